"""Tiny pipelines of the real classes with fixed random weights, saved as folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMTextToImagePipeline,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# The published model's configuration, with the entries that other schedulers read from it.
SDXL_SCHEDULER = {
    **BETAS,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def tokenizer(folder: Path, pad: str = SPECIAL[1]) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is single characters and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    merges = ["r e", "re d</w>", "c i", "b l", "bl u", "blu e</w>"]
    joined = ["".join(merge.split()) for merge in merges]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *joined, *SPECIAL]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=77,
        pad_token=pad,
    )


def text_config(tokens: CLIPTokenizer, width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(tokens),
        max_position_embeddings=77,
        projection_dim=projection,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def autoencoder(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=scaling_factor,
    )


def tiny_autoencoder() -> AutoencoderTiny:
    """Return a tiny autoencoder whose latents have the form of `autoencoder`'s."""
    torch.manual_seed(3)
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def large_autoencoder() -> AutoencoderKL:
    """Return an autoencoder with 8 pixels to a latent along a side."""
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.18215,
    )


def conditional_unet(**options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**(settings | options))


def stable_diffusion(
    folder: Path,
    prediction_type: str = "epsilon",
    pipeline: Any = StableDiffusionPipeline,
    vae: AutoencoderKL | None = None,
    safety_checker: StableDiffusionSafetyChecker | None = None,
    feature_extractor: CLIPImageProcessorPil | None = None,
    **unet: Any,
) -> None:
    tokens = tokenizer(folder / "tokenizer")
    pipeline(
        vae=vae or autoencoder(0.18215),
        text_encoder=CLIPTextModel(text_config(tokens, 32, 32)),
        tokenizer=tokens,
        unet=conditional_unet(**unet),
        scheduler=PNDMScheduler(
            **BETAS,
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
            prediction_type=prediction_type,
        ),
        safety_checker=safety_checker,
        feature_extractor=feature_extractor,
        requires_safety_checker=safety_checker is not None,
    ).save_pretrained(folder)


def safety_checker() -> StableDiffusionSafetyChecker:
    """One that looks at 24 by 24 pixels, and finds none of its concepts in any image."""
    torch.manual_seed(5)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        "initializer_range": 0.5,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
    return checker.eval()


def stable_diffusion_checked(folder: Path) -> None:
    """With a safety checker, for which half of the images are too near to one of its concepts."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    checker = safety_checker()
    stable_diffusion(folder, safety_checker=checker, feature_extractor=processor)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_checker = None
    seeds = [torch.Generator().manual_seed(seed) for seed in range(8)]
    call = {"height": 32, "width": 32, "num_inference_steps": 2}
    images = pipe("red", num_images_per_prompt=len(seeds), generator=seeds, **call).images
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt").pixel_values
        found = checker.visual_projection(checker.vision_model(pixels)[1])
        concept = checker.concept_embeds[3:4]
        near = torch.nn.functional.cosine_similarity(found, concept).sort().values
        checker.concept_embeds_weights[3] = near[len(near) // 2 - 1 : len(near) // 2 + 1].mean()
    checker.save_pretrained(folder / "safety_checker")


def stable_diffusion_blocks(folder: Path) -> None:
    """With the blocks in Stable Diffusion's own order: the lowest one does not look at the text."""
    stable_diffusion(
        folder,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def panorama(folder: Path) -> None:
    """With the 8 pixels of a latent that the pipeline counts on."""
    small: dict[str, Any] = {"block_out_channels": (8, 8), "attention_head_dim": 4}
    stable_diffusion(
        folder, "epsilon", StableDiffusionPanoramaPipeline, large_autoencoder(), **small
    )


def latent_consistency(folder: Path) -> None:
    """A UNet that takes the guidance scale, with an odd width of its embedding."""
    tokens = tokenizer(folder / "tokenizer")
    LatentConsistencyModelPipeline(
        vae=autoencoder(0.18215),
        text_encoder=CLIPTextModel(text_config(tokens, 32, 32)),
        tokenizer=tokens,
        unet=conditional_unet(time_cond_proj_dim=25),
        scheduler=LCMScheduler(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_v(folder: Path) -> None:
    stable_diffusion(folder, "v_prediction")


def inpainting(folder: Path) -> None:
    """A UNet that takes a mask and the latents around it."""
    stable_diffusion(folder, pipeline=StableDiffusionInpaintPipeline, in_channels=9, out_channels=4)


def inpainting_xl(folder: Path) -> None:
    stable_diffusion_xl(folder, StableDiffusionXLInpaintPipeline, in_channels=9, out_channels=4)


def instruct_pix2pix(folder: Path) -> None:
    stable_diffusion(
        folder, pipeline=StableDiffusionInstructPix2PixPipeline, in_channels=8, out_channels=4
    )


def instruct_pix2pix_xl(folder: Path) -> None:
    stable_diffusion_xl(
        folder, StableDiffusionXLInstructPix2PixPipeline, in_channels=8, out_channels=4
    )


def upscaler(folder: Path) -> None:
    """A UNet that takes a small image, and how noisy it is as a class."""
    tokens = tokenizer(folder / "tokenizer")
    StableDiffusionUpscalePipeline(
        vae=autoencoder(0.08333),
        text_encoder=CLIPTextModel(text_config(tokens, 32, 32)),
        tokenizer=tokens,
        unet=conditional_unet(in_channels=7, out_channels=4, num_class_embeds=100),
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False),
        max_noise_level=50,
    ).save_pretrained(folder)


def depth_to_image(folder: Path) -> None:
    """A UNet that takes an image's depth, and what estimates it: a vision transformer whose layers
    are read at four places, and joined by convolutions."""
    tokens = tokenizer(folder / "tokenizer")
    estimator = DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            initializer_range=0.15,
        )
    )
    with torch.no_grad():  # above what the last layer cuts off
        estimator.head.head[4].bias.fill_(5.0)
    StableDiffusionDepth2ImgPipeline(
        vae=autoencoder(0.18215),
        text_encoder=CLIPTextModel(text_config(tokens, 32, 32)),
        tokenizer=tokens,
        unet=conditional_unet(in_channels=5, out_channels=4),
        scheduler=PNDMScheduler(
            **BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        ),
        depth_estimator=estimator,
        feature_extractor=DPTImageProcessorPil(
            size={"height": 32, "width": 32}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
    ).save_pretrained(folder)


def stable_diffusion_xl(
    folder: Path, pipeline: Any = StableDiffusionXLPipeline, **unet_options: Any
) -> None:
    tokens = tokenizer(folder / "tokenizer")
    tokens_2 = tokenizer(folder / "tokenizer_2", pad="!")
    unet = conditional_unet(
        cross_attention_dim=32 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        **unet_options,
    )
    pipeline(
        vae=autoencoder(0.13025),
        text_encoder=CLIPTextModel(text_config(tokens, 32, 32)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokens_2, 24, 20)),
        tokenizer=tokens,
        tokenizer_2=tokens_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
        add_watermarker=False,
    ).save_pretrained(folder)


def controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """One for this UNet, whose last convolutions are not zero as they are before training."""
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weights in made.named_parameters():
            if "controlnet" in name:
                weights.normal_(std=0.1)
    return made


def t2i_adapter(kind: str, seed: int, in_channels: int = 3) -> T2IAdapter:
    """One whose features fit `stable_diffusion_blocks` ("full_adapter"), or the UNet of
    `stable_diffusion_xl` ("full_adapter_xl")."""
    torch.manual_seed(seed)
    made = T2IAdapter(
        in_channels=in_channels,
        channels=[16, 32],
        num_res_blocks=1,
        downscale_factor=2 if kind == "full_adapter" else 4,
        adapter_type=kind,
    )
    with torch.no_grad():
        for weights in made.parameters():
            weights.mul_(2.0)
    return made


def refiner(folder: Path) -> None:
    """The second text encoder alone, and a score in the place of the target size. That encoder and
    the VAE are those of the base model, as published."""
    with TemporaryDirectory() as other:
        base = StableDiffusionXLPipeline.from_pretrained(make("sdxl", Path(other) / "base"))
    unet = conditional_unet(
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 20,
        use_linear_projection=True,
    )
    StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)


def ip_adapter(
    unet: UNet2DConditionModel, folder: Path, seed: int = 20, kind: str = "adapter"
) -> Path:
    """An adapter for this UNet, of a kind in `_PROJECTIONS`, and its image encoder: the file of
    weights."""
    torch.manual_seed(seed)
    width, embeds = unet.config.cross_attention_dim, 24
    projection = _PROJECTIONS[kind](width, embeds)
    weights = {f"image_proj.{name}": value for name, value in projection.items()}
    looking = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(looking):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        for key in ("to_k_ip", "to_v_ip"):
            shape = (layer.to_k.out_features, width)
            weights[f"ip_adapter.{2 * index + 1}.{key}.weight"] = torch.randn(shape) * 0.2
    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=16,
            projection_dim=embeds,
        )
    )
    encoder.save_pretrained(folder / "image_encoder")
    save_file(weights, folder / f"{kind}.safetensors")
    return folder / f"{kind}.safetensors"


def _projection(width: int, embeds: int, tokens: int = 4) -> dict[str, torch.Tensor]:
    """Return the weights of a plain adapter's projection."""
    return {
        "proj.weight": torch.randn(tokens * width, embeds) * 0.2,
        "proj.bias": torch.randn(tokens * width) * 0.1,
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _every_token(width: int, _: int, states: int = 32) -> dict[str, torch.Tensor]:
    """Return the weights of a full adapter's projection."""
    return {
        "proj.0.weight": torch.randn(states, states) * 0.2,
        "proj.0.bias": torch.randn(states) * 0.1,
        "proj.2.weight": torch.randn(width, states) * 0.2,
        "proj.2.bias": torch.randn(width) * 0.1,
        "proj.3.weight": torch.ones(width),
        "proj.3.bias": torch.zeros(width),
    }


def _resampler(width: int, _: int, inner: int = 16, tokens: int = 6) -> dict[str, torch.Tensor]:
    """Return the weights of a Plus adapter, as its files name them: four layers of attention with
    one head of 64.
    """
    made = {
        "latents": torch.randn(1, tokens, inner),
        "proj_in.weight": torch.randn(inner, 32) * 0.2,
        "proj_in.bias": torch.randn(inner) * 0.1,
        "proj_out.weight": torch.randn(width, inner) * 0.2,
        "proj_out.bias": torch.zeros(width),
        "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width),
    }
    for layer in range(4):
        own = {"0.to_q.weight": (64, inner), "0.to_kv.weight": (128, inner)}
        own |= {"0.to_out.weight": (inner, 64), "1.1.weight": (4 * inner, inner)}
        own |= {"1.3.weight": (inner, 4 * inner)}
        made |= {f"layers.{layer}.{name}": torch.randn(shape) * 0.2 for name, shape in own.items()}
        for name in ("0.norm1", "0.norm2", "1.0"):
            made[f"layers.{layer}.{name}.weight"] = torch.ones(inner)
            made[f"layers.{layer}.{name}.bias"] = torch.zeros(inner)
    return made


_PROJECTIONS = {"adapter": _projection, "plus": _resampler, "full": _every_token}


def bert_tokenizer() -> BertTokenizer:
    """BERT's tokenizer over some words and all letters, whatever stands before them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "circle", "square"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words += [*letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={word: place for place, word in enumerate(words)})


def bert(words: int, **options: Any) -> LDMBertModel:
    """A text encoder of latent diffusion for `words` words."""
    config = LDMBertConfig(
        vocab_size=words,
        encoder_layers=2,
        encoder_ffn_dim=48,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=32,
        init_std=0.2,
        **options,
    )
    return LDMBertModel(config)


def quantised() -> VQModel:
    """A VAE of latents of 4 channels, which it rounds to the vectors of a codebook, as far apart as
    the latents of a few steps are, and decodes as 6."""
    vae = VQModel(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=6,
        vq_embed_dim=4,
        num_vq_embeddings=512,
        norm_num_groups=4,
    )
    with torch.no_grad():
        vae.quantize.embedding.weight.normal_(std=20.0)
    return vae


def latent_diffusion_quantised(folder: Path) -> None:
    """With a codebook."""
    latent_diffusion(folder, codebook=True)


def latent_diffusion(folder: Path, codebook: bool = False) -> None:
    """A VAE of 8 pixels to a latent along a side, which the class counts on."""
    tokens = bert_tokenizer()
    unet = conditional_unet(sample_size=8)
    # Texts are mostly filling, which this encoder does not mask: louder, they show in the image.
    with torch.no_grad():
        for name, weights in unet.named_parameters():
            if "attn2" in name:
                weights.mul_(5.0)
    plain = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    LDMTextToImagePipeline(
        vqvae=quantised() if codebook else plain,
        bert=bert(len(tokens)),
        tokenizer=tokens,
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    ).save_pretrained(folder)


def unconditional(folder: Path) -> None:
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    # Random weights make clipped sampling chaotic: rounding errors double at every step. A
    # trained network damps them; a quieter last layer does here.
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)


PIPELINES: Mapping[str, Callable[[Path], None]] = {
    "sd": stable_diffusion,
    "sd-v": stable_diffusion_v,
    "sd-checked": stable_diffusion_checked,
    "sd-blocks": stable_diffusion_blocks,
    "panorama": panorama,
    "lcm": latent_consistency,
    "sdxl": stable_diffusion_xl,
    "inpaint": inpainting,
    "inpaint-xl": inpainting_xl,
    "pix2pix": instruct_pix2pix,
    "pix2pix-xl": instruct_pix2pix_xl,
    "upscaler": upscaler,
    "depth": depth_to_image,
    "refiner": refiner,
    "ldm": latent_diffusion,
    "ldm-vq": latent_diffusion_quantised,
    "unconditional": unconditional,
}


def make(name: str, folder: Path) -> Path:
    """Build the pipeline `name` into `folder`, the same weights every time."""
    from tests.support import tiny_kandinsky, tiny_qwen, tiny_transformers  # they build on this

    torch.manual_seed(3)
    others = (tiny_transformers, tiny_qwen, tiny_kandinsky)
    every = {**PIPELINES} | {name: make for each in others for name, make in each.PIPELINES.items()}
    every[name](folder)
    return folder
