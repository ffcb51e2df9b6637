"""Wan makes the same videos as diffusers: its parts alone, both of its forms, on both engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
)
from PIL import Image
from safetensors.torch import save_file

import latentc
from latentc.benchmarks.bench.latentc_case import arguments as bench_arguments
from latentc.exporter.capture.step_cache import split
from latentc.exporter.compiler.export import export
from latentc.exporter.components.wan_video_decoder import video_decoder_graph
from latentc.exporter.families import family_of, wan
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.targets.tensorrt.lowering import default_profile
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.commands.generate import generate
from latentc.runtimes.errors import InputError, UnsupportedPipeline
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.tuning.tune import tune
from latentc.runtimes.verification.verify import relative_l2
from tests.docs import independent_loader as reader
from tests.support import tiny_transformers as tiny
from tests.support.uncaptured import uncaptured

STEPS = 4
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": STEPS}
PROMPT = "a red circle above a small square"


SCHEDULERS: dict[str, Any] = {
    "flow_euler": FlowMatchEulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}


def loaded(folder: Path) -> Any:
    with quiet_loading():
        pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def bundle(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "bundle"
    options: dict[str, Any] = {"schedulers": ["flow_euler", "dpmpp_2m"], "steps": [2, STEPS]}
    source = pipeline_folder("wan-2.2")
    return export(source, folder, targets=["onnx", "openvino"], **options).bundle


@pytest.fixture(scope="module")
def original(pipeline_folder: Callable[[str], Path]) -> Any:
    return loaded(pipeline_folder("wan-2.2"))


@pytest.fixture(params=["onnxruntime", "openvino"])
def ours(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with latentc.load(bundle, backend=request.param) as pipe:
        yield pipe


def frames_of(original: Any, seed: Any, scheduler: str | None = None, **call: Any) -> Any:
    """Return what diffusers makes of a call with a seed, or one for each video."""
    pipe = original
    if scheduler is not None:
        pipe = copy.copy(original)
        pipe.scheduler = SCHEDULERS[scheduler].from_config(original.scheduler.config)
    several = isinstance(seed, list)
    generators = [torch.Generator().manual_seed(each) for each in (seed if several else [seed])]
    return pipe(generator=generators if several else generators[0], **call).frames


def assert_same(ours: Pipeline, original: Any, seed: Any = 3, **call: Any) -> Any:
    """Compare the latents and the frames of a call, and return what it made."""
    expected = frames_of(original, seed, output_type="latent", **call)
    frames = frames_of(original, seed, output_type="np", **call)
    result = ours(seed=seed, output_type="np", **call)
    assert relative_l2(result.latents, expected.numpy()) < 1e-4
    assert result.frames.shape == frames.shape
    assert np.abs(result.frames - frames).max() * 255 < 2
    return result


CALLS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one frame": {"num_frames": 1, "height": 16},
    "more frames, high": {"num_frames": 13, "height": 48, "width": 16},
    "fewer steps": {"num_inference_steps": 2},
    "Euler's scheduler": {"scheduler": "flow_euler"},
    "another scheduler": {"scheduler": "dpmpp_2m", "guidance_scale_2": 2.0},
    "without guidance": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a large blue drawing", "guidance_scale": 3.0},
    "two scales": {"guidance_scale": 4.0, "guidance_scale_2": 2.0},
    "guided early": {"guidance_scale": 4.0, "guidance_scale_2": 0.5},
    "several videos": {"num_videos_per_prompt": 2, "seed": [5, 6]},
    "two prompts": {"prompt": [PROMPT, "flat"], "negative_prompt": ["", "blue"], "seed": [7, 8]},
    "not clean": {"prompt": " a  red\tcircle &amp;amp; a\nsquare ", "negative_prompt": "&lt;b&gt;"},
}


@pytest.mark.support(family="wan-2.2", task="text-to-video", target="onnxruntime")
@pytest.mark.support(family="wan-2.2", task="text-to-video", target="openvino")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_same_videos(ours: Pipeline, original: Any, call: dict[str, Any]) -> None:
    assert_same(ours, original, **{"prompt": PROMPT, **SMALL, **call})


def test_frames_as_pillow_images_and_their_rate(ours: Pipeline) -> None:
    result = ours(PROMPT, seed=1, num_videos_per_prompt=2, **SMALL)
    assert [len(video) for video in result.frames] == [5, 5]
    assert {frame.size for video in result.frames for frame in video} == {(48, 32)}
    assert result.rate == 16
    arrays = ours.decode(result.latents, "np")
    assert arrays.shape == (2, 5, 32, 48, 3)
    assert np.array_equal(np.asarray(result.frames[1][4]), (arrays[1, 4] * 255).round())
    same = {name: result.settings[name] for name in ("num_frames", "num_videos_per_prompt")}
    assert same == {"num_frames": 5, "num_videos_per_prompt": 2}


@pytest.mark.parametrize(
    ("frames", "made"), [(2, 1), (3, 1), (4, 5), (6, 5), (7, 5), (8, 9)], ids=str
)
def test_frames_are_rounded_as_in_diffusers(
    ours: Pipeline, original: Any, frames: int, made: int
) -> None:
    call = {**SMALL, "num_frames": frames, "num_inference_steps": 2}
    with pytest.warns(UserWarning, match=f"num_frames {frames} is not 1 more than a multiple of 4"):
        result = ours(PROMPT, seed=1, output_type="latent", **call)
    expected = frames_of(original, 1, prompt=PROMPT, output_type="latent", **call)
    assert result.latents.shape == tuple(expected.shape)
    assert result.settings["num_frames"] == made


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"num_frames": 0}, "num_frames 0 is not 1 more than a multiple of 4; nearest: 1"),
        ({"num_frames": 4097}, "num_frames 4097: this model makes at most 4093"),
        ({"num_frames": 5.5}, "'num_frames' must be an integer"),
        ({"height": 24}, "height 24 is not a multiple of 16; nearest: 16 or 32"),
        ({"num_images_per_prompt": 2}, "unknown argument 'num_images_per_prompt'"),
        ({"max_sequence_length": 256}, "unknown argument 'max_sequence_length'"),
        ({"latents": np.zeros((1, 16, 8, 12))}, "must have the shape"),
        ({"latents": np.zeros((1, 16, 3, 8, 12))}, "num_frames 5 does not fit 'latents'"),
    ],
)
def test_bad_input(call: dict[str, Any], says: str, ours: Pipeline) -> None:
    with pytest.raises(InputError, match=says):
        ours(PROMPT, **{**SMALL, **call})


def test_given_latents_say_how_many_frames(ours: Pipeline, original: Any) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 16, 3, 8, 4), np.float32)
    result = ours(PROMPT, latents=latents, num_inference_steps=2, output_type="latent")
    assert result.settings["num_frames"] == 9
    expected = original(
        PROMPT,
        latents=torch.from_numpy(latents),
        num_inference_steps=2,
        height=32,
        width=16,
        num_frames=9,
        output_type="latent",
    ).frames
    assert relative_l2(result.latents, expected.numpy()) < 1e-4


def test_tiles_are_those_of_diffusers(ours: Pipeline, original: Any) -> None:
    """Tiles have 64 pixels here: a size of its own, so that small frames have several."""
    call = {**SMALL, "height": 96, "width": 80, "num_inference_steps": 2}
    ours.enable_vae_tiling(64)
    result = ours(PROMPT, seed=1, output_type="np", **call)
    sides = dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 64)
    strides = dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 48)
    original.vae.enable_tiling(**sides, **strides)
    try:
        frames = frames_of(original, 1, prompt=PROMPT, output_type="np", **call)
    finally:
        original.vae.disable_tiling()
    assert np.abs(result.frames - frames).max() * 255 < 2
    ours.disable_vae_tiling()
    whole = ours(PROMPT, seed=1, output_type="np", **call)
    assert np.abs(result.frames - whole.frames).max() > 1e-3


def test_one_size_of_calls(bundle: Path, ours: Pipeline) -> None:
    static = {"height": 32, "width": 48, "num_frames": 5}
    expected = ours(PROMPT, seed=1, **SMALL)
    with latentc.load(bundle, backend=ours.backend.name, static=static) as pipe:
        result = pipe(PROMPT, seed=1, **SMALL)
        assert relative_l2(result.latents, expected.latents) < 1e-5
        with pytest.raises(InputError, match="it was loaded for"):
            pipe(PROMPT, **{**SMALL, "num_frames": 9})
    with pytest.raises(InputError, match="'static': num_frames must be a whole number"):
        latentc.load(bundle, static={"num_frames": 5.5})


def test_one_transformer_in_memory_at_a_time(bundle: Path, ours: Pipeline) -> None:
    expected = ours(PROMPT, seed=1, **SMALL)
    with latentc.load(bundle, backend=ours.backend.name, low_memory=True) as pipe:
        assert np.array_equal(pipe(PROMPT, seed=1, **SMALL).latents, expected.latents)


@pytest.mark.parametrize("name", ["circle.webp", "circle.png", "circle.gif"])
def test_an_animation_on_the_command_line(bundle: Path, tmp_path: Path, name: str) -> None:
    asked = [str(bundle), PROMPT, "--steps", "2", "--height", "32", "--width", "32", "--seed", "1"]
    target = tmp_path / name
    made = CliRunner().invoke(generate, [*asked, "--num-frames", "9", "-o", str(target), "--json"])
    assert made.exit_code == 0, made.output
    with Image.open(target) as image:
        assert (image.n_frames, image.size) == (9, (32, 32))
        assert image.is_animated
    assert str(target) in made.output


def test_frames_in_folders_on_the_command_line(bundle: Path, tmp_path: Path) -> None:
    asked = [str(bundle), PROMPT, "-n", "2", "--steps", "2", "--height", "32", "--width", "32"]
    asked += ["--num-frames", "5", "-o", f"{tmp_path}/circle/"]
    made = CliRunner().invoke(generate, asked)
    assert made.exit_code == 0, made.output
    names = [f"{index:05}.png" for index in range(5)]
    for index in range(2):
        assert sorted(path.name for path in (tmp_path / f"circle-{index}").iterdir()) == names
    again = CliRunner().invoke(generate, asked)
    assert "the folder is not empty" in str(again.exception)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("circle.mp4", "a name that ends in / is a folder"),
        ("circle.gif/", "with the extension"),
        ("", "not an empty one"),
    ],
)
def test_files_that_hold_no_video(bundle: Path, tmp_path: Path, name: str, says: str) -> None:
    asked = [str(bundle), PROMPT, "-o", name and f"{tmp_path}/{name}"]
    assert says in str(CliRunner().invoke(generate, asked).exception)


def test_tuning_compares_images(bundle: Path) -> None:
    with pytest.raises(InputError, match="latentc tune compares images, and this bundle makes"):
        tune(Bundle.open(bundle), seconds=1, prompts=["a"])


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_the_decoder_takes_whole_clips(frames: int) -> None:
    """With the published factors, and a width of its own for each block."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 4], num_res_blocks=1).eval()
    graph = video_decoder_graph(vae)
    latents = torch.randn(2, 16, frames, 2, 3)
    mean, deviation = (torch.tensor(vae.config[f"latents_{name}"]) for name in ("mean", "std"))
    with torch.no_grad():
        scaled = latents * deviation.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
        expected = vae.decode(scaled, return_dict=False)[0]
        (made,) = graph.module(latents)
    assert expected.shape[2] == 4 * frames - 3
    assert graph.component.outputs["frames"].fits(made.shape, {"frames": frames})
    found = (made * 2 - 1).clamp(-1, 1).permute(0, 2, 1, 3, 4)
    assert (found - expected).abs().max() < 2e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("shape", [(1, 1, 2, 8), (3, 3, 6, 4), (2, 5, 4, 2)], ids=str)
def test_the_denoiser_turns_by_the_place_of_a_patch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    transformer = tiny.wan_transformer().eval()
    rows, *sides = shape
    sample, states = torch.randn(rows, 16, *sides), torch.randn(rows, 7, tiny.T5_WIDTH)
    timestep = torch.full((rows,), 601.0)
    with torch.no_grad():
        expected = transformer(sample, timestep, states, return_dict=False)[0]
        (made,) = wan.Denoiser(transformer)(sample, timestep, states)
        (moved,) = wan.Denoiser(transformer)(sample.flip(3), timestep, states)
    assert (made - expected).abs().max() < 1e-5
    assert (moved.flip(3) - made).abs().max() > 1e-3  # places count


def test_states_are_zero_where_there_is_no_text(original: Any) -> None:
    texts = ["a red circle", "", "square " * 600]
    expected = original._get_t5_prompt_embeds(texts, max_sequence_length=512)
    ids = original.tokenizer(texts, padding="max_length", max_length=512, truncation=True)
    with torch.no_grad():
        (states,) = wan.TextEncoder(original.text_encoder)(torch.tensor(ids.input_ids))
    assert relative_l2(states.numpy(), expected.detach().numpy()) < 1e-5
    assert not states[1, 1:].any()


def test_one_transformer(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Wan 2.1; that engines give what the modules give is for its parts in the other form."""
    source = pipeline_folder("wan")
    with uncaptured(source, tmp_path / "bundle", steps=[2]) as pipe:
        assert "guidance_scale_2" not in pipe.signature.names
        call = {**SMALL, "num_inference_steps": 2, "negative_prompt": "blue"}
        assert_same(pipe, loaded(source), prompt=PROMPT, **call)
        with pytest.raises(InputError, match="unknown argument 'guidance_scale_2'"):
            pipe(PROMPT, guidance_scale_2=2.0)


def test_a_lora(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source, file = pipeline_folder("wan"), tmp_path / "lora.safetensors"
    layers = {f"blocks.0.{name}" for name in ("attn1.to_q", "attn2.to_k", "ffn.net.0.proj")}
    original, weights = loaded(source), {}
    torch.manual_seed(0)
    for name in sorted(layers):
        layer = original.transformer.get_submodule(name)
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, layer.in_features)
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)
    save_file(weights, file)
    call: dict[str, Any] = {"prompt": PROMPT, **SMALL, "num_inference_steps": 2}
    plain = frames_of(original, 3, output_type="latent", **call)
    original.load_lora_weights(file)
    asked = {"lora": [str(file)]}
    with uncaptured(source, tmp_path / "bundle", steps=[2], asked=asked) as pipe:
        result = assert_same(pipe, original, **call)
    assert relative_l2(plain.numpy(), result.latents) > 1e-2


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        (None, {"expand_timesteps": True}, "expand_timesteps"),
        (None, {"boundary_ratio": None}, "one of transformer_2 and boundary_ratio"),
        ("vae", {"is_residual": True}, "is_residual"),
        ("vae", {"scale_factor_temporal": 8}, "whose layers are made for 4 and 4"),
        ("transformer_2", {"image_dim": 8}, "is given an image"),
        ("transformer", {"in_channels": 36}, "36 input and 16 output"),
        ("transformer", {"patch_size": (2, 2, 2)}, "expected one frame and squares"),
    ],
)
def test_forms_that_are_refused(
    original: Any, part: str | None, changes: dict[str, Any], says: str
) -> None:
    pipe = copy.copy(original)
    holder = pipe if part is None else copy.copy(getattr(pipe, part))
    holder._internal_dict = type(holder._internal_dict)({**holder.config, **changes})
    if part is not None:
        object.__setattr__(pipe, part, holder)
    with pytest.raises(UnsupportedPipeline, match=says):
        family_of("WanPipeline").describe(pipe)


def test_targets_and_passes_that_do_not_fit(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, original: Any
) -> None:
    source = pipeline_folder("wan-2.2")
    with pytest.raises(InputError, match="'coreml' has graphs of any height and width alone"):
        export(source, tmp_path / "bundle", targets=["coreml"])
    with pytest.raises(UnsupportedPipeline, match="WanTransformer3DModel cannot be cut"):
        split(family_of("WanPipeline").describe(original))
    signature: Any = SimpleNamespace(makes_videos=True)
    case = {"height": 32, "width": 32, "batch": 1, "call": {}}
    with pytest.raises(InputError, match="latentc bench compares images"):
        bench_arguments({"case": case}, signature, "a", 2, 1, None)


def test_a_recipe_for_engines_has_a_range_of_frames(original: Any) -> None:
    profile = default_profile(family_of("WanPipeline").describe(original))
    assert profile["denoiser"]["frames"] == profile["denoiser_2"]["frames"] == (1, 21, 31)
    assert profile["vae_decoder"]["frames"] == (1, 21, 31)


def test_the_other_reader(bundle: Path) -> None:
    """The reader of tests/docs has frames, and texts that are cleaned."""
    other = reader.Bundle(bundle)
    call: dict[str, Any] = {**SMALL, "scheduler": "unipc", "seed": 4}
    text = "a  red\tcircle &amp;lt; a square"
    with latentc.load(bundle, backend="onnxruntime") as pipe:
        for more in ({"guidance_scale_2": 1.5}, {"num_frames": 8}, {"num_videos_per_prompt": 2}):
            latents, frames = other(prompt=[text], **{**call, **more})
            found = pipe([text], output_type="np", **{**call, **more})
            assert relative_l2(latents, found.latents) < 1e-5
            assert np.abs(frames - found.frames * 255).max() < 1
