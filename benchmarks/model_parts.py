"""The parts that full-size pipelines are made of: networks with random weights, tokenizers over
made-up vocabularies, schedulers."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

SEED = 0
_START, _END = "<|startoftext|>", "<|endoftext|>"
_T5_PIECES = 32_000  # beside 100 sentinels; the model has rows for 32,128


@dataclass(frozen=True)
class Network:
    """A part with weights: its class, its configuration, and how many parameters it must have;
    `layers`: settings that are numbers of equal layers, and the parameters of one."""

    library: str
    class_name: str
    config: Mapping[str, Any]
    parameters: int
    layers: Mapping[str, int] = field(default_factory=dict)

    def shallow(self, depth: int | None) -> Network:
        """Return the network with at most `depth` layers of each kind; None keeps them all."""
        if depth is None:
            return self
        cut = {name: self.config[name] - min(depth, self.config[name]) for name in self.layers}
        fewer = sum(cut[name] * self.layers[name] for name in cut)
        config = {**self.config, **{name: self.config[name] - less for name, less in cut.items()}}
        return replace(self, config=config, parameters=self.parameters - fewer)

    def build(self) -> torch.nn.Module:
        """Return the module with its class's own initial weights, on torch's current device."""
        cls = getattr(import_module(self.library), self.class_name)
        if hasattr(cls, "from_config"):  # diffusers
            module: torch.nn.Module = cls.from_config(dict(self.config))
        else:
            module = cls(cls.config_class(**self.config))
        return module.eval()

    def save(self, folder: Path, dtype: str) -> str:
        """Build and write the part; returns what there is to say about it."""
        import torch

        torch.manual_seed(SEED)
        with _default_dtype(torch.float16 if dtype == "fp16" else torch.float32):
            module = self.build()
        if dtype == "fp16":
            module.half()  # tables of float32 besides, such as positions
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


@dataclass(frozen=True)
class T5Tokenizer:
    """T5's tokenizer over a made-up vocabulary of about the real one's size."""

    library: str = "transformers"
    class_name: str = "T5TokenizerFast"

    def save(self, folder: Path, dtype: str) -> str:
        """Write tokenizer.json and the configuration."""
        from transformers import T5TokenizerFast

        tokenizer = T5TokenizerFast(vocab=t5_vocabulary(), model_max_length=512)
        tokenizer.save_pretrained(folder)
        return f"{len(tokenizer):,} tokens"


Part = Network | Scheduler | ClipTokenizer | T5Tokenizer


@dataclass(frozen=True)
class Model:
    """A pipeline class of diffusers and its parts, by their folders' names. `settings` are the
    constructor's other arguments; parts that are absent have None there."""

    pipeline_class: str
    parts: Mapping[str, Part]
    settings: Mapping[str, Any]

    @property
    def networks(self) -> dict[str, Network]:
        """Return the parts that have weights."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Network)}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make everything inside of this type from the beginning: no second copy is in memory."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count_parameters(module: torch.nn.Module) -> int:
    """Return how many parameters a module has (buffers do not count)."""
    return sum(parameter.numel() for parameter in module.parameters())


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token ids and merges of a CLIP-style BPE.

    It has 49,408 tokens, every letter combination up to three letters, some of four. Any text can
    be encoded, as with the real one.
    """
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


def t5_vocabulary() -> list[tuple[str, float]]:
    """Return pieces of a unigram model and their logarithmic probabilities.

    They are every printable character, and letter combinations with and without a space before
    them, longer ones likelier.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = string.ascii_lowercase
    words = ("".join(each) for size in (2, 3) for each in itertools.product(letters, repeat=size))
    joined = (piece for word in words for piece in (f"▁{word}", word))
    single = [piece for char in string.printable.strip() for piece in (char, f"▁{char}")]
    pieces = [*single, *itertools.islice(joined, _T5_PIECES - len(special) - len(single))]
    return [*special, *((piece, -9.0 + len(piece)) for piece in pieces)]


def _byte_symbols() -> list[str]:
    """Return the characters that stand for the 256 bytes in GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(code) for code in printable] + [chr(next(others)) for _ in range(256 - 188)]


def _merges() -> Iterator[tuple[str, str]]:
    """Yield pairs that each make a new token out of known ones, the short ones first."""
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    for pieces in (letters, pairs):
        yield from itertools.product(pieces, letters)
        yield from itertools.product(pieces, [f"{letter}</w>" for letter in letters])
    yield from itertools.product(pairs, pairs)
