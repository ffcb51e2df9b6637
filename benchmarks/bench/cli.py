"""`latentc bench`: measure a bundle's builds against PyTorch, and compare two such reports.

Only click and the names of the baselines are imported here; what a command needs, it imports when
it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.benchmarks.bench.cases import BASELINES
from latentc.runtimes.commands.option_types import Finite
from latentc.runtimes.errors import InputError, LatentcError, PerformanceRegression
from latentc.runtimes.terminal import markup, say

if TYPE_CHECKING:
    from latentc.benchmarks.bench.cases import CaseFile, Group
    from latentc.benchmarks.bench.model import Report, Settings
    from latentc.benchmarks.bench.plan import Plan
    from latentc.benchmarks.bench.runner import Progress

_DEFAULT_SCENARIOS = ("cold_start", "load", "first_call", "denoiser_step", "text_encode",
                      "vae_decode", "end_to_end")  # fmt: skip
_PROMPT = "a large red circle"


class DefaultGroup(click.Group):
    """A group whose first argument may be left out: ``bench BUNDLE`` is ``bench run BUNDLE``."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {*self.commands, *ctx.help_option_names}
        if args and args[0] not in known:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=DefaultGroup,
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
def bench() -> None:
    """Measure a bundle's builds against PyTorch: speed, memory, fidelity, in one report."""


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
              help="Folder for the report.")  # fmt: skip
@click.option("--build", "builds", multiple=True, metavar="NAME",
              help="Only this build; may be repeated.  [default: all that run here]")  # fmt: skip
@click.option("--backend", "backends", multiple=True, metavar="NAME",
              help="With this engine; may be repeated.")  # fmt: skip
@click.option("--device", "devices", multiple=True, metavar="NAME",
              help="On this device; may be repeated.")  # fmt: skip
@click.option("--compute", "computes", multiple=True, metavar="NAME",
              help="Compute in this precision; may be repeated.")  # fmt: skip
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), metavar="N",
              help="Images in a call; may be repeated.  [default: 1]")  # fmt: skip
@click.option("--size", "sizes", multiple=True, metavar="WIDTHxHEIGHT",
              help="In pixels; may be repeated.  [default: the bundle's]")  # fmt: skip
@click.option("--threads", multiple=True, type=click.IntRange(0), metavar="N",
              help="Of the engine, 0 its choice; may be repeated.")  # fmt: skip
@click.option("--steps", multiple=True, type=click.IntRange(1), metavar="N",
              help="Inference steps; may be repeated.  [default: near 10]")  # fmt: skip
@click.option("--compile", is_flag=True, help="Let engines that can compile do it first.")
@click.option("--static", is_flag=True, help="Load for one size only.")
@click.option("--low-memory", is_flag=True, help="Hold one component at a time.")
@click.option("--no-cache", is_flag=True, help="Compile graphs at each start.")
@click.option("--call", "call", multiple=True, metavar="NAME=NUMBER",
              help="Further argument of the calls, such as cache_interval=3; may be "
              "repeated.")  # fmt: skip
@click.option("--scenario", "scenarios", multiple=True, metavar="NAME",
              help="cold_start, load, compile, first_call, denoiser_step, text_encode, vae_decode "
              "or end_to_end; may be repeated.  [default: all]")  # fmt: skip
@click.option("--cases", "case_file", type=click.Path(path_type=Path), metavar="FILE",
              help="A TOML file of cases.")  # fmt: skip
@click.option("--baseline", "baselines", multiple=True,
              type=click.Choice([*BASELINES, "none"]),
              help="The first is compared with, others are rows.  [default: torch and "
              "torch-channels-last]")  # fmt: skip
@click.option("--source", type=click.Path(path_type=Path), metavar="FOLDER",
              help="The pipeline that the bundle was made from; not needed for the built-in "
              "one.")  # fmt: skip
@click.option("--peer", "peers", multiple=True, metavar="NAME",
              help="Another program, in an environment of its own; may be repeated.")  # fmt: skip
@click.option("--peer-settings", type=click.Choice(["default", "best"]), default="default",
              show_default=True)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), help="Processes of each case.  [default: 3]")
@click.option("--repeats", type=click.IntRange(1), help="Calls in each.  [default: 2]")
@click.option("--prompt", metavar="TEXT", help=f"[default: {_PROMPT}]")
@click.option("--negative-prompt", metavar="TEXT")
@click.option("--guidance-scale", type=float, metavar="X")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--score", type=click.IntRange(0), metavar="N",
              help="Images for the judge of the built-in model.  [default: 10]")  # fmt: skip
@click.option("--timeout", type=Finite(0), default=1800, show_default=True,
              help="Seconds until a process is ended; 0 is never.")  # fmt: skip
@click.option("--memory-limit", type=Finite(0), metavar="GIB",
              help="At which a process is ended.  [default: 90% of what is free]")  # fmt: skip
@click.option("--short", is_flag=True, help="Two rounds of one call, no extra baselines.")
@click.option("--wandb", is_flag=True, help="Log the report to Weights & Biases as well.")
@click.option("--wandb-project", metavar="NAME")
def run(bundle: Path, output: Path, **options: Any) -> None:
    """Measure BUNDLE and write report.html, report.md, report.json and report.csv."""
    from latentc.runtimes.storage.outputs import check_folder

    _require(options)
    check_folder(output)
    plan = _plan(bundle, options)
    output.mkdir(parents=True, exist_ok=True)
    from latentc.benchmarks.bench import runner

    with _bar() as progress:
        report = runner.run(
            plan, output, ["latentc", "bench", *_command(bundle, options)], progress
        )
    paths = write(report, output)
    from latentc.benchmarks.bench.pages import texts

    say(_summary(report))
    for path in paths:
        say(path)
    if options["wandb"]:
        _log(report, output, options["wandb_project"])
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
@click.option("--threshold", type=Finite(0), default=0.05, show_default=True,
              help="Share by which something must differ to count.")  # fmt: skip
@click.option("--scenario", "scenarios", multiple=True, metavar="NAME",
              help="Only this one; may be repeated.")  # fmt: skip
@click.option("--seconds", is_flag=True,
              help="Compare seconds, not times the baseline.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(
    before: Path,
    after: Path,
    threshold: float,
    scenarios: tuple[str, ...],
    seconds: bool,
    as_json: bool,
) -> None:
    """Compare the reports BEFORE and AFTER, case by case and scenario by scenario."""
    from latentc.benchmarks.bench import compare as comparing
    from latentc.benchmarks.bench.cases import check_scenarios
    from latentc.benchmarks.bench.model import read

    found = comparing.compare(
        read(before), read(after), threshold, check_scenarios(scenarios), divide=not seconds
    )
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


def _require(options: dict[str, Any]) -> None:
    """Refuse now what would fail when everything is measured."""
    from importlib.util import find_spec

    if options["wandb_project"] and not options["wandb"]:
        raise InputError("--wandb-project names where --wandb logs to: give --wandb too")
    if options["wandb"]:
        from latentc.benchmarks.wandb_report import library

        library()

    needed = ("psutil", "matplotlib", "jinja2", "skimage")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise LatentcError(
            f"latentc bench needs {', '.join(missing)}; "
            "install it with: pip install 'latentc[bench]'"
        )


def _plan(bundle: Path, options: dict[str, Any]) -> Plan:
    from latentc.benchmarks.bench import cases, plan
    from latentc.runtimes.bundle.manifest import Manifest

    manifest = Manifest.load(bundle)
    file = cases.read(options["case_file"]) if options["case_file"] else None
    baselines = _baselines(options, file)
    return plan.make(
        bundle,
        _groups(options, file),
        baselines,
        _settings(options, file, texts=bool(manifest.tokenizers)),
        source=options["source"],
        score=10 if options["score"] is None else options["score"],
    )


def _baselines(options: dict[str, Any], file: CaseFile | None) -> list[str]:
    chosen = list(options["baselines"])
    if not chosen and file and file.baselines is not None:
        chosen = list(file.baselines)
    for name in chosen:
        if name not in (*BASELINES, "none"):
            raise InputError(f"no baseline {name!r}; there are: {', '.join(BASELINES)}, none")
    if "none" in chosen:
        return []
    return chosen or (["torch"] if options["short"] else ["torch", "torch-channels-last"])


def _groups(options: dict[str, Any], file: CaseFile | None) -> list[Group]:
    """Return the file's cases, and one group of what the flags name."""
    from latentc.benchmarks.bench.cases import Group, parse_size

    flags = ("compile", "static", "low_memory", "no_cache")
    axes: dict[str, Any] = {name: options[name] for name in flags}
    for name in ("backends", "devices", "batches", "threads", "steps", "computes"):
        if options[name]:
            axes[name] = options[name]
    axes["call"] = dict(map(_argument, options["call"]))
    if options["sizes"]:
        axes["sizes"] = tuple(parse_size(text) for text in options["sizes"])
    peers = _peers(options["peers"])
    groups = list(file.groups) if file else []
    if options["builds"] or not groups:
        groups.append(Group(builds=options["builds"], **axes))
    if peers:
        kept = {k: v for k, v in axes.items() if k in ("batches", "sizes", "threads", "steps")}
        groups.append(Group(peers=peers, settings=(options["peer_settings"],), **kept))
    return groups


def _argument(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"--call {text}: expected NAME=NUMBER, such as cache_interval=3") from None
    return name.strip(), int(number) if number.is_integer() else number


def _peers(names: Sequence[str]) -> tuple[str, ...]:
    from latentc.benchmarks.bench.cases import PEERS

    for name in names:
        if name not in PEERS:
            raise InputError(f"no peer {name!r}; there are: {', '.join(PEERS)}")
    return tuple(names)


def _settings(options: dict[str, Any], file: CaseFile | None, texts: bool) -> Settings:
    from latentc.benchmarks.bench.cases import check_scenarios
    from latentc.benchmarks.bench.model import Settings

    scenarios = options["scenarios"] or (file.scenarios if file else None) or ()
    usual = (*_DEFAULT_SCENARIOS, *(["compile"] if _compiles(options) else []))
    short = options["short"]
    rounds = options["rounds"] or (file.rounds if file else None) or (2 if short else 3)
    repeats = options["repeats"] or (file.repeats if file else None) or (1 if short else 2)
    return Settings(
        prompt=(options["prompt"] or _PROMPT) if texts else None,
        negative_prompt=options["negative_prompt"],
        guidance_scale=options["guidance_scale"],
        seed=options["seed"],
        scenarios=[*check_scenarios(scenarios or usual)],
        rounds=rounds,
        repeats=repeats,
        timeout=options["timeout"],
        memory_limit=_memory_limit(options["memory_limit"]),
        short=short,
    )


def _compiles(options: dict[str, Any]) -> bool:
    return (
        options["compile"]
        or any("compile" in name for name in options["baselines"])
        or options["case_file"]
    )


def _memory_limit(gib: float | None) -> int:
    """Return the bytes at which a process is ended; 0 is never."""
    if gib is not None:
        return int(gib * 2**30)
    try:
        import psutil
    except ImportError:
        return 0
    return int(0.9 * psutil.virtual_memory().available)


def _command(bundle: Path, options: dict[str, Any]) -> list[str]:
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
