"""Tiny pipelines whose configurations are unlike those of the published checkpoints.

Each combines several options of the constructors, so that few exports cover them all; see
tests/exporter/families/test_configurations.py for what they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.support.tiny import BETAS, SDXL_SCHEDULER, tokenizer

Options = Mapping[str, Any]

_ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}
# A tiny autoencoder for latents of an eighth of the image's sides: of any size for diffusers,
# which takes images in multiples of 8 pixels.
_EIGHTH = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1,) * 4,
    "num_decoder_blocks": (1,) * 4,
}
_SCHEDULER = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


@dataclass(frozen=True)
class Configuration:
    """A configuration says what a pipeline's parts are made with, over the smallest usual ones.

    `pad`: the tokenizer's padding token. `pipeline`: more arguments of the pipeline's class.
    """

    unet: Options = field(default_factory=dict)
    text: Options = field(default_factory=dict)
    text_2: Options = field(default_factory=dict)
    vae: Options = field(default_factory=dict)
    tiny_vae: bool = False
    pad: str = "<|endoftext|>"
    scheduler: Options = field(default_factory=dict)
    pipeline: Options = field(default_factory=dict)


STABLE_DIFFUSION: Mapping[str, Configuration] = {
    # As DeepFloyd IF: text projected, pooled by attention, and attended to by ResNet blocks' sides.
    "simple cross-attention": Configuration(
        unet={
            **_SIMPLE,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.41,
            "time_embedding_act_fn": "gelu",
            "only_cross_attention": True,
            "cross_attention_norm": "group_norm",
            "attention_head_dim": 8,
            "encoder_hid_dim": 24,
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 4,
        },
        text={"hidden_size": 24},
        vae={"use_quant_conv": False, "use_post_quant_conv": False, "out_channels": 1},
    ),
    "attention without text": Configuration(
        unet={
            "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "time_embedding_type": "fourier",
            "time_embedding_dim": 40,
            "timestep_post_act": "silu",
            "conv_in_kernel": 5,
            "conv_out_kernel": 1,
            "center_input_sample": True,
            "sample_size": (16, 24),
        },
        text={"eos_token_id": 2},
        vae={
            "mid_block_add_attention": False,
            "layers_per_block": 2,
            "latents_mean": (1.0,) * 4,
            "shift_factor": 0.5,
        },
        scheduler={"prediction_type": "v_prediction"},
    ),
    "one block": Configuration(
        unet={
            "block_out_channels": (18,),
            "norm_num_groups": 3,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "mid_block_type": None,
            "only_cross_attention": (True,),
            "attention_type": "gated",
            "attention_head_dim": 3,
            "transformer_layers_per_block": 2,
            "sample_size": (9, 11),
            "in_channels": 3,
            "out_channels": 3,
        },
        text={"use_attention_mask": True},
        vae={**_EIGHTH, "latent_channels": 3},
        tiny_vae=True,
    ),
    "odd sides": Configuration(
        unet={
            "sample_size": (13, 15),
            "block_out_channels": (12, 20),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "mid_block_type": None,
            "layers_per_block": (1, 2),
            "attention_head_dim": (3, 5),
            "cross_attention_dim": (32, 32),
            "upcast_attention": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "dropout": 0.5,
        },
        text={"use_attention_mask": True},
        pad="!",
        vae=_EIGHTH,
        tiny_vae=True,
        scheduler={"prediction_type": "sample"},
    ),
    "many blocks": Configuration(
        unet={
            "block_out_channels": (8,) * 4,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
            "mid_block_type": None,
            "use_linear_projection": True,
            "attention_head_dim": 2,
            "downsample_padding": 0,
            "act_fn": "mish",
        },
        vae={
            "encoder_block_out_channels": (8,),
            "decoder_block_out_channels": (8,),
            "num_encoder_blocks": (1,),
            "num_decoder_blocks": (1,),
            "act_fn": "silu",
        },
        tiny_vae=True,
    ),
}

# The quickest to export that has text, attention and a VAE: for tests of what is made, and when.
SMALLEST = Configuration(
    unet={
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    },
    vae={"block_out_channels": (8,), "mid_block_add_attention": False},
)
ONE_BLOCK = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
# The quickest of all: for tests of exports as such.
SMALLEST_UNCONDITIONAL = Configuration(unet=ONE_BLOCK)

_XL = {
    "cross_attention_dim": 32 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 20,
}
_MOMENTS = {"latents_mean": (0.5, -1.0, 0.0, 2.0), "latents_std": (1.0, 0.5, 2.0, 3.0)}

STABLE_DIFFUSION_XL: Mapping[str, Configuration] = {
    "normalised latents": Configuration(
        unet={**_XL, "time_cond_proj_dim": 9, "mid_block_type": None},
        text_2={"hidden_size": 24, "eos_token_id": 2},
        vae={**_MOMENTS, "block_out_channels": (8,), "norm_num_groups": 4},
        pipeline={"force_zeros_for_empty_prompt": False},
    ),
    "one encoder": Configuration(
        unet={**_XL, "cross_attention_dim": 24, "sample_size": 15, "mid_block_type": None},
        text_2={"hidden_size": 24, "num_hidden_layers": 2},
        vae=_EIGHTH,
        tiny_vae=True,
        pipeline={"text_encoder": None, "tokenizer": None},
    ),
}

UNCONDITIONAL: Mapping[str, Configuration] = {
    "fourier": Configuration(
        unet={
            "time_embedding_type": "fourier",
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "block_out_channels": (32, 32),
            "mid_block_scale_factor": 1.41,
            "sample_size": (8, 16),
        },
        scheduler={"timestep_spacing": "trailing", "clip_sample_range": 2.0},
    ),
    "learned": Configuration(
        unet={
            "time_embedding_type": "learned",
            "num_train_timesteps": 1000,
            "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 4,
            "attention_head_dim": None,
            "in_channels": 1,
            "out_channels": 1,
            "center_input_sample": True,
        },
        scheduler={"thresholding": True, "prediction_type": "v_prediction"},
    ),
    "variance": Configuration(
        unet={"out_channels": 6}, scheduler={"variance_type": "learned_range"}
    ),
}


def text_encoder(tokens: Any, options: Options, projection: bool = False) -> Any:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": len(tokens),
        "max_position_embeddings": tokens.model_max_length,
        "projection_dim": 20,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    } | dict(options)
    settings.setdefault("intermediate_size", 2 * settings["hidden_size"])
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return cls(CLIPTextConfig(**settings))


def unet(options: Options) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        **_ATTENTION,
    }
    return UNet2DConditionModel(**(settings | dict(options)))


def autoencoder(options: Options, tiny: bool = False) -> AutoencoderKL | AutoencoderTiny:
    if tiny:
        return AutoencoderTiny(**options)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    } | dict(options)
    blocks = len(settings["block_out_channels"])
    settings.setdefault("down_block_types", ("DownEncoderBlock2D",) * blocks)
    settings.setdefault("up_block_types", ("UpDecoderBlock2D",) * blocks)
    return AutoencoderKL(**settings)


def stable_diffusion(folder: Path, made_with: Configuration) -> None:
    tokens = tokenizer(folder / "tokenizer", made_with.pad)
    StableDiffusionPipeline(
        vae=autoencoder(made_with.vae, made_with.tiny_vae),
        text_encoder=text_encoder(tokens, made_with.text),
        tokenizer=tokens,
        unet=unet(made_with.unet),
        scheduler=DDIMScheduler(**(_SCHEDULER | dict(made_with.scheduler))),
        safety_checker=None,
        feature_extractor=None,
        **({"requires_safety_checker": False} | dict(made_with.pipeline)),
    ).save_pretrained(folder)


def stable_diffusion_xl(folder: Path, made_with: Configuration) -> None:
    tokens = tokenizer(folder / "tokenizer")
    tokens_2 = tokenizer(folder / "tokenizer_2", made_with.pad)
    parts: dict[str, Any] = {
        "text_encoder": text_encoder(tokens, made_with.text),
        "text_encoder_2": text_encoder(tokens_2, made_with.text_2, projection=True),
        "tokenizer": tokens,
        "tokenizer_2": tokens_2,
    }
    StableDiffusionXLPipeline(
        vae=autoencoder(made_with.vae, made_with.tiny_vae),
        unet=unet(made_with.unet),
        scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER | dict(made_with.scheduler)),
        add_watermarker=False,
        **(parts | dict(made_with.pipeline)),
    ).save_pretrained(folder)


def unconditional(folder: Path, made_with: Configuration) -> None:
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    } | dict(made_with.unet)
    made = UNet2DModel(**settings)
    # As in tests.support.tiny: a loud last layer makes clipped sampling chaotic.
    with torch.no_grad():
        made.conv_out.weight.mul_(0.1)
    DDPMPipeline(unet=made, scheduler=DDPMScheduler(**made_with.scheduler)).save_pretrained(folder)
