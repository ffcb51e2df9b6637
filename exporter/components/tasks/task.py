"""A task says what a pipeline can be asked for: what its denoiser takes for it, and what it adds to
a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from latentc.exporter.components.description import Graph
from latentc.exporter.programs.draft import Draft, Phase
from latentc.runtimes.bundle.sizes import dimension
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.programs.statements import SizeOf

IMAGE, MASK = "image", "mask_image"  # arguments of diffusers' calls
NOISE = "noise"  # the input of an image encoder that takes a draw


@dataclass(frozen=True)
class Habits:
    """Habits are what pipelines of one kind do with every image.

    Attributes:
        each_made: where every image that is made has a generator of its own, one that all are made
            of is encoded anew for each.
        sized_by_image: a call has the size of its image.
        rounds: which way, where the strength is no whole number of steps.
    """

    each_made: bool
    sized_by_image: bool
    rounds: Literal["down", "up"]


@dataclass(frozen=True)
class Task:
    """A task is one thing that a pipeline can be asked for.

    Attributes:
        write: adds to a program that has its texts, numbers and guidance.
        graphs: the components that the program runs besides.
        channels: denoiser inputs that the model takes joined to the sample, in order, the pixels of
            those that are larger (`folded` together) as channels.
        inputs: its others.
        bounds: as in `Graph`.
        guide: how it is guided; None is as from a text alone.
    """

    name: str
    write: Callable[[Draft], None] = lambda draft: None
    graphs: tuple[Graph, ...] = ()
    channels: Mapping[str, TensorSpec] = field(default_factory=dict)
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    guide: Callable[[Draft], None] | None = None

    def folded(self) -> dict[str, int]:
        """Return how many pixels along a side become channels of one latent, by input."""
        sides = {n: int(dimension(s.shape[2], {"height": 1})) for n, s in self.channels.items()}
        return {name: side for name, side in sides.items() if side > 1}

    def widths(self) -> dict[str, int]:
        """Return how many channels each of `channels` becomes."""
        by = self.folded()
        return {n: int(s.shape[1]) * by.get(n, 1) ** 2 for n, s in self.channels.items()}


def encode_image(draft: Draft, encoder: Component, gives: str, phase: Phase, **how: Any) -> str:
    """Have the call's image encoded, and return the name of its latents, `gives`.

    Args:
        how: members of the draw, where the encoder takes one; `fill_where`, a mask whose white is
            filled with grey.
    """
    fill = {"fill_where": how.pop("fill_where")} if "fill_where" in how else {}
    shape = encoder.inputs["image"].shape[1:]
    name = f"_{encoder.name}"
    feeds = {"image": draft.pixels(f"{name}_image", IMAGE, shape, phase, **fill)}
    if NOISE in encoder.inputs:
        drawn = encoder.inputs[NOISE].shape[1:]
        feeds[NOISE] = draft.noise(f"{name}_noise", drawn, phase, rows=(IMAGE,), **how)
    return draft.run(encoder.name, feeds, {"latents": gives}, phase)["latents"]


def size_by(draft: Draft, image: str, times: int = 1) -> None:
    """Let a call have the size of an image, `times` enlarged, unless it has another's."""
    draft.size_of = draft.size_of or SizeOf(image=image, times=times)
