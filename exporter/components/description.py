"""One file per pipeline family: which graphs it has, and what its programs do with them.

A family turns a loaded diffusers pipeline into a `Description`: everything that the rest of
the exporter and the manifest need, with no behaviour that names the family left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.latents import Latents, latents_of
from latentc.runtimes.programs.statements import Program

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Graph:
    """One component to capture.

    `module` returns a tuple of tensors in the order of `component.outputs` and takes the
    inputs in the order of `component.inputs`. `vocabulary` bounds the token ids of int64
    inputs in examples, `bounds` float inputs that do not take any number. `fed_by`: the graph whose
    outputs a shallow graph takes; its module then runs more than it uses. `least`: the smallest
    latent height and width of which none of the module's tensors has a side of 1. `also`: sizes by
    symbol at which the module does something else than at small ones, for a probe of its own.
    """

    component: Component
    module: torch.nn.Module
    vocabulary: int = 0
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fed_by: Graph | None = None
    least: int = 1
    also: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """A transformers tokenizer, which is an attribute of the pipeline and has the same name in
    programs.

    `max_length`: how many ids a text becomes, None for the tokenizer's own maximum. `lowercase`:
    the pipeline writes texts small and strips them first. `clean`: it writes out character
    references of HTML, twice, and makes all white space single spaces, as ``prompt_clean`` in
    diffusers. That also repairs broken encodings where ftfy is installed, which bundles do not.
    """

    tokenizer: str
    max_length: int | None = None
    lowercase: bool = False
    clean: bool = False

    def length(self, tokenizer: Any) -> int:
        """Return how many ids a text becomes."""
        return int(tokenizer.model_max_length) if self.max_length is None else self.max_length

    def prepared(self, text: str) -> str:
        """Return the text as the pipeline gives it to its tokenizer; character references are the
        runtime's."""
        if self.clean:
            text = re.sub(r"\s+", " ", text).strip()
        return text.lower().strip() if self.lowercase else text


@dataclass(frozen=True)
class FixedScheduler:
    """The diffusers scheduler that a loop follows in every call, and the step count of a call that
    asks for none."""

    scheduler: Any
    default_steps: int


@dataclass(frozen=True)
class Shifted:
    """This says how a pipeline tells a scheduler with dynamic shifting the image's size: by the
    number of patches of `patch` latents along a side. `max_shift` is used where the
    scheduler's configuration has none."""

    patch: int
    max_shift: float


def calling(pipe: Any, **fixed: Any) -> Callable[..., Any]:
    """Return what runs a diffusers pipeline: its images for keyword arguments of its call, float
    [batch, height, width, channels] in [0, 1] unless `output_type` says otherwise; of one that
    makes videos its frames, [batch, frames, height, width, channels]."""

    def call(output_type: str = "np", **arguments: Any) -> Any:
        made = pipe(output_type=output_type, **fixed, **arguments)
        return made.frames if hasattr(made, "frames") else made.images

    return call


def as_held(held: torch.Tensor, _: Mapping[str, Any]) -> torch.Tensor:
    """Return what a loop holds, where that is latents as the denoiser's graph takes them."""
    return held


@dataclass(frozen=True)
class Description:
    """A description says what a pipeline is made of, in the manifest's terms.

    Attributes:
        programs: what the pipeline can be asked for, what it is asked for without images first.
        graphs: the components that any of the programs runs.
        denoiser: the module that the loop of diffusers' pipeline calls.
        call: runs the pipeline as the first program does: keyword arguments as in the runtime,
            `generator` and `num_inference_steps` included; returns images [batch, height, width,
            channels] float in [0, 1], or frames with one axis more.
        calling: returns what runs another pipeline of the same parts so, for the other programs.
        resizable: whether the diffusers pipeline itself can be asked for another size than the
            default.
        gives_latents: whether the diffusers pipeline can be asked for latents.
        makes_several: whether it makes each of several images as it would make it alone.
        view: what the loop of diffusers' pipeline holds, and what it gave its denoiser by name →
            latents.
        fixed_schedulers: of the loops that follow one in every call (`Plan.fixed`), by name.
    """

    programs: tuple[Program, ...]
    graphs: tuple[Graph, ...]
    tokens: tuple[Tokens, ...]
    denoiser: torch.nn.Module
    call: Callable[..., Any]
    calling: Callable[[Any], Callable[..., Any]] = calling
    resizable: bool = True
    gives_latents: bool = True
    makes_several: bool = True
    view: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor] = as_held
    shifted: Shifted | None = None
    fixed_schedulers: Mapping[str, FixedScheduler] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """Return the pipeline's own program."""
        return self.programs[0]

    @property
    def latents(self) -> Latents:
        """Return the sizes that all programs have in common."""
        return latents_of(self.program)


def size_multiple(unet: Any) -> int:
    """Return what latent height and width must be multiples of, for the UNet to halve them evenly
    at each of its downsampling blocks."""
    return int(2 ** (len(unet.config.block_out_channels) - 1))


def latents_of_unet(unet: Any, factor: int, multiple: int) -> Latents:
    """Return the Latents record of a UNet and a decoder that enlarges by `factor`.

    Args:
        multiple: what the pipeline needs latent height and width to be multiples of.

    Raises:
        UnsupportedPipeline: a UNet that does not state its size, or cannot have it.
    """
    height, width = _sides(unet)
    if any(side % multiple for side in (height, width)):
        raise UnsupportedPipeline(
            f"a UNet with sample_size {height} by {width} cannot halve it "
            f"{len(unet.config.block_out_channels) - 1} times: diffusers cannot run it either"
        )
    return Latents(
        channels=unet.config.out_channels,
        factor=factor,
        multiple=multiple,
        default_height=height * factor,
        default_width=width * factor,
    )


def _sides(unet: Any) -> tuple[int, int]:
    size = unet.config.sample_size
    if size is None:
        raise UnsupportedPipeline(
            "the UNet does not say its sample_size, which diffusers takes the default height and "
            "width from; set it in unet/config.json"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
