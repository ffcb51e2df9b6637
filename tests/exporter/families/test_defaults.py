"""Every default of every task is that of the diffusers class which the task stands for: a table of
class, task and class that does it, held against the classes' signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline

from latentc.exporter.classes import CLASSES
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.programs.statements import Numbers, Program
from tests.support import tiny
from tests.support.sample_images import mask, sample_image
from tests.support.uncaptured import uncaptured

TEXT, IMAGE, MASK = "text-to-image", "image-to-image", "inpainting"
SD, XL, SD3 = "StableDiffusion", "StableDiffusionXL", "StableDiffusion3"
CONTROLLED, XL_CONTROLLED = "StableDiffusionControlNet", "StableDiffusionXLControlNet"
LCM = "LatentConsistencyModel"
KANDINSKY = "KandinskyV22"


def three(stem: str) -> dict[str, str]:
    return {
        TEXT: f"{stem}Pipeline",
        IMAGE: f"{stem}Img2ImgPipeline",
        MASK: f"{stem}InpaintPipeline",
    }


def alone(task: str, name: str) -> dict[str, str]:
    return {task: name}


# By class: a tiny pipeline with its parts, and the class that does each of its tasks.
TABLE: Mapping[str, tuple[str, Mapping[str, str]]] = {
    **{f"{SD}{end}": ("sd", three(SD)) for end in ("Pipeline", "Img2ImgPipeline")},
    f"{SD}InpaintPipeline": ("inpaint", alone(MASK, f"{SD}InpaintPipeline")),
    f"{SD}InstructPix2PixPipeline": (
        "pix2pix",
        alone("instruct-pix2pix", f"{SD}InstructPix2PixPipeline"),
    ),
    f"{SD}UpscalePipeline": ("upscaler", alone("upscaling", f"{SD}UpscalePipeline")),
    f"{SD}Depth2ImgPipeline": ("depth", alone("depth-to-image", f"{SD}Depth2ImgPipeline")),
    **{cls: ("sd", three(CONTROLLED)) for cls in three(CONTROLLED).values()},
    f"{SD}PanoramaPipeline": ("panorama", alone(TEXT, f"{SD}PanoramaPipeline")),
    f"{SD}AdapterPipeline": ("sd-blocks", alone(TEXT, f"{SD}AdapterPipeline")),
    f"{LCM}Pipeline": ("lcm", {TEXT: f"{LCM}Pipeline"}),
    **{
        f"{XL}{end}": ("sdxl", three(XL))
        for end in ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")
    },
    f"{XL}InstructPix2PixPipeline": (
        "pix2pix-xl",
        alone("instruct-pix2pix", f"{XL}InstructPix2PixPipeline"),
    ),
    **{cls: ("sdxl", three(XL_CONTROLLED)) for cls in three(XL_CONTROLLED).values()},
    f"{XL}AdapterPipeline": ("sdxl", alone(TEXT, f"{XL}AdapterPipeline")),
    **{f"{SD3}{end}": ("sd3", three(SD3)) for end in ("Pipeline", "Img2ImgPipeline")},
    f"{SD3}InpaintPipeline": ("sd3-masks", alone(MASK, f"{SD3}InpaintPipeline")),
    **{
        f"Flux{end}": ("flux-dev", three("Flux"))
        for end in ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")
    },
    "FluxFillPipeline": ("flux-fill", alone(MASK, "FluxFillPipeline")),
    "PixArtAlphaPipeline": ("pixart-alpha", alone(TEXT, "PixArtAlphaPipeline")),
    "PixArtSigmaPipeline": ("pixart-sigma", alone(TEXT, "PixArtSigmaPipeline")),
    "QwenImagePipeline": ("qwen-image", alone(TEXT, "QwenImagePipeline")),
    "DiTPipeline": ("dit", alone("class-to-image", "DiTPipeline")),
    "WanPipeline": ("wan-2.2", alone("text-to-video", "WanPipeline")),
    "LDMTextToImagePipeline": ("ldm", alone(TEXT, "LDMTextToImagePipeline")),
    f"{KANDINSKY}CombinedPipeline": (
        "kandinsky",
        {TEXT: f"{KANDINSKY}CombinedPipeline", IMAGE: f"{KANDINSKY}Img2ImgCombinedPipeline"},
    ),
    f"{KANDINSKY}Img2ImgCombinedPipeline": (
        "kandinsky",
        alone(IMAGE, f"{KANDINSKY}Img2ImgCombinedPipeline"),
    ),
    "DDPMPipeline": ("unconditional", alone("unconditional", "DDPMPipeline")),
    "DDIMPipeline": ("unconditional", alone("unconditional", "DDIMPipeline")),
}
# A scored refiner has another UNet than the class usually has.
EXTRA = {"refiner": {IMAGE: f"{XL}Img2ImgPipeline", MASK: f"{XL}InpaintPipeline"}}


@pytest.fixture(scope="module")
def made(pipeline_folder: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """A function: name of a tiny pipeline and class → a pipeline of that class with its parts."""

    @cache
    def load(name: str) -> Any:
        with quiet_loading():
            return DiffusionPipeline.from_pretrained(pipeline_folder(name))

    def get(name: str, class_name: str) -> Any:
        pipe, cls = load(name), getattr(diffusers, class_name)
        if type(pipe) is cls:
            return pipe
        if class_name.endswith("DDIMPipeline"):
            return cls(unet=pipe.unet, scheduler=diffusers.DDIMScheduler())
        more: dict[str, Any] = {}
        if "ControlNet" in class_name:
            more = {"controlnet": tiny.controlnet(pipe.unet, 1)}
        if "Adapter" in class_name:
            kind = "full_adapter_xl" if "XL" in class_name else "full_adapter"
            more = {"adapter": tiny.t2i_adapter(kind, 1)}
        with quiet_loading():
            return cls.from_pipe(pipe, **more)

    return get


def effective(program: Program) -> dict[str, tuple[float, ...]]:
    """Return what a call of the program that gives nothing uses, by argument."""
    numbers = (each for each in program.arguments if isinstance(each, Numbers))
    return {
        each.name: tuple(float(value) for value in each.default)
        for each in numbers
        if each.default and not any(isinstance(value, str) for value in each.default)
    }


def of_class(name: str) -> dict[str, tuple[float, ...]]:
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    plain = {n: p.default for n, p in parameters.items()}
    return {
        n: tuple(map(float, v)) if isinstance(v, tuple) else (float(v),)
        for n, v in plain.items()
        if isinstance(v, int | float | tuple) and not isinstance(v, bool)
    }


def test_every_class_is_in_the_table() -> None:
    assert set(TABLE) >= set(CLASSES)


@pytest.mark.fault("2.4", "SDXL inpainting: guidance scale")
@pytest.mark.fault("2.4", "SDXL ControlNet image-to-image: strength")
@pytest.mark.fault("2.4", "Stable Diffusion 3 image-to-image: steps")
@pytest.mark.fault("2.4", "every default of every task of every family")
@pytest.mark.parametrize("name", [*TABLE, *EXTRA])
def test_defaults_are_those_of_the_class(name: str, made: Callable[[str, str], Any]) -> None:
    pipeline, classes = TABLE[name] if name in TABLE else (name, EXTRA[name])
    class_name = name if name in TABLE else classes[IMAGE]
    description = family_of(class_name).describe(made(pipeline, class_name))
    programs = {program.name: program for program in description.programs}
    assert set(programs) == set(classes)
    for task, expected in classes.items():
        usual, found = of_class(expected), effective(programs[task])
        shared = found.keys() & usual.keys()
        assert "num_inference_steps" in shared
        for argument in shared:
            values = usual[argument]
            wanted = values if len(values) > 1 else values * len(found[argument])
            assert found[argument] == wanted, (task, argument)


@pytest.mark.fault("2.4", "a plain call of a task uses the defaults of its class")
def test_a_plain_call_uses_them(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Steps, scale and strength, of each task of one bundle."""
    given = {"image": sample_image(32, 32), "mask_image": mask(32, 32)}
    for name, expected in {
        "sdxl": {TEXT: (50, 5.0, 1.0), IMAGE: (50, 5.0, 0.3), MASK: (50, 7.5, 0.9999)},
        "sd3": {TEXT: (28, 7.0, 1.0), IMAGE: (50, 7.0, 0.6), MASK: (50, 7.0, 0.6)},
    }.items():
        pipe = uncaptured(pipeline_folder(name), tmp_path / name, (IMAGE, MASK), steps=(28, 50))
        for task, images in {TEXT: (), IMAGE: ("image",), MASK: tuple(given)}.items():
            request = pipe.stream("red", **{each: given[each] for each in images}).request
            strength = request.numbers.get("strength", (1.0,))[0]
            found = request.num_inference_steps, request.scales["guidance_scale"], strength
            assert (request.facts.program.name, found) == (task, expected[task])
