"""``latentc tune``: what is fastest on this machine, for each preset."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentc.runtimes.commands.declared_options import given_options, options_of
from latentc.runtimes.options import complete
from latentc.runtimes.terminal import markup, say
from latentc.runtimes.tuning.tune_arguments import Tell, TuneArguments

if TYPE_CHECKING:
    from latentc.runtimes.presets.trials import Tuning


@click.command(
    epilog="""
    \b
    Examples:
      latentc tune shapes
      latentc tune bundle --seconds 3600 --prompt "a castle on a hill" --prompt "a red car"
      latentc tune bundle --backend openvino --device GPU --json
      latentc generate bundle "a castle" --preset fast
    """
)
@click.argument("bundle", type=click.Path(path_type=Path))
@options_of(TuneArguments)
@click.option("--json", "as_json", is_flag=True, help="Print all that was tried as JSON.")
def tune(bundle: Path, as_json: bool, **options: Any) -> None:
    """Find the fastest settings of BUNDLE on this machine, for each preset.

    A preset says how far an image may be from that of fp32: faithful 30 dB and none of the
    judge's points, balanced 20 dB and 2 of 100, fast 12 dB and 4. Tried are the builds on each
    engine, what they compute in, threads, fixed sizes, the guidance window and step caching. What
    was found is kept in the cache folder, not in the bundle; latentc generate uses it.
    """
    from latentc.runtimes.bundle.files import Bundle
    from latentc.runtimes.commands.report import print_tuning
    from latentc.runtimes.presets.preset import records_folder
    from latentc.runtimes.presets.records import save
    from latentc.runtimes.storage.outputs import check_folder
    from latentc.runtimes.tuning.tune import tune as search

    opened = Bundle.open(bundle)
    check_folder(records_folder(), "the cache folder (LATENTC_CACHE)")
    arguments = given_options(options)
    with _progress(complete(TuneArguments, arguments)["seconds"]) as tell:
        found = search(opened, tell=tell, **arguments)
    opened.cache.save()
    place = None
    try:
        place = save(found.record, options["backend"], options["device"])
    except OSError as error:
        say(
            f"warning: cannot keep what was found: {error}; set LATENTC_CACHE to a folder that "
            "can be written",
            err=True,
        )
    if as_json:
        say(json.dumps(_document(found, place), indent=2))
        return
    print_tuning(found)
    for note in found.notes:
        say(f"note: {note}")
    if place:
        say(f"kept in {place}; latentc generate {bundle} uses it (--preset NAME)")


def _document(found: Tuning, place: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    from latentc.runtimes.presets.preset import LIMITS

    trials = [
        asdict(trial) | {"presets": [n for n, each in found.winners.items() if each == trial]}
        for trial in found.trials
    ]
    return {
        "machine": found.record.machine,
        "limits": {name: asdict(limits) for name, limits in LIMITS.items()},
        "num_inference_steps": found.steps,
        "prompts": list(found.prompts),
        "reference": asdict(found.reference),
        "trials": trials,
        "winners": {name: asdict(trial) for name, trial in found.winners.items()},
        "notes": list(found.notes),
        "record": str(place) if place else None,
    }


@contextmanager
def _progress(seconds: float) -> Iterator[Tell]:
    """A bar of the time spent on a terminal, lines elsewhere; yields what to call."""
    if not sys.stderr.isatty():
        yield lambda what, spent: say(f"{spent:6.0f} s  {what}", err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=seconds)
        yield lambda what, spent: bar.update(task, completed=spent, description=markup(what))
