"""Where the shapes example wants its latents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from diffusers import AutoencoderKL

from examples.shapes import data
from examples.shapes.opponent import COLOUR_SPAN, COVER_MIDDLE, COVER_SPAN, opponent_layout
from latentc import builtin_model
from latentc.benchmarks.shapes.scenes import COLOURS, Placed, Scene


def middle(colour: str) -> np.ndarray:
    scene = Scene((Placed(colour, "square", 32.0, 32.0, 32.0),))
    return opponent_layout(scene)[:, 8, 8]


@pytest.mark.parametrize("pair", list(itertools.combinations(COLOURS, 2)), ids="-".join)
def test_any_two_colours_lie_far_apart(pair: tuple[str, str]) -> None:
    distance = float(np.linalg.norm(middle(pair[0]) - middle(pair[1])))
    assert distance >= COLOUR_SPAN * 2**0.5 - 1e-5


def test_background_is_zero_but_for_the_cover() -> None:
    layout = opponent_layout(Scene(()))
    assert layout.shape == (4, 16, 16)
    assert not layout[:3].any()
    np.testing.assert_allclose(layout[3], -COVER_SPAN * COVER_MIDDLE)


def test_a_later_shape_hides_an_earlier_one() -> None:
    below, above = (Placed(colour, "square", 32.0, 32.0, 32.0) for colour in ("red", "blue"))
    inner = np.s_[:, 5:11, 5:11]  # at the edge the lower one shows through, as in the image
    hidden, alone = opponent_layout(Scene((below, above))), opponent_layout(Scene((above,)))
    np.testing.assert_allclose(hidden[inner], alone[inner], atol=1e-6)


def test_shipped_autoencoder_keeps_to_the_layout() -> None:
    autoencoder = AutoencoderKL.from_pretrained(builtin_model() / "vae")
    images, layout = data.autoencoder_batch(seed=9, step=0, size=8)
    latents = autoencoder.encode(images).latent_dist.mode()
    for axis in range(3):
        found = latents[:, axis].detach().numpy().ravel()
        assert np.corrcoef(found, layout[:, axis].numpy().ravel())[0, 1] > 0.95
