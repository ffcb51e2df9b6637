"""LoRA files, fused into a pipeline's weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

diffusers and PEFT load them: their own format, Kohya's, DoRA, and what else they know. A layer in
the file that meets none in the pipeline is an error, where they would only warn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.ingredients import Ingredient
from runtimes.errors import SourceError
from runtimes.session import first_line

_SUFFIX = ".safetensors"
_USUAL = "pytorch_lora_weights.safetensors"  # as diffusers saves them
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OF_A_LAYER = re.compile(r"\.(lora_|lokr_|loha_|hada_|dora_|oft_|alpha$)")
_SHOWN = 5


def find(asked: str) -> Ingredient:
    """``FILE``, ``FOLDER``, ``OWNER/NAME`` or ``OWNER/NAME/FILE`` on the Hub, with ``:SCALE``."""
    place, scale = _scaled(asked)
    path = Path(place).expanduser()
    if path.is_dir():
        path = path / _only(place, [each.name for each in path.iterdir() if each.is_file()])
    elif not path.is_file():
        path = _download(place)
    _check(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.name if Path(place).expanduser().exists() else place
    return Ingredient("lora", name, path, sha256, scale)


def parts(pipeline_class: str) -> tuple[str, ...]:
    import diffusers

    cls = getattr(diffusers, pipeline_class, None)
    return tuple(getattr(cls, "_lora_loadable_modules", ()))


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> None:
    """Fuse them, each at its scale; their sum is what diffusers computes with all of them."""
    from exporter.source import quiet_loading

    _require_peft()
    if not parts(type(pipe).__name__):
        raise SourceError(f"{type(pipe).__name__} takes no LoRA ({ingredients[0].id})")
    names = [f"lora_{index}" for index in range(len(ingredients))]
    with quiet_loading():
        for name, each in zip(names, ingredients, strict=True):
            _load(pipe, name, each)
        pipe.set_adapters(names, [each.scale for each in ingredients])
        pipe.fuse_lora(adapter_names=names)
        pipe.unload_lora_weights()


def _load(pipe: Any, name: str, lora: Ingredient) -> None:
    try:
        state = _layers(pipe, lora.path)
        pipe.load_lora_weights(str(lora.path), adapter_name=name)
    except Exception as error:
        raise SourceError(
            f"the LoRA {lora.id} does not fit {type(pipe).__name__}: {first_line(error)}"
        ) from error
    met = {
        (part, layer)
        for part in parts(type(pipe).__name__)
        for layer in _adapted(getattr(pipe, part, None), name)
    }
    unmatched = sorted(".".join(each) for each in state - met)
    if not state:
        known = ", ".join(parts(type(pipe).__name__))
        raise SourceError(f"the LoRA {lora.id} has no layers for any part of this model ({known})")
    if unmatched:
        shown = ", ".join(unmatched[:_SHOWN])
        more = f" and {len(unmatched) - _SHOWN} more" if len(unmatched) > _SHOWN else ""
        raise SourceError(
            f"the LoRA {lora.id} is for another model: {len(unmatched)} of its {len(state)} layers "
            f"meet none of this pipeline's ({shown}{more})"
        )


def _layers(pipe: Any, path: Path) -> set[tuple[str, str]]:
    """(part, layer) for each layer that the file has, by the pipeline's names."""
    unet = getattr(pipe, "unet", None)
    given = {} if unet is None else {"unet_config": unet.config}
    found = pipe.lora_state_dict(str(path), local_files_only=True, **given)
    state: Mapping[str, Any] = found[0] if isinstance(found, tuple) else found
    layers: set[tuple[str, str]] = set()
    for part in parts(type(pipe).__name__):
        prefix = f"{part}."
        own = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
        layers |= {(part, _OF_A_LAYER.split(key)[0]) for key in _pipelines(own, pipe, part)}
    return layers


def _pipelines(state: dict[str, Any], pipe: Any, part: str) -> list[str]:
    """The keys of a part as diffusers renames them when it loads them."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if not state:
        return []
    if not part.startswith("text_encoder"):
        ready = any("lora_A" in key or ".lokr_" in key for key in state)
        return list(state if ready else convert_unet_state_dict_to_peft(state))
    keys = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    flat = not hasattr(getattr(pipe, part), "text_model")
    return [key.removeprefix("text_model.") if flat else key for key in keys]


def _adapted(model: Any, name: str) -> set[str]:
    """The layers of a model that carry the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        layer
        for layer, module in (model.named_modules() if model is not None else ())
        if isinstance(module, BaseTunerLayer)
        and any(name in getattr(module, each, ()) for each in module.adapter_layer_names)
    }


def _scaled(asked: str) -> tuple[str, float]:
    place, colon, scale = asked.rpartition(":")
    if not colon or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", scale, re.IGNORECASE):
        return asked, 1.0
    return place, float(scale)


def _only(place: str, names: Sequence[str]) -> str:
    """Which of a folder's files is meant."""
    fitting = sorted(name for name in names if name.endswith(_SUFFIX))
    if _USUAL in fitting:
        return _USUAL
    if len(fitting) != 1:
        raise SourceError(
            f"{place} holds {len(fitting) or 'no'} {_SUFFIX} files; name the one that is meant"
        )
    return fitting[0]


def _download(place: str) -> Path:
    pieces = place.split("/")
    if len(pieces) < 2 or not all(pieces) or place.startswith((".", "~")):
        raise SourceError(f"no such LoRA: {place}")
    import huggingface_hub

    owner, inside = "/".join(pieces[:2]), "/".join(pieces[2:])
    try:
        inside = inside or _only(place, huggingface_hub.list_repo_files(owner))
        return Path(huggingface_hub.hf_hub_download(owner, inside))
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{place} is no file here, and it could not be had from the Hub: {first_line(error)}"
        ) from error


def _check(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in _PICKLES:
        raise SourceError(
            f"{path.name} is a pickle, which runs whatever code it holds when it is read; "
            "convert it to safetensors, with a program and from a source that you trust"
        )
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{path} is no safetensors file, or damaged: {first_line(error)}"
        ) from error


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise SourceError("a LoRA needs PEFT: pip install 'latentc[export]'") from None
