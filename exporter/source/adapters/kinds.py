"""This module changes a pipeline's own weights by what goes into an export beside the source.

Each kind finds what was asked for, says which parts of a pipeline it changes (so that the keys
of what is made from them change too), and is applied to the loaded pipeline before it is captured.
Nothing of it is left for the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from latentc.runtimes.errors import InputError

# Kind → module of this package. One line per kind; they are applied in this order.
KINDS: Mapping[str, str] = {
    "vae": "latentc.exporter.source.adapters.replaced_vae",
    "lora": "latentc.exporter.source.adapters.lora",
    "textual-inversion": "latentc.exporter.source.adapters.textual_inversion",
    "ip-adapter": "latentc.exporter.source.adapters.ip_adapter_files",
    "controlnet": "latentc.exporter.source.adapters.controlnet_files",
    "t2i-adapter": "latentc.exporter.source.adapters.t2i_adapter_files",
}

# Those that write into weights, which must be in memory for that, and not in a mapped file.
WRITING = frozenset({"lora", "textual-inversion"})
# Those that stand in the place of a part.
REPLACING = frozenset({"vae"})


@dataclass(frozen=True)
class Ingredient:
    """`id`: as it was asked for, less the folder of a local file; `sha256`: of its content;
    `scale`: how strongly it is mixed in, None where it is not; `token`: the word that it adds;
    `encoder`: the folder of the model that it needs besides."""

    kind: str
    id: str
    path: Path
    sha256: str
    scale: float | None = None
    token: str | None = None
    encoder: Path | None = None


@dataclass(frozen=True)
class Reading:
    """A `Reading` says how ingredients are read.

    Attributes:
        allow_pickle: files of weights may be pickles; they are read without running their code.
        image_encoder: folder or Hub id of the image encoder of IP-Adapters, None for the one that
            lies beside each.
    """

    allow_pickle: bool = False
    image_encoder: str | None = None


class Kind(Protocol):
    """The interface of a kind's module. One that brings components has ``added(ingredients)``
    besides: their names, and digests of what they are made of."""

    def find(self, asked: str, reading: Reading) -> Ingredient:
        """Raises SourceError: it is not there, or is not what it should be."""

    def parts(self, pipeline_class: str) -> tuple[str, ...]:
        """Return the pipeline's parts that it may change; none where the class has none of them."""

    def apply(self, pipe: Any, ingredients: Sequence[Ingredient]) -> Any:
        """Return another pipeline that has them, or None where it is the same.

        Raises SourceError: they do not fit the pipeline.
        """


def kind(name: str) -> Kind:
    """Return the module of a kind."""
    module: Any = import_module(KINDS[name])
    return module  # type: ignore[no-any-return]


def find(
    asked: Mapping[str, Sequence[str]], reading: Reading | None = None
) -> tuple[Ingredient, ...]:
    """Return all that was asked for, by kind.

    Raises:
        InputError: an image encoder, and nothing that needs one.
        SourceError: something is not there, or is not what it should be.
    """
    how = reading or Reading()
    if how.image_encoder is not None and not asked.get("ip-adapter"):
        raise InputError("an image encoder is for IP-Adapters; give one, or leave it out")
    return tuple(kind(name).find(each, how) for name in KINDS for each in asked.get(name, ()))


def changed(
    digests: Mapping[str, str], ingredients: Sequence[Ingredient], pipeline_class: str
) -> dict[str, list[Any]]:
    """Return for each part of a pipeline that is changed what it depends on (JSON-able)."""
    facts_by_part: dict[str, list[Any]] = {}
    for ingredient in ingredients:
        for part in kind(ingredient.kind).parts(pipeline_class):
            if part in digests:
                facts = facts_by_part.setdefault(part, [digests[part]])
                facts.append(
                    [ingredient.kind, ingredient.sha256, ingredient.scale, ingredient.token]
                )
    return facts_by_part


def modules(
    ingredients: Sequence[Ingredient], pipeline_class: str, parts: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the modules that decide what becomes of a pipeline with these ingredients; with
    `parts`, of these parts alone. A kind that brings components counts for all parts."""
    names = dict.fromkeys(ingredient.kind for ingredient in ingredients)
    return tuple(
        KINDS[name]
        for name in names
        if parts is None
        or hasattr(kind(name), "added")
        or not set(parts).isdisjoint(kind(name).parts(pipeline_class))
    )


def replaced(ingredients: Sequence[Ingredient], pipeline_class: str) -> set[str]:
    """Return the parts that are others altogether, their configuration too."""
    kinds = {ingredient.kind for ingredient in ingredients if ingredient.kind in REPLACING}
    return {part for name in kinds for part in kind(name).parts(pipeline_class)}


def added(ingredients: Sequence[Ingredient]) -> dict[str, str]:
    """Return the components that ingredients bring, made of nothing else, and their digests."""
    digests: dict[str, str] = {}
    for name in KINDS:
        ours = [ingredient for ingredient in ingredients if ingredient.kind == name]
        make = getattr(kind(name), "added", None) if ours else None
        digests |= make(ours) if make else {}
    return digests


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> Any:
    """Return the pipeline with all of them.

    Raises:
        SourceError: something does not fit it.
    """
    from latentc.exporter.stored_weights import materialise

    for name in KINDS:
        ours = [ingredient for ingredient in ingredients if ingredient.kind == name]
        if not ours:
            continue
        for part in kind(name).parts(type(pipe).__name__):
            module: Any = getattr(pipe, part, None)
            if name in WRITING and hasattr(module, "named_parameters"):  # not a tokenizer
                materialise(module)
        pipe = kind(name).apply(pipe, ours) or pipe
    return pipe
