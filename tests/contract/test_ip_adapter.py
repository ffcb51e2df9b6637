"""IP-Adapters: the same as diffusers' pipelines with one loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image

import latentc
from latentc.cli import run as command
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, SourceError
from latentc.runtimes.programs.statements import Loop, Run
from tests.conftest import KEPT, one_at_a_time
from tests.support import tiny
from tests.support.combinations import kept
from tests.support.loaded import EAGER, Ours, kept_open
from tests.support.sample_images import BACKENDS, CALL, assert_same, sample_image
from tests.support.uncaptured import uncaptured

STEPS = 4


# Name → its pipeline, and its adapters' kinds in their order.
ADAPTED = {
    "sd": ("sd", ["adapter"]),
    "sdxl": ("sdxl", ["adapter"]),
    "sd-plus": ("sd", ["adapter", "plus"]),
    "sdxl-plus": ("sdxl", ["plus", "full"]),
}
CASES = [(name, backend) for name in ADAPTED for backend in (EAGER, *BACKENDS)]
# What every run tries: engines run the bundle that has both forms of adapters.
USUAL = (("sd", EAGER), ("sd-plus", "onnxruntime"), ("sd-plus", "openvino"))


@pytest.fixture(scope="module")
def adapter(pipeline_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """A function: name of a tiny pipeline and a kind → the file of an adapter for it."""

    def get(name: str, kind: str = "adapter") -> Path:
        folder = KEPT / "ip-adapters" / f"{name}-2"
        with one_at_a_time(f"ip-adapter-{name}"):
            if not (folder / f"{kind}.safetensors").exists():
                folder.mkdir(parents=True, exist_ok=True)
                unet = DiffusionPipeline.from_pretrained(pipeline_folder(name)).unet
                tiny.ip_adapter(unet, folder, kind=kind)
        return folder / f"{kind}.safetensors"

    return get


@pytest.fixture(scope="module")
def adapted(
    pipeline_folder: Callable[[str], Path],
    adapter: Callable[..., Path],
    bundles: Callable[[str], Path],
) -> Callable[[str], Path]:
    """A function: name in `ADAPTED` → its bundle."""

    @cache
    def get(name: str) -> Path:
        source, kinds = ADAPTED[name]
        folder = KEPT / "bundles" / f"{name}-ip-adapter"
        with one_at_a_time(f"bundle-{name}-ip-adapter"):
            export(
                pipeline_folder(source),
                folder,
                targets=["onnx", "openvino"],
                tasks=["image-to-image"] if name == "sd" else [],
                ip_adapter=[adapter(source, kind) for kind in kinds],
                schedulers=["ddim"],
                steps=[STEPS],
                overwrite=True,
                share_with=bundles(source),
            )
        return folder

    return get


@pytest.fixture(scope="module")
def ours(
    adapted: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
    adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ours]:
    def modules(name: str) -> latentc.Pipeline:
        source, kinds = ADAPTED[name]
        return uncaptured(
            pipeline_folder(source),
            tmp_path_factory.mktemp("uncaptured") / name,
            tasks=["image-to-image"] if name == "sd" else [],
            steps=[STEPS],
            schedulers=["ddim"],
            asked={"ip-adapter": [str(adapter(source, kind)) for kind in kinds]},
        )

    with kept_open(adapted, modules) as get:
        yield get


@pytest.fixture(scope="module")
def theirs(
    pipeline_folder: Callable[[str], Path], adapter: Callable[..., Path]
) -> Callable[..., Any]:
    loaded: dict[str, Any] = {}

    def get(name: str, auto: Any = None) -> Any:
        if name not in loaded:
            source, kinds = ADAPTED[name]
            files = [adapter(source, kind) for kind in kinds]
            with quiet_loading():
                pipe = DiffusionPipeline.from_pretrained(pipeline_folder(source))
                pipe.load_ip_adapter(
                    [str(file.parent) for file in files],
                    subfolder="",
                    weight_name=[file.name for file in files],
                )
            loaded[name] = pipe
        pipe = loaded[name] if auto is None else auto.from_pipe(loaded[name])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


def check(pipe: Any, original: Any, scale: Any = 1.0, **call: Any) -> None:
    given = {**CALL, "num_inference_steps": STEPS, **call}
    original.set_ip_adapter_scale(scale)
    expected = []
    for kind in ("latent", "np"):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            made = original(generator=generator, output_type=kind, **given).images
        expected.append(made.numpy() if kind == "latent" else made)
    result = pipe(**given, seed=7, ip_adapter_scale=scale, output_type="np")
    assert_same(result, *expected)


@pytest.mark.support(family="name", task="IP-Adapter", target="backend")
@pytest.mark.parametrize(("name", "backend"), kept(CASES, *USUAL))
def test_an_image_to_look_at(name: str, backend: str, ours: Any, theirs: Any) -> None:
    """Several adapters are looked at together, and each alone too: the other's scale is 0."""
    several = len(ADAPTED[name][1]) > 1
    images = [sample_image(70, 50), sample_image(30, 50, 40)] if several else sample_image(70, 50)
    scales: list[Any] = [[1.0, 1.0], [0.7, 0.0], [0.0, 0.6]] if several else [1.0, 0.4]
    pipe = ours(name, backend)
    for scale in scales:
        check(pipe, theirs(name), scale, ip_adapter_image=images)
    check(pipe, theirs(name), scales[0], ip_adapter_image=images, num_images_per_prompt=2)
    check(pipe, theirs(name), scales[0], ip_adapter_image=images, guidance_scale=1.0)


def test_no_image_is_not_nothing(adapted: Callable[[str], Path]) -> None:
    """The tokens that are guided away from are those of no image, which are not zeros."""
    manifest = Manifest.load(adapted("sd-plus"))
    (loop,) = (step for step in manifest.programs[0].steps if isinstance(step, Loop))
    encoders = (step for step in manifest.programs[0].steps if isinstance(step, Run))
    runs = [run for run in encoders if run.component == "ip_image_encoder"]
    fed = {branch.name: branch.feeds for branch in loop.branches}
    for suffix, run in zip(("", "_2"), runs, strict=True):
        name = f"ip_adapter_tokens{suffix}"
        assert fed["positive"][name] == run.gives[f"tokens{suffix}"]
        assert fed["negative"][name] == run.gives[f"negative{suffix}"]
    shapes = [manifest.component("denoiser").inputs[f"ip_adapter_tokens{n}"] for n in ("", "_2")]
    assert [each.shape[2] for each in shapes] == [4, 6]
    with (
        latentc.load(adapted("sd-plus"), backend="onnxruntime") as pipe,
        pipe.sessions.using("ip_image_encoder") as session,
    ):
        grey, black = (
            session.run({"image": np.full((1, 3, 32, 32), value, np.float32)})
            for value in (0.5, 0.0)
        )
    for name in ("negative", "negative_2"):
        assert np.array_equal(grey[name], black[name])
        assert np.abs(grey[name]).max() > 0.1
    assert not np.array_equal(grey["tokens_2"], black["tokens_2"])


def test_beside_other_images(ours: Any, theirs: Any) -> None:
    pipe = ours("sd")
    given = {"image": sample_image(48, 32), "strength": 0.8}
    original = theirs("sd", AutoPipelineForImage2Image)
    check(pipe, original, ip_adapter_image=sample_image(32, 32), **given)
    check(pipe, theirs("sd"), ip_adapter_image=sample_image(32, 32), guidance_scale=1.0)
    off = {**CALL, "num_inference_steps": STEPS, "seed": 1, "output_type": "latent"}
    one, other = (
        pipe(**off, ip_adapter_image=each, ip_adapter_scale=0).latents
        for each in (sample_image(32, 32), sample_image(32, 32, 50))
    )
    assert np.array_equal(one, other)


def test_what_went_in(ours: Any, adapted: Callable[[str], Path]) -> None:
    manifest = ours("sd").manifest
    assert [each.kind for each in manifest.source.ingredients] == ["ip-adapter"]
    assert {each.name for each in manifest.of_role("image_encoder")} == {
        "ip_image_encoder",
        "vae_encoder",
    }
    builds = Manifest.load(adapted("sd-plus")).builds
    assert all(build.verification and build.verification.passed for build in builds)


def test_bad_input(
    ours: Any,
    adapter: Callable[..., Path],
    pipeline_folder: Callable[[str], Path],
    sd_bundle: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_text("no weights")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(adapter("sd").read_bytes())
    for name, given, says in (
        ("sdxl", adapter("sd"), "does not fit this pipeline"),
        ("unconditional", adapter("sd"), "takes no IP-Adapter"),
        ("sd", tmp_path / "a.txt", "is no IP-Adapter"),
        ("sd", alone, "needs its image encoder"),
    ):
        with pytest.raises(SourceError, match=says):
            export(pipeline_folder(name), tmp_path / "b", ip_adapter=given)
    assert not (tmp_path / "b").exists()
    with latentc.load(sd_bundle) as pipe, pytest.raises(InputError, match="--ip-adapter"):
        pipe("red", ip_adapter_image=sample_image(32, 32))
    with pytest.raises(InputError, match="gives no image"):
        ours("sd")("red")
    for call, says in (
        ({"ip_adapter_image": sample_image(32, 32)}, "expected a list of 2"),
        ({"ip_adapter_image": [sample_image(32, 32)] * 3}, "expected a list of 2"),
        (
            {"ip_adapter_image": [sample_image(32, 32)] * 2, "ip_adapter_scale": [1, 2, 3]},
            "takes 2 numbers",
        ),
    ):
        with pytest.raises(InputError, match=says):
            ours("sd-plus").stream("red", **call)


def test_the_command(adapted: Callable[[str], Path], tmp_path: Path) -> None:
    sample_image(40, 30).save(tmp_path / "in.png")
    start = ["generate", str(adapted("sd-plus")), "red", "--steps", str(STEPS)]
    given = [*start, *["--ip-adapter-image", str(tmp_path / "in.png")] * 2]
    given += ["-o", str(tmp_path / "o.png")]
    assert command([*given, "--arg", "ip_adapter_scale=0.5"]) == 0
    with Image.open(tmp_path / "o.png") as made:
        assert made.size == (32, 32)
