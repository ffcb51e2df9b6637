"""The tables of options in the documentation, made of the declarations of the options.

    python -m tests.option_tables            writes them
    python -m tests.option_tables --check    says whether they are what the declarations say

A table stands between ``<!-- options: NAME -->`` and ``<!-- end of options -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click

from latentc import cli as command_line
from latentc.exporter.export_arguments import ExportArguments
from latentc.exporter.targets.coreml.options import CoreMLArguments
from latentc.runtimes.options import Declared, declared

DOCS = Path(__file__).resolve().parent.parent / "docs"
_TABLE = re.compile(r"(<!-- options: (\w+) -->\n)(.*?)(<!-- end of options -->)", re.DOTALL)
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$")


def export_table(page: str) -> str:
    """Return the table of the arguments of `latentc.export`."""
    places = (
        ("`source`", "required", "A Hub id, a diffusers folder, or a checkpoint of one file."),
        ("`output`", "required", "The bundle's folder; what is there of the same source is kept."),
    )
    rows = (_python_row(option, page) for option in declared(ExportArguments).values())
    return _table(("Parameter", "Default", "Meaning"), [*places, *rows])


def export_command_table(page: str) -> str:
    """Return the table of the options of ``latentc export``."""
    options = declared(ExportArguments)
    rows = [_command_row(each, options, page) for each in options_of("export")]
    return _table(("Option", "Default", "Meaning"), rows)


def coreml_table(page: str) -> str:
    """Return the table of the options of exports to Core ML."""
    rows = [
        (f"`{option.flags[0]}`", f"`{option.name}`", _usual(option), option.explained)
        for option in declared(CoreMLArguments).values()
    ]
    return _table(("Flag of `latentc export`", "Keyword", "Default", "Meaning"), rows)


TABLES: Mapping[str, Callable[[str], str]] = {
    "export": export_table,
    "export_command": export_command_table,
    "coreml": coreml_table,
}


def options_of(name: str) -> list[click.Option]:
    """Return the options of a command."""
    command = command_line.cli.get_command(click.Context(command_line.cli), name)
    assert command is not None
    return [each for each in command.params if isinstance(each, click.Option)]


def with_tables(text: str, page: str) -> str:
    """Return a page of docs/ with all its tables made anew."""
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]](page) + found[4], text)


def _python_row(option: Declared, page: str) -> tuple[str, str, str]:
    default = f"`{option.option.default!r}`"
    meaning = f"{option.explained} {_link(option, page)}".rstrip()
    return f"`{option.name}`", default, meaning


def _command_row(
    own: click.Option, options: Mapping[str, Declared], page: str
) -> tuple[str, str, str]:
    option = options.get(own.name or "")
    text = own.help or ""
    found = _DEFAULT.search(text)
    default = "required" if own.required else found[1] if found else ""
    if own.show_default and isinstance(own.default, str):
        default = f"`{own.default}`"
    meaning = _DEFAULT.sub("", text).replace(".  ", ". ")
    if option is None:
        return _flags(own), default, meaning
    # with its marks for code, which --help leaves out
    meaning = meaning.replace(option.option.help.replace("`", ""), option.option.help)
    choices = f"One of {', '.join(option.option.choices)}." if option.option.choices else ""
    sentences = (meaning, option.option.details, choices, _link(option, page))
    return _flags(own), default, " ".join(filter(None, sentences))


def _usual(option: Declared) -> str:
    is_text = isinstance(option.option.default, str) and not option.option.usual
    return f"`{option.usual}`" if is_text else option.usual


def _flags(own: click.Option) -> str:
    metavar = "" if own.is_flag else f" {own.metavar or 'NAME'}"
    flags = (*own.opts, *own.secondary_opts)
    return ", ".join([*(f"`{flag}`" for flag in flags[:-1]), f"`{flags[-1]}{metavar}`"])


def _link(option: Declared, page: str) -> str:
    see = option.option.see
    if not see:
        return ""
    place, _, anchor = see.partition("#")
    return f"[More](#{anchor})." if place == page else f"[More]({see})."


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (cell.replace("|", "\\|") for cell in row)
        lines.append(re.sub(r" +", " ", "| " + " | ".join(cells) + " |"))
    return "\n".join(lines) + "\n"


def stale() -> dict[Path, str]:
    """Return the pages that are not what the declarations say, with what they would be."""
    pages = {path: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}
    made = {path: with_tables(text, path.name) for path, text in pages.items()}
    return {path: text for path, text in made.items() if text != pages[path]}


def main() -> None:
    """Write the tables, or check them."""
    pages = stale()
    if "--check" in sys.argv[1:]:
        sys.exit(f"run python -m tests.option_tables: {[*map(str, pages)]}" if pages else 0)
    for path, text in pages.items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
