"""The reference pages list what there is, and nothing else."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import click
import pytest

import latentc
from latentc import cli as command_line
from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS
from latentc.runtimes.errors import LatentcError
from tests import faults
from tests import support_page as support
from tests.conftest import WHOLE
from tests.docs.markdown import ROOT, section, table

DOCS = ROOT / "docs"
CLI, API, CODES = DOCS / "cli.md", DOCS / "python-api.md", DOCS / "exit-codes.md"


# Where the tables are that are made of declarations.


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def errors(base: type[LatentcError] = LatentcError) -> Iterator[type[LatentcError]]:
    yield base
    for each in base.__subclasses__():
        if each.__module__ == base.__module__:
            yield from errors(each)


def test_every_error_has_its_exit_code() -> None:
    rows = table(CODES.read_text("utf-8"), "Code")
    documented = {(name, int(row["Code"])) for row in rows for name in names(row["Error"])}
    assert documented == {(each.__name__, each.exit_code) for each in errors()}
    codes = {int(row["Code"]) for row in rows}
    assert codes == {0, command_line._INTERRUPTED, *(each.exit_code for each in errors())}


def test_the_tree_of_errors() -> None:
    text = " ".join(CODES.read_text("utf-8").split())
    for each in errors():
        parent = each.__bases__[0]
        if parent is not LatentcError and each is not LatentcError:
            assert re.search(rf"`{each.__name__}`[^.]*`{parent.__name__}`", text), each


def test_errors_are_public() -> None:
    assert {each.__name__ for each in errors()} <= set(latentc.__all__)


def test_every_command_is_listed() -> None:
    rows = table(CLI.read_text("utf-8"), "Command")
    assert [names(row["Command"])[0] for row in rows] == list(command_line.COMMANDS)


def click_options(name: str) -> list[click.Option]:
    command = command_line.cli.get_command(click.Context(command_line.cli), name)
    assert command is not None
    if isinstance(command, click.Group):  # of bench: what runs where no subcommand is named
        command = command.commands["run"]
    options = (each for each in command.params if isinstance(each, click.Option))
    return [each for each in options if not each.hidden]


@pytest.mark.parametrize("name", list(command_line.COMMANDS))
def test_every_option_is_listed(name: str) -> None:
    rows = table(section(CLI, f"latentc {name}"), "Option") if click_options(name) else []
    flags = [flag for row in rows for flag in re.findall(r"`(--?[a-z0-9-]+)", row["Option"])]
    options = click_options(name)
    assert flags == [flag for each in options for flag in (*each.opts, *each.secondary_opts)]
    required = {f for each in options if each.required for f in each.opts}
    documented = {
        flag
        for row in rows
        if row["Default"] == "required"
        for flag in re.findall(r"`(--?[a-z0-9-]+)", row["Option"])
    }
    assert documented == required


def test_default_schedulers() -> None:
    text = " ".join(section(CLI, "latentc export").split())
    listed = re.search(r"The default set of schedulers is (.*?), less", text)
    assert listed is not None
    assert tuple(names(listed[1])) == DEFAULT_SCHEDULERS


def test_environment_variables() -> None:
    rows = table(CLI.read_text("utf-8"), "Environment variable")
    documented = {names(row["Environment variable"])[0] for row in rows}
    sources = [p for package in ("latentc", "exporter", "runtimes") for p in _python(package)]
    used = {name for text in sources for name in re.findall(r"\"(LATENTC_[A-Z_]+)\"", text)}
    assert documented == used


def _python(package: str) -> list[str]:
    return [path.read_text("utf-8") for path in (ROOT / package).rglob("*.py")]


def test_every_public_name_is_listed() -> None:
    rows = table(API.read_text("utf-8"), "Name")
    listed = [name for row in rows for name in names(row["Name"])]
    assert sorted(listed) == sorted(latentc.__all__)


SIGNATURES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "export": ("latentc.export", "Parameter", latentc.export),
    "load": ("latentc.load", "Parameter", latentc.load),
    "call": ("Pipeline", "Parameter of a call", latentc.Pipeline.__call__),
}


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_every_parameter_is_listed(name: str) -> None:
    heading, column, function = SIGNATURES[name]
    rows = table(section(API, heading), column)
    documented = {names(row[column])[0]: row["Default"] for row in rows}
    expected = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            expected[parameter.name] = ""
        elif parameter.default is parameter.empty:
            expected[parameter.name] = "required"
        else:
            expected[parameter.name] = f"`{parameter.default!r}`"
    expected.pop("self", None)
    assert documented == expected
    assert list(documented) == list(expected)


@pytest.mark.parametrize("heading", ["Result", "Run and Progress"])
def test_attributes_exist(heading: str) -> None:
    if heading == "Result":
        rows = table(section(API, heading), "Attribute")
        listed = [names(row["Attribute"])[0] for row in rows]
        assert listed == list(latentc.Result.__dataclass_fields__)
        return
    text = section(API, heading)
    for kind, prefix in ((latentc.Run, "run"), (latentc.Progress, "progress")):
        for name in re.findall(rf"\b{prefix}\.([a-z_]+)", text):
            assert hasattr(kind, name) or name in kind.__dataclass_fields__, f"{prefix}.{name}"


def test_every_decision_is_listed() -> None:
    index = (DOCS / "decisions" / "README.md").read_text("utf-8")
    pages = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", index) == pages
    numbers = [page[:4] for page in pages]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    "page", sorted((DOCS / "decisions").glob("[0-9]*.md")), ids=lambda page: page.name[:4]
)
def test_decisions_have_their_parts(page: Any) -> None:
    text = page.read_text("utf-8")
    assert re.match(rf"# {page.name[:4]}: ", text)
    assert re.search(
        r"^\*\*Status\*\*: (proposed|accepted|superseded by \d{4}), \d{4}-", text, re.M
    )
    parts = re.findall(r"^## (.*)$", text, re.M)
    assert parts == ["Context", "Decision", "Alternatives", "Consequences"]


@pytest.mark.parametrize("generator", [support, faults], ids=lambda module: str(module.__name__))
def test_pages_made_of_markers_are_up_to_date(
    generator: ModuleType, pytestconfig: pytest.Config
) -> None:
    """docs/support.md and tests/hostile/FAULTS.md are what the tests' markers make of them.

    Where not the whole suite is run, a process of its own collects it.
    """
    if WHOLE in pytestconfig.stash:
        made = generator.page(generator.noted(pytestconfig.stash[WHOLE]))
        assert made == generator.PAGE.read_text("utf-8"), f"run python -m {generator.__name__}"
        return
    done = subprocess.run(
        [sys.executable, "-m", generator.__name__, "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
