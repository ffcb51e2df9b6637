"""Mixed precision by measurement: keep the layers that matter until the picture is good enough.

Layers are ranked by what quantising each alone does to the output of its component, on inputs
from a real denoising run; then the fewest of them are kept, most harmful first, with which the
whole loop's picture, made by the build itself on its own engine, reaches the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exporter.passes.quantization import sites
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
    exact = Watched(lowering.captured()).run(sample)
    names = weights(lowering)
    made = []
    for count, name in enumerate(names, 1):
        program = lowering.program(lossy, frozenset(names) - {name})
        error = _relative_l2(Watched(program).run(sample), exact)
        made.append(Layer(lowering.name, name, error))
        told(count)
    return made


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
