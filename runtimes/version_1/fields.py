"""This module reads what manifests of format 1 say of calls by fields; programs say it in
statements since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.strict import Strict


class VectorInput(Strict, frozen=True):
    """An input [batch, n] float32 of the denoiser, or of image encoders that have one of its name:
    the listed arguments, one after the other.

    `window`: two arguments of as many values, fractions of the evaluations: in those that are not
    wholly between them the vector's value is 0. `until`: an argument of one value, which makes
    the vector 0 from that fraction of the step count on, rounded down.
    """

    input: str
    arguments: tuple[str, ...]
    window: tuple[str, str] | None = None
    until: str | None = None


class Argument(Strict, frozen=True):
    """A call argument made of numbers; a default is a number, ``"height"`` or ``"width"``.
    `limits`: the smallest and the largest that may be given. `spread`: one number stands for all
    values."""

    name: str
    default: tuple[float | str, ...]
    limits: tuple[float, float] | None = None
    spread: bool = False


class Embedding(Strict, frozen=True):
    """A call argument that takes what encoders make of a text, in the text's place.

    `name` is the argument's, with a branch's prefix before it; `inputs` the encoder outputs, and
    denoiser inputs, that it stands for. With each stand its columns, where position i of it says
    something of token i: the encoder inputs that the tokens are of, and how many numbers each has,
    one after the other.

    The argument's array is its inputs joined along the last axis; with `frame`, an array of so many
    positions and columns that has them one below the other, in its first columns, and zeros
    elsewhere.
    """

    name: str
    inputs: dict[str, dict[str, int]]
    frame: tuple[int, int] | None = None


class Branch(Strict, frozen=True):
    """One pass through the denoiser.

    Its texts and arguments are looked up with `prefix` before their names; where no text is
    given, `missing` says whether the empty string is encoded, all conditioning is zero, or guidance
    is off. Its weight is ``constant + sum(scales[name] * value of the argument name)``.
    """

    name: str
    prefix: str
    missing: Literal["empty", "zeros", "off"]
    constant: float
    scales: dict[str, float] = msgspec.field(default_factory=dict)


class Guidance(Strict, frozen=True):
    """Prediction = sum of branch weights times branch predictions.

    With `scale` set, guidance is on where that argument is above 1, each of `least` at least the
    number given there, and all branches have texts that need them; otherwise the branch `single`
    runs alone with weight 1. `defaults` holds the scale arguments. `rescale` names the one among
    them that says how much of the standard deviation is taken from the branch `single`.
    """

    branches: tuple[Branch, ...]
    single: str
    scale: str | None = None
    defaults: dict[str, float] = msgspec.field(default_factory=dict)
    rescale: str | None = None
    least: dict[str, float] = msgspec.field(default_factory=dict)

    def is_on(self, scales: Mapping[str, float]) -> bool:
        """Return whether all branches run, for these values of the scale arguments."""
        if self.scale is None or scales[self.scale] <= 1:
            return False
        return all(scales[name] >= least for name, least in self.least.items())

    @property
    def most(self) -> int:
        """Return the evaluations of an image in a step, where all branches run."""
        return len(self.branches)

    def evaluations(self, scale: float | None = None) -> int:
        """Return the evaluations of an image in a step; `scale` None is the default."""
        chosen = {} if scale is None or self.scale is None else {self.scale: scale}
        return self.most if self.scale is None or self.is_on({**self.defaults, **chosen}) else 1


@dataclass(frozen=True)
class CallFields:
    """All that calls of one bundle follow from, but for its tasks.

    Attributes:
        pipeline_class: the diffusers class that calls are those of.
        num_inference_steps: the step count of a call that asks for none.
        texts: by input of an encoder the call arguments that hold its text, the first one given
            being used.
    """

    pipeline_class: str
    num_inference_steps: int
    latents: Latents
    texts: Mapping[str, Sequence[str]]
    arguments: Sequence[Argument]
    vectors: Sequence[VectorInput]
    guidance: Guidance
    components: Sequence[Component]
    embeddings: Sequence[Embedding]

    def component(self, role: str) -> Component:
        """Return the first component of a role."""
        return next(each for each in self.components if each.role == role)

    def of_role(self, role: str) -> list[Component]:
        """Return the components of a role."""
        return [component for component in self.components if component.role == role]

    def cached(self) -> tuple[str, ...]:
        """Return the outputs of the denoiser that its shallow part takes in later steps."""
        inputs = {name for each in self.of_role("shallow") for name in each.inputs}
        return tuple(name for name in self.component("denoiser").outputs if name in inputs)
