"""Golden calls: what calls of every kind of bundle give, to hold a later version against.

``python -m tests.golden FOLDER`` writes latents and images, ``--compare`` says which calls give
something else now. The graphs are no modules but something quicker to which every input matters
(`tests.support.uncaptured.Mixing`), so that the figures are of the runtime alone. They are kept out
of the
repository: other processors round otherwise.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from latentc.runtimes.errors import LatentcError
from latentc.runtimes.pipeline.pipeline import Pipeline
from tests.contract.test_every_argument import KINDS, bundle_of, calls_of
from tests.support import tiny

_REFUSED = "refused"


def results(pipe: Pipeline) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the latents and images of each call by a name; of one that is refused the error's."""
    for program in pipe.manifest.programs:
        for name, call in calls_of(pipe, program):
            where = f"{program.name}: {name}"
            try:
                result = pipe(**call)
            except LatentcError as error:
                yield f"{where}: {_REFUSED}", np.array(type(error).__name__)
                continue
            yield f"{where}: latents", result.latents
            yield f"{where}: images", np.stack([np.asarray(each) for each in result.images])


def differences(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> Iterator[str]:
    """Yield a line for each result that is another one, or that one side alone has."""
    for name in sorted(wanted.keys() ^ found.keys()):
        yield f"{name}: {'gone' if name in wanted else 'new'}"
    for name in sorted(wanted.keys() & found.keys()):
        ours, theirs = found[name], wanted[name]
        if ours.shape != theirs.shape:
            yield f"{name}: {list(ours.shape)}, was {list(theirs.shape)}"
        elif ours.dtype.kind == "U":
            if ours != theirs:
                yield f"{name}: {ours}, was {theirs}"
        elif not np.array_equal(ours, theirs):
            largest = np.abs(ours.astype(np.float64) - theirs).max()
            yield f"{name}: {largest:.1e} off"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="With what stands there, instead of writing it.")
@click.option("--only", multiple=True, help="Kinds of bundle.  [default: all]")
def main(folder: Path, compare: bool, only: tuple[str, ...]) -> None:
    """Write, or compare, the results of every kind of bundle."""
    warnings.simplefilter("ignore")
    differing = 0
    for kind in only or KINDS:
        source = folder / "sources" / kind.partition("+")[0]
        if not source.exists():
            tiny.make(source.name, source)
        with bundle_of(kind, source, folder / f"bundle {kind}") as pipe:
            found = dict(results(pipe))
        path = folder / f"{kind}.npz"
        if not compare:
            np.savez(path, **found)  # type: ignore[arg-type]
            click.echo(f"{kind}: {len(found)} results")
            continue
        with np.load(path) as wanted:
            lines = list(differences(dict(wanted), found))
        differing += len(lines)
        click.echo("\n".join([f"{kind}: {len(lines)} of {len(found)} differ", *lines]))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
