"""Pipelines whose denoiser is a transformer make the same images as diffusers: PixArt, Stable
Diffusion 3 and FLUX.1, at sizes that were not traced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers.plans import add_to_bundle
from latentc.exporter.verification.reference import watched
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import ExportError, InputError
from latentc.runtimes.texts.tokenizer import PromptTruncatedWarning
from latentc.runtimes.verification.verify import relative_l2
from tests.support.combinations import kept
from tests.support.transformers import FROM_TEXT, STEPS, exported

SEED = 7
LATENTS = 1e-4  # relative L2 of the final latents
IMAGE = 2  # of 255
TEXTS = {"prompt": ["A Red circle ", "blue square above a large red circle"]}
GUIDED = {"negative_prompt": ["blue", "a flat drawing"], "guidance_scale": 3.0}
EXACT = {"use_resolution_binning": False}
# Per bundle, the arguments of two calls.
CALLS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "pixart-alpha": (
        {**TEXTS, **GUIDED, "num_images_per_prompt": 2, "height": 64, "width": 96, **EXACT},
        {"prompt": "a red circle", "height": 80, "width": 48, **EXACT},
    ),
    "pixart-sigma": (
        {**TEXTS, **GUIDED, "height": 24, "width": 40},
        {"prompt": "a red circle", "height": 32, "width": 32, "guidance_scale": 1.0},
    ),
    "sd3": (
        {**TEXTS, **GUIDED, "num_images_per_prompt": 2, "height": 24, "width": 40},
        {
            "prompt": "a red circle",
            "prompt_2": "blue",
            "prompt_3": "a flat drawing",
            "negative_prompt": "small",
            "negative_prompt_3": "large",
            "height": 64,
            "width": 56,
        },
    ),
    "sd3-without": (
        {**TEXTS, **GUIDED, "height": 24, "width": 40},
        {"prompt": "a red circle", "prompt_2": "blue", "height": 32, "width": 32},
    ),
    "flux-dev": (
        {**TEXTS, "num_images_per_prompt": 2, "height": 48, "width": 80, "guidance_scale": 2.5},
        {"prompt": "a red circle", "prompt_2": "blue", "height": 128, "width": 112},
    ),
    "flux-schnell": (
        {**TEXTS, "height": 48, "width": 80},
        {
            "prompt": "a red circle",
            "negative_prompt": "blue",
            "true_cfg_scale": 3.0,
            "height": 48,
            "width": 48,
        },
    ),
}
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "coreml": "coreml-reference"}
RUNS = [(name, ENGINES[each]) for name, (_, own) in FROM_TEXT.items() for each in own["targets"]]
OFTEN = [run for run in RUNS if run[0] in ("pixart-alpha", "sd3", "flux-dev")]

Made = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def bundle(pipeline_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """A function: name in `FROM_TEXT` → the exported bundle, verified."""

    return lambda name: exported(name, pipeline_folder)


@pytest.fixture(scope="module")
def reference(pipeline_folder: Callable[[str], Path]) -> Callable[[str, int], Made]:
    """Final latents and uint8 images of the diffusers pipeline, computed once for a call."""
    known: dict[tuple[str, int], Made] = {}

    def get(name: str, call: int) -> Made:
        if (name, call) not in known:
            known[name, call] = run(name, CALLS[name][call])
        return known[name, call]

    def run(name: str, arguments: Mapping[str, Any]) -> Made:
        pipeline, options = FROM_TEXT[name]
        absent = dict.fromkeys(options.get("without", ()))
        with quiet_loading():
            pipe = DiffusionPipeline.from_pretrained(
                pipeline_folder(pipeline), **absent, **({"tokenizer_3": None} if absent else {})
            )
        pipe.set_progress_bar_config(disable=True)
        description = family_of(type(pipe).__name__).describe(pipe)
        # There is no list of sizes for the tiny Σ model.
        own = {"clean_caption": False, **EXACT} if name.startswith("pixart") else {}
        with watched(pipe, pipe.transformer, description) as seen, torch.no_grad():
            images = pipe(
                **{**own, **arguments},
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(SEED),
                output_type="np",
            ).images
        assert seen.latents is not None
        return seen.latents.numpy(), (images * 255).round().astype(np.uint8)

    return get


@pytest.mark.support(family="name", task="text-to-image", target="backend")
@pytest.mark.parametrize(("name", "backend"), kept(RUNS, *OFTEN))
def test_same_images(
    name: str,
    backend: str,
    bundle: Callable[[str], Path],
    reference: Callable[[str, int], Made],
) -> None:
    """Two texts and a negative one, images that are not square, sizes that were not traced."""
    with latentc.load(bundle(name), backend=backend) as pipe:
        for call, arguments in enumerate(CALLS[name]):
            latents, images = reference(name, call)
            result = pipe(**arguments, num_inference_steps=STEPS, seed=SEED)
            found = np.stack([np.asarray(image) for image in result.images]).astype(int)
            assert relative_l2(result.latents, latents) <= LATENTS
            assert np.abs(found - images).max() <= IMAGE


def test_the_noise_follows_the_size(bundle: Callable[[str], Path]) -> None:
    """The noises that the test above compares are not the same at both sizes."""
    for name in ("sd3", "flux-dev"):
        with latentc.load(bundle(name), backend="onnxruntime") as pipe:
            begun = []
            for arguments in CALLS[name]:
                size = {side: arguments[side] for side in ("height", "width")}
                run = pipe.stream("a red circle", num_inference_steps=STEPS, seed=1, **size)
                begun.append([step.timestep for step in run])
        assert abs(begun[0][1] - begun[1][1]) > 0.5


def test_resolution_matters(bundle: Callable[[str], Path]) -> None:
    with latentc.load(bundle("pixart-alpha"), backend="onnxruntime") as pipe:
        size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "seed": 1, **EXACT}
        first = pipe("a red circle", output_type="latent", **size)
        other = pipe("a red circle", output_type="latent", resolution=(1024, 512), **size)
    assert relative_l2(first.latents, other.latents) > 1e-3


@pytest.mark.combinations
def test_a_part_that_is_left_out(
    bundle: Callable[[str], Path], pipeline_folder: Callable[[str], Path]
) -> None:
    manifest = Manifest.load(bundle("sd3-without"))
    assert manifest.source.without == ("text_encoder_3",)
    assert "text_encoder_3" not in {each.name for each in manifest.components}
    assert {each.name for each in manifest.tokenizers} == {"tokenizer", "tokenizer_2"}
    with pytest.raises(ExportError, match=r"has changed since|would be lost"):
        export(pipeline_folder("sd3"), bundle("sd3-without"), targets=("openvino",), steps=(4,))


@pytest.mark.parametrize(
    ("pipeline", "without", "message"),
    [
        ("sd3", "vae", "--without vae: no pipeline can be exported without it"),
        ("flux-dev", "text_encoder_3", "without 'text_encoder_3'; it works without: nothing"),
    ],
)
def test_parts_that_are_needed(
    pipeline: str,
    without: str,
    message: str,
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        export(pipeline_folder(pipeline), tmp_path / "bundle", without=without)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.fault("3.8", "FLUX: sizes that are no multiples are made smaller, with a warning")
def test_sizes_are_rounded_as_diffusers_does(
    bundle: Callable[[str], Path], pipeline_folder: Callable[[str], Path]
) -> None:
    with quiet_loading():
        theirs = DiffusionPipeline.from_pretrained(pipeline_folder("flux-dev"))
        theirs.set_progress_bar_config(disable=True)
        call = {"height": 71, "width": 45, "num_inference_steps": STEPS}
        expected = theirs(
            "a red circle", generator=torch.Generator().manual_seed(1), output_type="np", **call
        ).images
    with (
        latentc.load(bundle("flux-dev"), backend="onnxruntime") as pipe,
        pytest.warns(
            UserWarning, match="height 71 is not a multiple of .*: .* is taken in its place"
        ),
    ):
        result = pipe("a red circle", seed=1, output_type="np", **call)
    assert result.images.shape == expected.shape
    assert np.abs(result.images - expected).max() <= IMAGE / 255
    sides = tuple(result.settings[name] for name in ("height", "width"))
    assert sides == expected.shape[1:3] != (71, 45)


@pytest.mark.fault("3.8", "FLUX: no side has a limit of ours, only the area of an image")
def test_long_sides(bundle: Callable[[str], Path]) -> None:
    with latentc.load(bundle("flux-dev"), backend="onnxruntime") as pipe:
        factor = pipe.manifest.latents.factor
        for height, width in ((1024, 64), (64, 1024), (512, 512)):
            pipe.stream("a red circle", height=height * factor, width=width * factor).close()
        with pytest.raises(InputError, match=r"'flow_euler' are for images of up to .* megapixels"):
            pipe.stream("a red circle", height=1024 * factor, width=512 * factor)


def test_sizes_have_a_limit(
    bundle: Callable[[str], Path], pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with latentc.load(bundle("sd3"), backend="onnxruntime") as pipe:
        with pytest.raises(InputError, match="height 68: this model makes at most 64"):
            pipe("a red circle", height=68, width=32)
        with pytest.raises(InputError, match="width 30 is not a multiple of 4"):
            pipe("a red circle", width=30)
    with pytest.raises(InputError, match="height 68: this model makes at most 64"):
        export(pipeline_folder("sd3"), tmp_path / "bundle", height=68, width=32)


@pytest.mark.combinations
def test_schnell_is_told_no_guidance(bundle: Callable[[str], Path]) -> None:
    with (
        latentc.load(bundle("flux-schnell"), backend="openvino") as pipe,
        pytest.raises(InputError, match="unknown argument 'guidance_scale'"),
    ):
        pipe("a red circle", height=48, width=48, guidance_scale=2.0)


def test_texts_of_t5(bundle: Callable[[str], Path], pipeline_folder: Callable[[str], Path]) -> None:
    """Their length is the pipeline's, not the tokenizer's; PixArt writes them small."""
    from transformers import AutoTokenizer

    texts = ["", "  A Small RED circle!  ", "ß “Ünïcödé” 🚀 x", "large " * 200]
    original = AutoTokenizer.from_pretrained(pipeline_folder("pixart-alpha") / "tokenizer")
    wanted = original(
        [text.lower().strip() for text in texts],
        padding="max_length",
        max_length=120,
        truncation=True,
    ).input_ids
    with (
        latentc.load(bundle("pixart-alpha"), backend="onnxruntime") as pipe,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        found = pipe.tokenizers["tokenizer"].encode(texts)
    assert found.tolist() == wanted
    assert [each.category for each in caught] == [PromptTruncatedWarning]


def test_schedulers_of_another_kind(
    bundle: Callable[[str], Path], pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The default set is for diffusion: none of it is there, and asking for one is an error."""
    manifest = Manifest.load(bundle("sd3"))
    assert [each.name for each in manifest.schedules] == ["flow_euler"]
    with pytest.raises(InputError, match="EulerDiscreteScheduler is not for models of flow"):
        export(pipeline_folder("sd3"), tmp_path / "b", schedulers=["euler"], steps=(4,))
    with pytest.raises(InputError, match=r"FlowMatchHeun.* is not for models of diffusion"):
        export(pipeline_folder("sd"), tmp_path / "b", schedulers=["flow_heun"], steps=(4,))


def test_more_steps_of_a_shifted_scheduler(
    bundle: Callable[[str], Path], tmp_path: Path, pipeline_folder: Callable[[str], Path]
) -> None:
    """Plans are added without the pipeline, as its scheduler and what it is told have them."""
    import shutil

    copy = shutil.copytree(bundle("flux-dev"), tmp_path / "bundle")
    add_to_bundle(copy, schedulers=["flow_euler"], steps=[3])
    arguments = {"prompt": "a red circle", "height": 48, "width": 80, "num_inference_steps": 3}
    with quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(pipeline_folder("flux-dev"))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        **arguments, generator=torch.Generator().manual_seed(SEED), output_type="np"
    ).images
    with latentc.load(copy, backend="onnxruntime") as ours:
        found = ours(**arguments, seed=SEED, output_type="np").images
    assert np.abs(found - images).max() <= IMAGE / 255
