"""What is made of a call's pictures before the first step: runs of image encoders, in the order in
which diffusers' pipelines draw their noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtimes import noise
from runtimes.conditioning import check_finite
from runtimes.manifest import Branch, TensorSpec
from runtimes.request import Request
from runtimes.session import Array, cast
from runtimes.sessions import Sessions
from runtimes.sizes import dimension
from runtimes.task_pictures import DIRECT
from runtimes.tasks import NOISE, START, Preparation


@dataclass(frozen=True)
class Pictured:
    """The pictures' part of a denoiser input, float32 [images, …]: `values` for the guidance's
    `branches` (() is all), `others` for those beside them; None is zeros."""

    values: Array
    branches: tuple[str, ...] = ()
    others: Array | None = None

    def of(self, branch: Branch) -> Array:
        """What a branch gets."""
        if not self.branches or branch.name in self.branches:
            return self.values
        return np.zeros_like(self.values) if self.others is None else self.others


@dataclass
class Prepared:
    """`start`: clean latents, float32 [images, channels, height, width], or None. `conditioning`:
    by denoiser input."""

    start: Array | None = None
    conditioning: dict[str, Pictured] = field(default_factory=dict)

    def rows(self, branches: Sequence[Branch]) -> dict[str, Array]:
        """Conditioning for these branches, one after the other."""
        return {
            name: np.concatenate([each.of(branch) for branch in branches])
            for name, each in self.conditioning.items()
        }


def direct(request: Request) -> Prepared:
    """What pictures feed as they are."""
    fed = {name: request.pictures.feeds[DIRECT, name] for name in request.task.inputs}
    return Prepared(
        conditioning={n: Pictured(repeated(each, request.images)) for n, each in fed.items()}
    )


def run(
    sessions: Sessions,
    preparation: Preparation,
    request: Request,
    generators: noise.Generators,
    symbols: Mapping[str, int],
    into: Prepared,
    numbers: Mapping[str, Array],
) -> None:
    """Draw the noise of one preparation, run its component, add to `into` what comes out.

    Args:
        symbols: height and width of the latents.
        numbers: rows [1, n] of the vectors, by the input that they feed.

    Raises:
        NumericalError: NaN or infinity came out.
    """
    name = preparation.component
    place = request.task.preparations.index(preparation)
    feeds = {n: request.pictures.feeds[place, n] for n in preparation.feeds}
    if preparation.each and not isinstance(generators, noise.Generator):
        feeds = {n: repeated(each, request.images) for n, each in feeds.items()}
    rows = max(len(each) for each in feeds.values())
    feeds = {n: repeated(each, rows) for n, each in feeds.items()}
    inputs = sessions.components[name].inputs
    drawn = _drawn(inputs, generators, rows, symbols)
    feeds |= {n: repeated(each, rows) for n, each in numbers.items() if n in inputs}
    if not preparation.gives:
        return
    with sessions.using(name) as session:
        every = cast(session, feeds | drawn)
        made = [session.run({n: v[i : i + 1] for n, v in every.items()}) for i in range(rows)]
    others = {target: output for output, target in preparation.others.items()}

    def whole(output: str) -> Array:
        values = np.concatenate([each[output] for each in made])
        check_finite(name, output, values)
        return repeated(values, request.images)

    for output, target in preparation.gives.items():
        if target == START:
            into.start = whole(output)
        else:
            other = whole(others[target]) if target in others else None
            into.conditioning[target] = Pictured(whole(output), preparation.branches, other)


def repeated(values: Array, images: int) -> Array:
    """As many rows as pictures are made: those of one that was given are not next to each other, as
    in diffusers."""
    return np.tile(values, (images // len(values), *[1] * (values.ndim - 1)))


def _drawn(
    inputs: Mapping[str, TensorSpec],
    generators: noise.Generators,
    rows: int,
    symbols: Mapping[str, int],
) -> dict[str, Array]:
    """Noise for the component, where it takes any."""
    spec = inputs.get(NOISE)
    if spec is None:
        return {}
    shape = (rows, *(int(dimension(each, symbols)) for each in spec.shape[1:]))
    if isinstance(generators, noise.Generator):
        return {NOISE: noise.draw(generators, shape)}
    return {NOISE: noise.draw(generators[:rows], shape)}
