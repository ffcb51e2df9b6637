"""Checkpoints of one file, as Stable Diffusion's own repositories and most web sites have them.

diffusers converts them. What a file does not say (the tokenizer, the scheduler, the sizes of
layers) comes from a pipeline's configuration: a folder or Hub id that the user names, or the one
that diffusers takes the file for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentc.exporter.source.weight_files import PICKLES, SAFE, TRUSTED, check
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import SourceError, first_line

_CONFIGURATION = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model"]


@dataclass(frozen=True)
class SingleFile:
    """`path` holds the weights, `config` is the folder of a pipeline's configuration."""

    path: Path
    config: Path
    sha256: str


def find(path: Path, config: str | None, allow_pickle: bool = False) -> SingleFile:
    """Return a checkpoint and its configuration.

    Raises:
        SourceError: of an unknown kind, damaged, a pickle that was not allowed; no configuration.
    """
    _check(path, allow_pickle)
    place = config or _guess(path)
    folder = Path(place).expanduser()
    return SingleFile(path, folder if folder.is_dir() else _download(place, path), sha256(path))


def load(file: SingleFile, pipeline_class: str, given: dict[str, Any]) -> Any:
    """Return the pipeline in float32.

    Weights in half precision stay in the file (`latentc.exporter.stored_weights`).

    Args:
        given: parts that are not to be loaded, each None.

    Raises:
        SourceError: the file is for another kind of model, or weights are missing or not finite.
    """
    import diffusers
    import torch

    from latentc.exporter import stored_weights as weights
    from latentc.exporter.source import unread_keys

    safe = file.path.suffix.lower() == SAFE
    dtype = weights.stored_type([file.path] if safe else [])
    try:
        with unread_keys.watching() as watch:
            pipe = getattr(diffusers, pipeline_class).from_single_file(
                str(file.path),
                config=str(file.config),
                local_files_only=True,
                torch_dtype=dtype,
                **given,
            )
    except Exception as error:
        raise SourceError(
            f"{file.path.name} does not fit {pipeline_class} as {file.config.name} configures it: "
            f"{first_line(error)}"
        ) from error
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        missing = [key for key, value in part.state_dict().items() if value.is_meta]
        if missing:
            raise SourceError(
                f"{file.path.name} lacks {len(missing)} weights of {name} (such as {missing[0]})"
            )
        weights.taken_over(part, dtype, f"{file.path.name} ({name})")
        part.eval()
    unread_keys.refuse(file.path.name, pipeline_class, watch.unread(pipe))
    return pipe


def _check(path: Path, allow_pickle: bool) -> None:
    kind = path.suffix.lower()
    if kind in PICKLES and allow_pickle:
        return
    if kind not in (SAFE, *PICKLES):
        raise SourceError(
            f"{path} is a file of no known kind; expected a {SAFE} checkpoint, a diffusers folder "
            "or a Hub id"
        )
    check(path, TRUSTED)


def _guess(path: Path) -> str:
    """Return the Hub id of the pipeline that diffusers takes the checkpoint for."""
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        load_single_file_checkpoint,
    )

    try:
        config = fetch_diffusers_config(load_single_file_checkpoint(str(path)))
    except Exception as error:
        raise SourceError(f"{path}: {first_line(error)}") from error
    return str(config["pretrained_model_name_or_path"])


def _download(config: str, path: Path) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(config, allow_patterns=_CONFIGURATION))
    except Exception as error:
        raise SourceError(
            f"{path.name} needs the configuration of {config}, which is no folder here and could "
            f"not be had from the Hub ({first_line(error)}); name a folder with --config"
        ) from error
