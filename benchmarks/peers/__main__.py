"""Make the environments of peers, list them, and run one: ``python -m
latentc.benchmarks.peers``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from latentc.benchmarks import peers
from latentc.benchmarks.measure import table
from latentc.runtimes.errors import BackendError, LatentcError
from latentc.runtimes.terminal import say

INTO = click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder of the environments; {peers.HOME}, or build/peers, if not given.",
)


@click.group()
def cli() -> None:
    """Other programs that run the same pipelines, each in an environment of its own."""


@cli.command()
@click.argument("name")
@INTO
def create(name: str, into: Path | None) -> None:
    """Make the environment of the peer NAME, which downloads packages; minutes."""
    folder = _fail(lambda: peers.create(peers.find(name), into))
    say(f"{name}: {folder}")


@cli.command("list")
@INTO
def list_(into: Path | None) -> None:
    """List the peers, and whether their environments are there."""
    rows = []
    for peer in peers.PEERS.values():
        stamp = peers.read_stamp(peers.home(into) / peer.name)
        state = "missing" if stamp is None else "ready"
        if stamp is not None and stamp.get("requirements") != peer.digest:
            state = "out of date"
        rows.append((peer.name, state, peer.about))
    say(table(("peer", "environment", "what it is"), rows))
    say(f"\n{peers.home(into)}; to make one: python -m latentc.benchmarks.peers create NAME")


@cli.command()
@click.argument("name")
@click.argument("request", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("result", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--timeout", type=float, help="Seconds, conversion included.")
@INTO
def run(name: str, request: Path, result: Path, timeout: float | None, into: Path | None) -> None:
    """Run the peer NAME as REQUEST says and write RESULT, both JSON.

    The exit code is 5 if the peer failed; RESULT says why.
    """

    def work() -> dict[str, Any]:
        asked = json.loads(request.read_text(encoding="utf-8"))
        return peers.run(peers.find(name), asked, result, into=into, timeout=timeout)

    answer = _fail(work)
    if not answer.get("ok"):
        say(f"error: {name}: {answer.get('error')}", err=True)
        sys.exit(BackendError.exit_code)
    say(json.dumps(answer, indent=2))


def _fail(work: Callable[[], Any]) -> Any:
    """Return the value of `work`; errors become one line and latentc's exit codes."""
    try:
        return work()
    except LatentcError as error:
        say(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    cli(prog_name="python -m latentc.benchmarks.peers")
