"""``latentc build``: engines for this machine, from a bundle's graphs and recipes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.runtimes.building.build_arguments import BuildArguments
from latentc.runtimes.commands.declared_options import given_options, options_of
from latentc.runtimes.terminal import say

if TYPE_CHECKING:
    from latentc.runtimes.building.engines import ComponentEngine


@click.command(
    epilog="""
    \b
    Examples:
      latentc build bundle --target tensorrt
      latentc build bundle --build tensorrt-fp16 --images 1:1:4 --height 512 --width 512:768:1024
      latentc build bundle --target tensorrt --device cuda:1 --workspace 8 --force

    \b
    Exit codes: 2 bad argument · 4 bad bundle · 5 no such engine or GPU, or it refused a graph.
    """
)
@click.argument("bundle", type=click.Path(path_type=Path))
@options_of(BuildArguments)
@click.option("--json", "as_json", is_flag=True, help="Print the engines as JSON.")
def build(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build the engines of BUNDLE on this machine, for this machine.

    An engine fits one GPU, one driver, one version of its library and one graph; what fits is
    kept, anything else is built anew, and said why. Engines are kept in the cache folder, not
    in the bundle.
    """
    from latentc.runtimes.building.engines import build_engines

    engines = []
    arguments = given_options(options)
    for engine in build_engines(bundle, report=lambda line: say(line, err=True), **arguments):
        engines.append(engine)
        if not as_json:
            say(_line(engine))
    if as_json:
        records = [_record(engine) for engine in engines]
        say(json.dumps(records, indent=2, default=str))


def _record(engine: ComponentEngine) -> dict[str, Any]:
    return {"build": engine.build, "component": engine.component, **asdict(engine.built)}


def _line(engine: ComponentEngine) -> str:
    subject, built = f"{engine.build}, {engine.component}", engine.built
    if not built.seconds:
        return f"{subject}: is there and fits, {built.path}"
    why = f", the old one did not fit: {built.reason}" if built.reason else ""
    return f"{subject}: built in {built.seconds:.0f} s{why}, {built.path}"
