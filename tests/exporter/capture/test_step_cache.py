"""Step caching: the denoiser in two graphs, and the loop that runs the shallow one in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch.fx import Node

import latentc
from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values
from latentc.exporter.capture.step_cache import FEATURES, split
from latentc.exporter.compiler.export import export
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers.tables import build
from latentc.exporter.verification.reference import watched
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import ExportError, InputError, UnsupportedPipeline
from latentc.runtimes.verification.verify import relative_l2
from tests.conftest import KEPT, one_at_a_time
from tests.support.combinations import kept

INTERVAL, STEPS, SEED = 3, 6, 7
CALL: dict[str, Any] = {"prompt": "a red circle", "guidance_scale": 5.0}


def pipeline(folder: Path) -> Any:
    with quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def deep_cache(unet: torch.nn.Module, interval: int) -> Iterator[None]:
    """DeepCache in diffusers' own loop: the whole UNet runs at every step, but what comes from
    below into its last layer is replaced by that of the last step that counts."""
    kept: dict[str, torch.Tensor] = {}
    layer, width = unet.up_blocks[-1].resnets[-1], unet.conv_in.out_channels
    calls = iter(range(1000))

    def exchange(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        below, skip = inputs[0][:, :-width], inputs[0][:, -width:]
        if next(calls) % interval == 0:
            kept["below"] = below
        return (torch.cat([kept["below"], skip], 1), *inputs[1:])

    handle = layer.register_forward_pre_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def bundle(pipeline_folder: Callable[[str], Path], sdxl_bundle: Path) -> Path:
    """The tiny SDXL for two engines, and as integers, which calibrates both graphs."""
    folder = KEPT / "bundles" / "sdxl-step-cache"
    with one_at_a_time("bundle-sdxl-step-cache"):
        settings: dict[str, Any] = {"steps": (STEPS,), "schedulers": (), "passes": ["step-cache"]}
        source = pipeline_folder("sdxl")
        settings["share_with"] = sdxl_bundle
        export(source, folder, targets=("onnx", "openvino"), overwrite=True, **settings)
        export(source, folder, targets=("openvino",), precision="w8a8", **settings)
    return folder


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_same_as_in_diffusers(
    backend: str, bundle: Path, pipeline_folder: Callable[[str], Path]
) -> None:
    pipe = pipeline(pipeline_folder("sdxl"))
    with quiet_loading():
        pipe.scheduler = build(Manifest.load(bundle).schedules[0].name, dict(pipe.scheduler.config))
    found = []
    for interval in (1, INTERVAL):
        with deep_cache(pipe.unet, interval), watched(pipe, pipe.unet) as seen, torch.no_grad():
            generator = torch.Generator().manual_seed(SEED)
            pipe(**CALL, num_inference_steps=STEPS, generator=generator, output_type="latent")
        with latentc.load(bundle, backend=backend) as ours:
            given = {"seed": SEED, "num_inference_steps": STEPS, "output_type": "latent"}
            result = ours(**CALL, **given, cache_interval=interval)
        assert seen.latents is not None
        assert relative_l2(result.latents, seen.latents.numpy()) < 1e-4
        assert result.settings.get("cache_interval", 1) == interval
        found.append(result.latents)
    assert relative_l2(*found) > 1e-3  # it is an approximation


def test_long_texts_with_weights(bundle: Path, pipeline_folder: Callable[[str], Path]) -> None:
    """Both graphs take texts of any length."""
    pipe = pipeline(pipeline_folder("sdxl"))
    given: dict[str, Any] = {"seed": SEED, "num_inference_steps": STEPS, "output_type": "latent"}
    text = {"prompt": "a red circle " * 30 + "(blue:1.5)", "prompt_weighting": True}
    text["max_embeddings_multiples"] = 3
    with latentc.load(bundle, backend="openvino") as ours:
        encoded = ours.encode_prompt(**text)
        found = ours(**text, **given, guidance_scale=5.0, cache_interval=INTERVAL).latents
    assert encoded["prompt_embeds"].shape[1] == 3 * 77
    tensors = {name: torch.from_numpy(value) for name, value in encoded.items()}
    generator = torch.Generator().manual_seed(SEED)
    with deep_cache(pipe.unet, INTERVAL), watched(pipe, pipe.unet) as seen, torch.no_grad():
        pipe(**tensors, guidance_scale=5.0, num_inference_steps=STEPS, generator=generator)
    assert seen.latents is not None
    assert relative_l2(found, seen.latents.numpy()) < 1e-4


def test_integers_and_guidance_that_ends(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    quantized = next(each for each in manifest.builds if each.precision == "w8a8")
    assert quantized.artifacts["shallow_denoiser"].precision == "w8a8"
    assert quantized.verification is not None
    subjects = {check.subject for check in quantized.verification.checks}
    assert "shallow_denoiser" in subjects
    with latentc.load(bundle, build=quantized.name) as pipe:
        given = {"seed": SEED, "num_inference_steps": STEPS, "guidance_stop": 0.5}
        result = pipe(**CALL, **given, cache_interval=2, output_type="np")
    assert np.isfinite(result.images).all()


def test_static_sizes_and_low_memory(bundle: Path) -> None:
    given = {"seed": SEED, "num_inference_steps": STEPS, "output_type": "latent"}
    with latentc.load(bundle, backend="openvino") as pipe:
        expected = pipe(**CALL, **given, cache_interval=2).latents
    for settings in ({"static": {}}, {"low_memory": True}):
        with latentc.load(bundle, backend="openvino", **settings) as pipe:
            found = pipe(**CALL, **given, cache_interval=2).latents
        assert relative_l2(found, expected) < 1e-5


def described(folder: Path) -> Description:
    pipe = pipeline(folder)
    return split(family_of(type(pipe).__name__).describe(pipe))


def halves(description: Description) -> tuple[Graph, Graph]:
    by_role = {graph.component.role: graph for graph in description.graphs}
    return by_role["denoiser"], by_role["shallow"]


# Others have the same UNets but for what goes into the first layer.
UNETS = ("sd", "sd-blocks", "lcm", "sdxl", "refiner", "upscaler", "unconditional")


@pytest.mark.parametrize("name", kept(UNETS, "upscaler", "unconditional"))
def test_the_shallow_graph_alone(name: str, pipeline_folder: Callable[[str], Path]) -> None:
    """The shallow graph runs in other sizes than those it was captured at, and without the weights
    of the rest.
    """
    description = described(pipeline_folder(name))
    whole, shallow = halves(description)
    sizes = symbol_values(description, traced=False)
    inputs = example_inputs(whole, sizes, seed=2)
    with torch.no_grad():
        prediction, features = whole.module(**inputs)
    traced = symbol_values(description, traced=True)
    program = capture(shallow, description.latents.multiple, traced)
    every = inputs | {FEATURES: features}
    taken = {name: every[name] for name in shallow.component.inputs}
    (found,) = program.module()(**taken)
    assert relative_l2(found.detach().numpy(), prediction.numpy()) < 1e-5
    values = [n for n in program.graph.nodes if n.op == "placeholder" and isinstance(n, Node)]
    assert len(values) == len(program.graph_signature.input_specs)
    small = sum(value.numel() for value in program.state_dict.values())
    large = sum(value.numel() for value in whole.module.parameters())
    assert small < 0.3 * large


def test_a_denoiser_that_cannot_be_cut(pipeline_folder: Callable[[str], Path]) -> None:
    pipe = pipeline(pipeline_folder("unconditional"))
    pipe.unet.up_blocks[-1] = torch.nn.Identity()
    with pytest.raises(UnsupportedPipeline, match=r"cannot be cut.*found Identity"):
        split(family_of("DDPMPipeline").describe(pipe))


def test_what_users_get_wrong(
    bundle: Path, sdxl_bundle: Path, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for folder, interval, message in (
        (sdxl_bundle, 2, "export it with --pass step-cache"),
        (bundle, 0, "'cache_interval' must be at least 1"),
    ):
        pipe = latentc.load(folder, backend="onnxruntime")
        with pipe, pytest.raises(InputError, match=message):
            pipe(**CALL, cache_interval=interval)
    source = pipeline_folder("sdxl")
    with pytest.raises(InputError, match="unknown pass 'step_cache'; did you mean 'step-cache'"):
        export(source, tmp_path / "b", passes=["step_cache"])
    # Without the pass it would be another denoiser, and the build for ONNX would be lost.
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(ExportError, match=r"other graphs.*onnx-fp32.*would be lost"):
        export(source, bundle, targets=("openvino",), steps=(STEPS,), schedulers=())
    assert (bundle / "manifest.json").read_bytes() == before
