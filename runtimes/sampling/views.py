"""Views of latents: parts of an image that a denoiser looks at one after the other, and that become
one image again after each step.

Bar-Tal et al. 2023, "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation"
(https://arxiv.org/abs/2302.08113), equation 5: where views overlap, the image is their mean. Each
view has a state of its own beside the latents, as diffusers' panorama pipeline keeps one of its
scheduler for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.sampling.sampler import Steps, with_latents

MOST_VIEWS = 4096  # in one call: each is an evaluation of the denoiser in every step
View: TypeAlias = tuple[slice, slice]


def count_views(sides: Sequence[int], size: int, stride: int) -> int:
    """Return how many views there are of latents with these sides."""
    return int(np.prod([len(_starts(side, size, stride)) for side in sides]))


def views_of(sides: Sequence[int], size: int, stride: int) -> list[View]:
    """Return the places of all views, row by row from the upper left corner.

    Args:
        sides: height and width in latents.
        size: of a view along both sides, which is smaller where the latents are.
        stride: from one view to the next.
    """
    rows, columns = (
        [slice(start, start + min(size, side)) for start in _starts(side, size, stride)]
        for side in sides
    )
    return [(row, column) for row in rows for column in columns]


def _starts(side: int, size: int, stride: int) -> range:
    return range(0, max(side - size, 0) + 1, stride)


def cut(latents: Array, views: Sequence[View]) -> Array:
    """Return [B, C, H, W] as its views one after the other, [V*B, C, h, w]."""
    return np.concatenate([latents[..., rows, columns] for rows, columns in views])


def put_together(parts: Array, views: Sequence[View], shape: Sequence[int]) -> Array:
    """Return the mean of all views at each place: the reverse of `cut`."""
    total, counts = np.zeros(shape, parts.dtype), np.zeros(shape[-2:], parts.dtype)
    for (rows, columns), part in zip(views, np.split(parts, len(views)), strict=True):
        total[..., rows, columns] += part
        counts[rows, columns] += 1
    mean: Array = total / counts
    return mean


def one_by_one(
    predict: Callable[[Array, Array], Array], views: int, images: int
) -> Callable[[Array, Array], Array]:
    """Return what predicts for one view after the other.

    Args:
        predict: for the rows of one view, [G*B, C, h, w] with the branches of guidance outermost.
        views: how many there are; `images`: B.
    """

    def predict_all(sample: Array, timestep: Array) -> Array:
        inner = sample.shape[1:]
        parts = sample.reshape(-1, views, images, *inner)
        predictions = np.empty_like(parts)
        for view in range(views):
            rows = np.ascontiguousarray(parts[:, view]).reshape(-1, *inner)
            predictions[:, view] = predict(rows, timestep).reshape(parts[:, view].shape)
        return predictions.reshape(sample.shape)

    return predict_all


def merged(steps: Steps, views: Sequence[View], shape: Sequence[int]) -> Steps:
    """Return the steps of `latentc.runtimes.sampling.sampler.denoise` over views as steps of the
    whole latents, which the views are cut from again for the next step.

    Args:
        shape: of the whole, [B, C, H, W].

    Like those steps it takes another sample by ``send``.
    """
    return with_latents(
        steps,
        lambda step: put_together(step.latents, views, shape),
        lambda latents: cut(latents, views),
    )
