"""One file per pipeline family: which graphs it has, what their tensors are called.

A family turns a loaded diffusers pipeline into a `Description`: everything that the rest of
the exporter and the manifest need, with no behaviour that names the family left over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Argument, Component, Guidance, Latents, VectorInput

if TYPE_CHECKING:
    import torch

# diffusers class name → module of this package. One line per pipeline class.
FAMILIES: Mapping[str, str] = {
    "StableDiffusionPipeline": "stable_diffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "FluxPipeline": "flux",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
}

# Pipelines that hand their scheduler evenly spaced noise levels from 1 to 1/steps.
EVEN_SIGMAS = ("FluxPipeline",)


@dataclass(frozen=True)
class Graph:
    """One component to capture.

    `module` returns a tuple of tensors in the order of `component.outputs` and takes the
    inputs in the order of `component.inputs`. `vocabulary` bounds the token ids of int64
    inputs in examples. `fed_by`: the graph whose outputs a shallow graph takes; its module then
    runs more than it uses.
    """

    component: Component
    module: torch.nn.Module
    vocabulary: int = 0
    fed_by: Graph | None = None


@dataclass(frozen=True)
class TextInput:
    """A transformers tokenizer of the pipeline, the encoder input that it feeds, and the call
    arguments to look for, the first given one being used.

    `max_length`: how many ids a text becomes, None for the tokenizer's own maximum. `lowercase`:
    the pipeline writes texts small and strips them first.
    """

    attribute: str
    input: str
    texts: tuple[str, ...]
    max_length: int | None = None
    lowercase: bool = False

    def length(self, tokenizer: Any) -> int:
        """How many ids a text becomes."""
        return int(tokenizer.model_max_length) if self.max_length is None else self.max_length

    def prepared(self, text: str) -> str:
        """The text as the pipeline gives it to its tokenizer."""
        return text.lower().strip() if self.lowercase else text


@dataclass(frozen=True)
class Shifted:
    """How a pipeline tells a scheduler with dynamic shifting the picture's size: by the number of
    patches of `patch` latents along a side. `max_shift` where the scheduler's configuration has
    none."""

    patch: int
    max_shift: float


def plain(held: torch.Tensor, _: Mapping[str, Any]) -> torch.Tensor:
    """Of pipelines whose loop holds latents as they are."""
    return held


@dataclass(frozen=True)
class Description:
    """What a pipeline is made of, in the manifest's terms.

    `resizable` says whether the diffusers pipeline itself can be asked for another size than
    the default; `call` runs it: keyword arguments as in the runtime, `generator` and
    `num_inference_steps` included, and returns images [batch, height, width, channels] float
    in [0, 1]. `image_encoder` is the graph that image-to-image needs besides, where the pipeline
    has that, and `strength` diffusers' default for it.
    """

    task: str
    graphs: tuple[Graph, ...]
    latents: Latents
    text_inputs: tuple[TextInput, ...]
    arguments: tuple[Argument, ...]
    vectors: tuple[VectorInput, ...]
    guidance: Guidance
    num_inference_steps: int
    resizable: bool
    denoiser: torch.nn.Module
    call: Callable[..., Any]
    probe_arguments: Mapping[str, str | int | float]
    image_encoder: Graph | None = None
    strength: float = 0.8
    view: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor] = plain
    timesteps: float = 1.0
    shifted: Shifted | None = None


class Family(Protocol):
    """The interface of a family's module.

    `COMPONENTS` maps each component to the subfolders of the source that it is made of, so
    that an unchanged export is recognised without loading anything. A module whose pipelines work
    without some parts has `OPTIONAL` besides (see `optional`).
    """

    __name__: str
    COMPONENTS: Mapping[str, tuple[str, ...]]

    def describe(self, pipe: Any) -> Description: ...


def family_of(class_name: str) -> Family:
    """The family's module for a diffusers pipeline class.

    Raises:
        UnsupportedPipeline: listing the supported classes.
    """
    if class_name not in FAMILIES:
        raise UnsupportedPipeline(
            f"pipeline class {class_name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    module: Any = import_module(f"exporter.families.{FAMILIES[class_name]}")
    return module  # type: ignore[no-any-return]


def optional(class_name: str) -> Mapping[str, tuple[str, ...]]:
    """What can be left out of a pipeline, and the parts of the source that go with each."""
    found: Mapping[str, tuple[str, ...]] = getattr(family_of(class_name), "OPTIONAL", {})
    return found


def size_multiple(unet: Any) -> int:
    """What latent height and width must be multiples of: one halving per downsampling block."""
    return int(2 ** (len(unet.config.block_out_channels) - 1))


def latents_of(unet: Any, factor: int) -> Latents:
    """The Latents record of a UNet and a decoder that enlarges by `factor`."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Latents(
        channels=unet.config.in_channels,
        factor=factor,
        multiple=size_multiple(unet),
        default_height=height * factor,
        default_width=width * factor,
    )
