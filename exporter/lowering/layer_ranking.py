"""Mixed precision by measurement: keep the layers that matter until the image is good enough.

Layers are ranked by what quantising each alone does to the output of its component, on inputs
from a real denoising run; then the fewest of them are kept, most harmful first, with which the
whole loop's image, made by the build itself on its own engine, reaches the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from latentc.exporter.capture.interpreter import Inputs, Watched
from latentc.exporter.passes import Range, calibrated, int8_activations, load
from latentc.exporter.passes.quantization import Site, sites
from latentc.runtimes.errors import VerificationError

if TYPE_CHECKING:
    from latentc.exporter.lowering.component import Lowering

# The passes that lose something worth ranking; half precision is what layers are kept in.
_LOSSY = ("int8", "int4")


@dataclass(frozen=True)
class Layer:
    """A weight by component and name, and the relative L2 error of the component's output when
    nothing but this layer is quantised."""

    component: str
    weight: str
    error: float


def rank(
    lowering: Lowering, passes: tuple[str, ...], sample: Inputs, told: Callable[[int], None]
) -> list[Layer]:
    """The layers of one component that `passes` quantise.

    Args:
        sample: the component's input that the errors are measured on.
        told: called with the number of layers so far.
    """
    lossy = tuple(name for name in passes if name.startswith(_LOSSY))
    rounding = Rounding(lossy, lowering.ranges(passes))
    watched = Watched(lowering.captured())
    exact = watched.run(sample)
    made = []
    for count, site in enumerate(sites(watched.program), 1):
        error = _relative_l2(rounding.run(watched, site, sample), exact)
        made.append(Layer(lowering.name, site.name, error))
        told(count)
    return made


class Rounding:
    """A `Rounding` does to values, while the program runs, what passes do to one layer.

    No program has to be rewritten for each layer.
    """

    def __init__(self, passes: Sequence[str], ranges: Mapping[str, Range]) -> None:
        modules = [load(name) for name in passes]
        self._weights = [each for each in modules if each.__name__.endswith("_weights")]
        self._symmetric = "int8_activations_symmetric" in passes
        self._ranges = ranges if any(map(calibrated, passes)) else {}

    def run(self, watched: Watched, site: Site, sample: Inputs) -> tuple[torch.Tensor, ...]:
        """The outputs with nothing but this layer quantised."""
        weights = watched.program.state_dict
        whole = weights[site.name]
        weights[site.name] = self._rounded(whole.detach(), site.linear)
        try:
            return watched.run(sample, alter=lambda *call: self._alter(site, *call))
        finally:
            weights[site.name] = whole

    def _rounded(self, weight: torch.Tensor, linear: bool) -> torch.Tensor:
        tried = (module.rounded(weight, linear) for module in self._weights)
        found: torch.Tensor = next(each for each in (*tried, weight) if each is not None)
        return found

    def _alter(self, site: Site, node: Node, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        found = self._ranges.get(node.name) if node in site.layers else None
        if found is None:
            return arguments
        activation = int8_activations.rounded(arguments[0], found, self._symmetric)
        return (activation, *arguments[1:])


def weights(lowering: Lowering) -> list[str]:
    """The weights of a component that can be quantised."""
    return [site.name for site in sites(lowering.captured())]


def fewest(
    floor: float, without: float, layers: Sequence[Layer], measure: Callable[[int], float]
) -> int:
    """Return how many of the ranked layers to keep.

    More kept layers need not mean a better image at every single step, so that the result is
    a count that reaches the floor and of which the next smaller one tried does not. The first
    count tried is the one that the layers' own errors promise to be enough.

    Args:
        without: PSNR in dB with no layer kept, below the floor.
        measure: PSNR in dB with so many layers kept; it is asked for some counts only.

    Raises:
        VerificationError: the floor is out of reach even if every layer is kept.
    """
    most = len(layers)
    below, above, count = 0, most + 1, promised(floor - without, layers)
    step = max(1, count // 8)
    while above > most or above - below > max(1, above // 16):
        found = measure(count)
        if found >= floor:
            above = count
        elif count == most:
            raise VerificationError(
                f"the fidelity floor of {floor:g} dB is out of reach: with all {count} layers "
                f"kept in half precision the image has {found:.1f} dB; lower the floor or take "
                "a higher precision for other components"
            )
        else:
            below = count
        count = _next(below, above, most, step)
        step *= 2
    return above


def promised(gain: float, layers: Sequence[Layer]) -> int:
    """Return how many layers to keep for so many dB more, if errors add up.

    Those of layers do as those of independent noises.
    """
    squares = [layer.error**2 for layer in layers]
    left, allowed = sum(squares), sum(squares) / 10 ** (gain / 10)
    for count, square in enumerate(squares, 1):
        left -= square
        if left <= allowed:
            return count
    return len(layers)


def _next(below: int, above: int, most: int, step: int) -> int:
    """Further out in growing steps while one end is open, then in the middle."""
    if above > most:
        return min(below + step, most)
    if below == 0 and above - step > 0:
        return above - step
    return (below + above) // 2


def kept(layers: Sequence[Layer], count: int) -> Mapping[str, frozenset[str]]:
    """The first `count` layers by component."""
    made: dict[str, set[str]] = {}
    for layer in layers[:count]:
        made.setdefault(layer.component, set()).add(layer.weight)
    return {name: frozenset(found) for name, found in made.items()}


def _relative_l2(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
