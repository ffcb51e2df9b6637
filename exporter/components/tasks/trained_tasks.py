"""Tasks that a denoiser was trained for: it takes channels besides the sample's, which are made of
images. One function for each; `latentc.exporter.components.tasks.image_tasks` chooses."""

from __future__ import annotations

import math
from typing import Any

import torch
from msgspec import structs

from latentc.exporter.classes import INPAINTING
from latentc.exporter.components.description import Graph
from latentc.exporter.components.tasks.task import (
    IMAGE,
    MASK,
    NOISE,
    Habits,
    Task,
    encode_image,
    size_by,
)
from latentc.exporter.components.text_to_image import (
    SCALE,
    Scaling,
    classifier_free_guidance,
    encoder_graph,
    feed_numbers,
)
from latentc.exporter.programs.defaults import takes
from latentc.exporter.programs.draft import IMAGE_LATENTS, Draft, Phase, Start
from latentc.exporter.programs.sides import NEGATIVE
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.statements import Push, Test

_MASK_INPUT, _MASKED_LATENTS = "mask", "masked_image_latents"
_NOISE_LEVEL, _LOW_RES = "noise_level", "low_res_image"
_IMAGE_SCALE = "image_guidance_scale"


def inpainting(encoder: Graph, habits: Habits) -> Task:
    """Return the task of a denoiser that takes the mask and the latents of what is around it."""
    inputs = {_MASK_INPUT: _channels(1), _MASKED_LATENTS: encoder.component.outputs["latents"]}
    return _masked(encoder, habits, inputs, below_full_strength=True)


def filling(encoder: Graph, factor: int, habits: Habits) -> Task:
    """Return the task of FLUX.1 Fill, which takes the latents of what is around the mask, and all
    of the mask's pixels, `factor` by `factor` of them to a latent."""
    mask = TensorSpec("float32", ("batch", 1, f"{factor}*height", f"{factor}*width"))
    inputs = {_MASKED_LATENTS: encoder.component.outputs["latents"], _MASK_INPUT: mask}
    return _masked(encoder, habits, inputs, below_full_strength=False)


def _masked(
    encoder: Graph, habits: Habits, inputs: dict[str, TensorSpec], below_full_strength: bool
) -> Task:
    def write(draft: Draft) -> None:
        component = encoder.component
        draft.image(IMAGE)
        draft.mask(MASK)
        shape = inputs[_MASK_INPUT].shape[1:]
        draft.feed(_MASK_INPUT, draft.pixels(f"_{_MASK_INPUT}", MASK, shape, Phase.IMAGES))
        clean = encode_image(draft, component, f"_{IMAGE_LATENTS}", Phase.BEFORE_NOISE)
        draft.start = Start(clean, below_full_strength, habits.rounds)
        # diffusers makes what is masked 0 on its scale of -1 to 1: grey.
        around = encode_image(
            draft, component, f"_{_MASKED_LATENTS}", Phase.AFTER_NOISE, fill_where=MASK
        )
        draft.feed(_MASKED_LATENTS, around)

    return Task(INPAINTING, write, (encoder,), inputs)


def instruct_pix2pix(pipe: Any) -> Task:
    """Return the task of a UNet that takes the latents of an image to follow an instruction on
    (Brooks, Holynski and Efros 2022, https://arxiv.org/abs/2211.09800, equation 3), guided by text
    and image apart."""
    # The latents' mode; CosXL's editing model alone was trained on scaled ones.
    scaled = bool(getattr(pipe, "is_cosxl_edit", False))
    scaling = Scaling.plain(pipe.vae) if scaled else Scaling(1.0)
    encoder = encoder_graph(pipe.vae, scaling, draws=False)
    if encoder is None:
        raise UnsupportedPipeline("a VAE that does not encode what it decodes to is not supported")
    component = encoder.component

    def write(draft: Draft) -> None:
        draft.image(IMAGE)
        value = encode_image(draft, component, f"_{IMAGE_LATENTS}", Phase.BEFORE_NOISE)
        nothing = draft.zeros_like(value, Phase.BEFORE_NOISE)
        draft.feed(IMAGE_LATENTS, value, lambda branch: branch.name != "neither")
        draft.feed(IMAGE_LATENTS, nothing, lambda branch: branch.name == "neither")
        # SDXL's pipeline takes a size, and has the model's own if it is given none.
        if not takes(draft.stands_for, "height"):
            size_by(draft, IMAGE)

    channels = {IMAGE_LATENTS: _channels(pipe.vae.config.latent_channels)}
    return Task("instruct-pix2pix", write, (encoder,), channels, guide=_two_scales)


def _two_scales(draft: Draft) -> None:
    """Guide away from no image, towards the image, and from there towards the text."""
    classifier_free_guidance(draft)
    draft.branches.clear()
    scale = draft.scale(_IMAGE_SCALE, 1.0)
    when = (Test(argument=SCALE, above=1.0), Test(argument=scale, at_least=1.0))
    draft.branch("text")
    draft.branch("image", NEGATIVE, when, Push(branch="text", by=SCALE, less=1.0))
    draft.branch("neither", NEGATIVE, when, Push(branch="image", by=scale, less=1.0))


class LowRes(torch.nn.Module):
    """image [batch, 3, height, width] in [0, 1], noise of its shape, noise_level [batch, 1] → the
    noisy image in [-1, 1] that the UNet takes."""

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


def upscaling(pipe: Any) -> Task:
    """Return the task of a UNet that takes a small image with some noise, and how much; its latents
    are as large as that image, and the decoder enlarges them."""
    small, level = _channels(3), TensorSpec("float32", ("batch", 1))
    # Levels are looked up among the UNet's classes, and noise is made as of a timestep.
    timesteps = int(pipe.low_res_scheduler.config.num_train_timesteps)
    classes = int(pipe.unet.config.num_class_embeds or timesteps)
    most = min(int(pipe.config.max_noise_level), classes - 1, timesteps - 1)
    bounds = {_NOISE_LEVEL: (0.0, float(most))}
    inputs = {"image": small, NOISE: small, _NOISE_LEVEL: level}
    component = Component("low_res", "image_encoder", inputs, {_LOW_RES: small})
    graph = Graph(component, LowRes(pipe.low_res_scheduler, most + 1), bounds=bounds)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    def write(draft: Draft) -> None:
        draft.image(IMAGE)
        number = draft.number(_NOISE_LEVEL, (20.0,), least=0.0, most=float(most))
        feed_numbers(draft, _NOISE_LEVEL, [number])
        shape = small.shape[1:]
        feeds = {
            "image": draft.pixels("_low_res_image", IMAGE, shape, Phase.BEFORE_NOISE),
            NOISE: draft.noise("_low_res_noise", shape, Phase.BEFORE_NOISE, rows=(IMAGE,)),
            _NOISE_LEVEL: draft.row(f"_{_NOISE_LEVEL}", [number]),
        }
        gives = draft.run("low_res", feeds, {_LOW_RES: f"_{_LOW_RES}"}, Phase.BEFORE_NOISE)
        draft.feed(_LOW_RES, gives[_LOW_RES])
        size_by(draft, IMAGE, times=factor)
        # diffusers shrinks the small image as it does those for the VAE.
        multiple = math.lcm(draft.latents.multiple, factor)
        draft.latents = structs.replace(draft.latents, multiple=multiple)

    channels = {_LOW_RES: small}
    return Task("upscaling", write, (graph,), channels, {_NOISE_LEVEL: level}, bounds)


def folded(image: torch.Tensor, by: int) -> torch.Tensor:
    """Return an image [batch, 1, by * height, by * width] as [batch, by * by, height, width]."""
    batch, _, height, width = image.shape
    parts = image.reshape(batch, height // by, by, width // by, by)
    return parts.permute(0, 2, 4, 1, 3).reshape(batch, by * by, height // by, width // by)


def _channels(count: int) -> TensorSpec:
    return TensorSpec("float32", ("batch", count, "height", "width"))
