"""The files that are loaded, digested and looked at for their type are those that diffusers and
transformers load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, ModelMixin
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source import model_files
from latentc.exporter.source import resolving as source
from latentc.runtimes.errors import SourceError

D, T = "diffusion_pytorch_model", "model"
# Files of a folder, the variant that is asked for, and those whose weights arrive (none: refused).
LAYOUTS: list[tuple[str, list[str], str | None, list[str]]] = [
    ("diffusers", [f"{D}.safetensors"], None, [f"{D}.safetensors"]),
    ("diffusers", [f"{D}.safetensors", f"{D}.bin"], None, [f"{D}.safetensors"]),
    ("diffusers", ["other.safetensors", f"{D}.bin"], None, [f"{D}.bin"]),
    ("diffusers", [f"{D}.fp16.safetensors", f"{D}.bin"], None, [f"{D}.bin"]),
    ("diffusers", [f"{D}.safetensors", f"{D}.fp16.safetensors"], "fp16", [f"{D}.fp16.safetensors"]),
    ("diffusers", [f"{D}.safetensors", f"{D}.fp16.bin"], "fp16", [f"{D}.fp16.bin"]),
    ("diffusers", [f"{D}.safetensors", f"{D}.ema.safetensors"], None, [f"{D}.safetensors"]),
    (
        "diffusers",
        [f"{D}.safetensors", f"{D}.safetensors.index.json"],
        None,
        [f"{D}-00001-of-00002.safetensors", f"{D}-00002-of-00002.safetensors"],
    ),
    (
        "diffusers",
        [f"{D}.safetensors", f"{D}.safetensors.index.fp16.json"],
        "fp16",
        [f"{D}.fp16-00001-of-00002.safetensors", f"{D}.fp16-00002-of-00002.safetensors"],
    ),
    (
        "diffusers",
        [f"{D}.safetensors", f"{D}.safetensors.fp16.index.json"],
        "fp16",
        [f"{D}-00001-of-00002.fp16.safetensors", f"{D}-00002-of-00002.fp16.safetensors"],
    ),
    ("diffusers", ["model.safetensors"], None, []),
    ("diffusers", [f"{D}.bin.index.json"], None, []),
    ("diffusers", [f"{D}.safetensors"], "fp16", []),
    ("transformers", [f"{T}.safetensors", "pytorch_model.bin"], None, [f"{T}.safetensors"]),
    ("transformers", ["other.safetensors", "pytorch_model.bin"], None, ["pytorch_model.bin"]),
    ("transformers", [f"{D}.safetensors", "pytorch_model.bin"], None, ["pytorch_model.bin"]),
    (
        "transformers",
        [f"{T}.safetensors", f"{T}.safetensors.index.json"],
        None,
        [f"{T}.safetensors"],
    ),
    (
        "transformers",
        [f"{T}.safetensors.index.json", "pytorch_model.bin"],
        None,
        [f"{T}-00001-of-00002.safetensors", f"{T}-00002-of-00002.safetensors"],
    ),
    (
        "transformers",
        [f"{T}.safetensors", f"{T}.safetensors.index.fp16.json"],
        "fp16",
        [f"{T}.fp16-00001-of-00002.safetensors", f"{T}.fp16-00002-of-00002.safetensors"],
    ),
    (
        "transformers",
        ["pytorch_model.bin.index.json"],
        None,
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    ),
    ("transformers", [f"{D}.safetensors"], None, []),
]
# Odd names of variants, files of other libraries, and every kind of file at once.
ODD_LAYOUTS: list[tuple[str, list[str], str | None, list[str]]] = [
    (
        "diffusers",
        [f"{D}.safetensors", f"{D}.non_ema.safetensors", f"{D}.non_ema.bin"],
        "non_ema",
        [f"{D}.non_ema.safetensors"],
    ),
    (
        "diffusers",
        [f"{D}.safetensors", f"{D}.fp16.v2.safetensors", f"{D}.fp16.safetensors"],
        "fp16.v2",
        [f"{D}.fp16.v2.safetensors"],
    ),
    (
        "diffusers",
        [f"{D}.bin", f"{D}.safetensors", f"{D}.safetensors.index.json"],
        None,
        [f"{D}-00001-of-00002.safetensors", f"{D}-00002-of-00002.safetensors"],
    ),
    ("diffusers", [f"{D}.bin", f"{D}.bin.index.json"], None, [f"{D}.bin"]),
    (
        "diffusers",
        [f"{D}.fp16.safetensors", f"{D}.safetensors.index.json"],
        "fp16",
        [f"{D}.fp16.safetensors"],
    ),
    ("diffusers", ["openvino_model.bin", "model.onnx", f"{D}.bin"], None, [f"{D}.bin"]),
    ("diffusers", [f"{D}.SAFETENSORS", f"{D}.bin"], None, [f"{D}.bin"]),
    (
        "transformers",
        [f"{T}.safetensors", f"{T}.non_ema.safetensors", "pytorch_model.non_ema.bin"],
        "non_ema",
        [f"{T}.non_ema.safetensors"],
    ),
    (
        "transformers",
        [f"{T}.safetensors", "pytorch_model.fp16.bin"],
        "fp16",
        ["pytorch_model.fp16.bin"],
    ),
    (
        "transformers",
        [f"{T}.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin"],
        None,
        [f"{T}-00001-of-00002.safetensors", f"{T}-00002-of-00002.safetensors"],
    ),
    (
        "transformers",
        ["pytorch_model.bin.index.fp16.json", "pytorch_model.bin"],
        "fp16",
        ["pytorch_model.fp16-00001-of-00002.bin", "pytorch_model.fp16-00002-of-00002.bin"],
    ),
    ("transformers", ["openvino_model.bin", "pytorch_model.bin"], None, ["pytorch_model.bin"]),
    ("transformers", [f"{T}.ema.safetensors", f"{T}.safetensors"], None, [f"{T}.safetensors"]),
    ("transformers", [f"{T}.safetensors"], "non_ema", []),
]


def small_model(library: str) -> Any:
    torch.manual_seed(0)
    if library == "diffusers":
        blocks = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
        return AutoencoderTiny(num_encoder_blocks=(1,), num_decoder_blocks=(1,), **blocks)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    return CLIPTextModel(CLIPTextConfig(num_attention_heads=1, max_position_embeddings=4, **sizes))


def shards_of(index: str) -> list[str]:
    """The names that an index of this name gives its two files."""
    stem, ending, *rest = index.split(".")
    if rest == ["index", "json"]:
        return [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    if rest[0] == "index":  # the variant's name comes last in the index, and first in the files
        return [f"{stem}.{rest[1]}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    return [f"{stem}-0000{i}-of-00002.{rest[0]}.{ending}" for i in (1, 2)]


def write(path: Path, state: dict[str, torch.Tensor], number: float) -> None:
    filled = {name: torch.full_like(value, number) for name, value in state.items()}
    torch.save(filled, path) if path.suffix == ".bin" else save_file(filled, path, {"format": "pt"})


def layout(folder: Path, library: str, names: Sequence[str]) -> dict[float, str]:
    """Make a model's folder; each file's weights are another number: number → file."""
    folder.mkdir()
    model = small_model(library)
    (model.save_config if library == "diffusers" else model.config.save_pretrained)(folder)
    state, files = model.state_dict(), {}
    for name in names:
        if not name.endswith(".json"):
            files[float(len(files) + 1)] = name
            write(folder / name, state, float(len(files)))
            continue
        keys, both = sorted(state), shards_of(name)
        halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
        for shard, half in zip(both, halves, strict=True):
            files[float(len(files) + 1)] = shard
            write(folder / shard, {key: state[key] for key in half}, float(len(files)))
        pairs = zip(both, halves, strict=True)
        table = {"metadata": {}, "weight_map": {key: shard for shard, h in pairs for key in h}}
        (folder / name).write_text(json.dumps(table))
    return files


def arrived(model: torch.nn.Module, files: dict[float, str]) -> list[str]:
    values = {float(value.flatten()[0]) for value in model.state_dict().values() if value.numel()}
    return sorted(files[each] for each in values)


@pytest.mark.fault("2.11", "second look: odd variants, and files of several kinds at once")
@pytest.mark.fault("2.11", "the files that are digested are not those that the library loads")
@pytest.mark.parametrize(("library", "names", "variant", "expected"), LAYOUTS + ODD_LAYOUTS)
def test_the_files_that_the_library_loads(
    tmp_path: Path, library: str, names: list[str], variant: str | None, expected: list[str]
) -> None:
    folder = tmp_path / "part"
    files = layout(folder, library, names)
    cls = type(small_model(library))
    with quiet_loading():
        if not expected:
            with pytest.raises((OSError, ValueError)):
                cls.from_pretrained(folder, variant=variant, local_files_only=True)
            with pytest.raises(SourceError, match="no weights that"):
                source.load_model(cls, folder, variant)
            return
        theirs = cls.from_pretrained(folder, variant=variant, local_files_only=True)
        ours = source.load_model(cls, folder, variant)
    assert arrived(theirs, files) == arrived(ours, files) == expected
    found = model_files.weights(folder, library, variant)
    assert sorted(path.name for path in found) == expected
    assert isinstance(theirs, ModelMixin) == (library == "diffusers")


@pytest.mark.fault("2.11", "a .bin is rounded to the type of a .safetensors that is not loaded")
def test_the_type_is_that_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    model = small_model("transformers")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    save_file({"other": torch.zeros(4, dtype=torch.float16)}, tmp_path / "other.safetensors")
    loaded = source.load_model(CLIPTextModel, tmp_path, None).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "not an index of weights"),
        ('{"weight_map": {"a": "none.safetensors"}}', "names 'none.safetensors', and there is no"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"names '\.\./model\.safetensors'"),
    ],
)
def test_indexes_that_are_damaged(tmp_path: Path, index: str, says: str) -> None:
    (tmp_path / f"{T}.safetensors.index.json").write_text(index)
    with pytest.raises(SourceError, match=says):
        model_files.weights(tmp_path, "transformers", None)


@pytest.fixture
def mixed(smallest: Path, tmp_path: Path) -> Path:
    """A pipeline whose UNet alone has a variant, in two files beside the plain one."""
    folder = Path(shutil.copytree(smallest, tmp_path / "mixed"))
    state = load_file(folder / "unet" / f"{D}.safetensors")
    names = sorted(state)
    shards = {f"{D}.fp16-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for name, keys in shards.items():
        save_file({key: state[key] * 2 for key in keys}, folder / "unet" / name)
    table = {key: name for name, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": table}
    (folder / "unet" / f"{D}.safetensors.index.fp16.json").write_text(json.dumps(index))
    return folder


@pytest.mark.fault("3.5", "a folder whose parts come in different variants is refused")
def test_parts_of_different_variants(mixed: Path) -> None:
    ours = source.load(source.resolve(mixed, variant="fp16"))
    theirs = DiffusionPipeline.from_pretrained(mixed, variant="fp16")
    plain = DiffusionPipeline.from_pretrained(mixed)
    for part in ("unet", "vae", "text_encoder"):
        made, wanted = (getattr(pipe, part).state_dict() for pipe in (ours, theirs))
        assert all(torch.equal(made[key], wanted[key]) for key in wanted), part
    key = "conv_in.weight"
    assert torch.equal(ours.unet.state_dict()[key], plain.unet.state_dict()[key] * 2)
    with pytest.raises(SourceError, match="no files of the variant 'bf16'"):
        source.resolve(mixed, variant="bf16")


@pytest.mark.fault("2.11", "a variant in several files that changed exports nothing")
def test_a_change_of_the_variant_is_another_source(mixed: Path) -> None:
    before = [source.resolve(mixed, variant=each).digests for each in ("fp16", None)]
    file = mixed / "unet" / f"{D}.fp16-00002-of-00002.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    after = [source.resolve(mixed, variant=each).digests for each in ("fp16", None)]
    assert before[0]["unet"] != after[0]["unet"]
    assert before[0]["vae"] == after[0]["vae"]
    assert before[1] == after[1]


@pytest.mark.fault("2.13", "a folder's tensors that the model has no place for are dropped")
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_tensors_that_nothing_reads(tmp_path: Path, library: str) -> None:
    folder, model = tmp_path / "part", small_model(library)
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    key = next(each for each in sorted(state) if "0" in each)
    beyond = key.replace("0", "7", 1)
    save_file({**state, beyond: state[key].clone()}, file, {"format": "pt"})
    with pytest.raises(SourceError, match=f"reads all but 1 of its tensors .*{beyond}.* lost"):
        source.load_model(type(model), folder, None)
    harmless = {"text_model.embeddings.position_ids": torch.arange(4)[None]}
    if library == "transformers":
        harmless["vision_model.post_layernorm.weight"] = torch.ones(8)
    save_file({**state, **harmless}, file, {"format": "pt"})
    assert source.load_model(type(model), folder, None) is not None
