"""tests/hostile/FAULTS.md: which test guards against which known kind of fault.

    python -m tests.faults            writes the page
    python -m tests.faults --check    fails if the page is not what the tests say

A test names the fault that it guards against by the marker ``fault(line, clause)``: ``line`` is
one of `LINES`, ``clause`` says in a few words what must not happen again. A test may have several
markers.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "tests" / "hostile" / "FAULTS.md"

LINES: Mapping[str, str] = {
    "1.1": "A program archive of PyTorch runs code",
    "1.2": "Writing through links that a bundle brings",
    "1.3": "Engines open files that the manifest does not list",
    "1.4": "Files that are read whole are not regular, inside and bounded",
    "1.5": "A tokenizer kills or hangs the process",
    "1.6": "A loader's work grows faster than its input",
    "1.7": "Closing and cancelling while a call runs",
    "1.8": "Two writers of one folder; systems without POSIX",
    "1.9": "Escape sequences, writes that are not synced, temporary files that stay",
    "2.1": "NaN and infinity hidden by a graph",
    "2.2": "Outputs of graphs that are not as declared",
    "2.3": "Images in: orientation, depth, range, size",
    "2.4": "Defaults of a task that are not the diffusers class's",
    "2.5": "Given or not given",
    "2.6": "Inpainting by blending that ends early",
    "2.7": "Arguments that change nothing",
    "2.8": "Attributes that change nothing",
    "2.9": "Parts that are left out without a word",
    "2.10": "A tokenizer without its vocabulary",
    "2.11": "Weights that are not the ones loaded",
    "2.12": "LoRA alphas that meet no layer",
    "2.13": "Keys that nothing reads",
    "2.14": "The pipeline's corrections of its scheduler",
    "3.1": "Errors that come late",
    "3.2": "Plugins",
    "3.3": "Containers without a home folder",
    "3.4": "Parsers that raise other exceptions",
    "3.5": "Adapters: errors and refusals",
    "3.6": "Refused though it exists",
    "3.7": "Arguments of odd types and sizes",
    "3.8": "Sizes of images",
}

HEAD = """# Known faults, and the tests that guard against them

This page is made from the tests' markers (`python -m tests.faults`), and a test compares it with
them. Each clause is a fault that was found once; each test beside it failed before it was mended.
"""

ByLine = Mapping[str, Mapping[str, Iterable[str]]]


class Collector:
    """A plugin that reads the collected tests' markers."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def pytest_collection_modifyitems(self, items: Iterable[pytest.Item]) -> None:
        """Note every marked test, without its parameters."""
        for item in items:
            for marker in item.iter_markers("fault"):
                line, clause = marker.args
                if line not in LINES:
                    raise click.ClickException(f"{item.nodeid}: no line {line!r}")
                self.tests[line][clause].add(item.nodeid.split("[")[0])


def noted(items: Iterable[pytest.Item]) -> ByLine:
    """Return these tests by line and clause."""
    collector = Collector()
    collector.pytest_collection_modifyitems(items)
    return collector.tests


def collected() -> ByLine:
    """Return the tests by line and clause.

    Raises:
        ClickException: the tests cannot be collected.
    """
    collector = Collector()
    if pytest.main(["--collect-only", "-q", "-q", "-p", "no:cacheprovider"], [collector]) != 0:
        raise click.ClickException("the tests cannot be collected")
    return collector.tests


def page(tests: ByLine) -> str:
    """Return the page's text."""
    parts = [HEAD]
    for line, title in LINES.items():
        parts.append(f"\n## {line} {title}\n\n")
        for clause, names in sorted(tests.get(line, {}).items()):
            parts.append(f"- {clause}:\n")
            parts += [f"  - `{name}`\n" for name in sorted(names)]
    return "".join(parts)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if the page is another.")
def main(check: bool) -> None:
    """Make tests/hostile/FAULTS.md of what the tests say."""
    text = page(collected())
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != PAGE.read_text(encoding="utf-8"):
        click.echo(f"{PAGE} is not what the tests say: run python -m tests.faults", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
