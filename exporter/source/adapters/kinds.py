"""This module changes a pipeline's own weights by what goes into an export beside the source.

Each kind finds what was asked for, says which parts of a pipeline it changes (so that the keys
of what is made from them change too), and is applied to the loaded pipeline before it is captured.
Nothing of it is left for the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentc.exporter.source.adapters.places import scaled_place, worded_place
from latentc.runtimes.errors import InputError, first_line
from latentc.runtimes.options import Option
from latentc.runtimes.plugins import BrokenPlugin, Registry, started

if TYPE_CHECKING:
    from latentc.exporter.components.description import Description


@dataclass(frozen=True)
class AdapterKind:
    """This record says what is known of a kind before anything of it is read.

    Attributes:
        module: the module that finds and applies it (`KindModule`).
        noun: what messages call it.
        folder: it is a folder, and never a file.
        file: it is a file, and never a folder.
        inside: it may be a file inside of a repository on the Hub.
        place_of: the file, folder or id in what a caller gives, which may say a scale besides.
        writes: it writes into weights, which must be in memory for that, not in a mapped file.
        replaces: it stands in the place of a part, whose configuration is then another.
        option: of an export, whose keyword is the kind's name; None for a kind of latentc's own,
            which `latentc.exporter.export_arguments` declares.
    """

    module: str
    noun: str
    folder: bool = False
    file: bool = False
    inside: bool = False
    place_of: Callable[[str], str] = str
    writes: bool = False
    replaces: bool = False
    option: Option | None = None


_HERE = "latentc.exporter.source.adapters"
# One line per kind; they are applied in this order, before those of other packages.
OWN: Mapping[str, AdapterKind] = {
    "vae": AdapterKind(f"{_HERE}.replaced_vae", "VAE", folder=True, replaces=True),
    "lora": AdapterKind(f"{_HERE}.lora", "LoRA", inside=True, place_of=scaled_place, writes=True),
    "textual-inversion": AdapterKind(
        f"{_HERE}.textual_inversion",
        "textual inversion",
        inside=True,
        place_of=worded_place,
        writes=True,
    ),
    "ip-adapter": AdapterKind(f"{_HERE}.ip_adapter_files", "IP-Adapter", file=True, inside=True),
    "controlnet": AdapterKind(f"{_HERE}.controlnet_files", "ControlNet", folder=True),
    "t2i-adapter": AdapterKind(f"{_HERE}.t2i_adapter_files", "T2I-Adapter", folder=True),
}
KINDS = Registry("adapter", AdapterKind, "latentc.adapters", OWN)


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


class KindModule(Protocol):
    """The interface of a kind's module.

    One that brings components has ``added(ingredients)`` besides: their names, and digests of what
    they are made of. One whose pipelines have another description, with further graphs or
    arguments of calls, has ``described(pipe, description)``, which returns it; it is called with
    pipelines that ``apply`` returned, and with miniatures of them.
    """

    def find(self, asked: str, reading: Reading) -> Ingredient:
        """Raises SourceError: it is not there, or is not what it should be."""

    def parts(self, pipeline_class: str) -> tuple[str, ...]:
        """Return the pipeline's parts that it may change; none where the class has none of them."""

    def apply(self, pipe: Any, ingredients: Sequence[Ingredient]) -> Any:
        """Return another pipeline that has them, or None where it is the same.

        Raises SourceError: they do not fit the pipeline.
        """


def kind(name: str) -> KindModule:
    """Return the module of a kind.

    Raises:
        InputError: that of another package fails, or is none.
    """
    reference = KINDS[name].module
    try:
        with started(f"the module {reference!r}"):
            module: Any = import_module(reference)
    except (BrokenPlugin, ImportError) as error:
        raise InputError(f"adapter {name!r}: {first_line(error)}") from error
    for needed in ("find", "parts", "apply"):
        if not hasattr(module, needed):
            raise InputError(
                f"adapter {name!r}: the module {reference} has no {needed}, which an adapter has "
                "(docs/extending.md)"
            )
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
    return tuple(kind(name).find(place, how) for name, places in asked.items() for place in places)


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
        module
        for name in names
        if parts is None
        or hasattr(kind(name), "added")
        or not set(parts).isdisjoint(kind(name).parts(pipeline_class))
        for module in (*KINDS.modules(name), KINDS[name].module)
    )


def replaced(ingredients: Sequence[Ingredient], pipeline_class: str) -> set[str]:
    """Return the parts that are others altogether, their configuration too."""
    kinds = {each.kind for each in ingredients if KINDS[each.kind].replaces}
    return {part for name in kinds for part in kind(name).parts(pipeline_class)}


def added(ingredients: Sequence[Ingredient]) -> dict[str, str]:
    """Return the components that ingredients bring, made of nothing else, and their digests."""
    digests: dict[str, str] = {}
    for name, ours in _by_kind(ingredients).items():
        make = getattr(kind(name), "added", None)
        digests |= make(ours) if make else {}
    return digests


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> Any:
    """Return the pipeline with all of them.

    Raises:
        SourceError: something does not fit it.
    """
    from latentc.exporter.stored_weights import materialise

    for name, ours in _by_kind(ingredients).items():
        for part in kind(name).parts(type(pipe).__name__):
            module: Any = getattr(pipe, part, None)
            if KINDS[name].writes and hasattr(module, "named_parameters"):  # not a tokenizer
                materialise(module)
        pipe = kind(name).apply(pipe, ours) or pipe
    return pipe


def described(pipe: Any, description: Description, names: Sequence[str]) -> Description:
    """Return the description of a pipeline that has ingredients of these kinds.

    Raises:
        UnsupportedPipeline: a kind finds something in the pipeline that it does not support.
    """
    for name in dict.fromkeys(names):
        change = getattr(kind(name), "described", None)
        description = change(pipe, description) if change else description
    return description


def _by_kind(ingredients: Sequence[Ingredient]) -> dict[str, list[Ingredient]]:
    """Return the ingredients by kind, in the order in which kinds are applied."""
    kinds = {ingredient.kind for ingredient in ingredients}
    return {
        name: [ingredient for ingredient in ingredients if ingredient.kind == name]
        for name in (*OWN, *sorted(kinds - set(OWN)))
        if name in kinds
    }
