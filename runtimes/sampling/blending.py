"""Inpainting with a denoiser that knows no masks: after each step what is not to change is put
back, with as much noise as the sample has there."""

from __future__ import annotations

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.sampling.plan import SamplingPlan
from latentc.runtimes.sampling.sampler import Step, Steps, with_latents


def blended(
    steps: Steps,
    plan: SamplingPlan,
    mask: Array,
    clean: Array,
    noise: Array,
) -> Steps:
    """Return the steps of `latentc.runtimes.sampling.sampler.denoise`, blended.

    mask: [B, 1, H, W], 1 where the sample stays, 0 where it becomes `clean` [B, C, H, W] and
        `noise` [B, C, H, W], mixed as the plan says (`SamplingPlan.known`).

    Like those steps it takes another sample by ``send``.
    """
    kept = (1 - mask).astype(np.float32)

    def latents_of(step: Step) -> Array:
        of_clean, of_noise = plan.known[step.index]
        noisy = np.float32(of_clean) * clean + np.float32(of_noise) * noise
        latents: Array = kept * noisy + mask * step.latents
        return latents

    return with_latents(steps, latents_of, lambda latents: latents)
