"""transformers tokenizer → one tokenizer.json that pads and truncates by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentc.exporter.artifacts.source_closure import code
from latentc.exporter.artifacts.store import Store
from latentc.exporter.artifacts.versions import digest, versions
from latentc.exporter.components.description import Description, Tokens
from latentc.exporter.source import vocabulary
from latentc.exporter.source.adapters import kinds as ingredients
from latentc.exporter.source.resolving import PipelineSource
from latentc.runtimes.bundle.structures import Tokenizer
from latentc.runtimes.errors import ExportError
from latentc.runtimes.texts.tokenizer import frame_of

_PROBES = (
    "",
    "a large red circle",
    "A Photo of an ASTRONAUT, riding a horse!!  8k,   (masterpiece:1.2)",
    " two\tlines \n\n and more  ",
    "Ünïcödé — ソフトウェア 🚀 <|endoftext|> don't",
    " ".join(["very"] * 200),
)


def save(tokenizer: Any, path: Path, text: Tokens) -> None:
    """Write `path` and check that the `tokenizers` library alone gives the same ids.

    Args:
        text: how long texts become, and whether they are written small first.

    Raises:
        ExportError: the tokenizer has no fast form, or the ids differ.
    """
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json form")
    length = text.length(tokenizer)
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.normalizer = _preparing(text, plain.normalizer)
    plain.enable_truncation(length)
    plain.enable_padding(
        length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    for probe in _PROBES:
        wanted = tokenizer(
            text.prepared(probe), padding="max_length", max_length=length, truncation=True
        )
        if plain.encode(probe).ids != list(wanted.input_ids):
            raise ExportError(f"{type(tokenizer).__name__}: tokenizer.json gives other ids")
    plain.save(str(path), pretty=False)


def _preparing(text: Tokens, normalizer: Any) -> Any:
    """Return what does to a text what the pipeline does before it is tokenized (single spaces,
    small letters, no space at the ends), then what the tokenizer itself does."""
    from tokenizers import Regex, normalizers

    first: list[Any] = [normalizers.Replace(Regex(r"\s+"), " ")] if text.clean else []
    first += [normalizers.Lowercase()] if text.lowercase else []
    if not first:
        return normalizer
    own = [] if normalizer is None else [normalizer]
    return normalizers.Sequence([*first, normalizers.Strip(), *own])


def add_all(
    store: Store, source: PipelineSource, pipe: Any, description: Description
) -> tuple[Tokenizer, ...]:
    """Return the tokenizers of all texts that the pipeline takes, as the manifest has them."""
    return tuple(_added(store, source, pipe, text) for text in description.tokens)


def _added(store: Store, source: PipelineSource, pipe: Any, text: Tokens) -> Tokenizer:
    from tokenizers import Tokenizer as Words

    from latentc.exporter.source.adapters.textual_inversion import expansions

    tokenizer = getattr(pipe, text.tokenizer)
    length = text.length(tokenizer)
    key = digest(
        {
            "kind": "tokenizer",
            "source": source.digests[text.tokenizer],
            "length": length,
            "lowercase": text.lowercase,
            "clean": text.clean,
            "versions": versions(("transformers", "tokenizers")),
            "code": code(__name__, *ingredients.modules(source.ingredients, source.pipeline_class)),
        }
    )

    def write(folder: Path) -> Mapping[str, Any]:
        save(tokenizer, folder / "tokenizer.json", text)
        return {}

    item = store.item(key, f"tokenizers/{text.tokenizer}", write)
    frame = frame_of(Words.from_file(str(store.staging / item.files[0].path)))
    return Tokenizer(
        text.tokenizer,
        item.files[0],
        length,
        frame.before,
        frame.after,
        frame.pad,
        expansions(tokenizer),
        vocabulary.rows(pipe, text.tokenizer),
        unescape=text.clean,
    )
