"""LoRA files and their kin (LoHa, LoKr, DoRA, full differences), fused into a pipeline's weights.

What a file adds to a weight is computed by `latentc.runtimes.verification.weight_differences`, with
the alpha that the file has for that very layer. Names that only diffusers can translate (FLUX.1's
original ones) go through its conversion. A layer in the file that meets none in the pipeline is an
error, where diffusers would only warn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentc.exporter.source import unread_keys, weight_files
from latentc.exporter.source.adapters import lora_layers as adapter_layers
from latentc.exporter.source.adapters.kinds import Ingredient, Reading
from latentc.exporter.source.adapters.lora_layers import Place
from latentc.exporter.source.adapters.places import scaled
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import SourceError, first_line
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.verification import weight_differences
from latentc.runtimes.verification.weight_differences import Floats, Layer

_PLAIN = Reading()
_SHOWN = 5
# Of the patterns that PEFT's configuration may have: names, in which a dot is any letter.
_PLAIN_PATTERN = re.compile(r"[\w.^$\\]*")
_METADATA = "lora_adapter_metadata"  # diffusers' entry in a file's header


def find(asked: str, reading: Reading = _PLAIN) -> Ingredient:
    """Return a LoRA: ``FILE``, ``FOLDER``, ``OWNER/NAME`` or ``OWNER/NAME/FILE`` on the Hub, with
    ``:SCALE``.
    """
    place, scale = scaled(asked)
    usual = "pytorch_lora_weights.safetensors"
    name, path = weight_files.find(place, "LoRA", usual, reading.allow_pickle)
    return Ingredient("lora", name, path, sha256(path), scale)


def parts(pipeline_class: str) -> tuple[str, ...]:
    import diffusers

    cls = getattr(diffusers, pipeline_class, None)
    return tuple(getattr(cls, "_lora_loadable_modules", ()))


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> None:
    """Fuse them, each at its scale; their sum is what diffusers computes with all of them.

    Raises:
        SourceError: the pipeline takes none, or a file is damaged or for another model.
    """
    if not parts(type(pipe).__name__):
        raise SourceError(f"{type(pipe).__name__} takes no LoRA ({ingredients[0].id})")
    for ingredient in ingredients:
        try:
            layers = _placed(pipe, ingredient)
            for place, layer in layers:
                _fuse(pipe, place, layer, 1.0 if ingredient.scale is None else ingredient.scale)
        except SourceError as error:
            raise SourceError(f"the LoRA {ingredient.id} {error}") from error


def _fuse(pipe: Any, place: Place, layer: Layer, scale: float) -> None:
    part, name = place
    module = getattr(pipe, part).get_submodule(name)
    bias = getattr(module, "bias", None)
    try:
        weight, shifted = weight_differences.fused(
            module.weight.detach().numpy(),
            None if bias is None else bias.detach().numpy(),
            layer,
            scale,
        )
    except (SourceError, ValueError) as error:
        raise SourceError(
            f"does not fit {type(pipe).__name__}: {part}.{name}: {first_line(error)}"
        ) from error
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        if bias is not None and shifted is not None:
            bias.copy_(torch.from_numpy(shifted))


def _placed(pipe: Any, lora: Ingredient) -> list[tuple[Place, Layer]]:
    """Return the file's layers and where they belong.

    Raises:
        SourceError: some belong nowhere.
    """
    places = adapter_layers.places(pipe, parts(type(pipe).__name__))
    tensors, metadata = _read(lora.path)
    layers = _found(tensors, places, metadata)
    if any(place is None for place, _ in layers) and hasattr(pipe, "transformer"):
        try:
            tensors = _converted(pipe, tensors)
        except Exception as error:
            raise SourceError(f"does not fit {type(pipe).__name__}: {first_line(error)}") from error
        layers = _found(tensors, places, metadata)
    _refuse_unmatched(pipe, layers)
    return [(place, layer) for place, layer in layers if place is not None]


def _read(path: Path) -> tuple[Mapping[str, Floats], Mapping[str, str]]:
    if path.suffix.lower() not in weight_files.PICKLES:
        return weight_differences.read(path)
    held = weight_files.tensors(path)
    return {name: value.float().contiguous().numpy() for name, value in held.items()}, {}


def _found(
    tensors: Mapping[str, Floats], known: Mapping[str, Place], metadata: Mapping[str, str]
) -> list[tuple[Place | None, Layer]]:
    settings = _settings(metadata)
    found = []
    for name, layer in weight_differences.layers(tensors).items():
        place = known.get(adapter_layers.current(name))
        found.append((place, _configured(layer, place, settings) if place else layer))
    return found


def _refuse_unmatched(pipe: Any, layers: Sequence[tuple[Place | None, Layer]]) -> None:
    unmatched = sorted(layer.name for place, layer in layers if place is None)
    if len(unmatched) == len(layers):
        known = ", ".join(parts(type(pipe).__name__))
        raise SourceError(f"has no layers for any part of this model ({known})")
    if unmatched:
        shown = ", ".join(unmatched[:_SHOWN])
        more = f" and {len(unmatched) - _SHOWN} more" if len(unmatched) > _SHOWN else ""
        raise SourceError(
            f"is for another model: {len(unmatched)} of its {len(layers)} layers meet none of this "
            f"pipeline's ({shown}{more})"
        )


def _converted(pipe: Any, tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return the tensors by the names that diffusers gives them.

    It multiplies alphas in, or leaves them under names of the same layers.
    """
    import inspect

    from latentc.exporter.quiet import quiet_loading

    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    takes = inspect.signature(pipe.lora_state_dict).parameters
    with quiet_loading(), unread_keys.Lineage(state) as lineage:
        answer = pipe.lora_state_dict(
            state, **({"return_alphas": True} if "return_alphas" in takes else {})
        )
    converted, alphas = answer if isinstance(answer, tuple) else (answer, None)
    both = {**converted, **(alphas or {})}
    _refuse_unread(tensors, lineage, [v for v in both.values() if isinstance(v, torch.Tensor)])
    return {name: value.float().contiguous().numpy() for name, value in both.items()}


def _refuse_unread(
    tensors: Mapping[str, Floats], lineage: unread_keys.Lineage, converted: Iterable[Any]
) -> None:
    """Refuse tensors that diffusers does not convert, which it drops with a warning.

    Alphas become plain numbers that are multiplied in, so it is not seen where they went; each
    belongs to its layer's tensors.
    """
    read = {key for value in converted for key in lineage.sources.get(value, ())}
    unread = sorted(key for key in tensors if key not in read and not key.endswith(".alpha"))
    if unread:
        shown = ", ".join(unread[:_SHOWN])
        raise SourceError(
            f"has {len(unread)} tensors of {len(tensors)} that diffusers does not convert ({shown})"
        )


def _settings(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Return PEFT's configuration of each part, which diffusers writes into a file's header."""
    return _parsed(metadata[_METADATA]) if _METADATA in metadata else {}


@parser(SourceError, "text", "PEFT's configuration of a LoRA")
def _parsed(text: str) -> Mapping[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    for name, value in found.items():
        patterns = value if name.endswith(".alpha_pattern") and value else {}
        alphas = [value] if name.endswith(".lora_alpha") else patterns.values()
        if not all(isinstance(each, int | float) for each in alphas):
            raise ValueError(f"{name} is no number")
    return found


def _configured(layer: Layer, place: Place, settings: Mapping[str, Any]) -> Layer:
    """Return a layer with the alpha that PEFT's configuration has for it."""
    part, module = place
    if layer.alpha is not None or f"{part}.r" not in settings:
        return layer
    alpha = settings.get(f"{part}.lora_alpha")
    for pattern, pattern_alpha in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise SourceError(f"has a pattern that is not taken from a file: {pattern[:80]!r}")
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT's get_pattern_key
            alpha = pattern_alpha
            break
    return replace(layer, alpha=alpha, rank_root=bool(settings.get(f"{part}.use_rslora")))
