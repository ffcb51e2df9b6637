"""Tasks that a UNet was trained for: it takes channels besides the sample's, which are made of
pictures. One function for each; `exporter.families.pictures` chooses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from exporter.families import Graph, Offer
from exporter.families.text_to_image import Scaling, encoder_graph
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Component, TensorSpec
from runtimes.sizes import dimension
from runtimes.version_1.fields import Argument, Branch, Guidance, VectorInput
from runtimes.version_1.tasks import START, Feed, Preparation, Task

IMAGE, MASK = "image", "mask_image"  # arguments of diffusers' calls
_OUTSIDE = Feed(IMAGE, MASK, 0.5)  # diffusers makes what is masked 0 on its scale of -1 to 1
_MASK_INPUT, _MASKED_LATENTS = "mask", "masked_image_latents"
_NOISE_LEVEL = "noise_level"


@dataclass(frozen=True)
class Trained:
    """What a UNet was trained for.

    `channels`: denoiser inputs that the UNet takes joined to the sample, in order, the pixels of
    those that are larger (`folded` together) as channels; `inputs`: others. `bounds` as in `Graph`.
    `guidance`: None is that of text-to-image. `multiple`: what the pipeline makes latent sides
    multiples of besides.
    """

    offer: Offer
    channels: Mapping[str, TensorSpec]
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    arguments: tuple[Argument, ...] = ()
    vectors: tuple[VectorInput, ...] = ()
    guidance: Guidance | None = None
    multiple: int = 1

    def folded(self) -> dict[str, int]:
        """How many pixels along a side become channels of one latent, by input."""
        sides = {n: int(dimension(s.shape[2], {"height": 1})) for n, s in self.channels.items()}
        return {name: side for name, side in sides.items() if side > 1}

    def widths(self) -> dict[str, int]:
        """How many channels each of `channels` becomes."""
        by = self.folded()
        return {n: int(s.shape[1]) * by.get(n, 1) ** 2 for n, s in self.channels.items()}


def inpainting(encoder: Graph) -> Trained:
    """The UNet takes the mask and the latents of what is around it."""
    name = encoder.component.name
    start = Preparation(name, {"image": Feed(IMAGE)}, {"latents": START}, below_full_strength=True)
    around = Preparation(name, {"image": _OUTSIDE}, {"latents": _MASKED_LATENTS}, late=True)
    task = Task(
        "inpainting",
        {IMAGE: "image", MASK: "mask"},
        (start, around),
        {_MASK_INPUT: Feed(MASK)},
        strength=1.0,
        noise_at_full_strength=True,
    )
    inputs = {_MASK_INPUT: _channels(1), _MASKED_LATENTS: encoder.component.outputs["latents"]}
    return Trained(Offer(task, (encoder,)), inputs)


def filling(encoder: Graph, factor: int) -> Trained:
    """FLUX.1 Fill takes the latents of what is around the mask, and all of the mask's pixels,
    `factor` by `factor` of them to a latent."""
    name = encoder.component.name
    start = Preparation(name, {"image": Feed(IMAGE)}, {"latents": START})
    around = Preparation(name, {"image": _OUTSIDE}, {"latents": _MASKED_LATENTS}, late=True)
    task = Task(
        "inpainting",
        {IMAGE: "image", MASK: "mask"},
        (start, around),
        {_MASK_INPUT: Feed(MASK)},
        strength=1.0,
    )
    mask = TensorSpec("float32", ("batch", 1, f"{factor}*height", f"{factor}*width"))
    return Trained(
        Offer(task, (encoder,)),
        {_MASKED_LATENTS: encoder.component.outputs["latents"], _MASK_INPUT: mask},
    )


def instruct_pix2pix(pipe: Any, guidance: Guidance) -> Trained:
    """The UNet takes the latents of a picture to follow an instruction on (Brooks, Holynski and
    Efros 2022, https://arxiv.org/abs/2211.09800, equation 3), guided by text and picture apart.

    Args:
        guidance: that of text-to-image, whose scale and empty texts are the same.
    """
    # The latents' mode; CosXL's editing model alone was trained on scaled ones.
    scaled = bool(getattr(pipe, "is_cosxl_edit", False))
    scaling = Scaling.plain(pipe.vae) if scaled else Scaling(1.0)
    encoder = encoder_graph(pipe.vae, scaling, draws=False)
    if encoder is None:
        raise UnsupportedPipeline("a VAE that does not encode what it decodes to is not supported")
    branches = ("text", "image")
    made = Preparation(
        encoder.component.name, {"image": Feed(IMAGE)}, {"latents": "image_latents"}, branches
    )
    # SDXL's pipeline takes a size, and has the model's own if it is given none.
    sized = "height" in inspect.signature(type(pipe).__call__).parameters
    size_of = None if sized else IMAGE
    task = Task("instruct-pix2pix", {IMAGE: "image"}, (made,), size_of=size_of)
    channels = {"image_latents": _channels(pipe.vae.config.latent_channels)}
    return Trained(Offer(task, (encoder,)), channels, guidance=_two_scales(guidance))


def _two_scales(guidance: Guidance) -> Guidance:
    text, image = "guidance_scale", "image_guidance_scale"
    missing = next(branch.missing for branch in guidance.branches if branch.prefix)
    return Guidance(
        branches=(
            Branch("text", "", "empty", 0.0, {text: 1.0}),
            Branch("image", "negative_", missing, 0.0, {text: -1.0, image: 1.0}),
            Branch("neither", "negative_", missing, 1.0, {image: -1.0}),
        ),
        single="text",
        scale=text,
        defaults={**guidance.defaults, image: 1.0},
        rescale=guidance.rescale,
        least={image: 1.0},
    )


class LowRes(torch.nn.Module):
    """image [batch, 3, height, width] in [0, 1], noise of its shape, noise_level [batch, 1] → the
    noisy picture in [-1, 1] that the UNet takes."""

    of_image: torch.Tensor
    of_noise: torch.Tensor

    def __init__(self, scheduler: Any, levels: int) -> None:
        super().__init__()
        every = torch.arange(levels)
        one, none = torch.ones(levels, 1, 1, 1), torch.zeros(levels, 1, 1, 1)
        of_image = scheduler.add_noise(one, none, every)
        of_noise = scheduler.add_noise(none, one, every)
        self.register_buffer("of_image", of_image.float(), persistent=False)
        self.register_buffer("of_noise", of_noise.float(), persistent=False)

    def forward(
        self, image: torch.Tensor, noise: torch.Tensor, noise_level: torch.Tensor
    ) -> tuple[torch.Tensor]:
        level = noise_level[:, 0].long()
        return ((image * 2.0 - 1.0) * self.of_image[level] + noise * self.of_noise[level],)


def upscaling(pipe: Any) -> Trained:
    """The UNet takes a small picture with some noise, and how much; its latents are as large as
    that picture, and the decoder enlarges them."""
    picture, level = _channels(3), TensorSpec("float32", ("batch", 1))
    # Levels are looked up among the UNet's classes, and noise is made as of a timestep.
    timesteps = int(pipe.low_res_scheduler.config.num_train_timesteps)
    classes = int(pipe.unet.config.num_class_embeds or timesteps)
    most = min(int(pipe.config.max_noise_level), classes - 1, timesteps - 1)
    bounds = {_NOISE_LEVEL: (0.0, float(most))}
    component = Component(
        "low_res",
        "image_encoder",
        {"image": picture, "noise": picture, _NOISE_LEVEL: level},
        {"low_res_image": picture},
    )
    low_res = Graph(component, LowRes(pipe.low_res_scheduler, most + 1), bounds=bounds)
    made = Preparation("low_res", {"image": Feed(IMAGE)}, {"low_res_image": "low_res_image"})
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    task = Task("upscaling", {IMAGE: "image"}, (made,), size_of=IMAGE, enlarges=factor)
    return Trained(
        Offer(task, (low_res,)),
        {"low_res_image": picture},
        inputs={_NOISE_LEVEL: level},
        bounds=bounds,
        arguments=(Argument(_NOISE_LEVEL, (20.0,), (0.0, float(most))),),
        vectors=(VectorInput(_NOISE_LEVEL, (_NOISE_LEVEL,)),),
        multiple=factor,  # diffusers shrinks the small picture as it does those for the VAE
    )


def folded(image: torch.Tensor, by: int) -> torch.Tensor:
    """[batch, 1, by * height, by * width] → [batch, by * by, height, width]."""
    batch, _, height, width = image.shape
    parts = image.reshape(batch, height // by, by, width // by, by)
    return parts.permute(0, 2, 4, 1, 3).reshape(batch, by * by, height // by, width // by)


def unfolded(channels: torch.Tensor, by: int) -> torch.Tensor:
    """The reverse of `folded`."""
    batch, _, height, width = channels.shape
    parts = channels.reshape(batch, by, by, height, width).permute(0, 3, 1, 4, 2)
    return parts.reshape(batch, 1, height * by, width * by)


def _channels(count: int) -> TensorSpec:
    return TensorSpec("float32", ("batch", count, "height", "width"))
