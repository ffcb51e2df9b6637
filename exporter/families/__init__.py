"""One file per pipeline family: which graphs it has, what their tensors are called.

A family turns a loaded diffusers pipeline into a `Description`: everything that the rest of
the exporter and the manifest need, with no behaviour that names the family left over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Component
from runtimes.programs.latents import Latents
from runtimes.version_1.fields import Argument, Embedding, Guidance, VectorInput
from runtimes.version_1.tasks import Task

if TYPE_CHECKING:
    import torch

# diffusers class name → module of this package. One line per pipeline class.
FAMILIES: Mapping[str, str] = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionImg2ImgPipeline": "stable_diffusion",
    "StableDiffusionInpaintPipeline": "stable_diffusion",
    "StableDiffusionInstructPix2PixPipeline": "stable_diffusion",
    "StableDiffusionUpscalePipeline": "stable_diffusion",
    "StableDiffusionDepth2ImgPipeline": "stable_diffusion",
    "StableDiffusionControlNetPipeline": "stable_diffusion",
    "StableDiffusionControlNetImg2ImgPipeline": "stable_diffusion",
    "StableDiffusionControlNetInpaintPipeline": "stable_diffusion",
    "StableDiffusionAdapterPipeline": "stable_diffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl",
    "StableDiffusionXLInpaintPipeline": "stable_diffusion_xl",
    "StableDiffusionXLInstructPix2PixPipeline": "stable_diffusion_xl",
    "StableDiffusionXLControlNetPipeline": "stable_diffusion_xl",
    "StableDiffusionXLControlNetImg2ImgPipeline": "stable_diffusion_xl",
    "StableDiffusionXLControlNetInpaintPipeline": "stable_diffusion_xl",
    "StableDiffusionXLAdapterPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "StableDiffusion3Img2ImgPipeline": "stable_diffusion_3",
    "StableDiffusion3InpaintPipeline": "stable_diffusion_3",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
    "FluxInpaintPipeline": "flux",
    "FluxFillPipeline": "flux",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
}

# The tasks that a class is for, beside those that are asked for.
CLASS_TASKS: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionImg2ImgPipeline": ("image-to-image",),
    "StableDiffusionInpaintPipeline": ("inpainting",),
    "StableDiffusionInstructPix2PixPipeline": ("instruct-pix2pix",),
    "StableDiffusionUpscalePipeline": ("upscaling",),
    "StableDiffusionDepth2ImgPipeline": ("depth-to-image",),
    "StableDiffusionControlNetImg2ImgPipeline": ("image-to-image",),
    "StableDiffusionControlNetInpaintPipeline": ("inpainting",),
    "StableDiffusionXLImg2ImgPipeline": ("image-to-image",),
    "StableDiffusionXLInpaintPipeline": ("inpainting",),
    "StableDiffusionXLInstructPix2PixPipeline": ("instruct-pix2pix",),
    "StableDiffusionXLControlNetImg2ImgPipeline": ("image-to-image",),
    "StableDiffusionXLControlNetInpaintPipeline": ("inpainting",),
    "StableDiffusion3Img2ImgPipeline": ("image-to-image",),
    "StableDiffusion3InpaintPipeline": ("inpainting",),
    "FluxImg2ImgPipeline": ("image-to-image",),
    "FluxInpaintPipeline": ("inpainting",),
    "FluxFillPipeline": ("inpainting",),
}
# Of parts that graphs are usually made without, those that a class needs.
NEEDED: Mapping[str, tuple[str, ...]] = {"StableDiffusionDepth2ImgPipeline": ("feature_extractor",)}
# Pipelines that hand their scheduler evenly spaced noise levels from 1 to 1/steps.
EVEN_SIGMAS = (*("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline"),)


@dataclass(frozen=True)
class Graph:
    """One component to capture.

    `module` returns a tuple of tensors in the order of `component.outputs` and takes the
    inputs in the order of `component.inputs`. `vocabulary` bounds the token ids of int64
    inputs in examples, `bounds` float inputs that do not take any number. `fed_by`: the graph whose
    outputs a shallow graph takes; its module then runs more than it uses. `least`: the smallest
    latent height and width of which none of the module's tensors has a side of 1.
    """

    component: Component
    module: torch.nn.Module
    vocabulary: int = 0
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fed_by: Graph | None = None
    least: int = 1


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


def calling(pipe: Any, **fixed: Any) -> Callable[..., Any]:
    """Return what runs a diffusers pipeline: its images for keyword arguments of its call, float
    [batch, height, width, channels] in [0, 1] unless `output_type` says otherwise."""

    def call(output_type: str = "np", **arguments: Any) -> Any:
        return pipe(output_type=output_type, **fixed, **arguments).images

    return call


def plain(held: torch.Tensor, _: Mapping[str, Any]) -> torch.Tensor:
    """Of pipelines whose loop holds latents as they are."""
    return held


@dataclass(frozen=True)
class Offer:
    """A task that a bundle can be asked for, and the graphs that it needs besides."""

    task: Task
    graphs: tuple[Graph, ...] = ()


def _sample_alone(sample: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {"sample": sample}


@dataclass(frozen=True)
class Description:
    """What a pipeline is made of, in the manifest's terms.

    `resizable` says whether the diffusers pipeline itself can be asked for another size than
    the default; `call` runs it: keyword arguments as in the runtime, `generator` and
    `num_inference_steps` included, and returns images [batch, height, width, channels] float
    in [0, 1]. `task` is what `call` does, whose pictures are among its arguments: Pillow images,
    which `probe_pictures` makes of a height and width. `offers`: what the pipeline can do besides.
    `observed`: the graph's inputs that are in what the denoiser's module is given first.
    `embeddings`: what diffusers calls the encoders' outputs in a call.

    Defaults of strengths, scales, steps and arguments are "off" where a family makes it, and become
    those of the diffusers classes in `exporter.families.defaults`.
    """

    task: Task
    graphs: tuple[Graph, ...]
    latents: Latents
    text_inputs: tuple[TextInput, ...]
    arguments: tuple[Argument, ...]
    vectors: tuple[VectorInput, ...]
    guidance: Guidance
    resizable: bool
    denoiser: torch.nn.Module
    call: Callable[..., Any]
    probe_arguments: Mapping[str, str | int | float]
    num_inference_steps: int = 1
    offers: tuple[Offer, ...] = ()
    probe_pictures: Callable[[int, int], Mapping[str, Any]] | None = None
    observed: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] = _sample_alone
    embeddings: tuple[Embedding, ...] = ()
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
        raise UnsupportedPipeline(not_supported(f"pipeline class {class_name!r}"))
    module: Any = import_module(f"exporter.families.{FAMILIES[class_name]}")
    return module  # type: ignore[no-any-return]


def not_supported(what: str) -> str:
    """The message about a pipeline that no family handles."""
    return (
        f"{what} is not supported; supported: {', '.join(FAMILIES)}. "
        "How a class is added: docs/extending.md"
    )


def optional(class_name: str) -> Mapping[str, tuple[str, ...]]:
    """What can be left out of a pipeline, and the parts of the source that go with each."""
    found: Mapping[str, tuple[str, ...]] = getattr(family_of(class_name), "OPTIONAL", {})
    return found


def size_multiple(unet: Any) -> int:
    """Return what latent height and width must be multiples of, for the UNet to halve them evenly
    at each of its downsampling blocks."""
    return int(2 ** (len(unet.config.block_out_channels) - 1))


def latents_of(unet: Any, factor: int, multiple: int) -> Latents:
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
