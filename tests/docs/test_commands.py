"""The documentation names only commands that exist, and links to what exists."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

import latentc
from latentc.cli import cli
from tests.docs.markdown import ROOT, Block, anchors, blocks, documents, links

ALL = [block for path in documents() for block in blocks(path)]
SHELL = [block for block in ALL if block.language in ("bash", "console")]
PYTHON = [block for block in ALL if block.language == "python"]
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_SEPARATORS = {"&&", "||", "|", ";", "&"}


def commands(block: Block) -> Iterator[list[str]]:
    """The simple commands of a block, as lists of words."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        if block.language == "console":
            if not line.startswith("$ "):
                continue  # output
            line = line[2:]
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _SEPARATORS:
                words.append(word)
                continue
            while words and _ASSIGNMENT.match(words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def check_latentc(words: list[str]) -> None:
    """Parse the command line as click would, without running it."""
    if words and words[0].startswith("-"):
        assert words[0] in ("-h", "--help", "--version"), words[0]
        return
    assert words, "latentc without a command"
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, f"no such command: {words[0]}"
    with suppress(click.exceptions.Exit):  # --help
        command.make_context(words[0], words[1:], help_option_names=["-h", "--help"])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in words:
        if not word.startswith("-") and not _ASSIGNMENT.match(word):
            assert re.search(rf"^{re.escape(word)}\s*:", makefile, re.MULTILINE), f"make {word}"


def check_python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        if words[1] == "latentc":
            check_latentc(words[2:])
        elif words[1] == "pip":
            check_pip(words[2:])
        else:
            assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
    elif words and words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file(), words[0]


def check_pip(words: list[str]) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    for word in words:
        match = re.fullmatch(r"(?:latentc|\.)\[([\w,]+)\]", word)
        if match:
            assert set(match[1].split(",")) <= extras, word


CHECKS = {
    "latentc": check_latentc,
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
}


@pytest.mark.parametrize("block", SHELL, ids=[block.label for block in SHELL])
def test_shell_commands_exist(block: Block) -> None:
    for words in commands(block):
        check = CHECKS.get(Path(words[0]).name)
        if check:
            check(words[1:])


@pytest.mark.parametrize("block", PYTHON, ids=[block.label for block in PYTHON])
def test_python_compiles_and_its_names_exist(block: Block) -> None:
    tree = ast.parse(textwrap.dedent(block.text))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name), f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.Attribute) and _is_latentc(node.value):
            assert hasattr(latentc, node.attr), f"latentc.{node.attr}"
        elif isinstance(node, ast.Call):
            _check_keywords(node)


def _is_latentc(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "latentc"


def _check_keywords(call: ast.Call) -> None:
    """Keyword arguments of functions of latentc exist."""
    if not (isinstance(call.func, ast.Attribute) and _is_latentc(call.func.value)):
        return
    function = getattr(latentc, call.func.attr)
    if hasattr(builtins, call.func.attr) or not callable(function):
        return
    known = inspect.signature(function).parameters
    for keyword in call.keywords:
        assert keyword.arg in known, f"latentc.{call.func.attr}({keyword.arg}=…)"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link} does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_document_is_reachable() -> None:
    """From README.md, or the index of the documentation, by links."""
    start = [path for path in (ROOT / "README.md", ROOT / "docs" / "README.md") if path.exists()]
    seen, waiting = set(start), list(start)
    while waiting:
        path = waiting.pop()
        for link in links(path):
            target = (path.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target not in seen:
                seen.add(target)
                waiting.append(target)
    missing = [path for path in (ROOT / "docs").rglob("*.md") if path not in seen]
    assert not missing
