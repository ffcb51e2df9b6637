"""LoRA files, fused into a pipeline's weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

diffusers and PEFT load them: their own format, Kohya's, DoRA, and what else they know. A layer in
the file that meets none in the pipeline is an error, where they would only warn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter import weight_files
from exporter.ingredients import Ingredient
from runtimes.errors import SourceError
from runtimes.session import first_line
from runtimes.trust import sha256

_OF_A_LAYER = re.compile(r"\.(lora_|lokr_|loha_|hada_|dora_|oft_|alpha$)")
_SHOWN = 5


def find(asked: str) -> Ingredient:
    """``FILE``, ``FOLDER``, ``OWNER/NAME`` or ``OWNER/NAME/FILE`` on the Hub, with ``:SCALE``."""
    place, scale = _scaled(asked)
    name, path = weight_files.find(place, "LoRA", "pytorch_lora_weights.safetensors")
    return Ingredient("lora", name, path, sha256(path), scale)


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


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise SourceError("a LoRA needs PEFT: pip install 'latentc[export]'") from None
