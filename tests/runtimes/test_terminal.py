"""No name from a bundle, and no name of a file, steers the terminal that it is printed in."""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentc.cli import run as command
from latentc.exporter.cli import Reporter
from latentc.exporter.progress import Event
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.commands.report import print_manifest
from latentc.runtimes.errors import BackendUnavailable, BundleError, InputError
from latentc.runtimes.terminal import markup, say, visible
from tests.conftest import Run
from tests.support import fakes

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("runtimes", "exporter", "latentc", "benchmarks")
# Where Python's or click's own print is right.
DIRECTLY = {
    "runtimes/terminal.py:say": "is the one place",
    "benchmarks/jobs.py:note": "runs by itself, on a model that the benchmark made",
    "benchmarks/export_cost.py:note": "JSON, for the parent process",
}
HOSTILE = {
    "clear the screen": "a\x1b[2Jb",
    "set the clipboard": "a\x1b]52;c;cm0gLXJm\x07b",
    "bell": "a\x07b",
    "C1 escape": "a\x9b31mb",
    "backspace": "safe\x08\x08\x08\x08evil",
    "right to left": "a\u202egnp.exe",
    "isolate": "a\u2066b\u2069",
    "delete": "a\x7fb",
    "line separator": "a\u2028b",
    "tag": "a\U000e0041b",
    "newline": "a\nerror: the disk is on fire",
    "return": "a\rb",
    "hyperlink": "a\x1b]8;;https://example.com\x1b\\b\x1b]8;;\x1b\\",
    "device control": "a\x1bPq#0;2;0;0;0\x1b\\\x1b_G\x1b\\b",
    "no width": "a\u200b\ufeff\u2060\U0001d173b",
    "markup": "[red]a[/red] [link=https://example.com]b[/link]",
}
# What no output may hold: control characters but newlines, and what turns the order of a line.
STEERING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\U0001d173\U000e0000-\U000e007f]"
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: ä 漢 🙂 é 👩\u200d🚀", "plain: ä 漢 🙂 é 👩\u200d🚀"),
        ("a\x1b[2J", "a\\u001b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("\U000e0041", "\\udb40\\udc41"),
        ("\ud800", "\\ud800"),
        ("one\ntwo\tthree", "one\ntwo\tthree"),
    ],
)
def test_what_steers_a_terminal_is_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert "\n" not in visible(text, one_line=True)


@pytest.mark.parametrize("text", HOSTILE.values())
def test_json_means_the_same_afterwards(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for ascii_only in (True, False):
        say(json.dumps({text: text}, ensure_ascii=ascii_only))
        printed = capsys.readouterr().out
        assert json.loads(printed) == {text: text}
        assert not STEERING.search(printed)


def with_name(folder: Path, name: str) -> Path:
    """A bundle in which everything that has a name, and may have any, is called so."""
    bundle = fakes.make_bundle(folder / "bundle")
    document = json.loads((bundle / MANIFEST).read_bytes())

    def renamed(value: Any, of: str) -> Any:
        if isinstance(value, dict):
            return {key: renamed(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [renamed(each, of) for each in value]
        free = ("id", "pipeline_class", "class_name", "latentc", "platform", "precision", "target")
        return value + name if of in free and isinstance(value, str) else value

    document = renamed(document, "")
    document["builds"][0]["name"] = "b" + re.sub(r"[/:\\]", "", name)
    document["schedules"][1]["name"] = "s" + re.sub(r"[/:\\]", "", name)
    (component,) = [each for each in document["components"] if each["role"] == "encoder"]
    for step in document["programs"][0]["steps"]:
        if step.get("component") == component["name"]:
            step["component"] += name
    component["name"] += name
    artifacts = document["builds"][0]["artifacts"]
    artifacts[component["name"]] = artifacts.pop("text_encoder")
    (bundle / MANIFEST).write_text(json.dumps(document))
    return bundle


@pytest.mark.fault("1.9", "names in a bundle are printed raw, with their escape sequences")
@pytest.mark.parametrize("name", HOSTILE)
def test_inspect_shows_names_as_they_are(name: str, tmp_path: Path, run: Run) -> None:
    bundle = with_name(tmp_path, HOSTILE[name])

    code, printed, errors = run("inspect", bundle)
    assert code == 0, errors
    assert not STEERING.search(printed)
    joined = re.sub(r"\s+", "", printed)
    assert re.sub(r"\s+", "", visible(HOSTILE[name], one_line=True)) in joined
    if name == "newline":
        assert not re.search(r"^\s*error:", printed, re.MULTILINE)
    code, printed, _ = run("inspect", bundle, "--json")
    assert code == 0
    assert not STEERING.search(printed)


@pytest.mark.fault("1.9", "names in a bundle are printed raw, with their escape sequences")
@pytest.mark.parametrize("name", HOSTILE)
def test_commands_print_no_name_raw(
    name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "latentc.runtimes.backends.backend.BACKENDS", {"fake": "tests.support.fakes:FakeBackend"}
    )
    bundle = with_name(tmp_path, HOSTILE[name])
    odd = tmp_path / HOSTILE[name].replace("/", "")
    calls: list[tuple[Any, ...]] = [
        ("verify", bundle),
        ("plans", bundle, "-o", odd),
        ("generate", bundle, "a", "--build", HOSTILE[name], "-o", tmp_path / "a.png"),
        ("generate", odd, "a"),
        ("inspect", odd),
        ("export", odd, "-o", tmp_path / "new", "-q"),
        ("bench", "compare", odd, odd),
        (HOSTILE[name],),
    ]
    for call in calls:
        _, printed, errors = run(*call)
        assert not STEERING.search(printed + errors), (call, printed, errors)


@pytest.mark.fault("1.9", "names in a bundle are printed raw, with their escape sequences")
@pytest.mark.parametrize("text", HOSTILE.values())
def test_errors_and_warnings_show_what_they_quote(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (BundleError(text), InputError(text), BackendUnavailable("x", "pip", text)):
        assert not STEERING.search(str(error).replace("\n", ""))
    before = warnings.showwarning
    try:
        command(["--version"])  # sets how warnings are shown
        warnings.warn(text, UserWarning, stacklevel=1)
    finally:
        warnings.showwarning = before
    assert not STEERING.search(capsys.readouterr().err)


@pytest.mark.fault("1.9", "second look: prompts, options and the messages of engines")
@pytest.mark.parametrize("text", HOSTILE.values())
def test_prompts_and_engines_are_shown(
    text: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call quotes its prompt, and an engine the graph that it refuses, without steering the
    terminal.
    """
    monkeypatch.setattr(
        "latentc.runtimes.backends.backend.BACKENDS", {"fake": "tests.support.fakes:FakeBackend"}
    )

    def fail(feeds: Any) -> Any:
        raise RuntimeError(f"{text} is no operator")

    monkeypatch.setitem(fakes.GRAPHS, "failing", fail)  # type: ignore[arg-type]
    bundle = fakes.make_bundle(tmp_path / "bundle")
    failing = fakes.make_bundle(tmp_path / "failing", graphs={"denoiser": "failing"})
    image = tmp_path / "a.png"
    for call, expected in (
        (("generate", bundle, text, "--json", "-o", image), 0),
        (("generate", bundle, f"({text}:1000)", "--prompt-weighting", "-o", image), 2),
        (("generate", bundle, "a", "--scheduler", text, "-o", image), 2),
        (("generate", bundle, "a", "--image", text.replace("/", ""), "-o", image), 2),
        (("generate", failing, text, "-o", image), 5),
    ):
        code, printed, errors = run(*call)
        assert code == expected, (call, errors)
        assert not STEERING.search(printed + errors), (call, printed, errors)


@pytest.mark.fault("1.9", "names in a bundle are printed raw, with their escape sequences")
@pytest.mark.parametrize("text", HOSTILE.values())
def test_progress_shows_what_it_names(text: str) -> None:
    from rich.console import Console

    for terminal in (False, True):
        reporter, written = Reporter(quiet=False), io.StringIO()
        reporter._console = Console(file=written, force_terminal=terminal, color_system=None)
        reporter.report(Event(text, text))
        reporter.report(Event(text, text, seconds=1.0, size=2))
        assert not STEERING.search(written.getvalue())
        assert visible(text, one_line=True)[:3] in written.getvalue()
        assert "1.0 s" in written.getvalue()


def test_markup_in_names_is_no_markup() -> None:
    from rich.text import Text

    assert Text.from_markup(markup("[red]a[/red]")).plain == "[red]a[/red]"


def test_a_verified_manifest_prints_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_manifest(Manifest.load(fakes.make_bundle(tmp_path / "bundle")))
    printed = capsys.readouterr().out
    assert "input_ids int64 [batch, 6]" in printed
    assert "fake-fp32" in printed


@pytest.mark.fault("1.9", "a text is printed past the one place that makes it visible")
def test_everything_is_printed_by_the_one_function() -> None:
    found = {
        place
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if not (path.parent.name == "peers" and (path.name[0] == "_" or "-" in path.name))
        or path.name == "__main__.py"
        for place in _printing(ast.parse(path.read_text("utf-8")), str(path.relative_to(ROOT)))
    }
    assert found == set(DIRECTLY), "use latentc.runtimes.terminal.say, or say in DIRECTLY why not"


def _printing(tree: ast.Module, path: str) -> Iterator[str]:
    def visit(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "click.echo", "click.secho") or name.endswith("std" + "out.write"):
                yield f"{path}:{function}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(tree, "")
