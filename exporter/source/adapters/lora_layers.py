"""This module finds the layer of a pipeline that an adapter's file means by a name.

Files name layers as diffusers and PEFT do (``unet.mid_block.…``), as the scripts of kohya-ss and
LyCORIS do (``lora_unet_mid_block_…``, dots written as underscores), and those of the latter kind
also as the UNet of Stability AI's own code does (``lora_unet_middle_block_…``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

# (part of the pipeline, module in it)
Place = tuple[str, str]

# Beginnings of the second kind of names, by the part that they mean.
_BEGINNINGS: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
# What diffusers once called the layers of attention, in UNets and in text encoders.
_FORMER = (
    (re.compile(r"\.processor\.to_out_lora$"), ".to_out.0"),
    (re.compile(r"\.processor\.to_(q|k|v)_lora$"), r".to_\1"),
    (re.compile(r"\.self_attn\.to_(q|k|v|out)_lora$"), r".self_attn.\1_proj"),
)
_TEXT_MODEL = "text_model."


def places(pipe: Any, parts: Iterable[str]) -> dict[str, Place]:
    """Return every layer of a pipeline's parts by all the names that files have for it."""
    found: dict[str, Place] = {}
    for part in parts:
        model = getattr(pipe, part, None)
        if not isinstance(model, torch.nn.Module):
            continue
        for module, layer in model.named_modules():
            if not isinstance(getattr(layer, "weight", None), torch.Tensor):
                continue
            for name in _spellings(model, module):
                for key in _names(part, name):
                    found.setdefault(key, (part, module))
        if part == "unet":
            for name, module in _stability(model):
                for key in _names(part, name):
                    found.setdefault(key, (part, module))
    return found


def current(name: str) -> str:
    """Return a layer's name in a file as diffusers writes it today."""
    for pattern, replacement in _FORMER:
        name = pattern.sub(replacement, name)
    return name


def _names(part: str, module: str) -> Iterator[str]:
    yield f"{part}.{module}"
    yield f"{part}.base_model.model.{module}"
    for beginning in _BEGINNINGS.get(part, ()):
        yield beginning + module.replace(".", "_")


def _spellings(model: Any, module: str) -> Iterator[str]:
    """Yield a module's names: transformers once had a CLIP text encoder's layers in a part of their
    own.
    """
    yield module
    if not hasattr(model, "text_model"):
        yield _TEXT_MODEL + module


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _stability(unet: Any) -> Iterator[tuple[str, str]]:
    """Yield (name in Stability AI's code, module) for each layer of a UNet.

    There all blocks are in one list, down and up, and what changes the size is a block of its own,
    or at the end of one.
    """
    modules = dict(unet.named_modules())
    for name, module in _blocks(unet):
        inner = _RESNET if "resnets" in module else {}
        for theirs, ours in inner.items():
            if f"{module}.{ours}" in modules:
                yield f"{name}.{theirs}", f"{module}.{ours}"
        if not inner:
            for each in modules:
                if each == module or each.startswith(f"{module}."):
                    yield name + each.removeprefix(module), each
    yield from ((name, module) for name, module in _ENDS.items() if module in modules)


def _blocks(unet: Any) -> Iterator[tuple[str, str]]:
    count = 1
    for index, block in enumerate(unet.down_blocks):
        for place in range(len(block.resnets)):
            yield f"input_blocks.{count}.0", f"down_blocks.{index}.resnets.{place}"
            if getattr(block, "attentions", None):
                yield f"input_blocks.{count}.1", f"down_blocks.{index}.attentions.{place}"
            count += 1
        if getattr(block, "downsamplers", None):
            yield f"input_blocks.{count}.0.op", f"down_blocks.{index}.downsamplers.0.conv"
            count += 1
    if unet.mid_block is not None:
        yield "middle_block.0", "mid_block.resnets.0"
        yield "middle_block.1", "mid_block.attentions.0"
        yield "middle_block.2", "mid_block.resnets.1"
    count = 0
    for index, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", None)
        for place in range(len(block.resnets)):
            yield f"output_blocks.{count}.0", f"up_blocks.{index}.resnets.{place}"
            if attentions:
                yield f"output_blocks.{count}.1", f"up_blocks.{index}.attentions.{place}"
            count += 1
        if getattr(block, "upsamplers", None):
            after = 2 if attentions else 1
            last = f"output_blocks.{count - 1}.{after}.conv"
            yield last, f"up_blocks.{index}.upsamplers.0.conv"
