"""LoRA files and other VAEs at export: what diffusers draws with them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import latentc
from latentc.cli import run as command
from latentc.exporter.compiler.export import export
from latentc.exporter.source import resolving as source
from latentc.exporter.source.adapters import places, textual_inversion
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import SourceError
from latentc.runtimes.verification.verify import relative_l2
from tests.support.combinations import kept
from tests.support.loaded import EAGER
from tests.support.tiny import tiny_autoencoder
from tests.support.uncaptured import uncaptured

SMALL: dict[str, Any] = {"targets": ["onnx"], "schedulers": (), "steps": (4,)}
BOTH = SMALL | {"targets": ["onnx", "openvino"]}
BACKENDS = ("onnxruntime", "openvino")
CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
PROMPT = "a red circle"
WHICH = {"lora_A": "lora_down", "lora_B": "lora_up", "lora_magnitude_vector": "dora_scale"}


def make_lora(folder: Path, file: Path, seed: int, *, kohya: bool = False, **options: Any) -> Path:
    """A LoRA with random weights for a saved pipeline's UNet and text encoders."""
    torch.manual_seed(seed)
    pipe = DiffusionPipeline.from_pretrained(folder)
    texts = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    parts = {"unet": ["to_q", "to_v"], "text_encoder": texts, "text_encoder_2": texts[:5]}
    layers, kohyas = {}, {}
    for part, targets in parts.items():
        model = getattr(pipe, part, None)
        if model is None:
            continue
        model.add_adapter(
            LoraConfig(
                r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, **options
            )
        )
        state = get_peft_model_state_dict(model)
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state)
        kohyas |= {name: value for key in state for name, value in as_kohya(part, key, state[key])}
    if kohya:
        save_file(kohyas, file)
        return file
    type(pipe).save_lora_weights(file.parent, weight_name=file.name, **layers)
    return file


def as_kohya(part: str, key: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor as the scripts of kohya-ss name it; alpha is half of the rank."""
    module, _, which = key.removesuffix(".weight").rpartition(".")
    if part == "text_encoder" and not module.startswith("text_model."):
        module = f"text_model.{module}"
    name = f"lora_{'unet' if part == 'unet' else 'te'}_{module.replace('.', '_')}"
    yield f"{name}.{WHICH[which]}.weight", value
    yield f"{name}.alpha", torch.tensor(2.0)


def drawn(pipe: Any) -> np.ndarray:
    """diffusers' final latents."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    made = pipe(PROMPT, generator=generator, output_type="latent", **CALL).images
    latents: np.ndarray = made.float().numpy()
    return latents


def with_loras(folder: Path, loras: Sequence[tuple[Path, float]]) -> np.ndarray:
    """Return what diffusers draws with LoRAs that are not fused."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    names = [f"a{index}" for index in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in loras])
    return drawn(pipe)


def latents_of(bundle: Path, backend: str = "onnxruntime") -> np.ndarray:
    with latentc.load(bundle, backend) as pipe:
        latents: np.ndarray = pipe(PROMPT, seed=5, output_type="latent", **CALL).latents
    return latents


@pytest.mark.support(family="name", task="LoRA", target="backend")
@pytest.mark.parametrize("backend", kept([EAGER, *BACKENDS], EAGER))
@pytest.mark.parametrize("name", kept(["sd", "sdxl"], "sdxl"))
def test_two_loras_at_their_scales(
    pipeline_folder: Callable[[str], Path],
    exported: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    backend: str,
) -> None:
    """Only weights are others than without them: graphs are in test-all."""
    folder = pipeline_folder(name)
    one = make_lora(folder, tmp_path / "one.safetensors", 1)
    two = make_lora(folder, tmp_path / "two.safetensors", 2)
    loras, bundle = [f"{one}:0.8", f"{two}:-0.5"], tmp_path / "b"
    expected = with_loras(folder, [(one, 0.8), (two, -0.5)])
    if backend == EAGER:
        with uncaptured(folder, bundle, steps=(4,), asked={"lora": loras}) as pipe:
            found = pipe(PROMPT, seed=5, output_type="latent", **CALL).latents
    else:
        export(folder, bundle, lora=loras, share_with=exported(name), **BOTH)
        found = latents_of(bundle, backend)
    assert relative_l2(found, expected) <= 1e-4
    plain = drawn(DiffusionPipeline.from_pretrained(folder))
    assert relative_l2(expected, plain) > 1e-2
    recorded = Manifest.load(bundle).source.ingredients
    assert [(each.kind, each.id, each.scale) for each in recorded] == [
        ("lora", "one.safetensors", 0.8),
        ("lora", "two.safetensors", -0.5),
    ]
    assert command(["inspect", str(tmp_path / "b")]) == 0


@pytest.mark.parametrize("how", [{"kohya": True}, {"use_dora": True}, {"use_rslora": True}])
def test_other_forms(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, how: Mapping[str, Any]
) -> None:
    """Fused weights draw what diffusers draws with the adapter beside them."""
    folder = pipeline_folder("sd")
    file = make_lora(folder, tmp_path / "one.safetensors", 1, **how)
    if "use_dora" in how:  # diffusers does not load the lengths of a text encoder's layers
        state = load_file(file)
        save_file({key: state[key] for key in state if key.startswith("unet.")}, file)
    asked = {"lora": [str(file)]}
    fused = drawn(source.load(source.resolve(folder, asked=asked)))
    assert relative_l2(fused, with_loras(folder, [(file, 1.0)])) <= 1e-4


def test_what_is_made_depends_on_it(smallest: Path, smallest_bundle: Path, tmp_path: Path) -> None:
    file = make_lora(smallest, tmp_path / "one.safetensors", 1)
    settings = SMALL | {"targets": ["torch"], "verify": False}  # the quickest
    settings["share_with"] = smallest_bundle

    def made(*asked: str) -> set[str]:
        result = export(smallest, tmp_path / "b", lora=asked, **settings)
        return set() if not result.made else {result.manifest.source.fingerprint}

    (plain,), (with_it,), (stronger,) = made(), made(str(file)), made(f"{file}:1.5")
    assert len({plain, with_it, stronger}) == 3
    assert not made(f"{file}:1.5")
    vae = {artifact.key for artifact in _decoders(tmp_path / "b")}
    assert made(str(file)) == {with_it}
    assert vae == {artifact.key for artifact in _decoders(tmp_path / "b")}


def _decoders(bundle: Path) -> list[Any]:
    return [build.artifacts["vae_decoder"] for build in Manifest.load(bundle).builds]


@pytest.mark.support(family="sd", task="another VAE", target="onnxruntime")
@pytest.mark.support(family="sd", task="another VAE", target="openvino")
def test_another_vae(
    pipeline_folder: Callable[[str], Path], sd_bundle: Path, tmp_path: Path
) -> None:
    folder = pipeline_folder("sd")
    tiny = tiny_autoencoder()
    tiny.save_pretrained(tmp_path / "tiny")
    made = export(folder, tmp_path / "b", vae=tmp_path / "tiny", share_with=sd_bundle, **BOTH)
    assert [(each.kind, each.id) for each in made.manifest.source.ingredients] == [("vae", "tiny")]
    pipe = DiffusionPipeline.from_pretrained(folder, vae=tiny)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipe(PROMPT, generator=generator, output_type="np", **CALL).images
    for backend in BACKENDS:
        with latentc.load(tmp_path / "b", backend) as ours:
            found = ours(PROMPT, seed=5, output_type="np", **CALL).images
        assert np.abs(found - expected).max() <= 2 / 255
    # of a whole pipeline its VAE is meant
    whole = source.resolve(folder, asked={"vae": [str(pipeline_folder("sdxl"))]})
    assert whole.ingredients[0].path.name == "vae"
    assert isinstance(source.load(whole).vae, diffusers.AutoencoderKL)


@pytest.mark.parametrize(
    ("asked", "place", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("C:\\a.safetensors", "C:\\a.safetensors", 1.0),
        ("owner/name:.25", "owner/name", 0.25),
        ("owner/name:strong", "owner/name:strong", 1.0),
    ],
)
def test_scales(asked: str, place: str, scale: float) -> None:
    assert places.scaled(asked) == (place, scale)


def test_a_lora_of_another_family_is_refused_with_its_layers(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = make_lora(pipeline_folder("sd"), tmp_path / "one.safetensors", 1)
    state = load_file(file)
    key = next(key for key in state if key.startswith("unet."))
    extra = {key.replace("down_blocks.", "down_blocks.7"): value.clone()
             for key, value in state.items() if "down_blocks" in key}  # fmt: skip
    save_file({**state, **extra}, tmp_path / "more.safetensors")
    with pytest.raises(
        SourceError, match=r"is for another model: \d+ of its \d+ layers .*blocks\.7"
    ):
        source.load(
            source.resolve(
                pipeline_folder("sd"), asked={"lora": [str(tmp_path / "more.safetensors")]}
            )
        )
    assert key


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lora", "{tmp}/cut.safetensors"], "is damaged or cut short"),
        (["--lora", "{tmp}/old.bin"], "is a pickle, which can run whatever code"),
        (["--lora", "{tmp}/empty"], "holds no .safetensors files"),
        (
            ["--lora", "{tmp}/other.safetensors"],
            "other.safetensors has no layers for any part of this model (unet, t",
        ),
        (["--vae", "{tmp}/empty"], "is no VAE: expected a folder"),
        (["--vae", "{sd}/unet"], "is no VAE: it is a UNet2DConditionModel"),
        (["--vae", "{tmp}/small"], "does not fit: block out channels 3"),
    ],
)
def test_bad_input(
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "old.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "empty").mkdir()
    save_file({"x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    if "small" in arguments[1]:
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=8,
        ).save_pretrained(tmp_path / "small")
    folder, output = pipeline_folder("sd"), tmp_path / "b"
    given = [each.format(tmp=tmp_path, sd=folder) for each in arguments]
    assert command(["export", str(folder), "-o", str(output), *given]) == 3
    assert says in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_a_pipeline_without_such_parts(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = make_lora(pipeline_folder("sd"), tmp_path / "one.safetensors", 1)
    folder = pipeline_folder("unconditional")
    for asked, says in (
        ({"lora": [str(file)]}, "DDPMPipeline takes no LoRA"),
        ({"vae": [str(pipeline_folder("sd"))]}, "DDPMPipeline has no VAE to replace"),
        ({"vae": [str(pipeline_folder("sd"))] * 2}, "a pipeline has one VAE; 2 were given"),
    ):
        with pytest.raises(SourceError, match=says):
            source.load(source.resolve(folder, asked=asked))


def make_inversion(folder: Path, file: Path, name: str, vectors: int = 2) -> Path:
    """Vectors for one word; a pair for pipelines with two text encoders."""
    torch.manual_seed(11)
    pipe = DiffusionPipeline.from_pretrained(folder)

    def tensor(encoder: Any) -> torch.Tensor:
        return torch.randn(vectors, encoder.get_input_embeddings().weight.shape[1])

    second = getattr(pipe, "text_encoder_2", None)
    pair = {"clip_l": tensor(pipe.text_encoder)} | ({"clip_g": tensor(second)} if second else {})
    save_file(pair if second else {name: pair["clip_l"]}, file)
    return file


@pytest.mark.support(family="name", task="textual inversion", target="onnxruntime")
@pytest.mark.support(family="name", task="textual inversion", target="openvino")
@pytest.mark.parametrize(
    ("name", "vectors"), kept([("sd", 1), ("sd", 3), ("sdxl", 1), ("sdxl", 3)], ("sdxl", 3))
)
def test_a_new_word(
    pipeline_folder: Callable[[str], Path],
    exported: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    vectors: int,
) -> None:
    """The other components are taken over from a bundle without the word."""
    folder = pipeline_folder(name)
    file = make_inversion(folder, tmp_path / "cat.safetensors", "<cat>", vectors)
    asked = f"{file}:<cat>" if name == "sdxl" else str(file)
    other = exported(name)
    made = export(folder, tmp_path / "b", textual_inversion=asked, share_with=other, **BOTH)
    known = {
        artifact.key
        for build in Manifest.load(other).builds
        for artifact in build.artifacts.values()
    }
    for build in made.manifest.builds:
        anew = {n for n, artifact in build.artifacts.items() if artifact.key in made.made}
        assert anew == {n for n in build.artifacts if n.startswith("text_encoder")}
        assert {a.key for n, a in build.artifacts.items() if n not in anew} <= known
    (recorded,) = made.manifest.source.ingredients
    assert (recorded.kind, recorded.id, recorded.token) == (
        "textual-inversion",
        "cat.safetensors",
        "<cat>",
    )
    pipe = DiffusionPipeline.from_pretrained(folder)
    state = load_file(file)
    pipe.load_textual_inversion(state["clip_l" if name == "sdxl" else "<cat>"], token="<cat>")
    if name == "sdxl":
        pipe.load_textual_inversion(
            state["clip_g"],
            token="<cat>",
            text_encoder=pipe.text_encoder_2,
            tokenizer=pipe.tokenizer_2,
        )
    words = made.manifest.tokenizers[0].vocabulary
    assert words == pipe.text_encoder.get_input_embeddings().weight.shape[0]
    pipe.set_progress_bar_config(disable=True)
    for prompt in ("a red <cat> above <cat>, blue", "no such word"):
        generator = torch.Generator().manual_seed(5)
        wanted = pipe(prompt, generator=generator, output_type="latent", **CALL).images
        for backend in BACKENDS:
            with latentc.load(tmp_path / "b", backend) as ours:
                found = ours(prompt, seed=5, output_type="latent", **CALL).latents
            assert relative_l2(found, wanted.float().numpy()) <= 1e-4
    # Its weight is that of all its tokens.
    names = ("prompt_embeds", "", "pooled_prompt_embeds")
    of_text = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        empty = pipe.encode_prompt("", **of_text)[0]
        states = dict(zip(names, pipe.encode_prompt("a <cat>, red", **of_text), strict=False))
        states.pop("")
    cat, generator = slice(2, 2 + vectors), torch.Generator().manual_seed(5)
    text = states["prompt_embeds"]
    text[:, cat] = empty[:, cat] + 1.5 * (text[:, cat] - empty[:, cat])
    wanted = pipe(**states, generator=generator, output_type="latent", **CALL).images
    with latentc.load(tmp_path / "b") as ours:
        found = ours(
            "a (<cat>:1.5), red", prompt_weighting=True, seed=5, output_type="latent", **CALL
        ).latents
    assert relative_l2(found, wanted.float().numpy()) <= 1e-4


@pytest.mark.parametrize(
    ("made_for", "used_on", "says"),
    [
        ("sd", "sdxl", "has vectors for text_encoder; StableDiffusionXLPipeline needs them for te"),
        ("sd", "unconditional", "DDPMPipeline takes no new words"),
    ],
)
def test_words_that_do_not_fit(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, made_for: str, used_on: str, says: str
) -> None:
    file = make_inversion(pipeline_folder(made_for), tmp_path / "cat.safetensors", "<cat>")
    asked = {"textual-inversion": [str(file)]}
    with pytest.raises(SourceError, match=says):
        source.load(source.resolve(pipeline_folder(used_on), asked=asked))


@pytest.mark.parametrize(
    ("state", "word", "says"),
    [
        ({"<cat>": torch.zeros(2, 5)}, "", "does not fit: vectors of 5 numbers for '<cat>', and"),
        (
            {"a": torch.zeros(1), "b": torch.zeros(1)},
            "",
            "is no textual inversion: expected one te",
        ),
        (
            {"emb_params": torch.zeros(1, 32)},
            ":a",
            "is in the vocabulary already",
        ),
    ],
)
def test_files_that_are_no_words(
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    state: dict[str, torch.Tensor],
    word: str,
    says: str,
) -> None:
    save_file(state, tmp_path / "cat.safetensors")
    asked = {"textual-inversion": [f"{tmp_path / 'cat.safetensors'}{word}"]}
    with pytest.raises(SourceError, match=says):
        source.load(source.resolve(pipeline_folder("sd"), asked=asked))


def test_the_word_of_a_file(tmp_path: Path) -> None:
    for name, asked, expected in (
        ("<cat>", "", "<cat>"),
        ("<cat>", ":<dog>", "<dog>"),
        ("emb_params", "", "style"),
    ):
        save_file({name: torch.zeros(1, 4)}, tmp_path / "style.safetensors")
        found = textual_inversion.find(f"{tmp_path / 'style.safetensors'}{asked}")
        assert found.token == expected
