"""Weights of a file that nothing reads are named, and refused.

The libraries drop what they do not know: the scales of weights in 8 bits, layers that a
configuration does not have. For checkpoints of one file, diffusers' conversion is watched: which of
the file's tensors the parameters of a model were made from, be it whole, in pieces or joined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from latentc.runtimes.errors import SourceError

_SHOWN = 3
# What a checkpoint of one file may have that diffusers leaves out on purpose, with the reason.
_HARMLESS: Mapping[str, str] = {
    r"^(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar)$": (
        "tables of the noise in training, which the scheduler computes"
    ),
    r"^(scale_factor|denoiser\.sigmas|model_sampling\.\w+)$": "the same, of later repositories",
    r"^(model_ema|first_stage_model\.model_ema)\.": "averages of the weights",
    r"^first_stage_model\.loss\.": "what the VAE was trained against",
    r"(^|\.)position_ids$": "0, 1, 2 …, which the models compute",
    r"\.attn_mask$": "a constant, which the models compute",
    r"(^|\.)logit_scale$": "a factor between texts and images in training",
    r"^cond_stage_model\.model\.text_projection$": "of the whole text, which SD 2 does not take",
    r"^text_encoders\.clip_l\.transformer\.text_projection\.weight$": (
        "diffusers has the unit matrix in its place"
    ),
    r"\.encoder\.embed_tokens\.weight$": "T5's table once more, which is shared",
}
# The same for folders, by the class that is loaded; the libraries' own lists are applied before.
_HARMLESS_IN_FOLDERS: Mapping[str, str] = {
    "CLIPTextModel": (  # the other half of a whole CLIP, and what stands behind the text's states
        r"^(vision_model\.|visual_projection\.|text_projection\.|logit_scale$)"
    ),
    "CLIPTextModelWithProjection": r"^(vision_model\.|visual_projection\.|logit_scale$)",
    "CLIPVisionModelWithProjection": r"^(text_model\.|text_projection\.|logit_scale$)",
    "T5EncoderModel": r"^(decoder\.|lm_head\.)",  # the other half
}
_CONSTANT = "position_ids"  # in old folders, and computed today
_SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale)$")


def refuse(place: str, reader: str, keys: Iterable[str]) -> None:
    """Raise SourceError if there are any keys, naming the first of them.

    Args:
        place: the file or folder that has them, and `reader` what should have read them.
    """
    unread = sorted(keys)
    if not unread:
        return
    shown = ", ".join(unread[:_SHOWN])
    scaled = any(_SCALED.search(key) for key in unread)
    hint = (
        "weights in 8 bits with scales of their own are not supported; convert it to fp16"
        if scaled
        else "the configuration is another model's, or the file is; take those that belong together"
    )
    raise SourceError(
        f"{place}: {reader} reads all but {len(unread)} of its tensors ({shown}), which would be "
        f"lost: {hint}"
    )


def in_folder(class_name: str, keys: Iterable[str]) -> list[str]:
    """Return the keys of a model's folder that its class should have read, sorted."""
    harmless = _HARMLESS_IN_FOLDERS.get(class_name)
    return sorted(
        key
        for key in keys
        if not key.endswith(_CONSTANT) and not (harmless and re.search(harmless, key))
    )


@dataclass
class Watch:
    """A watch holds what the conversion of a checkpoint has read so far."""

    keys: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)

    def unread(self, pipe: Any) -> set[str]:
        """Return the keys that no parameter was made from, without those that are harmless."""
        left = {key for key in self.keys - self.read if not _harmless(key)}
        return left - _beyond(pipe, left)


@contextmanager
def watching(tensors: Mapping[str, torch.Tensor] | None = None) -> Iterator[Watch]:
    """Inside, watch diffusers convert checkpoints of one file, and `tensors` that it is given."""
    from diffusers.loaders import single_file, single_file_model, single_file_utils, unet

    watch, lineage = Watch(set(tensors or ())), Lineage(tensors)

    def loading(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **kwargs: Any) -> Any:
            checkpoint = original(*args, **kwargs)
            for key, value in checkpoint.items():
                if isinstance(value, torch.Tensor):
                    watch.keys.add(key)
                    lineage.sources[value] = frozenset({key})
            return checkpoint

        return load

    def filling(original: Callable[..., Any]) -> Callable[..., Any]:
        def fill(model: Any, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            expected = model.state_dict().keys()
            for name, value in state.items():
                if name in expected and isinstance(value, torch.Tensor):
                    watch.read |= lineage.sources.get(value, frozenset())
            return original(model, state, *args, **kwargs)

        return fill

    with ExitStack() as stack:
        for module, name, wrap in (
            (single_file, "load_single_file_checkpoint", loading),
            (single_file_model, "load_model_dict_into_meta", filling),
            (single_file_utils, "load_model_dict_into_meta", filling),
            (unet, "load_model_dict_into_meta", filling),
        ):
            wrapped = wrap(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, wrapped))
        stack.enter_context(lineage)
        yield watch


class Lineage(TorchFunctionMode):
    """Inside, it learns for each tensor which of a file's it was made from."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()
        for key, value in (tensors or {}).items():
            self.sources[value] = frozenset({key})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        sources: frozenset[str] = frozenset()
        for each in _tensors([*args, *(kwargs or {}).values()]):
            sources |= self.sources.get(each, frozenset())
        if sources:
            for each in _tensors([made]):
                self.sources[each] = sources | self.sources.get(each, frozenset())
        return made


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _harmless(key: str) -> bool:
    return any(re.search(pattern, key) for pattern in _HARMLESS)


def _beyond(pipe: Any, keys: Iterable[str]) -> set[str]:
    """Return those keys that the pipeline has no part for.

    Of Stable Diffusion 2's text encoder these are the last layer's: the model takes what the one
    before it gives, and diffusers' configuration has a layer less. Those of parts that were left
    out are among them.

    Of Stable Diffusion 2's text encoder that is the last layer: the model takes what the one before
    it gives, and diffusers' configuration has a layer less. Parts that were left out are among
    them.
    """
    config = getattr(getattr(pipe, "text_encoder", None), "config", None)
    layers = getattr(config, "num_hidden_layers", -1)
    beginnings = [f"cond_stage_model.model.transformer.resblocks.{layers}."]
    if getattr(pipe, "text_encoder_3", config) is None:
        beginnings.append("text_encoders.t5xxl.")
    return {key for key in keys if key.startswith(tuple(beginnings))}
