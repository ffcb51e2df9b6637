"""T2I-Adapters, which run once for a call: the same as diffusers' pipelines for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    HeunDiscreteScheduler,
    MultiAdapter,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
)
from PIL import Image

import latentc
from latentc.cli import run as command
from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values
from latentc.exporter.capture.step_cache import split
from latentc.exporter.compiler.export import export
from latentc.exporter.components.adapters.t2i_adapter import Adapter, Feature, Packing
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, SourceError, UnsupportedPipeline
from latentc.runtimes.programs.statements import Image as ImageArgument
from tests.conftest import KEPT, one_at_a_time
from tests.support import tiny
from tests.support.combinations import kept
from tests.support.loaded import EAGER, Ours, kept_open
from tests.support.sample_images import BACKENDS, CALL, assert_same, sample_image
from tests.support.uncaptured import uncaptured

STEPS = 4
# Bundle → its pipeline, and of each adapter the kind and the image's channels.
ADAPTED: dict[str, tuple[str, list[tuple[str, int]]]] = {
    "sd-blocks": ("sd-blocks", [("full_adapter", 1)]),
    "sd-blocks-two": ("sd-blocks", [("full_adapter", 1), ("full_adapter", 3)]),
    "sdxl": ("sdxl", [("full_adapter_xl", 3)]),
}
SAVED, SEVERAL = "sd-blocks", "sd-blocks-two"
CASES = [(name, backend) for name in ADAPTED for backend in (EAGER, *BACKENDS)]
# What every run tries: engines run those that have both forms of adapters.
USUAL = ((SEVERAL, "onnxruntime"), (SEVERAL, "openvino"), (SAVED, EAGER), ("sdxl", EAGER))
SCHEDULERS = {"sdxl": ("pndm", "heun")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """A function: name in `ADAPTED` → folders of its adapters."""

    def make(name: str) -> list[Path]:
        folders = []
        for index, (kind, channels) in enumerate(ADAPTED[name][1]):
            folder = KEPT / "t2i-adapters" / f"{kind}-{channels}-{index}"
            with one_at_a_time(f"t2i-adapter-{kind}-{channels}-{index}"):
                if not (folder / "config.json").exists():
                    tiny.t2i_adapter(kind, 30 + index, channels).save_pretrained(folder)
            folders.append(folder)
        return folders

    return make


@pytest.fixture(scope="module")
def theirs(
    pipeline_folder: Callable[[str], Path], adapters: Callable[[str], list[Path]]
) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            cls = StableDiffusionXLAdapterPipeline if name == "sdxl" else None
            with quiet_loading():
                pipe = DiffusionPipeline.from_pretrained(pipeline_folder(ADAPTED[name][0]))
                models = [T2IAdapter.from_pretrained(folder) for folder in adapters(name)]
                loaded[name] = (cls or StableDiffusionAdapterPipeline).from_pipe(
                    pipe, adapter=MultiAdapter(models) if len(models) > 1 else models[0]
                )
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def saved(theirs: Callable[[str], Any]) -> Path:
    """The folder of a pipeline that was saved with its adapter."""
    folder = KEPT / "t2i-adapters" / "saved"
    with one_at_a_time("t2i-adapter-saved"), quiet_loading():
        theirs(SAVED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(
    pipeline_folder: Callable[[str], Path],
    adapters: Callable[[str], list[Path]],
    saved: Path,
    bundles: Callable[[str], Path],
) -> Callable[[str], Path]:
    """A function: name in `ADAPTED` → its bundle. One is of a folder that was saved with its
    adapter."""

    @cache
    def get(name: str) -> Path:
        folder = KEPT / "bundles" / f"{name}-t2i-adapter"
        others = [bundles(name)] if name == "sdxl" else []
        with one_at_a_time(f"bundle-{name}-t2i-adapter"):
            export(
                saved if name == SAVED else pipeline_folder(ADAPTED[name][0]),
                folder,
                targets=["onnx", "openvino"],
                t2i_adapter=() if name == SAVED else adapters(name),
                schedulers=SCHEDULERS.get(name, ()),
                steps=[STEPS],
                overwrite=True,
                share_with=others,
            )
        return folder

    return get


@pytest.fixture(scope="module")
def ours(
    adapted: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
    adapters: Callable[[str], list[Path]],
    saved: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ours]:
    def modules(name: str) -> latentc.Pipeline:
        beside = [] if name == SAVED else [str(folder) for folder in adapters(name)]
        return uncaptured(
            saved if name == SAVED else pipeline_folder(ADAPTED[name][0]),
            tmp_path_factory.mktemp("uncaptured") / name,
            steps=[STEPS],
            schedulers=SCHEDULERS.get(name, ()),
            asked={"t2i-adapter": beside},
        )

    with kept_open(adapted, modules) as get:
        yield get


def shown(name: str, seed: int = 0) -> Any:
    """An image for each adapter, as diffusers wants it."""
    kinds = ADAPTED[name][1]
    made = [sample_image(48, 32, seed + 30 * index) for index in range(len(kinds))]
    made = [p.convert("L") if kind[1] == 1 else p for p, kind in zip(made, kinds, strict=True)]
    return made if len(made) > 1 else made[0]


def check(ours: Any, theirs: Any, name: str, backend: str = EAGER, **call: Any) -> None:
    pipe, scheduler, expected = theirs(name), call.pop("scheduler", None), []
    given = {**CALL, "image": shown(name), "num_inference_steps": STEPS, **call}
    usual = pipe.scheduler
    if scheduler is not None:
        pipe.scheduler = scheduler[1].from_config(usual.config)
    for kind in ("latent", "np"):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            found = pipe(generator=generator, output_type=kind, **given).images
        expected.append(found.numpy() if kind == "latent" else found)
    pipe.scheduler = usual
    named = {} if scheduler is None else {"scheduler": scheduler[0]}
    assert_same(ours(name, backend)(**given, **named, seed=7, output_type="np"), *expected)


@pytest.mark.support(family="name", task="T2I-Adapter", target="backend")
@pytest.mark.parametrize(("name", "backend"), kept(CASES, *USUAL))
def test_the_same_as_diffusers(name: str, backend: str, ours: Any, theirs: Any) -> None:
    scale: Any = [0.8, 1.3] if name == "sd-blocks-two" else 0.8
    check(ours, theirs, name, backend, adapter_conditioning_scale=scale)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.6])
def test_a_share_of_the_steps(share: float, ours: Any, theirs: Any) -> None:
    check(ours, theirs, "sdxl", adapter_conditioning_factor=share)


@pytest.mark.parametrize("scheduler", [("pndm", PNDMScheduler), ("heun", HeunDiscreteScheduler)])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_shares_count_steps_not_evaluations(
    share: float, scheduler: tuple[str, Any], ours: Any, theirs: Any
) -> None:
    """These schedulers evaluate more often than there are steps, and diffusers stops before."""
    check(ours, theirs, "sdxl", scheduler=scheduler, adapter_conditioning_factor=share)


def test_several_images(ours: Any, theirs: Any) -> None:
    call = {"negative_prompt": "blue", "num_images_per_prompt": 2}
    check(ours, theirs, "sdxl", **call, adapter_conditioning_factor=0.5)
    check(ours, theirs, "sdxl", guidance_scale=1.0)
    two = {"prompt": ["red", "blue"], "image": [shown("sd-blocks"), shown("sd-blocks", 50)]}
    check(ours, theirs, "sd-blocks", **two)
    check(ours, theirs, "sd-blocks", **two, num_images_per_prompt=2)


def test_what_goes_on_as_ever(ours: Any) -> None:
    """The guidance's window, a scale of zero, coloured images for a grey adapter."""
    call = {**CALL, "image": shown("sdxl"), "num_inference_steps": STEPS, "seed": 5}
    call |= {"output_type": "latent", "adapter_conditioning_factor": 0.5, "guidance_stop": 0.5}
    stopped = ours("sdxl")(**call).latents
    assert not np.array_equal(stopped, ours("sdxl")(**{**call, "guidance_stop": 1.0}).latents)
    off = {**call, "guidance_stop": None, "adapter_conditioning_factor": None}
    none = ours("sdxl")(**off, adapter_conditioning_scale=0.0).latents
    other = {**off, "image": shown("sdxl", 50)}
    assert np.array_equal(ours("sdxl")(**other, adapter_conditioning_scale=0.0).latents, none)
    assert not np.array_equal(ours("sdxl")(**off).latents, none)
    grey = {**CALL, "num_inference_steps": STEPS, "seed": 5, "output_type": "latent"}
    colours = sample_image(48, 32)
    one, same = (
        ours("sd-blocks")(**grey, image=each).latents for each in (colours, colours.convert("L"))
    )
    assert np.abs(one - same).max() < 0.05 * np.abs(one).max()


@pytest.mark.fault("3.8", "every size that diffusers takes: T2I-Adapters")
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("kind", ["light_adapter", "full_adapter"])
def test_features_travel_whole(kind: str, multiple: int) -> None:
    """The features of a light adapter travel too, whose channels do not fill the larger image's.

    So do those for latents that cannot be halved.
    """
    torch.manual_seed(0)
    channels = [10, 18, 18] if kind == "full_adapter" else [10, 18]
    made, adapter = (T2IAdapter(3, channels, 1, 2, kind) for _ in range(2))
    made.load_state_dict(adapter.state_dict())
    packing = Packing((Feature(10, 1), Feature(18, 2), Feature(18, 4)), multiple)
    sizes = ((16, 24), (4, 8)) if multiple == 4 else ((16, 24), (17, 23), (2, 5), (3, 2))
    for height, width in sizes:
        image = torch.rand(2, 3, 2 * height, 2 * width)
        with torch.no_grad():
            expected = adapter(image)
            (packed,) = Adapter(made, packing, 2)(image)
        assert packed.shape == (2, sum(packing.channels()), height, width)
        for found, wanted in zip(packing.unpack(packed), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.fault("3.8", "the smallest size that a T2I-Adapter's features have room in")
def test_the_smallest_size() -> None:
    features = (Feature(4, 2), Feature(64, 8))
    packing = Packing(features)
    for side in range(1, 20):
        made = [torch.rand(1, each.channels, *[-(-side // each.ratio)] * 2) for each in features]
        try:
            unpacked = packing.unpack(packing.pack(made, side, side))
            same = all(torch.equal(a, b) for a, b in zip(unpacked, made, strict=True))
        except IndexError:
            same = False
        assert same == (side >= packing.least())


def test_steps_can_be_cached(
    pipeline_folder: Callable[[str], Path], adapters: Callable[[str], list[Path]]
) -> None:
    """The denoiser's shallow part needs nothing of the adapters."""
    asked = {"t2i-adapter": [str(folder) for folder in adapters("sd-blocks-two")]}
    source = resolve(pipeline_folder("sd-blocks"), asked=asked)
    halves = split(family_of(source.pipeline_class).describe(load(source)))
    (shallow,) = (each for each in halves.graphs if each.component.role == "shallow")
    assert not any(name.startswith("adapter") for name in shallow.component.inputs)
    symbols = symbol_values(halves, traced=True)
    inputs = example_inputs(shallow, symbol_values(halves, traced=False))
    (made,) = capture(shallow, halves.latents.multiple, symbols).module()(**inputs)
    with torch.no_grad():
        (expected,) = shallow.module(**inputs)
    assert torch.equal(made, expected)


def test_a_pipeline_that_has_one(ours: Any, theirs: Any, tmp_path: Path) -> None:
    """Saved as diffusers' pipeline for adapters."""
    manifest = ours(SAVED).manifest
    assert manifest.source.pipeline_class == "StableDiffusionAdapterPipeline"
    assert [each.name for each in manifest.of_role("image_encoder")] == ["t2i_adapter"]
    with quiet_loading():
        theirs("sd-blocks-two").save_pretrained(tmp_path / "two")
    with pytest.raises(UnsupportedPipeline, match="give each with --t2i-adapter"):
        export(tmp_path / "two", tmp_path / "c")


def test_low_memory(ours: Any, adapted: Callable[[str], Path]) -> None:
    call = {**CALL, "image": shown(SEVERAL), "num_inference_steps": STEPS, "seed": 5}
    with latentc.load(adapted(SEVERAL), backend="onnxruntime", low_memory=True) as pipe:
        found = pipe(**call).latents
    assert np.array_equal(found, ours(SEVERAL, "onnxruntime")(**call).latents)


def test_what_went_in(adapted: Callable[[str], Path]) -> None:
    manifest = Manifest.load(adapted("sd-blocks-two"))
    assert [each.kind for each in manifest.source.ingredients] == ["t2i-adapter"] * 2
    images = [each for each in manifest.programs[0].arguments if isinstance(each, ImageArgument)]
    assert [(each.name, each.count) for each in images] == [("image", 2)]
    assert [e.name for e in manifest.of_role("image_encoder")] == ["t2i_adapter", "t2i_adapter_2"]
    assert all(build.verification and build.verification.passed for build in manifest.builds)


@pytest.mark.parametrize(
    ("name", "call", "says"),
    [
        ("sdxl", {}, "gives no image; this bundle takes 'image'"),
        ("sdxl", {"image": "x.png"}, "expected a Pillow image"),
        ("sdxl", {"image": sample_image(48, 32), "strength": 0.5}, "no use for strength"),
        (
            "sdxl",
            {"image": sample_image(48, 32), "adapter_conditioning_factor": 1.5},
            "'adapter_conditioning_factor' must be from 0 to 1",
        ),
        ("sd-blocks-two", {"image": sample_image(48, 32)}, "expected a list of 2"),
        (
            "sd-blocks-two",
            {"image": [sample_image(48, 32)] * 2, "adapter_conditioning_scale": [1, 2, 3]},
            "takes 2 numbers",
        ),
    ],
)
def test_bad_input(name: str, call: dict[str, Any], says: str, ours: Any) -> None:
    with pytest.raises(InputError, match=says):
        ours(name).stream("red", **call)


def test_bad_sources(
    pipeline_folder: Callable[[str], Path], adapters: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    adapter = adapters("sd-blocks")[0]
    for pipeline, given, says in (
        ("sdxl", adapter, "is for another family: .* 16 channels at 1/1, 32 channels at 1/2 does"),
        ("lcm", adapter, "takes no T2I-Adapter"),
        ("unconditional", adapter, "takes no T2I-Adapter"),
        ("sd-blocks", pipeline_folder("sd") / "vae", "it is a AutoencoderKL"),
        ("sd-blocks", tmp_path, "is no T2I-Adapter"),
    ):
        with pytest.raises(SourceError, match=says):
            export(pipeline_folder(pipeline), tmp_path / "b", t2i_adapter=given)
    with pytest.raises(InputError, match="has no task image-to-image"):
        export(
            pipeline_folder("sd-blocks"),
            tmp_path / "b",
            t2i_adapter=adapter,
            tasks=["image-to-image"],
        )
    unet = DiffusionPipeline.from_pretrained(pipeline_folder("sd-blocks")).unet
    (tmp_path / "looks").mkdir()
    looks = tiny.ip_adapter(unet, tmp_path / "looks")
    lines = tmp_path / "lines"
    tiny.controlnet(unet, 10).save_pretrained(lines)
    for beside, says in (
        ({"ip_adapter": looks}, "together with an IP-Adapter is not supported"),
        ({"controlnet": lines}, "StableDiffusionControlNetPipeline takes no T2I-Adapter"),
    ):
        with pytest.raises(SourceError, match=says):
            export(pipeline_folder("sd-blocks"), tmp_path / "b", t2i_adapter=adapter, **beside)
    assert not (tmp_path / "b").exists()


def test_the_command(adapted: Callable[[str], Path], tmp_path: Path) -> None:
    for index, each in enumerate(shown("sd-blocks-two")):
        each.save(tmp_path / f"{index}.png")
    given = [word for i in range(2) for word in ("--image", str(tmp_path / f"{i}.png"))]
    start = ["generate", str(adapted("sd-blocks-two")), "red", "--steps", str(STEPS)]
    out = ["-o", str(tmp_path / "o.png")]
    assert command([*start, *given, *out, "--arg", "adapter_conditioning_scale=1,0.5"]) == 0
    with Image.open(tmp_path / "o.png") as made:
        assert made.size == (48, 32)
    (tmp_path / "o.png").unlink()
    assert command([*start, *given[:2], *out]) == 2
    assert not (tmp_path / "o.png").exists()
