"""Tiny pipelines of Kandinsky 2.2's classes with fixed random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.support.tiny import text_config, tokenizer

WIDTH = 32  # of embeddings
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}


_LOOKS = 8.0  # times the weights by which the prior looks at its sample


def prior(**options: Any) -> PriorTransformer:
    """A prior whose embeddings have a mean and a deviation of their own, and which looks at what it
    denoises: of random weights alone another seed would make nearly the same embedding."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "embedding_dim": WIDTH,
    }
    model = PriorTransformer(**settings | options)
    with torch.no_grad():
        model.clip_std.uniform_(0.5, 1.5)
        model.clip_mean.normal_()
        model.positional_embedding.normal_(std=0.1)
        model.proj_in.weight.mul_(_LOOKS)
        for block in model.transformer_blocks:
            block.attn1.to_v.weight.mul_(_LOOKS)
        if model.prd_embedding is not None:
            model.prd_embedding.normal_(std=0.1)
    return model


def unet(**options: Any) -> UNet2DConditionModel:
    """A UNet of the published one's blocks, which looks at the embedding of an image."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 8,
        "encoder_hid_dim": WIDTH,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image",
        "cross_attention_dim": 16,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
    }
    return UNet2DConditionModel(**settings | options)


def movq(**options: Any) -> VQModel:
    """MoVQ's autoencoder, of 8 pixels to a latent along a side. Its decoder's norms have 32 groups
    whatever is said."""
    settings: dict[str, Any] = {
        "block_out_channels": (32, 32, 32, 32),
        "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 16,
        "norm_num_groups": 4,
        "norm_type": "spatial",
    }
    return VQModel(**settings | options)


def parts(folder: Path) -> dict[str, Any]:
    """Return what both pipelines are made of. The decoder's noise has a variance that the UNet
    says."""
    tokens = tokenizer(folder / "prior_tokenizer")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=WIDTH,
    )
    side = {"height": 16, "width": 16}
    return {
        "unet": unet(),
        "scheduler": DDPMScheduler(
            **BETAS, variance_type="learned_range", clip_sample=True, clip_sample_range=2.0
        ),
        "movq": movq(),
        "prior_prior": prior(),
        "prior_image_encoder": CLIPVisionModelWithProjection(vision),
        "prior_text_encoder": CLIPTextModelWithProjection(text_config(tokens, WIDTH, WIDTH)),
        "prior_tokenizer": tokens,
        "prior_scheduler": UnCLIPScheduler(
            prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        "prior_image_processor": CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side),
    }


def kandinsky(folder: Path) -> None:
    """Text to image."""
    KandinskyV22CombinedPipeline(**parts(folder)).save_pretrained(folder)


def kandinsky_from_image(folder: Path) -> None:
    """From an image, with noise of a fixed variance."""
    own = parts(folder) | {"scheduler": DDIMScheduler(**BETAS, clip_sample=False)}
    KandinskyV22Img2ImgCombinedPipeline(**own).save_pretrained(folder)


PIPELINES: Mapping[str, Callable[[Path], None]] = {
    "kandinsky": kandinsky,
    "kandinsky-image": kandinsky_from_image,
}
