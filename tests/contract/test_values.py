"""Values of a call's program, given and asked for: what is refused, and in which words, and that
they are those of diffusers. That each can be given back is for test_every_argument.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from latentc.runtimes.errors import InputError, NumericalError, PlanNotFound
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.verification.verify import relative_l2
from tests.support.sample_images import mask, sample_image
from tests.support.uncaptured import uncaptured

SIDE = 32
IMAGE = sample_image(SIDE, SIDE)
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "output_type": "latent"}
LATENTS = np.zeros((1, 4, 16, 16), np.float32)


@pytest.fixture(scope="module")
def source(pipeline_folder: Callable[[str], Path]) -> Path:
    return pipeline_folder("sd")


@pytest.fixture(scope="module")
def pipe(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """PyTorch's own modules, for three programs."""
    folder = tmp_path_factory.mktemp("values") / "bundle"
    return uncaptured(source, folder, ("image-to-image", "inpainting"), steps=(1, 2))


@pytest.fixture(scope="module")
def pix2pix(pipeline_folder: Callable[[str], Path], tmp_path_factory: Any) -> Pipeline:
    """A bundle whose only program takes an image."""
    folder = tmp_path_factory.mktemp("pix2pix") / "bundle"
    return uncaptured(pipeline_folder("pix2pix"), folder, steps=(1, 2), mixing=True)


@pytest.mark.parametrize("seed", [5, [5, 9]])
def test_image_latents_are_those_of_diffusers(
    seed: int | list[int], source: Path, pipe: Pipeline
) -> None:
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(source, safety_checker=None)
    image = theirs.image_processor.preprocess(IMAGE)
    expected = []
    for each in np.atleast_1d(seed).tolist():
        generator = torch.Generator().manual_seed(each)
        with torch.no_grad():
            made = theirs.vae.encode(image).latent_dist.sample(generator)
        expected.append((made * theirs.vae.config.scaling_factor).numpy())
    found = pipe.compute(
        "image_latents", image=IMAGE, seed=seed, num_images_per_prompt=np.size(seed)
    )
    assert found.shape == (np.size(seed), 4, 16, 16)
    assert relative_l2(found, np.concatenate(expected)) < 1e-5


def test_values_are_those_of_the_whole_call(pipe: Pipeline) -> None:
    call = {"prompt": "a red circle", "image": IMAGE, "strength": 0.5, **CALL}
    whole = pipe(**call)
    found = pipe.compute("latents", "image_latents", "denoised", **call)
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["denoised"], whole.latents)
    for name in ("latents", "image_latents", "denoised"):
        np.testing.assert_array_equal(pipe.compute(name, **call), found[name])
    given = {name: value for name, value in call.items() if name != "image"}
    as_image = pipe(**given, image=found["image_latents"])
    by_name = pipe(**given, image_latents=found["image_latents"])
    np.testing.assert_array_equal(by_name.latents, as_image.latents)


def test_what_is_left_out(pipe: Pipeline, pix2pix: Pipeline) -> None:
    """A call may leave out what a value does not need: texts, images, the number of either."""
    two = pipe.compute("image_latents", image=[IMAGE, sample_image(SIDE, SIDE, seed=9)], seed=1)
    assert two.shape == (2, 4, 16, 16)
    assert pipe.compute("latents", seed=1, num_images_per_prompt=2).shape[0] == 2
    assert pipe.compute("negative_prompt_embeds", negative_prompt=["a", "b"]).shape[0] == 2
    assert pix2pix.compute("prompt_embeds", prompt="red").shape == (1, 77, 32)
    assert pix2pix.compute("latents", seed=1, height=SIDE, width=SIDE).shape == (1, 4, 16, 16)
    images = pipe(denoised=np.concatenate([LATENTS, LATENTS]), output_type="np")
    assert images.images.shape == (2, SIDE, SIDE, 3)
    assert (images.timings.steps, "guidance_scale" in images.settings) == ([], False)
    run = pipe.stream(denoised=LATENTS)
    assert (run.num_timesteps, run.guided(), [*run]) == (0, [], [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"image": IMAGE, "image_latents": LATENTS}, "'image' has no effect beside 'image_lat"),
        ({"image": LATENTS, "image_latents": LATENTS}, "'image' and 'image_latents' say the same"),
        ({"denoised": LATENTS}, "'prompt' has no effect beside 'denoised'"),
        (
            {"prompt": None, "denoised": LATENTS, "num_inference_steps": 2},
            "'num_inference_step",
        ),
        ({"prompt": None, "denoised": LATENTS, "latents": LATENTS}, "'latents' has no effect besi"),
        ({"prompt": None, "image_latents": LATENTS}, "no text given: this bundle needs 'prompt'"),
        ({"image_latents": LATENTS[:, :3]}, r"shape \[images, 4, height, width\], not \[1, 3, 16"),
        ({"image_latents": LATENTS[0]}, r"shape \[rows, 4, height, width\], not \[4, 16, 16\]"),
        ({"image_latents": np.zeros((2, 4, 16, 16))}, "2 latents in 'image_latents' for 1 images"),
        ({"image_latents": LATENTS + np.nan}, "'image_latents' holds NaN or infinity"),
        ({"image_latents": "latents"}, "'image_latents' must be an array of numbers"),
        ({"image_latents": LATENTS, "height": 48}, "height 48 does not fit 'image_latents', which"),
        (
            {"image_latents": LATENTS, "latents": np.zeros((1, 4, 8, 16))},
            "'latents' is for a height of 16, and 'image_latents' for one of 32|"
            "'image_latents' is for a height of 32, and 'latents' for one of 16",
        ),
        ({"image_latents": LATENTS, "mask_image": mask(SIDE, SIDE)}, "'mask_image' and 'image_lat"),
        (
            {"_image_latents": LATENTS},
            "unknown argument '_image_latents'; did you mean 'image_latents'",
        ),
        ({"masked_image_latents": LATENTS}, "unknown argument 'masked_image_latents'"),
        ({"denoised": LATENTS, "prompt": None, "padding_mask_crop": 2}, "no mask was given"),
    ],
)
def test_values_that_a_call_refuses(call: dict[str, Any], message: str, pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=message):
        pipe.stream(**{"prompt": "a", **call})


@pytest.mark.parametrize(
    ("names", "call", "message"),
    [
        (("_input_ids",), {"prompt": "a"}, "no value '_input_ids' can be asked for; this bundle "),
        (
            ("prompt",),
            {"prompt": "a"},
            "did you mean 'prompt_embeds' or 'negative_prompt_embeds'",
        ),
        ((3,), {"prompt": "a"}, "no value 3 can be asked for"),
        (("prompt_embeds",), {}, "no text given: this bundle needs 'prompt'"),
        (("image_latents",), {"prompt": "a"}, "'image' is missing"),
        (
            ("image_latents",),
            {"image": IMAGE, "mask_image": IMAGE},
            "this call gives 'image' and",
        ),
        (("latents", "_mask"), {"image": IMAGE}, "no value '_mask'"),
        (("latents",), {"strength": 0.5}, "'strength' changes nothing in text-to-image"),
        (("latents",), {"colour": 3}, "unknown argument 'colour'"),
        (("latents",), {"height": 33, "width": 32}, "height 33 is not a multiple of 2"),
        (("latents",), {"seed": [1, 2]}, "2 seeds for 1 images"),
        (("denoised",), {"prompt": "a", "scheduler": "x"}, "no scheduler 'x'"),
        (("denoised",), {"prompt": "a", "callback_on_step_end": print}, "unknown argument 'callb"),
        (("latents",), {"prompt": "a", "prompt_embeds": np.zeros((1, 77, 32))}, "say the same"),
    ],
)
def test_what_cannot_be_asked_for(
    names: tuple[Any, ...], call: dict[str, Any], message: str, pipe: Pipeline
) -> None:
    with pytest.raises(InputError, match=message):
        pipe.compute(*names, **call)


@pytest.mark.usefixtures("no_exporter")
def test_errors_of_what_is_run(pipe: Pipeline) -> None:
    with pytest.raises(PlanNotFound, match=f"latentc schedule {pipe.bundle.root} --scheduler"):
        pipe.compute("denoised", prompt="a", num_inference_steps=9)
    with pytest.raises(NumericalError, match="denoiser"):
        pipe.compute("denoised", prompt="a", latents=np.full((1, 4, 16, 16), 3e38), **CALL)
    pipe.compute("latents", seed=1, num_inference_steps=9)  # which needs no plan
