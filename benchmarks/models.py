"""Full-size pipelines with random weights, built without a download.

    python -m latentc.benchmarks.models sd15 OUT

What an export needs in memory and time depends on a model's architecture, not on what its
weights have learnt: random weights measure the same. Parts are built, saved and freed one
after the other, so that the peak is one UNet and not the whole pipeline.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from latentc.benchmarks.model_parts import (
    ClipTokenizer,
    Model,
    Network,
    Scheduler,
    T5Tokenizer,
    clip_vocabulary,
    count_parameters,
)

__all__ = ["MODELS", "ClipTokenizer", "Network", "clip_vocabulary", "count_parameters", "write"]
from latentc.runtimes.terminal import say

INDEX = "model_index.json"

CLIP_L = Network(
    "transformers",
    "CLIPTextModel",
    {
        "vocab_size": 49_408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 49_406,
        "eos_token_id": 49_407,
        "pad_token_id": 49_407,
    },
    parameters=123_060_480,
)

VAE_1 = Network(
    "diffusers",
    "AutoencoderKL",
    {
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.18215,
    },
    parameters=83_653_863,
)

UNET_15 = Network(
    "diffusers",
    "UNet2DConditionModel",
    {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    parameters=859_520_964,
)

CLIP_G = Network(
    "transformers",
    "CLIPTextModelWithProjection",
    {
        **CLIP_L.config,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "projection_dim": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "pad_token_id": 1,
    },
    parameters=694_659_840,
)

VAE_XL = Network(
    VAE_1.library,
    VAE_1.class_name,
    {**VAE_1.config, "sample_size": 1024, "scaling_factor": 0.13025},
    parameters=VAE_1.parameters,
)

UNET_XL = Network(
    "diffusers",
    "UNet2DConditionModel",
    {
        **UNET_15.config,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    },
    parameters=2_567_463_684,
)

T5 = Network(
    "transformers",
    "T5EncoderModel",
    {
        "vocab_size": 32_128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10_240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    parameters=4_762_310_656,
    layers={"num_layers": 192_946_176},
)

VAE_3 = Network(
    VAE_1.library,
    VAE_1.class_name,
    {
        **VAE_1.config,
        "sample_size": 1024,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    parameters=83_819_683,
)

VAE_FLUX = Network(
    VAE_3.library,
    VAE_3.class_name,
    {**VAE_3.config, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    parameters=VAE_3.parameters,
)

TRANSFORMER_3 = Network(
    "diffusers",
    "SD3Transformer2DModel",
    {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    parameters=2_028_328_000,
    layers={"num_layers": 84_980_736},
)

TRANSFORMER_FLUX = Network(
    "diffusers",
    "FluxTransformer2DModel",
    {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    parameters=11_901_408_320,
    layers={"num_layers": 339_831_296, "num_single_layers": 141_591_808},
)

CLIP_L_PROJECTED = Network(
    CLIP_L.library,
    "CLIPTextModelWithProjection",
    CLIP_L.config,
    parameters=CLIP_L.parameters + 768 * 768,
)

FLOW = Scheduler("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
FLOW_DYNAMIC = Scheduler(
    "FlowMatchEulerDiscreteScheduler",
    {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
)

PNDM = Scheduler(
    "PNDMScheduler",
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
)

EULER = Scheduler(
    "EulerDiscreteScheduler",
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    },
)

MODELS: Mapping[str, Model] = {
    "sd15": Model(
        "StableDiffusionPipeline",
        {
            "tokenizer": ClipTokenizer(),
            "scheduler": PNDM,
            "text_encoder": CLIP_L,
            "vae": VAE_1,
            "unet": UNET_15,
        },
        {
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        },
    ),
    "sdxl": Model(
        "StableDiffusionXLPipeline",
        {
            "tokenizer": ClipTokenizer(),
            "tokenizer_2": ClipTokenizer(pad="!"),
            "scheduler": EULER,
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "vae": VAE_XL,
            "unet": UNET_XL,
        },
        {
            "feature_extractor": None,
            "image_encoder": None,
            "force_zeros_for_empty_prompt": True,
        },
    ),
    "sd3": Model(
        "StableDiffusion3Pipeline",
        {
            "tokenizer": ClipTokenizer(),
            "tokenizer_2": ClipTokenizer(pad="!"),
            "tokenizer_3": T5Tokenizer(),
            "scheduler": FLOW,
            "text_encoder": CLIP_L_PROJECTED,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5,
            "vae": VAE_3,
            "transformer": TRANSFORMER_3,
        },
        {"feature_extractor": None, "image_encoder": None},
    ),
    "flux": Model(
        "FluxPipeline",
        {
            "tokenizer": ClipTokenizer(),
            "tokenizer_2": T5Tokenizer(),
            "scheduler": FLOW_DYNAMIC,
            "text_encoder": CLIP_L,
            "text_encoder_2": T5,
            "vae": VAE_FLUX,
            "transformer": TRANSFORMER_FLUX,
        },
        {"feature_extractor": None, "image_encoder": None},
    ),
}


def write(
    name: str,
    folder: Path,
    dtype: str = "fp32",
    report: Callable[[str], None] = say,
    depth: int | None = None,
) -> None:
    """Write the pipeline `name` of `MODELS` into `folder`, the same weights every time.

    `depth` cuts transformers down to so many layers of each kind, of full width. The index file
    comes last: a folder without it is unfinished.
    """
    model = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for part_name, part in model.parts.items():
        begun = time.perf_counter()
        made = part.shallow(depth) if isinstance(part, Network) else part
        said = made.save(folder / part_name, dtype)
        gc.collect()
        report(f"{part_name:14}{part.class_name:24}{said:22}{time.perf_counter() - begun:7.1f} s")
    (folder / INDEX).write_text(json.dumps(_index(model), indent=2) + "\n", encoding="utf-8")


def _index(model: Model) -> dict[str, Any]:
    import diffusers

    absent = {name: [None, None] if value is None else value for name, value in
              model.settings.items()}  # fmt: skip
    return {
        "_class_name": model.pipeline_class,
        "_diffusers_version": diffusers.__version__,
        **{name: [part.library, part.class_name] for name, part in model.parts.items()},
        **absent,
    }


@click.command(
    epilog="""
    \b
    Examples:
      python -m latentc.benchmarks.models sd15 build/sd15
      python -m latentc.benchmarks.models sd15 build/sd15-fp16 --dtype fp16
      python -m latentc.benchmarks.models sdxl build/sdxl
      python -m latentc.benchmarks.models flux build/flux-1 --depth 1
      python -m latentc.benchmarks.models sd3 build/sd3-2 --depth 2
    """
)
@click.argument("name", type=click.Choice(list(MODELS)))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="fp16 halves the disk space.",
)
@click.option(
    "--depth",
    type=click.IntRange(1),
    help="Of sd3 and flux: so many layers of each kind, of full width.  [default: all]",
)
def main(name: str, out: Path, dtype: str, depth: int | None) -> None:
    """Build the full-size pipeline NAME with random weights into the folder OUT.

    sd15: Stable Diffusion 1.5, 3.4 GB of UNet in fp32, 4.3 GB in all. sdxl: Stable Diffusion XL
    base, 10.3 GB of UNet in fp32, 13.9 GB in all. sd3: Stable Diffusion 3 Medium, 8.1 GB of
    transformer, 30.8 GB in all. flux: FLUX.1 dev, 47.6 GB and 67.5 GB; at a depth of 1 they are
    0.3 GB and 5.2 GB, 2.2 GB and 4.3 GB.
    """
    from latentc.benchmarks.measure import gib, peak_memory

    write(name, out, dtype, depth=depth)
    say(f"{out}: peak memory {gib(peak_memory())}")


if __name__ == "__main__":
    main()
