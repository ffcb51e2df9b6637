"""Sizes that cannot be halved evenly in each block of the UNet, and others that are no multiples of
64: the same images as diffusers', for every family, its tasks, and both engines.

The tiny pipelines of UNets have 2 pixels to a latent and halve once, so sides that are no multiples
of 4 pixels, of images that diffusers' pipelines take as they are, are what 8 and 600 are to Stable
Diffusion. Of a text alone diffusers takes multiples of 8 pixels only, whatever the VAE; latents
that are given have any size.

One size of each row is tried on each engine by default, all ten of them by `pytest -m "" FILE`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values
from latentc.exporter.classes import class_of
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.verification.verify import relative_l2
from tests.support import transformers
from tests.support.combinations import kept
from tests.support.loaded import Ours, kept_open
from tests.support.sample_images import BACKENDS, CALL, mask, sample_image

STEPS = transformers.STEPS
# Width and height in pixels; latents of 35 by 22 for the first.
SIZES = (
    *((70, 45), (18, 14), (34, 50), (22, 32), (32, 22), (6, 10), (26, 26), (46, 38), (54, 30)),
    (14, 62),
)
# Width and height in what a side must be a multiple of.
UNITS = (*((3, 5), (5, 3), (2, 3), (7, 2), (5, 8), (9, 5), (3, 3), (1, 6), (11, 4), (16, 11)),)


@dataclass(frozen=True)
class Row:
    """A task of one pipeline.

    Attributes:
        name: of the tiny pipeline, or of a bundle in `transformers.BUNDLES`.
        unit: what diffusers takes multiples of, in pixels; 0 where the size is that of the image,
            or of latents that are given.
        more: arguments besides.
        like: what is compared: Stable Diffusion 3's inpainting pipeline decodes its latents without
            the VAE's shift, which the others of this model add.
    """

    name: str
    task: str
    unit: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    like: str = "np"

    def call(self, width: int, height: int) -> dict[str, Any]:
        """Return a call whose result has a size, or of an image that has it."""
        made: dict[str, Any] = {**CALL, "num_inference_steps": STEPS, **self.more}
        image = self.unit == 0, width, height
        if self.unit:
            width, height = width * self.unit, height * self.unit
            made |= {"height": height, "width": width}
            image = True, width + 3, height + 7  # to be resized
        if self.task == "text-to-image":
            return made if self.unit else {**made, "latents": noise(width, height)}
        made["image"] = sample_image(*image[1:])
        if self.task == "inpainting":
            made["mask_image"] = mask(*image[1:])
        return made


def noise(width: int, height: int) -> np.ndarray:
    """Noise for an image of this size, of 2 pixels to a latent."""
    shape = (1, 4, height // 2, width // 2)
    return np.random.default_rng(width).standard_normal(shape).astype(np.float32)


HALF = {"strength": 0.5}
EXACT = {"use_resolution_binning": False}
# Pipelines whose graphs are those of other rows, but for their numbers of channels or conditions.
OTHERS = (
    *("refiner", "inpaint", "pix2pix", "pix2pix-xl", "inpaint-xl", "pixart-sigma", "sd3-masks"),
    *("flux-schnell", "flux-fill"),
)
TEXT, IMAGE, INPAINT = "text-to-image", "image-to-image", "inpainting"
ROWS = (
    Row("sd", TEXT),
    Row("sdxl", TEXT),
    Row("lcm", TEXT),
    Row("ldm", TEXT, unit=8),
    Row("sd", IMAGE, more=HALF),
    Row("sdxl", IMAGE, more=HALF),
    Row("refiner", IMAGE, more=HALF),
    Row("depth", "depth-to-image", more=HALF),
    Row("pix2pix", "instruct-pix2pix"),
    Row("pix2pix-xl", "instruct-pix2pix", unit=8),
    Row("sd", INPAINT, unit=8, more=HALF),
    Row("sdxl", INPAINT, unit=8, more=HALF),
    Row("inpaint", INPAINT, unit=8),
    Row("inpaint-xl", INPAINT, unit=8),
    Row("pixart-alpha", TEXT, unit=16, more=EXACT),
    Row("pixart-sigma", TEXT, unit=8, more=EXACT),
    Row("sd3", TEXT, unit=4),
    Row("sd3", IMAGE, unit=4, more=HALF),
    Row("sd3", INPAINT, unit=4, more=HALF, like="latent"),
    Row("sd3-masks", INPAINT, unit=4, more=HALF, like="latent"),
    Row("flux-dev", TEXT, unit=16),
    Row("flux-schnell", TEXT, unit=16, more={"guidance_scale": None}),
    Row("flux-dev", IMAGE, unit=16, more=HALF),
    Row("flux-dev", INPAINT, unit=16, more=HALF),
    Row("flux-fill", INPAINT, unit=16),
)


def _marks(row: Row, usual: bool) -> list[pytest.MarkDecorator]:
    """Return what leaves a parameter out of most runs: its size, and its pipeline."""
    rest = [] if usual else [pytest.mark.sizes]
    return [*rest, pytest.mark.combinations] if row.name in OTHERS else rest


def parameters() -> Iterator[Any]:
    """Every row, size and engine; all but one size of each are marked, and all of `OTHERS`."""
    for place, row in enumerate(ROWS):
        for which in range(len(SIZES)):
            width, height = (UNITS if row.unit else SIZES)[which]
            for engine, backend in enumerate(BACKENDS):
                usual = which == (place + 5 * engine) % len(SIZES)
                yield pytest.param(
                    *(place, (width, height), backend),
                    id=f"{row.name}-{row.task}-{width}x{height}-{backend}",
                    marks=_marks(row, usual),
                )


@pytest.fixture(scope="module")
def engines(
    bundles: Callable[[str], Path],
    exported: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
) -> Iterator[Ours]:
    """A function: name of a row and backend → the loaded bundle."""

    def bundle(name: str) -> Path:
        if name in transformers.BUNDLES:
            return transformers.exported(name, pipeline_folder)
        return exported(name) if name in ("lcm", "ldm") else bundles(name)

    with kept_open(bundle) as get:
        yield get


@pytest.fixture(scope="module")
def expected(pipeline_folder: Callable[[str], Path]) -> Callable[..., np.ndarray]:
    """A function: a row's place and a size → the images or latents of diffusers, made once."""

    @cache
    def loaded(name: str, task: str) -> Any:
        folder = pipeline_folder(transformers.BUNDLES.get(name, (name,))[0])
        with quiet_loading():
            pipe = DiffusionPipeline.from_pretrained(folder)
            cls: Any = class_of(pipe, task)
            pipe = pipe if cls is type(pipe) else cls.from_pipe(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cache
    def get(place: int, size: tuple[int, int]) -> np.ndarray:
        row = ROWS[place]
        call = row.call(*size)
        if "latents" in call:
            call["latents"] = torch.from_numpy(call["latents"])
        if row.name.startswith("pixart"):
            call["clean_caption"] = False
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            made = loaded(row.name, row.task)(**call, generator=generator, output_type=row.like)
        return np.asarray(made.images)

    return get


@pytest.mark.fault("3.8", "SDXL is told its default size where latents alone say another")
@pytest.mark.fault("3.8", "every size that diffusers takes: all families, tasks and two engines")
@pytest.mark.parametrize(("place", "size", "backend"), parameters())
def test_the_same_image_at_any_size(
    place: int, size: tuple[int, int], backend: str, engines: Ours, expected: Any
) -> None:
    row = ROWS[place]
    theirs = expected(place, size)
    found = engines(row.name, backend)(**row.call(*size), seed=7, output_type=row.like).images
    assert found.shape == theirs.shape
    assert relative_l2(found, theirs) <= 1e-4
    assert row.like == "latent" or np.abs(found - theirs).max() <= 2 / 255


@pytest.mark.fault("3.8", "FLUX: padding_mask_crop in a size that is made smaller")
@pytest.mark.parametrize("size", [(71, 47), (45, 100), (64, 48)])
def test_a_masked_part_in_an_uneven_size(
    size: tuple[int, int], engines: Ours, pipeline_folder: Callable[[str], Path]
) -> None:
    """The part that is cut out has the proportions of the size asked for, as in diffusers."""
    with quiet_loading():
        plain = DiffusionPipeline.from_pretrained(pipeline_folder("flux-dev"))
        theirs = class_of(plain, INPAINT).from_pipe(plain)  # type: ignore[attr-defined]
    theirs.set_progress_bar_config(disable=True)
    call = {**CALL, "num_inference_steps": STEPS, **HALF, "width": size[0], "height": size[1]}
    call |= {"image": sample_image(120, 90), "mask_image": mask(120, 90), "padding_mask_crop": 3}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the size is made smaller
        (expected,) = theirs(**call, generator=torch.Generator().manual_seed(7)).images
        (found,) = engines("flux-dev")(**call, seed=7).images
    assert found.size == expected.size == (120, 90)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.fault("3.8", "the small image of an upscaler is shrunk as diffusers does")
def test_the_upscalers_rule(ours: Any, original: Callable[..., Any]) -> None:
    processor = original("upscaler").image_processor
    for width, height in SIZES[:4]:
        shrunk = processor.preprocess(sample_image(width, height)).shape[2:]
        made = ours("upscaler")(
            "red", image=sample_image(width, height), num_inference_steps=4, output_type="np"
        )
        assert made.images.shape[1:3] == (shrunk[0] * 2, shrunk[1] * 2)


@pytest.mark.fault("3.8", "every size that diffusers takes: each UNet's own graph")
@pytest.mark.parametrize("name", kept(["inpaint", "lcm"], "lcm"))
def test_graphs_at_any_size(name: str, pipeline_folder: Callable[..., Any]) -> None:
    """The captured program against diffusers' UNet."""
    source = resolve(pipeline_folder(name))
    pipe = load(source)
    description = family_of(source.pipeline_class).describe(pipe)
    graph = next(each for each in description.graphs if each.component.role == "denoiser")
    traced = symbol_values(description, traced=True)
    program = capture(graph, description.latents.multiple, traced).module()
    for width, height in SIZES:
        sides = {"height": height // 2, "width": width // 2}
        inputs = example_inputs(graph, traced | sides, seed=3)
        parts = [inputs[n] for n in ("sample", "mask", "masked_image_latents") if n in inputs]
        scale = inputs.get("guidance_scale")
        embedding = (
            pipe.get_guidance_scale_embedding(scale[:, 0] - 1, 25) if name == "lcm" else None
        )
        with torch.no_grad():
            (found,) = program(**inputs)
            expected = pipe.unet(
                torch.cat(parts, 1),
                inputs["timestep"],
                inputs["encoder_hidden_states"],
                timestep_cond=embedding,
            )[0]
        assert relative_l2(found.numpy(), expected.numpy()) <= 1e-5
