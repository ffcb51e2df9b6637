"""Pipelines with the configurations of published models, whose weights have no storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.support import tiny, tiny_qwen
from tests.support.tiny_transformers import t5_tokenizer


def _scheduler(cls: Any, **options: Any) -> Any:
    """Return a scheduler, whose tables are on the CPU as always."""
    with torch.device("cpu"):
        return cls.from_config(options)


def _clip(cls: Any, tokens: Any, width: int, layers: int, heads: int) -> Any:
    config = tiny.text_config(tokens, width, width)
    config.intermediate_size = 4 * width
    config.num_hidden_layers, config.num_attention_heads = layers, heads
    return cls(config)


def _t5(tokens: Any) -> Any:
    gated = {"d_ff": 10240, "feed_forward_proj": "gated-gelu", "num_layers": 24}
    config = T5Config(vocab_size=len(tokens), d_model=4096, d_kv=64, num_heads=64, **gated)
    config.pad_token_id, config.eos_token_id = tokens.pad_token_id, tokens.eos_token_id
    return T5EncoderModel(config)


def _vae(channels: int, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        **options,
    )


def stable_diffusion(folder: Path) -> Any:
    """Return a pipeline configured as Stable Diffusion 1.5."""
    tokens = tiny.tokenizer(folder / "1")
    return StableDiffusionPipeline(
        vae=_vae(4, scaling_factor=0.18215),
        text_encoder=_clip(CLIPTextModel, tokens, 768, 12, 12),
        tokenizer=tokens,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=_scheduler(PNDMScheduler, **tiny.BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unet_xl(**options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**(settings | options))


def stable_diffusion_xl(folder: Path) -> Any:
    """Return a pipeline configured as Stable Diffusion XL."""
    tokens, tokens_2 = tiny.tokenizer(folder / "1"), tiny.tokenizer(folder / "2", pad="!")
    return StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=_clip(CLIPTextModel, tokens, 768, 12, 12),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokens_2, 1280, 32, 20),
        tokenizer=tokens,
        tokenizer_2=tokens_2,
        unet=_unet_xl(),
        scheduler=_scheduler(EulerDiscreteScheduler, **tiny.SDXL_SCHEDULER),
        add_watermarker=False,
    )


def refiner(folder: Path) -> Any:
    """Return a pipeline configured as the refiner of Stable Diffusion XL."""
    tokens = tiny.tokenizer(folder / "2", pad="!")
    unet = _unet_xl(
        block_out_channels=(384, 768, 1536, 1536),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        attention_head_dim=(6, 12, 24, 24),
        transformer_layers_per_block=4,
        cross_attention_dim=1280,
        projection_class_embeddings_input_dim=5 * 256 + 1280,
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokens, 1280, 32, 20),
        tokenizer=None,
        tokenizer_2=tokens,
        unet=unet,
        scheduler=_scheduler(EulerDiscreteScheduler, **tiny.SDXL_SCHEDULER),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def stable_diffusion_3(folder: Path) -> Any:
    """Return a pipeline configured as Stable Diffusion 3.5 Medium."""
    tokens, tokens_2 = tiny.tokenizer(folder / "1"), tiny.tokenizer(folder / "2", pad="!")
    tokens_3 = t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=768 + 1280,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
        out_channels=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(CLIPTextModelWithProjection, tokens, 768, 12, 12),
        tokenizer=tokens,
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokens_2, 1280, 32, 20),
        tokenizer_2=tokens_2,
        text_encoder_3=_t5(tokens_3),
        tokenizer_3=tokens_3,
    )


def flux_dev(folder: Path) -> Any:
    """Return a pipeline configured as FLUX.1 dev, of 17,000 million numbers."""
    tokens, tokens_2 = tiny.tokenizer(folder / "1"), t5_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=_scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(CLIPTextModel, tokens, 768, 12, 12),
        tokenizer=tokens,
        text_encoder_2=_t5(tokens_2),
        tokenizer_2=tokens_2,
    )


def pixart_sigma(folder: Path) -> Any:
    """Return a pipeline configured as PixArt-Σ for 1024 pixels."""
    tokens = t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=tokens,
        text_encoder=_t5(tokens),
        vae=_vae(4, scaling_factor=0.13025),
        transformer=PixArtTransformer2DModel(
            caption_channels=4096, use_additional_conditions=False
        ),
        scheduler=_scheduler(DPMSolverMultistepScheduler, beta_start=0.0001, beta_end=0.02),
    )


def qwen_image(_: Path) -> Any:
    """Return a pipeline configured as Qwen-Image, of 29,000 million numbers."""
    tokens = tiny_qwen.tokenizer()
    layers = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    eyes = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    return QwenImagePipeline(
        scheduler=_scheduler(FlowMatchEulerDiscreteScheduler, **tiny_qwen.SCHEDULER),
        vae=AutoencoderKLQwenImage(),
        text_encoder=tiny_qwen.text_encoder(tokens, [16, 24, 24], layers, eyes),
        tokenizer=tokens,
        transformer=QwenImageTransformer2DModel(),
    )


def wan_2_2(folder: Path) -> Any:
    """Return a pipeline configured as Wan 2.2 A14B, whose transformers have 14,000 million numbers
    each."""
    tokens = t5_tokenizer()
    widths = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    config = UMT5Config(vocab_size=len(tokens), **widths)
    config.pad_token_id, config.eos_token_id = tokens.pad_token_id, tokens.eos_token_id
    flows = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return WanPipeline(
        tokenizer=tokens,
        text_encoder=UMT5EncoderModel(config),
        vae=AutoencoderKLWan(),
        transformer=WanTransformer3DModel(),
        transformer_2=WanTransformer3DModel(),
        boundary_ratio=0.875,
        scheduler=_scheduler(UniPCMultistepScheduler, **flows),
    )


def _without_storage(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def made(folder: Path) -> Any:
        with torch.device("meta"):
            return make(folder)

    return made


PUBLISHED: Mapping[str, Callable[[Path], Any]] = {
    make.__name__: _without_storage(make)
    for make in (
        *(stable_diffusion, stable_diffusion_xl, refiner),
        *(stable_diffusion_3, flux_dev, pixart_sigma, qwen_image, wan_2_2),
    )
}
