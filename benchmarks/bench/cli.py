"""`latentc bench`: measure a bundle's builds against PyTorch, and compare two such reports.

Only click and declarations are imported here; what a command needs, it imports when
it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.benchmarks.bench.bench_arguments import BenchArguments, CompareArguments
from latentc.runtimes.commands.declared_options import given_options, options_of
from latentc.runtimes.errors import InputError, LatentcError, PerformanceRegression
from latentc.runtimes.terminal import markup, say
from latentc.runtimes.unknown_names import near_names, suggestion

if TYPE_CHECKING:
    from latentc.benchmarks.bench.model import Report
    from latentc.benchmarks.bench.runner import Progress


class DefaultGroup(click.Group):
    """A group whose first argument may be left out: ``bench BUNDLE`` is ``bench run BUNDLE``."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {*self.commands, *ctx.help_option_names}
        if args and args[0] not in known:
            if near_names(args[0], self.commands) and not Path(args[0]).exists():
                ctx.fail(f"no such command: {args[0]}; {suggestion(args[0], self.commands)}")
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=DefaultGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    epilog="""
    \b
    Examples:
      latentc bench shapes -o report
      latentc bench shapes --build onnx-fp32 --batch 1 --batch 4 --threads 1 -o report
      latentc bench shapes --cases cases.toml --baseline torch -o report
      latentc bench compare before after --threshold 0.1
    `latentc bench BUNDLE` is `latentc bench run BUNDLE`; its options: latentc bench run --help
    """,
)
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure a bundle's builds against PyTorch: speed, memory, fidelity, in one report."""
    if context.invoked_subcommand is None:
        say(context.get_help())


@bench.command(
    epilog="""
    \b
    Examples:
      latentc bench shapes -o report
      latentc bench shapes --scenario denoiser_step --size 64x64 --size 128x64 -o report
      latentc bench sd15 --source ./my-pipeline --rounds 1 --steps 2 -o report
    """
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False),
              metavar="FOLDER", help="Folder for the report.")  # fmt: skip
@options_of(BenchArguments, settings={"call": {"multiple": True, "default": ()}})
@click.option("--wandb", is_flag=True, help="Log the report to Weights & Biases as well.")
@click.option("--wandb-project", metavar="NAME", help="Under this project.")
def run(bundle: Path, output: Path, wandb: bool, wandb_project: str | None, **options: Any) -> None:
    """Measure BUNDLE and write report.html, report.md, report.json and report.csv."""
    from latentc.benchmarks.bench.requested_plan import requested_plan
    from latentc.runtimes.storage.outputs import check_folder

    _require(wandb, wandb_project)
    check_folder(output)
    arguments = given_options({**options, "call": _call(options["call"]) or None})
    plan = requested_plan(bundle, **arguments)
    output.mkdir(parents=True, exist_ok=True)
    from latentc.benchmarks.bench import runner

    with _bar() as progress:
        report = runner.run(plan, output, ["latentc", "bench", *_command(bundle)], progress)
    paths = write(report, output)
    from latentc.benchmarks.bench.pages import texts

    say(_summary(report))
    for path in paths:
        say(path)
    if wandb:
        _log(report, output, wandb_project)
    failed = [case for case in report.cases if case.status != "ok"]
    for case in failed:
        say(f"{case.label}: {case.status}: {texts.last_line(case)}", err=True)
    say(texts.verdict_sentence(report))


@bench.command(
    epilog="""
    \b
    Examples:
      latentc bench compare before after
      latentc bench compare before/report.json after/report.json --threshold 0.1 --seconds
    Exit codes: 0 nothing became slower · 2 not comparable · 8 something became slower or fails.
    """
)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@options_of(CompareArguments)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(before: Path, after: Path, as_json: bool, **options: Any) -> None:
    """Compare the reports BEFORE and AFTER, case by case and scenario by scenario."""
    from latentc.benchmarks.bench import compare as comparing
    from latentc.benchmarks.bench.model import read

    found = comparing.compare(read(before), read(after), **given_options(options))
    say(comparing.as_json(found) if as_json else comparing.as_text(found))
    if found.slower:
        raise PerformanceRegression(comparing.sentence(found))


@bench.command()
def schema() -> None:
    """Print the JSON Schema of report.json."""
    import json

    from latentc.benchmarks.bench.model import schema as made

    say(json.dumps(made(), indent=2))


def write(report: Report, output: Path) -> list[Path]:
    """Write a report in every form into a folder."""
    from latentc.benchmarks.bench import model
    from latentc.benchmarks.bench.pages import html, texts

    # First of all what cannot be made again.
    (output / model.REPORT).write_bytes(model.encode(report))
    forms = {
        "report.html": html.page(report, output),
        "report.md": texts.markdown(report),
        "report.csv": texts.table_csv(report),
    }
    for name, text in forms.items():
        (output / name).write_text(text, "utf-8")
    return [output / name for name in (*forms, model.REPORT)]


def _require(wandb: bool, wandb_project: str | None) -> None:
    """Refuse now what would fail when everything is measured."""
    from importlib.util import find_spec

    if wandb_project and not wandb:
        raise InputError("--wandb-project names where --wandb logs to: give --wandb too")
    if wandb:
        from latentc.benchmarks.wandb_report import library

        library()

    needed = ("psutil", "matplotlib", "jinja2", "skimage")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise LatentcError(
            f"latentc bench needs {', '.join(missing)}; "
            "install it with: pip install 'latentc[bench]'"
        )


def _call(texts: Sequence[str]) -> dict[str, float]:
    """Return the arguments that ``--call`` gives. Raises InputError for another form."""
    numbers_by_name: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            example = "expected NAME=NUMBER, such as cache_interval=3"
            raise InputError(f"--call {text}: {example}") from None
        numbers_by_name[name.strip()] = int(number) if number.is_integer() else number
    return numbers_by_name


def _command(bundle: Path) -> list[str]:
    """Return the command line that makes the same report, from what was parsed."""
    words = [str(bundle)]
    context = click.get_current_context()
    for parameter in context.command.params:
        if not isinstance(parameter, click.Option):
            continue
        value = context.params.get(parameter.name or "")
        flag = parameter.opts[-1]
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words += [word for each in value for word in (flag, str(each))]
        elif value is not None and value is not False and value != parameter.default:
            words += [flag, str(value)]
    import shlex

    return [shlex.quote(word) for word in words]


def _summary(report: Report) -> str:
    """Return the rows as a table: p50, interval and speed-up of each case in each scenario."""
    from latentc.benchmarks.bench.pages import texts
    from latentc.benchmarks.measure import table

    lines = []
    for row in report.rows:
        faster = row.speedup
        lines.append(
            (
                f"{row.scenario}  {report.case(row.case).label}",
                texts.seconds(row.p50),
                f"±{texts.percent(row.noise)}",
                texts.times(faster.value) if faster else "",
                faster.verdict if faster else "",
            )
        )
    return table(("", "p50", "noise", "speed-up", ""), lines)


def _log(report: Report, output: Path, project: str | None) -> None:
    from importlib import import_module

    import msgspec

    # By name: the packages below latentc do not import it.
    import_module("latentc.wandb").log_report(msgspec.to_builtins(report), output, project)


@contextmanager
def _bar() -> Iterator[Progress]:
    """Yield a function that shows progress: a bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: say(f"[{done + 1}/{total}] {what}", err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(
            task, description=markup(what), completed=done, total=total
        )
