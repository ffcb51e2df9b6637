"""This module tells which files of a model's folder its library loads.

This is the one place that answers the question; what is loaded, digested and looked at for its type
is the same. diffusers and transformers have different rules, written out here from
`ModelMixin.from_pretrained` (diffusers/models/modeling_utils.py and model_loading_utils.py) and
`_get_resolved_checkpoint_files` (transformers/modeling_utils.py) for local folders. A test holds
both against what the libraries load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentc.runtimes.errors import SourceError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser

CONFIG = "config.json"
_CONFIGURATION = (".json", ".txt", ".model")
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
_INDEX = ".index.json"
# Libraries, as an index of a pipeline calls them, whose models transformers saves and loads; the
# others are diffusers' modules of pipelines with a text encoder or a safety checker of their own.
_OF_TRANSFORMERS = ("transformers", "latent_diffusion", "stable_diffusion")
_LARGEST = 256 << 20  # bytes of a configuration; tokenizers have some 30 MiB


# The files without which a part cannot be read, by what its class's name contains; of several
# alternatives one is enough. Models are whatever has none of these names.
_NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "Scheduler": (("scheduler_config.json",),),
    "ImageProcessor": (("preprocessor_config.json",), ("processor_config.json",)),
    "FeatureExtractor": (("preprocessor_config.json",), ("processor_config.json",)),
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "CLIPTokenizerFast": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "BertTokenizer": (("tokenizer.json",), ("vocab.txt",)),
    "Qwen2Tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
    "T5TokenizerFast": (("tokenizer.json",), ("spiece.model",)),
    "": ((CONFIG,),),
}


def refuse_incomplete(folder: Path, class_name: str) -> None:
    """Raise SourceError if a part's folder lacks files that its class is read from.

    transformers reads a tokenizer without its vocabulary, which then knows two words.
    """
    ending = next(each for each in _NEEDED if each in class_name)
    choices = _NEEDED[ending]
    if ending == "" and "Tokenizer" in class_name:
        return  # of a kind that no supported pipeline has; loading it says more
    absent = [[name for name in names if not (folder / name).is_file()] for names in choices]
    if all(absent):
        wanted = ", or ".join(" and ".join(each) for each in reversed(absent))
        raise SourceError(f"{folder} is incomplete: a {class_name} needs {wanted} there")


def configuration(folder: Path) -> list[Path]:
    """Return the files in a part's folder that are no weights, by name.

    Raises:
        SourceError: one is too large to be read whole, as libraries read them.
    """
    found = sorted(path for path in _files(folder) if path.suffix in _CONFIGURATION)
    for path in found:
        size = path.stat().st_size
        if size > _LARGEST:
            raise SourceError(f"{path}: expected at most {_LARGEST:,} bytes, found {size:,}")
    return found


@parser(SourceError, "path", "the configuration of a model or a scheduler")
def read_configuration(path: Path) -> Mapping[str, Any]:
    """Return what a JSON file that configures one part of a pipeline says.

    Raises:
        SourceError: it is missing, damaged or no table.
    """
    return dict(json.loads(read_regular(path, LARGEST_DOCUMENT)))


def variants(folder: Path, parts: Iterable[str], variant: str | None) -> dict[str, str]:
    """Return the variant that each part of a pipeline is loaded in, for those that have it.

    The others are loaded without one, as in diffusers (`_identify_model_variants`).

    Raises:
        SourceError: no part has the variant.
    """
    if variant is None:
        return {}
    having = {
        part: variant
        for part in parts
        if any(_marked(path.name, variant) for path in _files(folder / part))
    }
    if not having:
        raise SourceError(f"{folder} has no files of the variant {variant!r}")
    return having


def weights(folder: Path, library: str, variant: str | None) -> tuple[Path, ...]:
    """Return the files of weights that `library` loads from a model's folder.

    Args:
        library: one of `_OF_TRANSFORMERS`; whatever else it says, diffusers has made the model.
        variant: None is that without a name.

    Returns:
        One file, or several that an index names; none where the folder has none.

    Raises:
        SourceError: an index is damaged, or names files that are not there.
    """
    if library in _OF_TRANSFORMERS:
        return _of_transformers(folder, variant)
    return _of_diffusers(folder, variant)


def required(folder: Path, library: str, variant: str | None) -> tuple[Path, ...]:
    """Return the same for a folder that must have weights if it configures a model.

    Raises:
        SourceError: it has none, besides what `weights` raises.
    """
    found = weights(folder, library, variant)
    if not found and (folder / CONFIG).is_file():
        stem = _TRANSFORMERS if library in _OF_TRANSFORMERS else _DIFFUSERS
        wanted = _named(f"{stem}.safetensors", variant)
        there = ", ".join(p.name for p in sorted(_files(folder)) if p.suffix not in _CONFIGURATION)
        raise SourceError(
            f"{folder} has no weights that {library} loads: expected {wanted}, "
            f"found {there or 'none'}"
        )
    return found


def _of_diffusers(folder: Path, variant: str | None) -> tuple[Path, ...]:
    index = folder / _named(f"{_DIFFUSERS}.safetensors{_INDEX}", variant)
    if not index.is_file() and variant is not None:
        index = _legacy_index(folder, variant)
    if index.is_file():
        return _shards(index)
    return _first(folder, [f"{_DIFFUSERS}.safetensors", f"{_DIFFUSERS}.bin"], variant)


def _legacy_index(folder: Path, variant: str) -> Path:
    """Return the path where diffusers once wrote the index of a variant.

    It still looks there, and puts the variant behind the second dot of the whole path (the third
    where a folder is called ``.cache``).
    """
    pieces = (folder / f"{_DIFFUSERS}.safetensors{_INDEX}").as_posix().split(".")
    place = 3 if ".cache" in folder.as_posix() else 2
    return Path(".".join([*pieces[:place], variant, *pieces[place:]]))


def _of_transformers(folder: Path, variant: str | None) -> tuple[Path, ...]:
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"{folder} holds an adapter of PEFT (adapter_config.json), which transformers would "
            "add to the model; merge it into the weights, or give it with --lora"
        )
    explicit = _configured(folder).get("transformers_weights")
    if isinstance(explicit, str):
        path = _inside(folder, explicit, CONFIG)
        return _shards(path) if explicit.endswith(_INDEX) else (path,)
    return _first(
        folder,
        [
            "model.safetensors",
            f"model.safetensors{_INDEX}",
            "pytorch_model.bin",
            f"pytorch_model.bin{_INDEX}",
        ],
        variant,
    )


def _first(folder: Path, names: Iterable[str], variant: str | None) -> tuple[Path, ...]:
    for name in names:
        path = folder / _named(name, variant)
        if path.is_file():
            return _shards(path) if name.endswith(_INDEX) else (path,)
    return ()


def _named(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _marked(name: str, variant: str) -> bool:
    """Return whether diffusers takes a file for one of the variant."""
    pieces = name.split(".")
    return len(pieces) > 1 and pieces[1].startswith(variant)


@parser(SourceError, "index", "an index of weights")
def _shards(index: Path) -> tuple[Path, ...]:
    names = set(json.loads(read_regular(index, LARGEST_DOCUMENT))["weight_map"].values())
    return tuple(_inside(index.parent, str(name), index.name) for name in sorted(names, key=str))


def _inside(folder: Path, name: str, told_by: str) -> Path:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise SourceError(f"{folder}: {told_by} names {name!r}, and there is no such file")
    return path


def _configured(folder: Path) -> Mapping[str, Any]:
    try:
        return read_configuration(folder / CONFIG)
    except SourceError:
        return {}  # loading it says more


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.is_file())
