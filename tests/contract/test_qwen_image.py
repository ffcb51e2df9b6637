"""Qwen-Image makes the same images as diffusers: texts in a template and of different lengths,
guidance that keeps the length of each patch, sizes that were not traced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.families.qwen_image import describe
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.verification.reference import watched
from latentc.runtimes.bundle.sizes import of_longest_texts, ranges, text_lengths
from latentc.runtimes.errors import InputError
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.texts.tokenizer import PromptTruncatedWarning
from latentc.runtimes.verification.verify import relative_l2
from tests.docs import independent_loader
from tests.support.uncaptured import uncaptured

SEED = 7
LATENTS = 1e-4  # relative L2 of the final latents
IMAGE = 2  # of 255
PROMPTS = ["A red circle", "\n\na small blue square above it, 3 of them"]
CALLS: tuple[Mapping[str, Any], ...] = (
    {
        "prompt": PROMPTS,
        "negative_prompt": ["blue, flat", ""],
        "height": 24,
        "width": 40,
        "num_inference_steps": 3,
    },
    {
        "prompt": "a red circle",
        "negative_prompt": " ",
        "true_cfg_scale": 1.5,
        "num_images_per_prompt": 2,
        "height": 56,
        "width": 24,
        "num_inference_steps": 4,
    },
    {"prompt": "", "height": 71, "width": 45, "num_inference_steps": 3},
    {"prompt": "a", "negative_prompt": "b", "true_cfg_scale": 1.0, "height": 8, "width": 48,
     "num_inference_steps": 4},
)  # fmt: skip
# Texts that a template, or its end, may do something to.
TEXTS = (
    *("", " ", "\n", "\n\n a red circle\n", "<|endoftext|>", "a<|im_end|>\n", "{} {0}", "é ½ 🚀"),
    *(" ".join(["red"] * count) for count in (505, 507, 509, 512, 513, 600)),
)

Made = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def theirs(pipeline_folder: Callable[[str], Path]) -> QwenImagePipeline:
    """Return diffusers' pipeline."""
    with quiet_loading():
        pipe = QwenImagePipeline.from_pretrained(pipeline_folder("qwen-image"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def bundle(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("qwen-image") / "bundle"
    targets = ["onnx", "openvino"]
    return export(pipeline_folder("qwen-image"), folder, targets=targets, steps=(3, 4)).bundle


@pytest.fixture(scope="module")
def ours(bundle: Path) -> Iterator[Pipeline]:
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        yield pipe


def made(pipe: QwenImagePipeline, **call: Any) -> Made:
    """Return final latents and uint8 images of diffusers' pipeline."""
    with watched(pipe, pipe.transformer, describe(pipe)) as seen, torch.no_grad():
        generator = torch.Generator().manual_seed(SEED)
        images = pipe(**call, generator=generator, output_type="np").images
    assert seen.latents is not None
    return seen.latents.numpy(), (images * 255).round().astype(np.uint8)


@pytest.mark.support(family="qwen-image", task="text-to-image", target="backend")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_same_images(backend: str, bundle: Path, theirs: QwenImagePipeline) -> None:
    with latentc.load(bundle, backend=backend) as pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 71 by 45 pixels are made smaller, as theirs
        for call in CALLS:
            latents, images = made(theirs, **call)
            result = pipe(**call, seed=SEED)
            found = np.stack([np.asarray(image) for image in result.images]).astype(int)
            assert relative_l2(result.latents, latents) <= LATENTS
            assert np.abs(found - images).max() <= IMAGE


def test_another_reader_makes_the_same_images(bundle: Path, ours: Pipeline) -> None:
    """The one of docs/bundle-format.md knows templates, and what combines predictions."""
    call = {"prompt": PROMPTS, "negative_prompt": ["blue, flat", ""], "num_inference_steps": 3}
    settings = {**call, "height": 16, "width": 24, "seed": SEED}
    latents, _ = independent_loader.Bundle(bundle)(**settings)
    assert relative_l2(latents, ours(**settings).latents) < 1e-5


def test_several_images_of_several_texts(ours: Pipeline, theirs: QwenImagePipeline) -> None:
    """Each image has the mask of its own text: in diffusers only where each has a prompt."""
    size = {"height": 16, "width": 24, "num_inference_steps": 3}
    latents, _ = made(theirs, prompt=[text for text in PROMPTS for _ in range(2)], **size)
    result = ours(PROMPTS, num_images_per_prompt=2, seed=SEED, **size)
    assert relative_l2(result.latents, latents) <= LATENTS


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text: str, ours: Pipeline, theirs: QwenImagePipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        found = ours.encode_prompt(["a red circle", text])
    with torch.no_grad():
        states, mask = theirs.encode_prompt(["a red circle", text], max_sequence_length=512)
    assert found["prompt_embeds"].shape == states.shape
    assert relative_l2(found["prompt_embeds"], states.numpy()) <= 1e-5
    wanted = torch.ones(states.shape[:2]) if mask is None else mask  # where nothing is filled up
    assert np.array_equal(found["prompt_embeds_mask"], wanted.numpy())


def test_what_is_cut_is_the_text(ours: Pipeline) -> None:
    """The end of the template may be cut without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.encode_prompt("a" + " red" * 511)
    with pytest.warns(PromptTruncatedWarning, match=r"tokens: \[' blue'\]"):
        ours.encode_prompt("a" + " red" * 511 + " blue")


def test_encoded_texts(ours: Pipeline) -> None:
    """They are given with their masks."""
    call = {"height": 16, "width": 24, "num_inference_steps": 3, "seed": SEED}
    texts = {"prompt": "a red circle above a blue square", "negative_prompt": "blue"}
    encoded = ours.encode_prompt(**texts)
    assert {*encoded} == {
        f"{side}prompt_embeds{kind}" for side in ("", "negative_") for kind in ("", "_mask")
    }
    latents = ours(**encoded, **call).latents
    assert np.array_equal(latents, ours(**texts, **call).latents)
    # Texts beside them become as long.
    longer = ours.encode_prompt(prompt=texts["prompt"], negative_prompt="blue " * 20)
    own = {name: value for name, value in longer.items() if not name.startswith("negative_")}
    beside = ours(**own, negative_prompt="blue", **call).latents
    assert relative_l2(beside, latents) < 1e-5
    with pytest.raises(InputError, match=r"has 28 positions, and the texts of this call make"):
        ours(**own, negative_prompt="blue " * 30, **call)
    # One alone is as long as in a whole call with both, or as it is without the other.
    own = ours.compute("negative_prompt_embeds", **texts)
    assert np.array_equal(own, encoded["negative_prompt_embeds"])
    (alone,) = ours.compute("negative_prompt_embeds", negative_prompt="blue")
    assert relative_l2(alone, own[0, : len(alone)]) < 1e-5
    assert len(alone) < own.shape[1]
    del encoded["prompt_embeds_mask"]
    with pytest.raises(InputError, match="'prompt_embeds' without 'prompt_embeds_mask'"):
        ours(**encoded, **call)


def test_loaded_for_one_length(bundle: Path, ours: Pipeline) -> None:
    """Where sizes are fixed, and on engines that take one length, texts are as long as any."""
    size = {"height": 16, "width": 24}
    call = {"prompt": "a red circle", "negative_prompt": "", "num_inference_steps": 3, **size}
    with latentc.load(bundle, backend="openvino", static={**size, "images": 1}) as pipe:
        encoded = pipe.encode_prompt("a red circle")
        latents = pipe(**call, seed=SEED).latents
    assert encoded["prompt_embeds"].shape[1] == 512
    assert relative_l2(latents, ours(**call, seed=SEED).latents) <= LATENTS
    manifest = ours.manifest
    longest = of_longest_texts(manifest)
    assert longest["text_encoder"] == {"tokens": 546}
    assert longest["denoiser"] == {"sequence": 512}
    lengths = text_lengths(manifest.programs, manifest.components)
    spans = ranges(manifest.components, manifest.latents, manifest.guidance, {}, lengths)
    shortest, _, most = spans["text_encoder"]["tokens"]
    # Of the shortest text the template's end is left.
    assert shortest <= ours.encode_prompt("")["prompt_embeds"].shape[1] + 34 < most == 546


@pytest.mark.parametrize(
    "name", ["guidance_scale", "attention_kwargs", "max_sequence_length", "sigmas"]
)
def test_arguments_that_bundles_do_not_have(name: str, ours: Pipeline) -> None:
    with pytest.raises(InputError, match=f"unknown argument '{name}'"):
        ours.stream("a red circle", **{name: 1})


def test_step_counts_that_the_scheduler_refuses_are_named(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """One step has no noise levels where they are shifted until the last one."""
    with pytest.warns(UserWarning, match="FlowMatchEulerDiscreteScheduler refuses 1 steps"):
        pipe = uncaptured(pipeline_folder("qwen-image"), tmp_path / "bundle", steps=(1, 4))
    assert pipe.manifest.schedules[0].steps == (4,)
    pipe.close()
