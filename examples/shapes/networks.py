"""The networks of the pipeline: their sizes, how they are built, how they are put together."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentc.benchmarks.shapes.scenes import CANVAS

from .tokenizer import MAX_LENGTH, build_tokenizer

LATENT_CHANNELS = 4
LATENT_SIZE = CANVAS // 4  # the autoencoder halves the image twice


@dataclass(frozen=True)
class Sizes:
    """Widths and depths.  The defaults are the shipped model; tests use smaller ones."""

    autoencoder: tuple[int, int, int] = (24, 48, 64)
    denoiser: tuple[int, ...] = (64, 96, 96)
    attention: tuple[bool, ...] = (False, True, False)  # cross-attention at each denoiser level?
    layers_per_block: int = 2
    head_width: int = 32
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4


def build_autoencoder(sizes: Sizes) -> AutoencoderKL:
    """Return an autoencoder for images [n, 3, 64, 64] from -1 to 1, with latents [n, 4, 16, 16]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=sizes.autoencoder,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=CANVAS,
    )


def build_denoiser(sizes: Sizes) -> UNet2DConditionModel:
    """Return a denoiser: latents [n, 4, 16, 16], timesteps [n] and text states [n, 77, width] to
    latents.
    """
    down = ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in sizes.attention]
    up = ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(sizes.attention)]
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=sizes.denoiser,
        layers_per_block=sizes.layers_per_block,
        cross_attention_dim=sizes.text_width,
        # diffusers reads this as the number of heads, for the sake of old checkpoints.
        attention_head_dim=tuple(width // sizes.head_width for width in sizes.denoiser),
    )


def build_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a text encoder: token ids [n, 77] to states [n, 77, width]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        projection_dim=sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Return the default sampler; its noise schedule is the one the denoiser is trained with."""
    settings = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        # What other schedulers read when they are made from this one's config, as in the
        # published Stable Diffusion models: latents are not clipped.
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    scheduler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler.from_config(settings)
    return scheduler


def build_pipeline(
    autoencoder: AutoencoderKL,
    denoiser: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """Return the parts as a Stable Diffusion pipeline, in evaluation mode."""
    for network in (autoencoder, denoiser, text_encoder):
        network.eval().to(memory_format=torch.contiguous_format)
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save as safetensors, then put the folder in place in one step.

    The denoiser and the autoencoder are stored as fp16.  The text encoder stays fp32, because
    transformers loads a part in the type it was stored in and diffusers does not.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    scratch.chmod(0o755)
    pipeline.unet.half()
    pipeline.vae.half()
    # Padding and truncation stick to a tokenizer from its last call.
    pipeline.tokenizer.backend_tokenizer.no_padding()
    pipeline.tokenizer.backend_tokenizer.no_truncation()
    pipeline.save_pretrained(scratch, safe_serialization=True)
    # Older readers look for the vocabulary and the merges as files of their own.
    build_tokenizer(scratch / "tokenizer")
    for path in scratch.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in scratch.rglob("*.json"):
        _tidy_fields(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _tidy_fields(path: Path) -> None:
    # Some fields name the folder a part was loaded from, which means nothing elsewhere, and an
    # infinite default is no JSON to a strict reader.
    fields = json.loads(path.read_text(encoding="utf-8"))
    kept = {
        key: value
        for key, value in fields.items()
        if key not in ("_name_or_path", "is_local", "local_files_only")
        and not (isinstance(value, float) and math.isinf(value))
    }
    if kept != fields:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
