"""Writes the tables of options in docs/, from where they are declared: ``python -m
tests.option_tables``. In a page a table stands between the lines `begin` and `END`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from latentc import cli
from latentc.exporter.export_arguments import ExportArguments
from latentc.exporter.targets.coreml.options import CoreMLArguments
from latentc.runtimes.commands.declared_options import is_repeated
from latentc.runtimes.options import Declared, declared
from tests.docs.markdown import ROOT, headings

DOCS = ROOT / "docs"
END = "<!-- end of the options -->"
EXPORT_PLACES = {
    "source": "A Hub id, a diffusers folder, or a checkpoint of one file.",
    "output": "The bundle's folder; builds of the same source that are there are kept.",
}


@dataclass(frozen=True)
class Table:
    """A table of a page. `name`: what it lists, for its marker; `lines`: makes it."""

    page: Path
    name: str
    lines: Callable[[], list[str]]

    @property
    def begin(self) -> str:
        """The line before it."""
        return f"<!-- options of {self.name}, written by python -m tests.option_tables -->"

    def put_into(self, text: str) -> str:
        """Return the text of the page with the table as it is to be."""
        head, _, rest = text.partition(self.begin)
        _, end, tail = rest.partition(END)
        if not end:
            raise LookupError(f"{self.page.name}: expected {self.begin!r} and {END!r}")
        return "\n".join([head + self.begin, "", *self.lines(), "", END + tail])


def keywords(arguments: type, required: Mapping[str, str]) -> Callable[[], list[str]]:
    """Return what makes the table of a function's arguments; `required`: what those mean that are
    no options, by name."""

    def lines() -> list[str]:
        rows = [(f"`{name}`", "required", text) for name, text in required.items()]
        for option in declared(arguments).values():
            meaning = _with_link(option.explained, option)
            rows.append((f"`{option.name}`", f"`{option.option.default!r}`", meaning))
        return _table(("Parameter", "Default", "Meaning"), rows)

    return lines


def flags(command: str, arguments: type) -> Callable[[], list[str]]:
    """Return what makes the table of a command's options: of those that are declared, and of those
    that exist on the command line alone."""

    def lines() -> list[str]:
        found = cli.cli.get_command(click.Context(cli.cli), command)
        assert found is not None
        rows = []
        for each in found.params:
            if not isinstance(each, click.Option):
                continue
            option = declared(arguments).get(str(each.name))
            default = "required" if each.required else _usual(option) if option else ""
            meaning = _repeated(option) if option else str(each.help)
            rows.append((_spelt(each), default, meaning))
        return _table(("Option", "Default", "Meaning"), rows)

    return lines


def flags_and_keywords(arguments: type) -> Callable[[], list[str]]:
    """Return what makes the table of options that stand on a page of their own."""

    def lines() -> list[str]:
        rows = [
            (f"`{option.flags[0]}`", f"`{option.name}`", _usual(option), option.meaning)
            for option in declared(arguments).values()
        ]
        return _table(("Flag of `latentc export`", "Keyword", "Default", "Meaning"), rows)

    return lines


def _spelt(option: click.Option) -> str:
    flags = [*option.opts, *option.secondary_opts]
    value = "" if option.is_flag else f" {option.metavar or _value(option)}"
    return ", ".join([*(f"`{flag}`" for flag in flags[:-1]), f"`{flags[-1]}{value}`"])


def _value(option: click.Option) -> str:
    return "NAME" if isinstance(option.type, click.Choice) else option.type.name.upper()


def _usual(option: Declared) -> str:
    said = option.usual
    is_text = isinstance(option.option.default, str | tuple) and not option.option.usual
    return f"`{said}`" if said and is_text else said


def _repeated(option: Declared) -> str:
    repeated = " May be repeated." if is_repeated(option) else ""
    return _with_link(option.meaning + repeated, option)


def _with_link(meaning: str, option: Declared) -> str:
    link = option.option.see
    return f"{meaning} More: [{_title(link)}]({link})." if link else meaning


def _title(link: str) -> str:
    """Return the heading that a link from docs/ leads to."""
    page, _, anchor = link.partition("#")
    by_anchor = headings(DOCS / page)
    return by_anchor[anchor] if anchor else next(iter(by_anchor.values()))


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    escaped = [[text.replace("|", "\\|") for text in row] for row in (columns, *rows)]
    head, *body = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in escaped]
    return [head, "|" + "---|" * len(columns), *body]


TABLES = (
    Table(DOCS / "python-api.md", "latentc.export", keywords(ExportArguments, EXPORT_PLACES)),
    Table(DOCS / "cli.md", "latentc export", flags("export", ExportArguments)),
    Table(DOCS / "coreml.md", "exports to Core ML", flags_and_keywords(CoreMLArguments)),
)


def main() -> None:
    """Write every table."""
    for table in TABLES:
        table.page.write_text(table.put_into(table.page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
