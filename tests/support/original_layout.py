"""A Stable Diffusion pipeline's weights by the names of its original repository's checkpoints
(https://github.com/CompVis/stable-diffusion), for any number of levels and layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0"},
    **{"conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"},
    "conv_shortcut": "skip_connection",
}
UNET = {
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    **{"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"},
    "mid_block.resnets.1": "middle_block.2",
}
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
VAE = {
    **{"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"},
    **{"mid_block.attentions.0": "mid.attn_1", "conv_norm_out": "norm_out"},
}


def checkpoint(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights of a pipeline, renamed."""
    made = dict(_renamed(pipe.unet.state_dict(), "model.diffusion_model.", _unet(pipe.unet)))
    made |= _renamed(pipe.vae.state_dict(), "first_stage_model.", _vae(pipe.vae))
    text = pipe.text_encoder.state_dict()
    flat = {key.removeprefix("text_model."): value for key, value in text.items()}
    made |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in flat.items()}
    for key in list(made):  # the VAE's attention was made of convolutions
        if ".attn_1." in key and key.endswith("weight") and ".norm." not in key:
            made[key] = made[key][:, :, None, None]
    return {key: value.contiguous().clone() for key, value in made.items()}


def _renamed(
    state: Mapping[str, torch.Tensor], prefix: str, names: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight by the name of the longest known part that it begins with."""
    for key, value in state.items():
        known = [name for name in names if key.startswith(f"{name}.")]
        if not known:
            yield f"{prefix}{key}", value
            continue
        longest = max(known, key=len)
        yield f"{prefix}{names[longest]}{key.removeprefix(longest)}", value


def _unet(unet: Any) -> dict[str, str]:
    layers, levels = unet.config.layers_per_block, len(unet.down_blocks)
    names = dict(UNET)
    for level in range(levels):
        for layer in range(layers):
            place = f"input_blocks.{1 + level * (layers + 1) + layer}"
            names[f"down_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        place = f"input_blocks.{(level + 1) * (layers + 1)}"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"{place}.0.op"
        attends = hasattr(unet.up_blocks[level], "attentions")
        for layer in range(layers + 1):
            place = f"output_blocks.{level * (layers + 1) + layer}"
            names[f"up_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        place = f"output_blocks.{level * (layers + 1) + layers}"
        names[f"up_blocks.{level}.upsamplers.0"] = f"{place}.{2 if attends else 1}"
    return {**names, **_inside(names, RESNET, ".resnets.")}


def _vae(vae: Any) -> dict[str, str]:
    levels = len(vae.config.block_out_channels)
    names = {}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.{ours}": f"{side}.{theirs}" for ours, theirs in VAE.items()}
        for level in range(levels):
            for layer in range(vae.config.layers_per_block + 1):
                down = f"encoder.down_blocks.{level}.resnets.{layer}"
                names[down] = f"encoder.down.{level}.block.{layer}"
                up = f"decoder.up_blocks.{level}.resnets.{layer}"
                names[up] = f"decoder.up.{levels - 1 - level}.block.{layer}"
            down = f"encoder.down_blocks.{level}.downsamplers.0"
            names[down] = f"encoder.down.{level}.downsample"
            up = f"decoder.up_blocks.{level}.upsamplers.0"
            names[up] = f"decoder.up.{levels - 1 - level}.upsample"
    inner = _inside(names, {"conv_shortcut": "nin_shortcut"}, ".resnets.")
    return {**names, **inner, **_inside(names, ATTENTION, ".attentions.")}


def _inside(names: Mapping[str, str], parts: Mapping[str, str], which: str) -> dict[str, str]:
    return {
        f"{ours}.{part}": f"{theirs}.{other}"
        for ours, theirs in names.items()
        for part, other in parts.items()
        if which in ours
    }
