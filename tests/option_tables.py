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
from latentc.benchmarks.bench.bench_arguments import BenchArguments, CompareArguments
from latentc.exporter.export_arguments import ExportArguments
from latentc.exporter.schedulers.schedule_arguments import ScheduleArguments
from latentc.exporter.targets.coreml.options import CoreMLArguments
from latentc.runtimes.building.build_arguments import BuildArguments
from latentc.runtimes.calls.call_arguments import CallArguments
from latentc.runtimes.options import Declared, declared
from latentc.runtimes.pipeline.callbacks import WatchedCallArguments
from latentc.runtimes.presets.load_arguments import LoadArguments
from latentc.runtimes.sampling.plans_arguments import PlansArguments
from latentc.runtimes.tuning.tune_arguments import TuneArguments
from latentc.runtimes.verification.verify_arguments import VerifyArguments

DOCS = Path(__file__).resolve().parent.parent / "docs"
_TABLE = re.compile(r"(<!-- options: (\w+) -->\n)(.*?)(<!-- end of options -->)", re.DOTALL)
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$")
_LOADING = {*declared(LoadArguments), "no_cache"}
_OF_CALLS = {**declared(CallArguments), **declared(LoadArguments)}


def load_table(page: str) -> str:
    """Return the table of the parameters of `latentc.load`."""
    bundle = ("`bundle`", "required", "The bundle's folder.")
    rows = (_python_row(option, page) for option in declared(LoadArguments).values())
    return _table(("Parameter", "Default", "Meaning"), [bundle, *rows])


def call_table(page: str) -> str:
    """Return the table of the arguments of a call."""
    rows = (_python_row(option, page) for option in declared(WatchedCallArguments).values())
    others = ("`arguments`", "", "By name: what else this bundle takes; [values](#values).")
    return _table(("Parameter of a call", "Default", "Meaning"), [*rows, others])


def export_table(page: str) -> str:
    """Return the table of the arguments of `latentc.export`."""
    places = (
        ("`source`", "required", "A Hub id, a diffusers folder, or a checkpoint of one file."),
        ("`output`", "required", "The bundle's folder; what is there of the same source is kept."),
    )
    rows = (_python_row(option, page) for option in declared(ExportArguments).values())
    return _table(("Parameter", "Default", "Meaning"), [*places, *rows])


def coreml_table(page: str) -> str:
    """Return the table of the options of exports to Core ML."""
    rows = [
        (f"`{option.flags[0]}`", f"`{option.name}`", _usual(option), option.explained)
        for option in declared(CoreMLArguments).values()
    ]
    return _table(("Flag of `latentc export`", "Keyword", "Default", "Meaning"), rows)


def table_of_command(name: str, options: Mapping[str, Declared]) -> Callable[[str], str]:
    """Return what makes the table of the options of a command, of which some are declared."""

    def table(page: str) -> str:
        rows = [_command_row(flag, options, page) for flag in options_of(name)]
        return _table(("Option", "Default", "Meaning"), rows)

    return table


def compute_table(page: str) -> str:
    """Return the table of the options of ``latentc compute``; what it shares with ``latentc
    generate`` is only named."""
    shared = {flag.name for flag in options_of("generate")} - {"output"}
    flags = options_of("compute")
    rows = [_command_row(flag, _OF_CALLS, page) for flag in flags if flag.name not in shared]
    of_call = [flag for flag in flags if flag.name in shared - _LOADING]
    of_loading = [flag for flag in flags if flag.name in _LOADING]
    for group, meaning in ((of_call, "What a call is given."), (of_loading, "How it is loaded.")):
        rows.append((", ".join(map(_flags, group)), "as there", meaning))
    return _table(("Option", "Default", "Meaning"), rows)


TABLES: Mapping[str, Callable[[str], str]] = {
    "export": export_table,
    "export_command": table_of_command("export", declared(ExportArguments)),
    "coreml": coreml_table,
    "load": load_table,
    "call": call_table,
    "generate": table_of_command("generate", _OF_CALLS),
    "compute": compute_table,
    "schedule": table_of_command("schedule", declared(ScheduleArguments)),
    "build": table_of_command("build", declared(BuildArguments)),
    "tune": table_of_command("tune", declared(TuneArguments)),
    "verify": table_of_command("verify", declared(VerifyArguments)),
    "plans": table_of_command("plans", declared(PlansArguments)),
    "bench": table_of_command("bench", declared(BenchArguments)),
    "bench_compare": table_of_command("bench compare", declared(CompareArguments)),
}


def options_of(name: str) -> list[click.Option]:
    """Return the options of a command; of ``bench`` those of what runs where no part of it is
    named."""
    whole, _, part = name.partition(" ")
    command = command_line.cli.get_command(click.Context(command_line.cli), whole)
    if isinstance(command, click.Group):
        command = command.commands[part or "run"]
    assert command is not None
    options = (flag for flag in command.params if isinstance(flag, click.Option))
    return [flag for flag in options if not flag.hidden]


def with_tables(text: str, page: str) -> str:
    """Return a page of docs/ with all its tables made anew."""
    return _TABLE.sub(lambda table: table[1] + TABLES[table[2]](page) + table[4], text)


def _python_row(option: Declared, page: str) -> tuple[str, str, str]:
    meaning = f"{option.explained} {_link(option, page)}".rstrip()
    return f"`{option.name}`", f"`{option.option.default!r}`", meaning


def _command_row(
    flag: click.Option, options: Mapping[str, Declared], page: str
) -> tuple[str, str, str]:
    option = options.get(flag.name or "")
    text = flag.help or ""
    stated = _DEFAULT.search(text)
    default = "required" if flag.required else stated[1] if stated else ""
    if flag.show_default and isinstance(flag.default, str):
        default = f"`{flag.default}`"
    meaning = _DEFAULT.sub("", text).replace(".  ", ". ")
    if option is None:
        return _flags(flag), default, meaning
    # With its marks for code, which --help leaves out.
    meaning = meaning.replace(option.option.help.replace("`", ""), option.option.help)
    choices = f"One of {', '.join(option.option.choices)}." if option.option.choices else ""
    sentences = (meaning, option.option.details, choices, _link(option, page))
    return _flags(flag), default, " ".join(filter(None, sentences))


def _usual(option: Declared) -> str:
    is_text = isinstance(option.option.default, str) and not option.option.usual
    return f"`{option.usual}`" if is_text else option.usual


def _flags(flag: click.Option) -> str:
    *others, last = (*flag.opts, *flag.secondary_opts)
    metavar = "" if flag.is_flag else f" {flag.metavar or 'NAME'}"
    return ", ".join(f"`{spelling}`" for spelling in (*others, last + metavar))


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
