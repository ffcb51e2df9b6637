"""Full-size pipelines with random weights, built without a download.

    python -m benchmarks.models sd15 OUT

What an export needs in memory and time depends on a model's architecture, not on what its
weights have learnt: random weights measure the same. Parts are built, saved and freed one
after the other, so that the peak is one UNet and not the whole pipeline.
"""

from __future__ import annotations

import gc
import itertools
import json
import string
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
SEED = 0
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Network:
    """A part with weights: its class, its configuration, and how many parameters it must have."""

    library: str
    class_name: str
    config: Mapping[str, Any]
    parameters: int

    def build(self) -> torch.nn.Module:
        """The module with its class's own initial weights, on torch's current device."""
        cls = getattr(import_module(self.library), self.class_name)
        if hasattr(cls, "from_config"):  # diffusers
            made: torch.nn.Module = cls.from_config(dict(self.config))
        else:
            made = cls(cls.config_class(**self.config))
        return made.eval()

    def save(self, folder: Path, dtype: str) -> str:
        """Build and write the part; returns what there is to say about it."""
        import torch

        torch.manual_seed(SEED)
        with _default_dtype(torch.float16 if dtype == "fp16" else torch.float32):
            module = self.build()
        count = count_parameters(module)
        if count != self.parameters:
            raise click.ClickException(
                f"{self.class_name} has {count:,} parameters, expected {self.parameters:,}: "
                "the installed version builds another architecture"
            )
        saved: Any = module
        saved.save_pretrained(folder, safe_serialization=True, max_shard_size="20GB")
        return f"{count / 1e6:.1f} M parameters"


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers and its configuration."""

    class_name: str
    config: Mapping[str, Any]
    library: str = "diffusers"

    def save(self, folder: Path, dtype: str) -> str:
        """Write the scheduler's configuration."""
        cls = getattr(import_module(self.library), self.class_name)
        cls(**self.config).save_pretrained(folder)
        return ""


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's tokenizer over a made-up vocabulary of the real one's form and size."""

    pad: str = _END
    library: str = "transformers"
    class_name: str = "CLIPTokenizer"

    def save(self, folder: Path, dtype: str) -> str:
        """Write the vocabulary, the merges and the configuration."""
        from transformers import CLIPTokenizer as Tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        vocabulary, merges = clip_vocabulary()
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer = Tokenizer(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            model_max_length=77,
            pad_token=self.pad,
        )
        tokenizer.save_pretrained(folder)
        return f"{len(tokenizer):,} tokens"


Part = Network | Scheduler | ClipTokenizer


@dataclass(frozen=True)
class Model:
    """A pipeline class of diffusers and its parts, by their folders' names. `settings` are the
    constructor's other arguments; parts that are absent have None there."""

    pipeline_class: str
    parts: Mapping[str, Part]
    settings: Mapping[str, Any]

    @property
    def networks(self) -> dict[str, Network]:
        """The parts that have weights."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Network)}


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
}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is made inside is of this type from the beginning: no second copy in memory."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count_parameters(module: torch.nn.Module) -> int:
    """How many parameters a module has (buffers do not count)."""
    return sum(parameter.numel() for parameter in module.parameters())


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges of a CLIP-style BPE: 49,408 tokens, every letter combination up to
    three letters, some of four. Any text can be encoded, as with the real one."""
    symbols = _byte_symbols()
    merges = list(itertools.islice(_merges(), 49_408 - 2 - 2 * len(symbols)))
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *(first + second for first, second in merges),
        _START,
        _END,
    ]
    return {token: index for index, token in enumerate(tokens)}, merges


def write(
    name: str, folder: Path, dtype: str = "fp32", report: Callable[[str], None] = click.echo
) -> None:
    """Write the pipeline `name` of `MODELS` into `folder`, the same weights every time.

    The index file comes last: a folder without it is unfinished.
    """
    model = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for part_name, part in model.parts.items():
        begun = time.perf_counter()
        said = part.save(folder / part_name, dtype)
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


def _byte_symbols() -> list[str]:
    """The characters that stand for the 256 bytes in GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(code) for code in printable] + [chr(next(others)) for _ in range(256 - 188)]


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs that each make a new token out of known ones, the short ones first."""
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    for known in (letters, pairs):
        yield from itertools.product(known, letters)
        yield from itertools.product(known, [f"{letter}</w>" for letter in letters])
    yield from itertools.product(pairs, pairs)


@click.command(
    epilog="""
    \b
    Examples:
      python -m benchmarks.models sd15 build/sd15
      python -m benchmarks.models sd15 build/sd15-fp16 --dtype fp16
      python -m benchmarks.models sdxl build/sdxl
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
def main(name: str, out: Path, dtype: str) -> None:
    """Build the full-size pipeline NAME with random weights into the folder OUT.

    sd15: Stable Diffusion 1.5, 3.4 GB of UNet in fp32, 4.3 GB in all. sdxl: Stable Diffusion XL
    base, 10.3 GB of UNet in fp32, 13.9 GB in all.
    """
    from benchmarks.measure import gib, peak_memory

    write(name, out, dtype)
    click.echo(f"{out}: peak memory {gib(peak_memory())}")


if __name__ == "__main__":
    main()
