"""Reads what a source says of itself: its licence, who made it, what it was made from.

A folder and a pipeline on the Hub have a model card (README.md with a block of YAML at its begin),
a checkpoint of one file has metadata. An export does not depend on what is said there: a card that
cannot be read costs a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentc.exporter.source import hub
from latentc.exporter.source.weight_files import SAFE, metadata
from latentc.runtimes.bundle.rules import LONGEST_SAID, MOST_BASE_MODELS
from latentc.runtimes.errors import SourceError, first_line
from latentc.runtimes.storage.files import LARGEST_SETTINGS, read_regular
from latentc.runtimes.storage.parsing import parser

CARD = "README.md"
_LARGEST_BLOCK = 1 << 16  # characters; the YAML reader takes seconds for a few of these
# A value that others may refer to. Cards have none, and merged into each other ten of them can make
# more members than any memory holds.
_ANCHOR = re.compile(r"(?<![^\W_])&[\w-]")
_MODELSPEC = "modelspec."


@dataclass(frozen=True)
class Card:
    """A card holds what is said of a source within the manifest's bounds, None and () where nothing
    is."""

    licence: str | None = None
    author: str | None = None
    base_model: tuple[str, ...] = ()


def of_folder(folder: Path, owner: str | None = None) -> Card:
    """Return what the model card in a pipeline's folder says. One that cannot be read is warned of.

    Args:
        owner: whom a pipeline on the Hub belongs to, its author where the card names none.
    """
    path = folder / CARD
    said = _unless_damaged(_front_matter, path) if path.exists() else {}
    return Card(
        licence=_licence(said),
        author=_joined(said.get("author") or said.get("authors")) or _joined(owner),
        base_model=_texts(said.get("base_model"))[:MOST_BASE_MODELS],
    )


def of_checkpoint(path: Path) -> Card:
    """Return what a checkpoint of one file says in its metadata, by the names of ModelSpec; nothing
    for a pickle. Metadata that cannot be read are warned of."""
    if path.suffix.lower() != SAFE:
        return Card()
    said = _unless_damaged(metadata, path)
    merged = said.get(f"{_MODELSPEC}merged_from", "").split(",")
    return Card(
        licence=_joined(said.get(f"{_MODELSPEC}license")),
        author=_joined(said.get(f"{_MODELSPEC}author")),
        base_model=_texts(merged)[:MOST_BASE_MODELS],
    )


def of_hub(place: str, folder: Path, revision: str | None) -> Card:
    """Return what the model card of a pipeline on the Hub says, which is downloaded if it is not
    there yet. One that cannot be had is warned of.

    Args:
        place: the pipeline's ``OWNER/NAME``.
        folder: where its other files are.
        revision: their commit.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not (folder / CARD).exists():  # diffusers downloads what it loads
        try:
            folder = Path(hub.file(place, CARD, revision)).parent
        except Exception as error:
            absent = isinstance(error, EntryNotFoundError)
            if not absent or isinstance(error, LocalEntryNotFoundError):
                _warn(f"the model card of {place} could not be had: {first_line(error)}")
    return of_folder(folder, place.partition("/")[0])


@parser(SourceError, "path", "a model card that can be read")
def _front_matter(path: Path) -> Mapping[str, Any]:
    """Return what the block of YAML at a model card's begin says; nothing where there is none."""
    from huggingface_hub import RepoCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = read_regular(path, LARGEST_SETTINGS).decode("utf-8-sig")
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:  # the library would write a warning of its own
        return {}
    if len(block.group()) > _LARGEST_BLOCK:
        raise ValueError(f"its metadata have more than {_LARGEST_BLOCK:,} characters")
    if _ANCHOR.search(block.group()):
        raise ValueError("its metadata have YAML anchors, which can grow without a bound")
    said: Mapping[str, Any] = vars(RepoCard(block.group(), ignore_metadata_errors=True).data)
    return said


def _unless_damaged(read: Callable[[Path], Mapping[str, Any]], path: Path) -> Mapping[str, Any]:
    try:
        return read(path)
    except SourceError as error:
        _warn(str(error))
        return {}


def _warn(problem: str) -> None:
    text = f"{problem}; the bundle may lack the licence, author and base model"
    warnings.warn(text, UserWarning, stacklevel=4)


def _licence(said: Mapping[str, Any]) -> str | None:
    """Return a card's licence: of one that the Hub has no name for the card's own name and link."""
    licence = _joined(said.get("license"))
    if licence != "other":
        return licence
    name = _joined(said.get("license_name")) or licence
    link = _joined(said.get("license_link"))
    whole = f"{name} ({link})" if link else name
    return whole if len(whole) <= LONGEST_SAID else name  # half a link leads elsewhere


def _joined(value: Any) -> str | None:
    return _bounded(", ".join(_texts(value))) or None


def _texts(value: Any) -> tuple[str, ...]:
    """Return the texts of a value that is one, or a list with some; other values say nothing."""
    listed = value if isinstance(value, list) else [value]
    bounded = [_bounded(item) for item in listed if isinstance(item, str)]
    return tuple(each for each in bounded if each)


def _bounded(text: str) -> str:
    """Return a text in one line, of the manifest's length at most, that UTF-8 can hold."""
    whole = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return whole if len(whole) <= LONGEST_SAID else f"{whole[: LONGEST_SAID - 1]}…"
