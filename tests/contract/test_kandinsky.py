"""Kandinsky 2.2 makes the same images as diffusers: of a text, from an image, of embeddings; its
prior alone makes the same embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.commands.generate import generate
from latentc.runtimes.errors import InputError, PlanNotFound
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.verification.verify import relative_l2
from tests.docs import independent_loader as reader
from tests.support.sample_images import sample_image

STEPS, PRIOR_STEPS = 6, 2  # after more, hardly anything is left of the noise of the prior
CALL: dict[str, Any] = {
    "prompt": "a red circle",
    "height": 64,
    "width": 128,
    "num_inference_steps": STEPS,
    "prior_num_inference_steps": PRIOR_STEPS,
}
EMBEDS = ("image_embeds", "negative_image_embeds")


@pytest.fixture(scope="module")
def bundle(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("kandinsky") / "bundle"
    options: dict[str, Any] = {
        "targets": ["onnx", "openvino"],
        "schedulers": ["ddim", "dpmpp_2m"],
        "steps": [PRIOR_STEPS, STEPS],
        "tasks": ["image-to-image"],
    }
    return export(pipeline_folder("kandinsky"), folder, **options).bundle


@pytest.fixture(scope="module")
def parts(pipeline_folder: Callable[[str], Path]) -> Mapping[str, Any]:
    with quiet_loading():
        cls = diffusers.KandinskyV22CombinedPipeline
        return dict(cls.from_pretrained(pipeline_folder("kandinsky")).components)


@pytest.fixture(params=["onnxruntime", "openvino"])
def ours(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with latentc.load(bundle, backend=request.param) as pipe:
        yield pipe


def original(parts: Mapping[str, Any], scheduler: str | None = None, image: bool = False) -> Any:
    """Return diffusers' own pipeline, with another scheduler for its decoder. One without a learned
    variance may not even have read of it: the pipeline asks the configuration."""
    kind = "Img2ImgCombined" if image else "Combined"
    own = dict(parts)
    if scheduler is not None:
        config = {k: v for k, v in own["scheduler"].config.items() if k != "variance_type"}
        own["scheduler"] = getattr(diffusers, scheduler).from_config(config)
    pipe = getattr(diffusers, f"KandinskyV22{kind}Pipeline")(**own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected_of(pipe: Any, seeds: Any, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents and the images of diffusers, in the size that the call's names say."""
    made = []
    for output_type in ("latent", "np"):
        several = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
        generator = several if isinstance(seeds, list) else several[0]
        images = pipe(generator=generator, output_type=output_type, callback_steps=None, **call)
        made.append(np.asarray(images.images))
    return made[0], made[1]


def assert_same(
    ours: Pipeline, expected: tuple[np.ndarray, np.ndarray], seeds: Any, **call: Any
) -> None:
    latents, images = expected
    result = ours(seed=seeds, output_type="np", **call)
    assert relative_l2(result.latents, latents) < 1e-4
    assert np.abs(result.images - images).max() <= 2 / 255


CALLS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "usual": (5, {}),
    "several": ([5, 6, 7, 8], {"prompt": ["a red circle", "blue"], "num_images_per_prompt": 2}),
    "one seed for all": (5, {"num_images_per_prompt": 2}),
    "without guidance": (5, {"guidance_scale": 1.0}),
    "a prior without guidance": (5, {"prior_guidance_scale": 1.0}),
    "strong guidance": (9, {"guidance_scale": 7.0, "prior_guidance_scale": 2.0}),
    "another size": (5, {"height": 128, "width": 64, "prior_num_inference_steps": STEPS}),
    "a negative prompt, and no guidance": (
        5,
        {"guidance_scale": 1.0, "negative_prompt": "blurred"},
    ),
    "a negative prompt, and a prior without guidance": (
        5,
        {"prior_guidance_scale": 1.0, "negative_prompt": "blurred"},
    ),
    "negative prompts": (
        5,
        {
            "prompt": ["a red circle", "blue"],
            "negative_prompt": ["blurred", "a house with a green roof"],
            "num_images_per_prompt": 2,
            "height": 128,
            "width": 64,
            "prior_num_inference_steps": STEPS,
        },
    ),
}


@pytest.mark.support(family="kandinsky", task="text-to-image", target="onnxruntime")
@pytest.mark.support(family="kandinsky", task="text-to-image", target="openvino")
@pytest.mark.parametrize("name", CALLS)
def test_the_same_images(ours: Pipeline, parts: Mapping[str, Any], name: str) -> None:
    seeds, more = CALLS[name]
    call = CALL | more
    assert_same(ours, expected_of(original(parts), seeds, **call), seeds, **call)


@pytest.mark.parametrize(
    ("name", "scheduler", "more"),
    [
        ("ddim", "DDIMScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"negative_prompt": "blurred"}),
    ],
)
def test_schedulers_that_leave_the_variance(
    ours: Pipeline, parts: Mapping[str, Any], name: str, scheduler: str, more: dict[str, Any]
) -> None:
    call = CALL | more
    expected = expected_of(original(parts, scheduler), 5, **call)
    assert_same(ours, expected, 5, scheduler=name, **call)


def test_a_seed_for_each_image_and_a_negative_prompt(
    ours: Pipeline, parts: Mapping[str, Any]
) -> None:
    """Each image is the one of its seed alone; diffusers takes no list of so many generators."""
    call = CALL | {"negative_prompt": "blurred"}
    alone = [expected_of(original(parts), seed, **call) for seed in (5, 6)]
    latents, images = (np.concatenate(each) for each in zip(*alone, strict=True))
    assert_same(ours, (latents, images), [5, 6], num_images_per_prompt=2, **call)


IMAGES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "usual": (5, {"strength": 0.5}),
    "all steps": (5, {"strength": 1.0, "guidance_scale": 1.0}),
    "several": (
        [5, 6, 7, 8],
        {"prompt": ["a red circle", "blue"], "num_images_per_prompt": 2, "strength": 0.7},
    ),
    "a negative prompt": (5, {"strength": 0.5, "negative_prompt": "blurred"}),
}


@pytest.mark.support(family="kandinsky", task="image-to-image", target="onnxruntime")
@pytest.mark.support(family="kandinsky", task="image-to-image", target="openvino")
@pytest.mark.parametrize("name", IMAGES)
def test_the_same_images_from_an_image(ours: Pipeline, parts: Mapping[str, Any], name: str) -> None:
    """Images are made smaller in two steps, by Pillow's `reducing_gap`. diffusers' class takes
    height and width for one another."""
    seeds, more = IMAGES[name]
    images = [sample_image(300, 420), sample_image(500, 90, seed=4)]
    image = images if isinstance(seeds, list) else images[0]
    call = CALL | {"image": image} | more
    swapped = call | {"height": call["width"], "width": call["height"]}
    expected = expected_of(original(parts, image=True), seeds, **swapped)
    assert_same(ours, expected, seeds, **call)


@pytest.mark.parametrize("more", [{}, {"negative_prompt": ["blurred", "a house"]}])
def test_the_prior_alone(
    ours: Pipeline, parts: Mapping[str, Any], more: dict[str, list[str]]
) -> None:
    call = {"prompt": ["a red circle", "blue"], "num_images_per_prompt": 2} | more
    expected = original(parts).prior_pipe(
        num_inference_steps=PRIOR_STEPS, generator=torch.Generator().manual_seed(3), **call
    )
    made = ours.compute(*EMBEDS, seed=3, prior_num_inference_steps=PRIOR_STEPS, **call)
    for name in EMBEDS:
        assert relative_l2(made[name], getattr(expected, name).numpy()) < 1e-5
    other = ours.compute("image_embeds", prompt="green", seed=3)
    assert relative_l2(made["image_embeds"][:1], other) > 1e-2


def test_noise_that_is_given(ours: Pipeline, parts: Mapping[str, Any]) -> None:
    """diffusers takes that of both embeddings as one array."""
    noise = np.random.default_rng(0).standard_normal((2, 1, 32)).astype(np.float32)
    texts = {"prompt": "a red circle", "negative_prompt": "blurred"}
    expected = original(parts).prior_pipe(
        num_inference_steps=PRIOR_STEPS,
        generator=torch.Generator().manual_seed(3),
        latents=torch.from_numpy(np.concatenate(noise)),
        **texts,
    )

    def computed(prior_latents: np.ndarray, negative_prior_latents: np.ndarray) -> Any:
        given = {"prior_latents": prior_latents, "negative_prior_latents": negative_prior_latents}
        steps = {"prior_num_inference_steps": PRIOR_STEPS}
        return ours.compute(*EMBEDS, seed=3, **steps, **texts, **given)

    made, swapped = computed(*noise), computed(*noise[::-1])
    for name in EMBEDS:
        wanted = getattr(expected, name).numpy()
        assert relative_l2(made[name], wanted) < 1e-5
        assert relative_l2(swapped[name], wanted) > 1e-4


def test_the_decoder_alone(ours: Pipeline, parts: Mapping[str, Any]) -> None:
    """A call without a text makes as many images as it gives embeddings."""
    embeds = np.random.default_rng(0).standard_normal((2, 2, 32)).astype(np.float32)
    call = {name: CALL[name] for name in ("height", "width", "num_inference_steps")}
    expected = expected_of(
        original(parts).decoder_pipe,
        [1, 2],
        **{name: torch.from_numpy(value) for name, value in zip(EMBEDS, embeds, strict=True)},
        **call,
    )
    given = dict(zip(EMBEDS, embeds, strict=True))
    assert_same(ours, expected, [1, 2], **given, **call)


def test_values_of_one_call_are_taken_by_another(ours: Pipeline) -> None:
    """The noise of the image is drawn after all that the prior draws, also where it is asked for
    alone."""
    call = CALL | {"scheduler": "ddim", "output_type": "latent"}
    values = ours.compute(*EMBEDS, seed=4, **CALL) | {
        "latents": ours.compute("latents", seed=4, **CALL)
    }
    rest = {n: call[n] for n in ("height", "width", "num_inference_steps", "scheduler")}
    again = ours(**values, seed=9, output_type="latent", **rest)
    np.testing.assert_array_equal(again.latents, ours(seed=4, **call).latents)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ({}, InputError, "no text given: this bundle needs 'prompt'"),
        (
            {"negative_prompt": "b", **dict.fromkeys(EMBEDS, np.zeros((1, 32)))},
            InputError,
            "'negative_prompt' has no effect beside 'image_embeds'",
        ),
        (
            {"prompt": "a", "negative_prior_latents": np.zeros((1, 32))},
            InputError,
            "'negative_prior_latents' changes nothing without 'negative_prompt'",
        ),
        ({"prompt": "a", "height": 100}, InputError, "height 100 is not a multiple of 64"),
        ({"prompt": "a", "scheduler": "prior_scheduler"}, InputError, "no scheduler 'prior_sch"),
        (
            {"prompt": "a", "prior_num_inference_steps": 1},
            PlanNotFound,
            "'prior_scheduler': no sampling plan for 1 steps, and none can be made: "
            "UnCLIPScheduler refuses 1 steps: diffusers itself fails there",
        ),
        (
            {"image_embeds": np.zeros((1, 32))},
            InputError,
            r"'image_embeds' without 'negative_image_embeds': .*\(compute gives them\)",
        ),
        (
            {"prompt": "a", **dict.fromkeys(EMBEDS, np.zeros((1, 32)))},
            InputError,
            "'prompt' has no effect beside 'image_embeds'",
        ),
        (
            {"prior_guidance_scale": 2.0, **dict.fromkeys(EMBEDS, np.zeros((1, 32)))},
            InputError,
            "'prior_guidance_scale' has no effect beside 'image_embeds'",
        ),
        (
            {"prompt": "(a:1.5)", "prompt_weighting": True},
            InputError,
            "prompt_weighting: this bundle does not say which numbers",
        ),
    ],
)
def test_bad_input(call: dict[str, Any], error: type[Exception], says: str, ours: Pipeline) -> None:
    with pytest.raises(error, match=says):
        ours(**call)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_the_other_reader(bundle: Path, scheduler: str) -> None:
    """The reader of tests/docs has two loops, and noise of a learned variance."""
    other, text = reader.Bundle(bundle), CALL | {"prompt": ["a red circle"], "scheduler": scheduler}
    embeds = dict.fromkeys(EMBEDS, np.full((2, 32), 0.5, np.float32))
    alone = {n: v for n, v in text.items() if n in ("height", "width", "scheduler")} | embeds
    away = text | {"negative_prompt": ["blurred"], "num_images_per_prompt": 2}
    calls = [(text, 3), (text | {"num_images_per_prompt": 2}, [3, 4]), (alone, 3), (away, 3)]
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        for call, seed in calls:
            given = call | {"num_inference_steps": PRIOR_STEPS, "seed": seed}
            latents, _ = other(**given)
            found = pipe(output_type="latent", **given)
            assert relative_l2(latents, found.latents) < 1e-5


def test_one_size_for_several_images(bundle: Path) -> None:
    """Every graph is told how many rows it gets, those after the prior's loop too."""
    call = CALL | {"num_images_per_prompt": 2, "seed": 3, "output_type": "latent"}
    calls = [call, call | {"negative_prompt": "blurred"}]
    sizes = {"images": 2, "height": 64, "width": 128}
    with latentc.load(bundle, backend="openvino") as usual:
        expected = [usual(**each).latents for each in calls]
    with latentc.load(bundle, backend="onnxruntime", static=sizes) as fixed:
        for each, latents in zip(calls, expected, strict=True):
            assert relative_l2(fixed(**each).latents, latents) < 1e-4


def test_the_pair_costs_little_where_nothing_needs_it(bundle: Path) -> None:
    """Its graph is opened by the first call with a negative prompt; its weights in ONNX are those
    of the prior."""
    (build,) = (each for each in Manifest.load(bundle).builds if each.target == "onnx")
    weights = {
        (bundle / file.path).stat().st_ino
        for name in ("prior", "prior_pair")
        for file in build.artifacts[name].files
        if file.path.endswith(".data")
    }
    assert len(weights) == 1
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        pipe(**CALL)
        assert pipe.sessions._opened.keys() == pipe.sessions.keys() - {"prior_pair", "vae_encoder"}
        pipe.compute("image_embeds", negative_prompt="blurred", **CALL)
        assert "prior_pair" in pipe.sessions._opened


def test_on_the_command_line(bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    sizes = ["--height", "64", "--width", "64", "--steps", "6"]
    texts = ["a red circle", "--negative-prompt", "blurred"]
    asked = [str(bundle), *texts, "--arg", "prior_num_inference_steps=2", *sizes]
    result = CliRunner().invoke(generate, [*asked, "--seed", "3", "-o", str(image)])
    assert result.exit_code == 0, result.output
    assert image.exists()
