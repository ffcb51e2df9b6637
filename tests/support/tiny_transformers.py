"""Tiny text-to-image pipelines whose denoiser is a transformer, with fixed random weights."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.support import tiny

T5_WIDTH = 24
_WORDS = ("red", "blue", "circle", "square", "above", "small", "large", "flat", "drawing", "a")
# Of the published Flux and Stable Diffusion 3.5 models, where not the defaults.
_DYNAMIC = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
# A few tokens are enough to shift the noise at sizes that tests can afford.
_QUICK = {**_DYNAMIC, "base_image_seq_len": 4, "max_image_seq_len": 96}


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer over some words and all printable characters."""
    pieces = [f"▁{word}" for word in _WORDS]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(piece, -3.0) for piece in pieces]
    vocabulary += [(char, -8.0) for char in string.printable.strip()]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5_encoder(tokens: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokens),
            d_model=T5_WIDTH,
            d_kv=6,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokens.pad_token_id,
            eos_token_id=tokens.eos_token_id,
        )
    )


def autoencoder(blocks: int, channels: int, **options: Any) -> AutoencoderKL:
    """Return an autoencoder that has a factor of 2 ** (blocks - 1) along a side."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        **options,
    )


def _pixart_transformer(sample_size: int) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        caption_channels=T5_WIDTH,
    )


def pixart(folder: Path, cls: Any, sample_size: int, blocks: int) -> None:
    tokens = t5_tokenizer()
    cls(
        tokenizer=tokens,
        text_encoder=t5_encoder(tokens),
        vae=autoencoder(blocks, 4, scaling_factor=0.18215),
        transformer=_pixart_transformer(sample_size),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    ).save_pretrained(folder)


def pixart_alpha(folder: Path) -> None:
    """Conditioned on the image's size, as the published model of 1024 pixels."""
    pixart(folder, PixArtAlphaPipeline, 128, 4)


def pixart_sigma(folder: Path) -> None:
    pixart(folder, PixArtSigmaPipeline, 16, 2)


def stable_diffusion_3(
    folder: Path,
    cls: Any = StableDiffusion3Pipeline,
    in_channels: int = 16,
    scheduler: Mapping[str, Any] = MappingProxyType({"shift": 3.0}),
) -> None:
    tokens = tiny.tokenizer(folder / "tokenizer")
    tokens_2 = tiny.tokenizer(folder / "tokenizer_2", pad="!")
    tokens_3 = t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=16,
        num_layers=2,
        attention_head_dim=6,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=24,
        pooled_projection_dim=10 + 8,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    cls(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=autoencoder(2, 16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(tiny.text_config(tokens, 12, 10)),
        tokenizer=tokens,
        text_encoder_2=CLIPTextModelWithProjection(tiny.text_config(tokens_2, 8, 8)),
        tokenizer_2=tokens_2,
        text_encoder_3=t5_encoder(tokens_3),
        tokenizer_3=tokens_3,
    ).save_pretrained(folder)


def stable_diffusion_3_shifted(folder: Path) -> None:
    """With noise that depends on the image's size, as Stable Diffusion 3.5 Medium."""
    stable_diffusion_3(folder, scheduler=_QUICK)


def stable_diffusion_3_masks(folder: Path) -> None:
    """Trained for inpainting: its transformer takes a mask, and what is around it."""
    stable_diffusion_3(folder, StableDiffusion3InpaintPipeline, 33)


def _flux(
    folder: Path,
    guidance_embeds: bool,
    scheduler: Mapping[str, Any],
    cls: Any = FluxPipeline,
    in_channels: int = 64,
) -> None:
    tokens = tiny.tokenizer(folder / "tokenizer")
    tokens_2 = t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=12,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    cls(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=autoencoder(4, 16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(tiny.text_config(tokens, 12, 12)),
        tokenizer=tokens,
        text_encoder_2=t5_encoder(tokens_2),
        tokenizer_2=tokens_2,
    ).save_pretrained(folder)


def flux_dev(folder: Path) -> None:
    _flux(folder, True, _DYNAMIC)


def flux_fill(folder: Path) -> None:
    """FLUX.1 Fill takes the mask's pixels, 8 by 8 for a latent."""
    _flux(folder, True, _DYNAMIC, FluxFillPipeline, 4 * (16 + 16 + 64))


def flux_schnell(folder: Path) -> None:
    _flux(folder, False, {"shift": 1.0})


def dit(folder: Path) -> None:
    """Save a DiT pipeline for square images in one size, which says 1000 for no class."""
    DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=1000,
        ),
        vae=autoencoder(2, 4, scaling_factor=0.18215),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        id2label={207: "golden retriever", 360: "otter"},
    ).save_pretrained(folder)


def umt5_encoder(tokens: T5TokenizerFast) -> UMT5EncoderModel:
    """It has relative positions of its own in every layer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokens),
            d_model=T5_WIDTH,
            d_kv=6,
            d_ff=2 * T5_WIDTH,
            num_layers=1,
            num_heads=4,
            pad_token_id=tokens.pad_token_id,
            eos_token_id=tokens.eos_token_id,
        )
    )


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=T5_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    )


def wan_autoencoder() -> AutoencoderKLWan:
    """Return an autoencoder with 4 frames after the first, as published.

    It has half of the published 8 pixels along a side: it is captured in half of the time.
    """
    return AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
    )


def wan(folder: Path, **parts: Any) -> None:
    """Wan 2.1, whose published scheduler has a flow_shift of 3."""
    tokens = t5_tokenizer()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    WanPipeline(
        tokenizer=tokens,
        text_encoder=umt5_encoder(tokens),
        vae=wan_autoencoder(),
        transformer=wan_transformer(),
        scheduler=scheduler,
        **parts,
    ).save_pretrained(folder)


def wan_2_2(folder: Path) -> None:
    """Wan 2.2 A14B: a transformer for timesteps from 875 on, and another one below."""
    wan(folder, transformer_2=wan_transformer(), boundary_ratio=0.875)


PIPELINES: Mapping[str, Callable[[Path], None]] = {
    "pixart-alpha": pixart_alpha,
    "pixart-sigma": pixart_sigma,
    "sd3": stable_diffusion_3,
    "sd3-shifted": stable_diffusion_3_shifted,
    "sd3-masks": stable_diffusion_3_masks,
    "flux-dev": flux_dev,
    "flux-fill": flux_fill,
    "flux-schnell": flux_schnell,
    "dit": dit,
    "wan": wan,
    "wan-2.2": wan_2_2,
}
