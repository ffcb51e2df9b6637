"""Kandinsky 2.2: what its graphs give is what diffusers' modules give, and what its class cannot
run is refused before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from latentc.exporter.compiler.export import export
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.errors import ExportError, SourceError, UnsupportedPipeline
from tests.support import tiny_kandinsky, tiny_transformers
from tests.support.tiny_kandinsky import WIDTH
from tests.support.uncaptured import uncaptured

CLASS = "KandinskyV22CombinedPipeline"
TEXTS = ["a red circle", "blue"]


@pytest.fixture(scope="module")
def pipe(pipeline_folder: Callable[[str], Path]) -> Any:
    with quiet_loading():
        return DiffusionPipeline.from_pretrained(pipeline_folder("kandinsky"))


@pytest.fixture(scope="module")
def modules(pipe: Any) -> Mapping[str, Callable[..., tuple[torch.Tensor, ...]]]:
    graphs = family_of(CLASS).describe(pipe).graphs
    return {graph.component.name: graph.module.eval() for graph in graphs}


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_texts_and_no_text(pipe: Any, modules: Mapping[str, Any]) -> None:
    expected = pipe.prior_pipe._encode_prompt(TEXTS, "cpu", 1, True)
    tokens = pipe.prior_tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    texts = modules["text_encoder"](tokens.input_ids)
    nothing = modules["no_text"](torch.zeros(2, 1))
    for found, none, both in zip(texts, nothing, expected, strict=True):
        assert_close(torch.cat([none, found]), both.float())
    assert texts[2].sum(1).tolist() == [len(ids) + 2 for ids in _ids(pipe)]


def _ids(pipe: Any) -> list[list[int]]:
    return [pipe.prior_tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


@torch.no_grad()
def test_the_prior(pipe: Any, modules: Mapping[str, Any]) -> None:
    sample, embeds = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    states, mask = (
        torch.randn(2, 77, WIDTH),
        torch.arange(77).expand(2, -1) < torch.tensor([[9], [5]]),
    )
    inputs = (sample, torch.tensor(500), embeds, states, mask)
    (found,) = modules["prior"](sample, torch.full((2,), 500.0), embeds, states, mask.float())
    assert_close(found, pipe.prior_prior(*inputs).predicted_image_embedding)
    for each in modules["prior_pair"](
        *(sample, torch.full((2,), 500.0), embeds, states, mask.float()),
        *(sample, embeds, states, mask.float()),
    ):
        assert_close(each, found)
    image, nothing = modules["prior_output"](found)
    assert_close(image, pipe.prior_prior.post_process_latents(found))
    assert_close(nothing, pipe.prior_pipe.get_zero_embed(2))


@torch.no_grad()
def test_the_decoder(pipe: Any, modules: Mapping[str, Any]) -> None:
    latents, embeds = torch.randn(2, 4, 8, 16), torch.randn(2, WIDTH)
    given = {"added_cond_kwargs": {"image_embeds": embeds}}
    both = pipe.unet(latents, torch.tensor(300), None, **given).sample
    found = modules["denoiser"](latents, torch.full((2,), 300.0), embeds)
    assert_close(torch.cat(found, dim=1), both)
    image = pipe.movq.decode(latents, force_not_quantize=True).sample * 0.5 + 0.5
    assert_close(modules["vae_decoder"](latents)[0], image)
    encoded = pipe.movq.encode(image * 2 - 1).latents
    assert_close(modules["vae_encoder"](image)[0], encoded)


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "no variance": (
        "unet",
        lambda: tiny_kandinsky.unet(out_channels=4),
        "a UNet with 4 input and 4 output channels does not fit",
    ),
    "a hint beside the embedding": (
        "unet",
        lambda: tiny_kandinsky.unet(addition_embed_type="image_hint"),
        "a UNet with addition_embed_type 'image_hint' does not fit",
    ),
    "texts": (
        "unet",
        lambda: tiny_kandinsky.unet(encoder_hid_dim_type=None),
        "a UNet with encoder_hid_dim_type 'text_proj' does not fit .* expected 'image_proj'",
    ),
    "class labels": (
        "unet",
        lambda: tiny_kandinsky.unet(num_class_embeds=4),
        "a UNet that takes class labels does not fit",
    ),
    "other latents": (
        "movq",
        lambda: tiny_kandinsky.movq(vq_embed_dim=3),
        "a movq for latents of 3 channels does not fit the UNet, which has 4",
    ),
    "a codebook": (
        "movq",
        lambda: tiny_kandinsky.movq(lookup_from_codebook=True),
        "a movq with lookup_from_codebook takes numbers of its codebook",
    ),
    "grey images": (
        "movq",
        lambda: tiny_kandinsky.movq(in_channels=1),
        "a movq for images of 1 and 3 channels",
    ),
    "another autoencoder": (
        "movq",
        lambda: tiny_transformers.autoencoder(4, 4),
        "a movq of the class AutoencoderKL is not supported",
    ),
    "a prior of several embeddings": (
        "prior_prior",
        lambda: tiny_kandinsky.prior(added_emb_type=None),
        "a prior with added_emb_type None: expected 'prd'",
    ),
    "a prior of other embeddings": (
        "prior_prior",
        lambda: tiny_kandinsky.prior(clip_embed_dim=16),
        "takes embeddings of 32 numbers and gives 16",
    ),
    "a prior of an odd width": (
        "prior_prior",
        lambda: tiny_kandinsky.prior(embedding_dim=24, clip_embed_dim=24),
        "a prior of embeddings of 24 numbers: expected a multiple of 16",
    ),
    "samples that are scaled": (
        "scheduler",
        diffusers.EulerDiscreteScheduler,
        "with a EulerDiscreteScheduler: diffusers' class scales no samples",
    ),
    "no prior": ("prior_prior", lambda: None, "was saved without its prior_prior"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_parts_that_are_refused(what: str, pipe: Any) -> None:
    part, make, message = REFUSED[what]
    other = copy.copy(pipe)
    setattr(other, part, make())
    with pytest.raises(UnsupportedPipeline, match=message):
        family_of(CLASS).describe(other)


def test_a_variance_of_no_limits(
    pipe: Any, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """No plan can say it, and no bundle is begun."""
    with quiet_loading():
        other = DiffusionPipeline.from_pretrained(pipeline_folder("kandinsky"))
        config = {**pipe.scheduler.config, "variance_type": "learned"}
        other.register_modules(scheduler=diffusers.DDPMScheduler.from_config(config))
        other.save_pretrained(tmp_path / "other")
    with pytest.raises(ExportError, match="'learned' expects a model that predicts its variance"):
        export(tmp_path / "other", tmp_path / "bundle")


def test_weights_that_are_missing(
    pipeline_folder: Callable[[str], Path], pipe: Any, tmp_path: Path
) -> None:
    """The prior would have random ones in their place."""
    pipe.save_pretrained(tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "prior_prior" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["clip_mean"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SourceError, match="the weights do not fit the model, 1 missing"):
        load(resolve(tmp_path / "pipeline"))
    (tmp_path / "pipeline" / "prior_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"needs vocab\.json and merges\.txt, or tokenizer\.json"):
        resolve(tmp_path / "pipeline")


def test_weights_in_halves(pipe: Any, tmp_path: Path) -> None:
    """Weights in halves give before a graph is captured what whole ones give."""
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(tmp_path / "halves")
    halves = family_of(CLASS).describe(load(resolve(tmp_path / "halves"))).graphs
    named = {graph.component.name: graph.module for graph in halves}
    whole = pipe.prior_pipe.get_zero_embed(1)
    nothing = named["prior_output"](torch.zeros(1, WIDTH))[1]
    torch.testing.assert_close(nothing, whole, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "tasks", "programs"),
    [
        ("kandinsky", (), ["text-to-image"]),
        ("kandinsky", ("image-to-image",), ["text-to-image", "image-to-image"]),
        ("kandinsky-image", (), ["image-to-image"]),
    ],
)
def test_what_is_in_a_bundle(
    name: str,
    tasks: tuple[str, ...],
    programs: list[str],
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    pipe = uncaptured(pipeline_folder(name), tmp_path / "bundle", tasks, mixing=True)
    manifest = pipe.manifest
    assert [program.name for program in manifest.programs] == programs
    encoder = {"vae_encoder"} if "image-to-image" in programs else set()
    names = {component.name for component in manifest.components}
    assert names == {*family_of(CLASS).COMPONENTS} | encoder
    assert [each.name for each in manifest.left_out] == ["prior_image_processor"]
    assert manifest.fixed_schedules == {"prior_scheduler"}
    assert 25 in manifest.schedule("prior_scheduler").steps  # what diffusers takes, unasked
    usual = {each.name: getattr(each, "default", None) for each in manifest.programs[0].arguments}
    assert usual["prior_num_inference_steps"] == (25.0,)
