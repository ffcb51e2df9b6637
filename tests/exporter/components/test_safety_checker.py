"""These tests hold a safety checker's component against transformers and diffusers themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessorPil

from latentc.exporter.components.names import USUAL, precision_of
from latentc.exporter.components.processors import Prepared
from latentc.exporter.components.safety_checker import SafetyChecker
from latentc.exporter.families import stable_diffusion
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.bundle.precision import canonical
from latentc.runtimes.errors import UnsupportedPipeline
from tests.support import tiny

SIZES = [(24, 24), (32, 48), (17, 40), (128, 96), (300, 200), (23, 25), (512, 520)]
PROCESSORS: list[dict[str, Any]] = [
    {},
    {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
    {"size": {"shortest_edge": 21}, "crop_size": {"height": 20, "width": 17}},
    # Smaller than the middle that is cut out of it, which is black around it then.
    {"size": {"shortest_edge": 20}, "crop_size": {"height": 31, "width": 28}},
    {"size": {"shortest_edge": 31}, "crop_size": {"height": 30, "width": 30}, "resample": 2},
    {"do_normalize": False, "rescale_factor": 1 / 128},
    {"do_rescale": False},
]


def images_of(height: int, width: int, seed: int = 0, count: int = 2) -> np.ndarray:
    """Images of noise with a smooth one's edges, somewhat beyond 0 and 1."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    smooth = np.stack([np.sin(9 * x + 4 * y + k + seed) for k in range(3)], axis=-1) / 2 + 0.5
    noise = np.random.default_rng(seed).normal(0, 0.2, (count, height, width, 3))
    return (smooth + noise).astype(np.float32)


def pillow(images: np.ndarray) -> list[PIL.Image.Image]:
    return StableDiffusionPipeline.numpy_to_pil(images.clip(0, 1))


@pytest.mark.parametrize("options", PROCESSORS, ids=str)
def test_images_are_prepared_as_by_pillow(options: dict[str, Any]) -> None:
    """But for one level of 255 here and there: Pillow weighs with 22 bits, and where a sum is half
    a level, rounding goes one way or the other."""
    processor = CLIPImageProcessorPil(**options)
    prepared = Prepared(processor)
    level = processor.rescale_factor if processor.do_rescale else 1.0
    level /= min(processor.image_std) if processor.do_normalize else 1.0
    for height, width in SIZES:
        images = images_of(height, width)
        expected = np.stack(processor(pillow(images))["pixel_values"])
        found = prepared(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        assert found.shape == expected.shape
        difference = np.abs(found - expected)
        assert difference.max() < 2.01 * level
        assert (difference > level / 100).mean() < 0.05


def test_the_rules_are_those_of_diffusers() -> None:
    """Over many images: scores are rounded, and what needs special care is judged more strictly."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    checker = tiny.safety_checker()
    images = np.concatenate([images_of(40, 32, seed, 3) for seed in range(20)])
    pixels = processor(pillow(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        made = checker.visual_projection(checker.vision_model(pixels)[1])
        near = torch.nn.functional.cosine_similarity(made, checker.concept_embeds[:1])
        middle = near.sort().values
        care = torch.nn.functional.cosine_similarity(made, checker.special_care_embeds[:1])
        checker.special_care_embeds_weights[0] = care.median()
        plain, stricter, rounded = set[tuple[bool, ...]](), [], []
        for threshold in (middle[30] - 0.0004, middle[30] - 0.0006, middle[30] + 0.005):
            checker.concept_embeds_weights[0] = threshold
            _, expected = checker(clip_input=pixels, images=torch.from_numpy(images).clone())
            shown, flags = SafetyChecker(checker, processor)(
                torch.from_numpy(images).permute(0, 3, 1, 2)
            )
            assert flags.tolist() == expected
            assert [not image.any() for image in shown] == expected
            plain.add(tuple(expected))
            stricter += [flag and own < threshold for flag, own in zip(expected, near, strict=True)]
            rounded += [
                not flag and own > threshold for flag, own in zip(expected, near, strict=True)
            ]
    assert len(plain) > 1
    assert any(stricter)  # flagged by what special care adds alone
    assert any(rounded)  # above the threshold, by less than what counts


def pipe_with(**parts: Any) -> Any:
    """A pipeline in the place of a loaded one."""
    own = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return {"safety_checker": tiny.safety_checker(), "feature_extractor": own, **parts}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"safety_checker": SimpleNamespace()}, "of the class SimpleNamespace is not supported"),
        ({"feature_extractor": {}}, r"24 pixels, and the feature_extractor makes some of \[224"),
        ({"feature_extractor": {"resample": 1}}, "with resample 1 is not supported"),
        ({"feature_extractor": {"do_center_crop": False}}, "do_center_crop False"),
    ],
)
def test_what_is_not_supported(parts: dict[str, Any], says: str, smallest: Path) -> None:
    """It is refused, and the way to do without it is named."""
    with quiet_loading():
        pipe = StableDiffusionPipeline.from_pretrained(smallest, safety_checker=None)
    made = pipe_with(**parts)
    made["feature_extractor"] = CLIPImageProcessorPil(**made["feature_extractor"])
    for name, part in made.items():
        setattr(pipe, name, part)
    with pytest.raises(UnsupportedPipeline, match=says) as error:
        stable_diffusion.describe(pipe)
    assert "--without safety_checker" in str(error.value)


def test_it_is_in_fp32_unless_it_is_named() -> None:
    assert precision_of("fp16", "safety_checker") == "fp32"
    assert precision_of("w8a8", "safety_checker") == "fp32"
    assert precision_of("fp16,safety_checker=fp16", "safety_checker") == "fp16"
    assert canonical("fp16,safety_checker=fp32", USUAL) == "fp16"
    assert canonical("fp16,safety_checker=fp16", USUAL) == "fp16,safety_checker=fp16"
