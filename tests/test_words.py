"""A docstring is a sentence: where "What" or "Whether" begins it, its subject or verb is missing.

"Return whether …" says what a function does; "Whether …" leaves that to the reader.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "examples", "exporter", "latentc", "runtimes", "tests")
FRAGMENT = re.compile(r"(What|Those|Of|Whether|How|Which|As|The same)\b")
QUOTED = re.compile(rf'"""\s*{FRAGMENT.pattern}')
KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# These rooms and files still have fragments: their code is being changed as well, and each line
# goes as soon as what it names has been rewritten.
EXCEPTIONS = (
    "exporter/compiler/",
    "exporter/lowering/",
    "exporter/options.py",
    "exporter/targets/",
    "latentc/",
    "runtimes/calls/",
    "runtimes/commands/",
    "runtimes/options.py",
    "runtimes/pipeline/",
    "runtimes/presets/",
    "runtimes/verification/",
)


def fragments(source: str) -> list[str]:
    """Return the first line of each docstring in a module's source that begins as a fragment."""
    if not QUOTED.search(source):  # saves to parse nearly all files
        return []
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, KINDS))
    docstrings = (ast.get_docstring(node) or "" for node in nodes)
    return [text.partition("\n")[0] for text in docstrings if FRAGMENT.match(text)]


def all_fragments() -> Iterator[tuple[str, str]]:
    """Yield path and first line of each fragment in the packages, the examples and the tests."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line in fragments(path.read_text(encoding="utf-8")):
                yield path.relative_to(ROOT).as_posix(), line


def test_docstrings_are_sentences() -> None:
    by_path = list(all_fragments())
    assert not [(path, line) for path, line in by_path if not path.startswith(EXCEPTIONS)]
    done = [place for place in EXCEPTIONS if not any(path.startswith(place) for path, _ in by_path)]
    assert not done, f"no fragment is left in {done}: remove these lines from EXCEPTIONS"


def test_fragments_are_seen() -> None:
    source = '''
"""What this is."""
class Lens:
    """How to look."""
    def is_open(self) -> bool:
        """Whether it is open."""
def half() -> None:
    """Return half of the length."""
def asked() -> None:
    """Ask for more."""
'''
    assert fragments(source) == ["What this is.", "How to look.", "Whether it is open."]
