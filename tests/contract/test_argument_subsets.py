"""Given or not given: every subset of arguments that depend on each other, as a table of pipeline,
task and arguments, against the diffusers class itself.

The graphs are PyTorch's own modules (`tests.support.uncaptured`), so that what differs is how
arguments are read; a sample runs on engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import latentc
from latentc.exporter.classes import class_of
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.errors import InputError
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.verification.verify import relative_l2
from tests.support.sample_images import BACKENDS, mask, sample_image
from tests.support.uncaptured import uncaptured

GIVEN = ("flat", "", [""])  # texts: [""] is given in diffusers, "" is not
SOME = GIVEN[::2]
LEFT = "left out"
SIZES: Mapping[str, Sequence[Any]] = {
    "original_size": [(64, 48)],
    "target_size": [(80, 24)],
    "crops_coords_top_left": [(7, 9)],
    "negative_original_size": [(16, 40)],
    "negative_target_size": [(56, 72)],
    "negative_crops_coords_top_left": [(3, 5)],
}
SIDES: Mapping[str, Sequence[Any]] = {"height": [16], "width": [48]}
NEGATIVE = {n: values for n, values in SIZES.items() if "negative" in n or "crops" in n}
NEGATIVE_SIZES = ("negative_original_size", "negative_target_size")
REFINED = {
    **{name: values for name, values in NEGATIVE.items() if "target" not in name},
    "aesthetic_score": [9.0],
    "negative_aesthetic_score": [1.0],
}
TEXTS = {"prompt_2": SOME, "negative_prompt": GIVEN[:2], "negative_prompt_2": SOME}
# With one step it takes another of its scheduler's results.
OF_PIXART = {"clean_caption": False}
IMAGE: Mapping[str, Any] = {"image": sample_image(32, 32)}
MASKED = {**IMAGE, "mask_image": mask(32, 32)}
WITH = {"image-to-image": {**IMAGE, "strength": 1.0}, "inpainting": {**MASKED, "strength": 1.0}}
WITH |= {"instruct-pix2pix": IMAGE, "depth-to-image": WITH["image-to-image"]}
WITH |= {"upscaling": {"image": sample_image(16, 16)}}

# Pipeline, task, arguments with the values that each is tried with besides being left out.
TABLE: list[tuple[str, str, Mapping[str, Sequence[Any]]]] = [
    ("sd", "text-to-image", {"negative_prompt": GIVEN, **SIDES}),
    ("inpaint", "inpainting", SIDES),
    ("pix2pix", "instruct-pix2pix", {"negative_prompt": SOME, "image_guidance_scale": [2.5]}),
    ("upscaler", "upscaling", {"negative_prompt": SOME, "noise_level": [3]}),
    ("sdxl", "text-to-image", TEXTS),
    ("sdxl", "text-to-image", {n: v for n, v in SIZES.items() if n != "target_size"}),
    ("sdxl", "text-to-image", {**SIDES, "target_size": [(80, 24)]}),
    ("sdxl", "image-to-image", NEGATIVE),
    ("sdxl", "inpainting", NEGATIVE),
    ("pix2pix-xl", "instruct-pix2pix", {"negative_prompt_2": SOME, "guidance_rescale": [0.7]}),
    ("pix2pix-xl", "instruct-pix2pix", NEGATIVE),
    ("refiner", "image-to-image", REFINED),
    ("sd3", "text-to-image", dict.fromkeys((*TEXTS, "prompt_3", "negative_prompt_3"), ("flat",))),
    ("sd3", "text-to-image", {"negative_prompt_3": GIVEN[1:], **SIDES}),
    (
        "flux-dev",
        "text-to-image",
        {"negative_prompt": ("",), "negative_prompt_2": ("flat",), "true_cfg_scale": [2.0]},
    ),
    ("pixart-alpha", "text-to-image", {"negative_prompt": GIVEN, **SIDES}),
]
# The same of other tasks and kinds.
OTHERS: list[tuple[str, str, Mapping[str, Sequence[Any]]]] = [
    ("sd", "image-to-image", {"negative_prompt": GIVEN, "guidance_scale": [1.0, 7.5]}),
    ("depth", "depth-to-image", {"negative_prompt": GIVEN, "guidance_scale": [1.0]}),
    ("sdxl", "inpainting", {"negative_prompt": SOME, "negative_prompt_2": SOME, **SIDES}),
    ("refiner", "image-to-image", {"negative_prompt": GIVEN, "aesthetic_score": [2.0]}),
    ("pix2pix", "instruct-pix2pix", {"guidance_scale": [1.0], "image_guidance_scale": [1.0, 0.5]}),
    ("sd3", "image-to-image", dict.fromkeys(("negative_prompt", "prompt_3"), ("flat", ""))),
    ("flux-dev", "image-to-image", {"prompt_2": SOME, "negative_prompt": ("", "flat")}),
]
NAMED = [f"{name}, {task}: {', '.join(group)}" for name, task, group in TABLE + OTHERS]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ours(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pipeline]:
    """A function: name of a tiny pipeline → the same by way of a bundle, for all its tasks."""

    @cache
    def get(name: str) -> Pipeline:
        tasks = ("image-to-image", "inpainting") if name in ("sd", "sdxl", "sd3") else ()
        tasks = ("image-to-image",) if name == "flux-dev" else tasks
        folder = tmp_path_factory.mktemp(name) / "bundle"
        return uncaptured(pipeline_folder(name), folder, tasks, steps=(1, 2, 4))

    return get


@pytest.fixture(scope="module")
def theirs(pipeline_folder: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """A function: name of a tiny pipeline and task → the pipeline of the diffusers class for it."""

    @cache
    def load(name: str) -> Any:
        with quiet_loading():
            return DiffusionPipeline.from_pretrained(pipeline_folder(name))

    @cache
    def get(name: str, task: str) -> Any:
        pipe = load(name)
        cls: Any = class_of(pipe, task)
        if cls is not type(pipe):
            with quiet_loading():
                pipe = cls.from_pipe(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


def subsets(group: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value, or none, for each argument."""
    for values in itertools.product(*([LEFT, *values] for values in group.values())):
        yield {n: v for n, v in zip(group, values, strict=True) if v is not LEFT}


def call_of(name: str, task: str) -> dict[str, Any]:
    call = {"prompt": "a red circle", "num_inference_steps": 1, **WITH.get(task, {})}
    if name.startswith("flux"):
        return call
    own = {"num_inference_steps": 2, "use_resolution_binning": False}
    return {**call, **(own if name.startswith("pixart") else {}), "guidance_scale": 3.0}


def of_diffusers(pipe: Any, call: Mapping[str, Any]) -> np.ndarray | None:
    """Final latents; None where diffusers refuses the call."""
    try:
        with torch.no_grad(), quiet_loading():
            generator = torch.Generator().manual_seed(5)
            made = pipe(generator=generator, output_type="latent", **call).images
    except (ValueError, TypeError):
        return None
    return np.asarray(made)


def unpacked(pipe: Any, latents: np.ndarray, like: np.ndarray) -> np.ndarray:
    """FLUX.1's latents are patches."""
    if latents.ndim == 4:
        return latents
    height, width = (side * pipe.vae_scale_factor for side in like.shape[2:])
    return pipe._unpack_latents(torch.tensor(latents), height, width, pipe.vae_scale_factor).numpy()


def asked_of(theirs: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call, with what diffusers does by default and the runtime does not."""
    return {**call, **(OF_PIXART if type(theirs).__name__.startswith("PixArt") else {})}


def check(ours: Callable[..., Any], theirs: Any, call: Mapping[str, Any], asked: Any) -> bool:
    """Check that both give the same latents, or that a refusal is right.

    It is where an argument would change nothing in diffusers, or diffusers refuses as well. Return
    whether latents were compared.
    """
    whole = asked_of(theirs, call)
    expected, refused = of_diffusers(theirs, {**whole, **asked}), ""
    try:
        found = ours(**{**call, **asked}, seed=5, output_type="latent").latents
    except InputError as error:
        refused = str(error)
    if expected is None:
        return False
    if refused:
        others = [{n: v for n, v in asked.items() if n != left} for left in asked]
        same = [of_diffusers(theirs, {**whole, **other}) for other in others]
        useless = any(s is not None and np.array_equal(s, expected) for s in same)
        assert useless, f"{asked} is refused: {refused}"
        return False
    expected = unpacked(theirs, expected, found)
    assert found.shape == expected.shape, asked
    assert relative_l2(found, expected) <= 1e-5, asked
    return True


@pytest.mark.fault("2.5", "given or not given: texts, sizes, crops and scales, every subset")
@pytest.mark.fault(
    "2.5", "second look: the same of other tasks, and with scales that turn guidance off"
)
@pytest.mark.parametrize(("name", "task", "group"), TABLE + OTHERS, ids=NAMED)
def test_every_subset(
    name: str,
    task: str,
    group: Mapping[str, Sequence[Any]],
    ours: Callable[[str], Pipeline],
    theirs: Callable[[str, str], Any],
) -> None:
    call = call_of(name, task)
    compared = [check(ours(name), theirs(name, task), call, asked) for asked in subsets(group)]
    assert sum(compared) >= 2


@pytest.mark.fault("2.5", "given or not given: texts and encoded texts, every subset")
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-dev", "pixart-alpha"])
def test_every_subset_of_encoded_texts(
    name: str, ours: Callable[[str], Pipeline], theirs: Callable[[str, str], Any]
) -> None:
    """Both give the same latents, or refusals; a part of what encoders make of a text is refused by
    name.
    """
    pipe, reference = ours(name), theirs(name, "text-to-image")
    call = call_of(name, "text-to-image")
    del call["prompt"]
    if name.startswith("flux"):
        call["true_cfg_scale"] = 2.0
    encoded = pipe.encode_prompt("a blue square", negative_prompt="flat")
    group: dict[str, list[Any]] = {"prompt": ["a red circle"], "negative_prompt": ["large"]}
    group |= {argument: [torch.from_numpy(value)] for argument, value in encoded.items()}
    compared = 0
    for asked in subsets(group):
        # PixArt's own default, "", counts as given beside its encoded form.
        none = {"negative_prompt": None} if "negative_prompt_embeds" in asked else {}
        expected = of_diffusers(reference, {**asked_of(reference, call), **none, **asked})
        refused = ""
        try:
            found = pipe(**call, **asked, seed=5, output_type="latent").latents
        except InputError as error:
            refused = str(error)
        if refused:
            partly = "needs all of them" in refused
            assert partly or expected is None, (sorted(asked), refused)
            continue
        if expected is None:
            # PixArt's check refuses a text beside the other branch's encoded one.
            assert name.startswith("pixart"), sorted(asked)
            continue
        assert relative_l2(found, unpacked(reference, expected, found)) <= 1e-5, sorted(asked)
        compared += 1
    assert compared >= 4


@pytest.mark.fault("2.5", "given or not given: images of IP-Adapters that are encoded already")
@pytest.mark.parametrize("image", [False, True])
def test_encoded_images_are_refused_by_name(image: bool, ours: Callable[[str], Pipeline]) -> None:
    """No bundle takes them: never is one ignored."""
    given = {"ip_adapter_image": sample_image(32, 32)} if image else {}
    with pytest.raises(InputError, match="ip_adapter_image"):
        ours("sd").stream("red", **given, ip_adapter_image_embeds=[torch.zeros(2, 1, 1, 8)])


TALL: Mapping[str, Any] = {"image": sample_image(48, 32), "mask_image": mask(48, 32)}


@pytest.mark.fault("2.4", "second look: the size of an image that is not of the usual one")
@pytest.mark.parametrize(
    ("name", "task"),
    [
        *(
            (name, task)
            for name in ("sd", "sdxl", "sd3")
            for task in ("image-to-image", "inpainting")
        ),
        *(("inpaint", "inpainting"), ("depth", "depth-to-image"), ("refiner", "image-to-image")),
        *(("pix2pix", "instruct-pix2pix"), ("pix2pix-xl", "instruct-pix2pix")),
    ],
)
def test_sizes_of_a_plain_call(
    name: str, task: str, ours: Callable[[str], Pipeline], theirs: Callable[[str, str], Any]
) -> None:
    """The image's own size, or the usual one, as the class of the task has it; and its strength."""
    call = call_of(name, task)
    call.pop("strength", None)
    call |= {key: TALL[key] for key in TALL if key in call} | {"num_inference_steps": 4}
    assert check(ours(name), theirs(name, task), call, {})


@pytest.mark.fault("2.5", "given or not given, on engines")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_on_engines(
    backend: str, sdxl_bundle: Path, theirs: Callable[[str, str], Any]
) -> None:
    call = call_of("sdxl", "text-to-image")
    with latentc.load(sdxl_bundle, backend=backend) as pipe:
        for asked in (
            {"prompt_2": [""], "negative_prompt": "", "negative_prompt_2": "flat"},
            {n: SIZES[n][0] for n in ("crops_coords_top_left", *NEGATIVE_SIZES)},
        ):
            assert check(pipe, theirs("sdxl", "text-to-image"), call, asked)
        for alone in ("negative_prompt_2", *NEGATIVE_SIZES):
            with pytest.raises(InputError, match=r"would change nothing|changes nothing"):
                pipe.stream(**call, **{alone: SIZES.get(alone, ["flat"])[0]})


@pytest.mark.fault("2.6", "inpainting by blending that ends early: what is kept is clean")
@pytest.mark.parametrize("end", [0.3, 0.6, 0.9])
def test_blending_that_ends_early(
    end: float, ours: Callable[[str], Pipeline], theirs: Callable[[str, str], Any]
) -> None:
    call = {**call_of("sdxl", "inpainting"), "num_inference_steps": 4}
    assert check(ours("sdxl"), theirs("sdxl", "inpainting"), call, {"denoising_end": end})


@pytest.mark.fault("2.6", "second look: blending that ends early, with other arguments")
@pytest.mark.parametrize(
    "more",
    [
        {"strength": 0.9},
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 2},
        {"negative_prompt": "flat", "denoising_end": 0.99},
    ],
    ids=lambda more: ", ".join(more),
)
def test_blending_that_ends_early_otherwise(
    more: dict[str, Any], ours: Callable[[str], Pipeline], theirs: Callable[[str, str], Any]
) -> None:
    call = {**call_of("sdxl", "inpainting"), "num_inference_steps": 4, "denoising_end": 0.6}
    pipe, reference = ours("sdxl"), theirs("sdxl", "inpainting")
    assert check(pipe, reference, {**call, **more}, {})


@pytest.mark.fault("2.6", "second look: blending that ends early, cropped to the mask")
@pytest.mark.parametrize("end", [0.4, 0.8])
def test_blending_that_ends_early_in_a_crop(
    end: float, ours: Callable[[str], Pipeline], theirs: Callable[[str, str], Any]
) -> None:
    call = {**call_of("sdxl", "inpainting"), "num_inference_steps": 4, "denoising_end": end}
    call |= {"padding_mask_crop": 2, "output_type": "pil"}
    with torch.no_grad(), quiet_loading():
        generator = torch.Generator().manual_seed(5)
        expected = theirs("sdxl", "inpainting")(generator=generator, **call).images[0]
    found = ours("sdxl")(**call, seed=5).images[0]
    difference = np.asarray(found).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1
