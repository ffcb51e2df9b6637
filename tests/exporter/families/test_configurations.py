"""Any saved pipeline of a supported class exports, whatever its configuration says; what its own
diffusers pipeline cannot run is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image

import latentc
from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values, variant
from latentc.exporter.capture.step_cache import FEATURES, split
from latentc.exporter.compiler.export import export
from latentc.exporter.compiler.run import Exported
from latentc.exporter.families import family_of
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.errors import ExportError, LatentcError, SourceError, UnsupportedPipeline
from latentc.runtimes.verification.verify import relative_l2
from tests.conftest import KEPT, one_at_a_time
from tests.support import tiny_configurations as tiny
from tests.support.combinations import kept

LATENTS = 1e-4  # relative L2 against the diffusers pipeline
IMAGE = 2  # of 255
BOTH = ("onnx", "openvino")
STABLE_DIFFUSION = {
    "simple cross-attention": ("onnx",),
    "attention without text": ("openvino",),
    "one block": ("openvino",),
    "odd sides": BOTH,
    "many blocks": ("onnx",),
}
STABLE_DIFFUSION_XL = {"normalised latents": ("onnx",), "one encoder": ("openvino",)}
UNCONDITIONAL = {"fourier": ("openvino",), "learned": ("onnx",), "variance": ("onnx",)}

Make = Callable[[Path, tiny.Configuration], None]


def exported(make: Make, name: str, made_with: tiny.Configuration, targets: Any) -> Exported:
    folder = KEPT / "configurations" / f"{make.__name__}-{name.replace(' ', '-')}"
    with one_at_a_time(folder.name):
        torch.manual_seed(3)
        make(folder / "pipeline", made_with)
        return export(
            folder / "pipeline",
            folder / "bundle",
            targets=targets,
            schedulers=[],
            steps=[4],
            overwrite=True,
        )


def assert_same(found: Exported) -> None:
    """Check that each engine did as the diffusers pipeline did with the same seed."""
    for build in found.manifest.builds:
        assert build.verification is not None
        loop = build.verification.loop
        assert loop is not None
        assert loop.latents_relative_l2 <= LATENTS
        assert loop.image_max_difference <= IMAGE


@pytest.mark.parametrize("name", kept(STABLE_DIFFUSION, "attention without text", "many blocks"))
def test_stable_diffusion(name: str) -> None:
    made_with = tiny.STABLE_DIFFUSION[name]
    found = exported(tiny.stable_diffusion, name, made_with, STABLE_DIFFUSION[name])
    assert_same(found)
    size = made_with.unet.get("sample_size", 16)
    height, width = (size, size) if isinstance(size, int) else size
    with latentc.load(found.bundle) as pipe:
        result = pipe("a red circle", num_inference_steps=4, seed=1)
    assert result.latents.shape[2:] == (height, width)


@pytest.mark.parametrize("name", kept(STABLE_DIFFUSION_XL, "normalised latents"))
def test_stable_diffusion_xl(name: str) -> None:
    made_with = tiny.STABLE_DIFFUSION_XL[name]
    assert_same(exported(tiny.stable_diffusion_xl, name, made_with, STABLE_DIFFUSION_XL[name]))


@pytest.mark.parametrize("name", kept(UNCONDITIONAL, "variance"))
def test_unconditional(name: str) -> None:
    made_with = tiny.UNCONDITIONAL[name]
    assert_same(exported(tiny.unconditional, name, made_with, UNCONDITIONAL[name]))


# How far the denoiser may be off in one call; for downsampled attention, how far it is by nature.
PASSES = {
    "fp16_compute": 1e-2,
    "bf16_compute": 5e-2,
    "split_einsum_attention": 1e-5,
    "int8_weights": 5e-2,
    "downsampled_attention": 1e-1,
}


@pytest.mark.parametrize("name", kept(["odd sides", "simple cross-attention"], "odd sides"))
def test_passes_and_sizes(name: str, tmp_path: Path) -> None:
    """Programs and the shallow part, at sizes that were not traced, against diffusers' UNet."""
    tiny.stable_diffusion(tmp_path, tiny.STABLE_DIFFUSION[name])
    pipe = load(resolve(tmp_path))
    description = family_of("StableDiffusionPipeline").describe(pipe)
    whole, shallow = split(description).graphs[1:3]
    multiple, traced = description.latents.multiple, symbol_values(description, traced=True)
    other = symbol_values(description, traced=False)
    program = capture(description.graphs[1], multiple, traced)
    for height, width in ((13, 15), (15, 10), (8, 24)) if multiple == 1 else ((12, 10), (8, 24)):
        inputs = example_inputs(whole, other | {"height": height, "width": width}, seed=1)
        with torch.no_grad():
            expected = pipe.unet(*inputs.values())[0]
            (found,) = program.module()(**inputs)
        assert relative_l2(found.numpy(), expected.numpy()) <= 1e-5
    for each, limit in PASSES.items():
        if each == "downsampled_attention" and name != "odd sides":
            continue  # it has no self-attention
        with torch.no_grad():
            (found,) = variant(program, [each]).module()(**inputs)
        assert relative_l2(found.float().numpy(), expected.numpy()) <= limit
    with torch.no_grad():
        _, features = whole.module(**inputs)
        taken = {n: (inputs | {FEATURES: features})[n] for n in shallow.component.inputs}
        (found,) = capture(shallow, multiple, traced).module()(**taken)
    assert relative_l2(found.numpy(), expected.numpy()) <= 1e-5


REFUSED: dict[str, tuple[Make, tiny.Configuration, str]] = {
    "class numbers": (
        tiny.stable_diffusion,
        tiny.Configuration(unet={"num_class_embeds": 10}),
        "num_class_embeds 10 takes class labels, and StableDiffusionPipeline has none",
    ),
    "class time": (
        tiny.stable_diffusion,
        tiny.Configuration(unet={"class_embed_type": "timestep"}),
        "class_embed_type 'timestep' takes class labels",
    ),
    "class vectors": (
        tiny.stable_diffusion_xl,
        tiny.Configuration(
            unet={
                "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 8,
                "class_embeddings_concat": True,
            }
        ),
        "class_embed_type 'simple_projection' takes class labels, and StableDiffusionXL",
    ),
    "classes of images": (
        tiny.unconditional,
        tiny.Configuration(unet={"num_class_embeds": 10}),
        "UNet2DModel with num_class_embeds 10 takes class labels, and DDPMPipeline has none",
    ),
    "size conditioning": (
        tiny.stable_diffusion,
        tiny.Configuration(
            unet={
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 68,
            }
        ),
        "addition_embed_type 'text_time' does not fit StableDiffusionPipeline",
    ),
    "no size conditioning": (
        tiny.stable_diffusion_xl,
        tiny.Configuration(),
        "addition_embed_type None does not fit StableDiffusionXLPipeline",
    ),
    "image conditioning": (
        tiny.stable_diffusion,
        tiny.Configuration(unet={"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj"}),
        "encoder_hid_dim_type 'image_proj' does not fit",
    ),
    "no size": (
        tiny.stable_diffusion,
        tiny.Configuration(unet={"sample_size": None}),
        "does not say its sample_size",
    ),
    "a variance that nothing reads": (
        tiny.unconditional,
        tiny.Configuration(unet={"out_channels": 6}),
        "3 input and 6 output channels does not fit a DDPMScheduler",
    ),
    "no variance": (
        tiny.unconditional,
        tiny.Configuration(scheduler={"variance_type": "learned_range"}),
        "3 input and 3 output channels does not fit a DDPMScheduler",
    ),
    "timesteps without a vector": (
        tiny.unconditional,
        tiny.Configuration(
            unet=tiny.UNCONDITIONAL["learned"].unet, scheduler={"num_train_timesteps": 2000}
        ),
        "counts 2000 timesteps and the UNet has learned 1000",
    ),
    "odd pixels": (
        tiny.unconditional,
        tiny.Configuration(unet={"sample_size": (16, 15)}),
        "sample_size 16 by 15 cannot halve it 1 times",
    ),
    "short text encoder": (
        tiny.stable_diffusion,
        tiny.Configuration(text={"max_position_embeddings": 40}),
        "makes 77 ids of each text and the text encoder has 40",
    ),
    "no text encoder": (
        tiny.stable_diffusion_xl,
        tiny.Configuration(pipeline={"text_encoder_2": None}),
        "StableDiffusionXLPipeline was saved without its text_encoder_2",
    ),
    "other enlargement": (
        tiny.stable_diffusion,
        tiny.Configuration(tiny_vae=True, vae={"upsampling_scaling_factor": 4}),
        "upsampling_scaling_factor 4",
    ),
}


FAULTS = {
    "timesteps without a vector": ("1.5", "timesteps beyond the vectors that a UNet has learned")
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.fault(*FAULTS[case])] if case in FAULTS else [])
        for case in REFUSED
    ],
)
def test_what_its_pipeline_cannot_run_is_refused(case: str, tmp_path: Path) -> None:
    make, made_with, message = REFUSED[case]
    make(tmp_path / "pipeline", made_with)
    with pytest.raises(UnsupportedPipeline, match=message):
        export(tmp_path / "pipeline", tmp_path / "bundle", schedulers=[], steps=[4])
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("made_with", "message"),
    [
        (tiny.Configuration(unet={"dual_cross_attention": True}), "DualTransformer2DModel"),
        (tiny.Configuration(text={"hidden_size": 16}), "shapes cannot be multiplied"),
    ],
    ids=["dual cross-attention", "text of another width"],
)
def test_what_fails_in_diffusers_says_so(
    made_with: tiny.Configuration, message: str, tmp_path: Path
) -> None:
    tiny.stable_diffusion(tmp_path / "pipeline", made_with)
    with pytest.raises(ExportError, match=rf"itself does not run in diffusers.*{message}"):
        export(tmp_path / "pipeline", tmp_path / "bundle", schedulers=[], steps=[4])
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_padding_is_masked_as_the_tokenizer_does(pad: str, tmp_path: Path) -> None:
    made_with = tiny.Configuration(text={"use_attention_mask": True}, pad=pad)
    tiny.stable_diffusion(tmp_path, made_with)
    pipe = load(resolve(tmp_path))
    encoder = family_of("StableDiffusionPipeline").describe(pipe).graphs[0].module
    texts = ["", "a red circle", "!!! red !", "red <|endoftext|> blue", "very " * 90]
    ids = pipe.tokenizer(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    expected = pipe.text_encoder(ids.input_ids, attention_mask=ids.attention_mask)[0]
    with torch.no_grad():
        assert torch.equal(encoder(ids.input_ids)[0], expected)
        assert not torch.equal(pipe.text_encoder(ids.input_ids)[0], expected)


def test_images_are_encoded_with_the_moments_of_the_latents(tmp_path: Path) -> None:
    """SDXL's image-to-image pipeline encodes images like this, which shares its VAE."""
    made_with = tiny.STABLE_DIFFUSION_XL["normalised latents"]
    tiny.stable_diffusion_xl(tmp_path, made_with)
    pipe = load(resolve(tmp_path))
    graphs = family_of("StableDiffusionXLPipeline").describe(pipe).graphs
    (graph,) = (each for each in graphs if each.component.name == "vae_encoder")
    image = torch.rand((2, 3, 8, 16), generator=torch.Generator().manual_seed(1))
    theirs = AutoPipelineForImage2Image.from_pipe(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = torch.cat([torch.randn((1, 4, 8, 16), generator=each) for each in generators])
    with torch.no_grad():
        expected = theirs.prepare_latents(
            image * 2 - 1,
            timestep=None,
            batch_size=2,
            num_images_per_prompt=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
            add_noise=False,
        )
        (found,) = graph.module(image, noise)
    assert relative_l2(found.numpy(), expected.numpy()) <= 1e-6


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        (None, SourceError, "has no model_index.json .save one with pipe.save_pretrained"),
        ({"_class_name": "KandinskyPipeline"}, UnsupportedPipeline, "'KandinskyPipeline'"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, UnsupportedPipeline, "code of its own"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, SourceError, "no _class_name; supported"),
        ([], SourceError, "no _class_name; supported"),
    ],
    ids=["no index", "another class", "code of its own", "no class", "no object"],
)
def test_other_sources(index: Any, kind: type[LatentcError], message: str, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(kind, match=message) as caught:
        export(tmp_path, tmp_path / "bundle")
    if kind is UnsupportedPipeline:
        assert "StableDiffusionXLPipeline" in str(caught.value)
        assert "docs/extending.md" in str(caught.value)
