"""A tiny pipeline of Qwen-Image's classes, with fixed random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

WIDTH = 24  # of the text encoder's states
PAD = "<|endoftext|>"
_SPECIAL = (PAD, "<|im_start|>", "<|im_end|>")
# The words of the pipeline's template, each of which becomes one id as in the published vocabulary,
# and some of prompts.
_TEXT = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n",
    "a red blue circle square above large small drawing\n\n",
)
# Of the published model's scheduler.
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the words and merges of a byte-pair encoding that has the words of `_TEXT`."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, spelled])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(_TEXT, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def tokenizer() -> Qwen2Tokenizer:
    """Return Qwen's tokenizer with a small vocabulary."""
    vocabulary, merges = _vocabulary()
    words = {**vocabulary, PAD: len(vocabulary)}
    tokens = Qwen2Tokenizer(vocab=words, merges=merges, model_max_length=2048)
    tokens.add_special_tokens({"additional_special_tokens": [*_SPECIAL[1:]]})
    return tokens


_LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


def text_encoder(
    tokens: Qwen2Tokenizer,
    sections: Sequence[int] = (1, 1, 1),
    layers: Mapping[str, int] = MappingProxyType(_LAYERS),
    eyes: Mapping[str, int] = MappingProxyType(_EYES),
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a language model with eyes, which the pipeline does not use.

    Args:
        sections: how many pairs of numbers of a head each rotary axis has.
    """
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [*sections]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **layers,
                "vocab_size": len(tokens),
                "max_position_embeddings": 2048,
                "rope_parameters": rotary,
                "pad_token_id": tokens.pad_token_id,
                "bos_token_id": None,
                "eos_token_id": tokens.pad_token_id,
            },
            vision_config={
                **eyes,
                "out_hidden_size": layers["hidden_size"],
                "fullatt_block_indexes": [0],
            },
            **dict.fromkeys(names, len(tokens) - 1),
        )
    )


def autoencoder(**options: Any) -> AutoencoderKLQwenImage:
    """Return a VAE of the published one's latents, which makes 4 pixels of one along a side."""
    usual = {
        "base_dim": 8,
        "dim_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    return AutoencoderKLQwenImage(**{**usual, **options})


def transformer(**options: Any) -> QwenImageTransformer2DModel:
    """Return a transformer of two blocks."""
    usual = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 4, 4),
    }
    return QwenImageTransformer2DModel(**{**usual, **options})


def qwen_image(folder: Path) -> None:
    """Save a tiny `QwenImagePipeline`."""
    tokens = tokenizer()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=autoencoder(),
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
        transformer=transformer(),
    ).save_pretrained(folder)


PIPELINES: Mapping[str, Callable[[Path], None]] = {"qwen-image": qwen_image}
