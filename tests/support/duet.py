"""A diffusion pipeline of the tests' own: images and strips of numbers, denoised together by one
network that looks at both. No class of diffusers has two states and is as small.

The module is its family as well: what latentc knows of it stands below the pipeline.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor

from latentc.exporter.components.description import Description, Graph, calling
from latentc.exporter.components.text_to_image import sample_spec, timestep_spec
from latentc.exporter.families.unconditional import Denormalise
from latentc.exporter.programs.draft import Draft, Phase
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.programs.statements import State

CHANNELS, SIDE, STRIP = 3, 8, (2, 12)
COMPONENTS: dict[str, tuple[str, ...]] = {"denoiser": ("denoiser",), "decoder": ()}


class DuetDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Images [batch, 3, h, w] and strips [batch, 2, 12] → a prediction of each, of both."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        self.image = UNet2DModel(
            sample_size=SIDE,
            in_channels=CHANNELS + STRIP[0],
            out_channels=CHANNELS,
            layers_per_block=1,
            block_out_channels=(width,),
            norm_num_groups=4,
            **blocks,
        )
        self.strip = torch.nn.Conv1d(STRIP[0] + CHANNELS, STRIP[0], 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, strip: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the predicted noise of images and of strips: mostly what is there, so that no
        scheduler runs away from it."""
        of_strip = strip.mean(dim=2)[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        of_image = sample.mean(dim=(2, 3))[:, :, None].expand(-1, -1, strip.shape[2])
        image = self.image(torch.cat([sample, of_strip], 1), timestep, return_dict=False)[0]
        return 0.7 * sample + 0.3 * image, 0.7 * strip + 0.3 * self.strip(
            torch.cat([strip, of_image], 1)
        )


class DuetPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws images, and strips beside them."""

    def __init__(self, denoiser: DuetDenoiser, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str = "np",
    ) -> Any:
        """Return images [batch, h, w, 3] from 0 to 1, and strips [batch, 2, 12]."""
        draw = {"generator": generator, "device": torch.device("cpu"), "dtype": torch.float32}
        sample = randn_tensor((batch_size, CHANNELS, SIDE, SIDE), **draw)
        strip = randn_tensor((batch_size, *STRIP), **draw)
        of_strip = type(self.scheduler).from_config(self.scheduler.config)
        for scheduler in (self.scheduler, of_strip):
            scheduler.set_timesteps(num_inference_steps)
        more = self.prepare_extra_step_kwargs(generator)
        sample = sample * self.scheduler.init_noise_sigma
        strip = strip * of_strip.init_noise_sigma
        for time in self.scheduler.timesteps:
            inputs = self.scheduler.scale_model_input(sample, time)
            other = of_strip.scale_model_input(strip, time)
            noise, noise_of_strip = self.denoiser(inputs, time, strip=other)
            sample = self.scheduler.step(noise, time, sample, **more).prev_sample
            strip = of_strip.step(noise_of_strip, time, strip, **more).prev_sample
        images = sample if output_type == "latent" else (sample / 2 + 0.5).permute(0, 2, 3, 1)
        images = images if output_type == "latent" else images.clamp(0, 1).numpy()
        return SimpleNamespace(images=images, strips=strip)

    def prepare_extra_step_kwargs(self, generator: Any) -> dict[str, Any]:
        """Return what `step` takes besides: schedulers that draw noise take a generator."""
        takes = "generator" in self.scheduler.step.__code__.co_varnames
        return {"generator": generator} if takes else {}


def make_pipeline() -> DuetPipeline:
    """Return a pipeline of random weights."""
    torch.manual_seed(11)
    return DuetPipeline(DuetDenoiser().eval(), DDIMScheduler())


# What latentc knows of it.


class Denoiser(torch.nn.Module):
    """The network with its inputs in the order of the component's."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, strip: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, strip_noise = self.network(sample, timestep, strip)
        return image, strip_noise


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    sample, strip = sample_spec(CHANNELS), TensorSpec("float32", ("batch", *STRIP))
    inputs = {"sample": sample, "timestep": timestep_spec(), "strip": strip}
    outputs = {"prediction": sample, "strip_prediction": strip}
    denoiser = Component("denoiser", "denoiser", inputs, outputs)
    decoder = Component("decoder", "decoder", {"latents": sample}, {"image": sample})
    draft = Draft("duet", type(pipe), Latents(CHANNELS, 1, 1, SIDE, SIDE))
    draft.branch("both")
    draft.decoder = decoder.name
    strip_noise = draft.noise("strip_latents", STRIP, Phase.AFTER_NOISE)
    draft.other_states = (
        State(
            name="denoised_strip", noise=strip_noise, input="strip", prediction="strip_prediction"
        ),
    )
    return Description(
        programs=(draft.program(),),
        graphs=(Graph(denoiser, Denoiser(pipe.denoiser)), Graph(decoder, Denormalise())),
        tokens=(),
        denoiser=pipe.denoiser,
        call=calling(pipe),
        resizable=False,
    )
