"""Mixed precision by measurement: keep the layers that matter until the picture is good enough.

Layers are ranked by what quantising each alone does to the output of its component, on inputs
from a real denoising run; then the fewest of them are kept, most harmful first, with which the
whole loop's picture, made by the build itself on its own engine, reaches the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from exporter.passes import CALIBRATED, Range, int8_activations
from exporter.passes.quantization import Site, sites
from exporter.watch import Inputs, Watched
from runtimes.errors import VerificationError

if TYPE_CHECKING:
    from exporter.lowering import Lowering

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
    """What passes do to one layer, done to values while the program runs: no program has to be
    rewritten for each layer."""

    def __init__(self, passes: Sequence[str], ranges: Mapping[str, Range]) -> None:
        modules = [import_module(f"exporter.passes.{name}") for name in passes]
        self._weights = [each for each in modules if each.__name__.endswith("_weights")]
        self._symmetric = "int8_activations_symmetric" in passes
        self._ranges = ranges if CALIBRATED & set(passes) else {}

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


def fewest(floor: float, layers: Sequence[Layer], measure: Callable[[int], float]) -> int:
    """How many of the ranked layers to keep.

    More kept layers need not mean a better picture at every single step, so that the result is
    a count that reaches the floor and of which the next smaller one tried does not; counts are
    tried by doubling, then by halving the interval.

    Args:
        measure: PSNR in dB with so many layers kept; it is asked for some counts only.

    Raises:
        VerificationError: the floor is out of reach even if every layer is kept.
    """
    found = measure(0)
    if found >= floor:
        return 0
    below, above = 0, 1
    while (found := measure(above)) < floor:
        if above == len(layers):
            raise VerificationError(
                f"the fidelity floor of {floor:g} dB is out of reach: with all {above} layers "
                f"kept in half precision the picture has {found:.1f} dB; lower the floor or take "
                "a higher precision for other components"
            )
        below, above = above, min(2 * above, len(layers))
    while above - below > max(1, above // 16):
        middle = (below + above) // 2
        below, above = (below, middle) if measure(middle) >= floor else (middle, above)
    return above


def kept(layers: Sequence[Layer], count: int) -> Mapping[str, frozenset[str]]:
    """The first `count` layers by component."""
    made: dict[str, set[str]] = {}
    for layer in layers[:count]:
        made.setdefault(layer.component, set()).add(layer.weight)
    return {name: frozenset(found) for name, found in made.items()}


def _relative_l2(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
