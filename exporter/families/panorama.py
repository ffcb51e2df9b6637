"""Panoramas by MultiDiffusion (Bar-Tal et al. 2023, https://arxiv.org/abs/2302.08113): Stable
Diffusion looks at square views of a wide image, one after the other in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from msgspec import structs

from latentc.exporter.components.description import Description
from latentc.exporter.components.text_to_image import vae_factor
from latentc.exporter.families import stable_diffusion
from latentc.exporter.programs.defaults import defaults_of
from latentc.exporter.programs.draft import Draft
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.statements import Views

COMPONENTS = stable_diffusion.COMPONENTS
_FACTOR = 8  # pixels per latent, whatever the VAE's are: the pipeline counts its views by it
_VIEWS = Views(size=64, stride=8)  # of the pipeline's `get_views`, which its call does not change


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`.

    Raises:
        UnsupportedPipeline: the VAE makes another number of pixels of a latent than 8.
    """
    factor = vae_factor(pipe.vae)
    if factor != _FACTOR:
        raise UnsupportedPipeline(
            f"a {type(pipe).__name__} whose VAE makes {factor} pixels of a latent: the pipeline "
            f"counts on {_FACTOR}, and leaves parts of the image empty in diffusers"
        )
    # Of several images the class gives views of one the texts of another.
    return replace(stable_diffusion.describe(pipe, _write), makes_several=False)


def _write(draft: Draft) -> None:
    stable_diffusion.write(draft)
    draft.views = _VIEWS
    usual = defaults_of(draft.stands_for)
    (height,), (width,) = usual["height"], usual["width"]
    # Of other sides diffusers leaves a strip at the end empty.
    draft.latents = structs.replace(
        draft.latents,
        multiple=_VIEWS.stride,
        default_height=int(height),
        default_width=int(width),
    )
