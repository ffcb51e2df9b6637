"""Files and folders that an export is given beside its source: those that cannot be there are
refused before anything is read or downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from latentc.exporter.source.adapters.kinds import KINDS, AdapterKind
from latentc.runtimes.errors import InputError, shown
from latentc.runtimes.storage.places import is_hub_id

# What is given beside a source besides adapters.
OTHERS: Mapping[str, AdapterKind] = {
    "image-encoder": AdapterKind("", "image encoder", folder=True, inside=True),
    "config": AdapterKind("", "folder of a configuration", folder=True),
}


def check(asked: Mapping[str, Sequence[str]]) -> None:
    """Refuse what is neither a file or folder here, nor may be an id on the Hub.

    Args:
        asked: by kind, as for `latentc.exporter.source.adapters.kinds.find`, with ``image-encoder``
        and ``config``.

    Raises:
        InputError: naming it.
    """
    if asked.get("image-encoder") and not asked.get("ip-adapter"):
        raise InputError("--image-encoder is that of IP-Adapters: give --ip-adapter too")
    for kind, places in asked.items():
        for each in places:
            try:
                _check(kind, each)
            except (OSError, ValueError) as error:  # such as a name that is too long
                said = getattr(error, "strerror", None) or error
                raise InputError(f"{_record(kind).noun} {shown(each)}: {said}") from error


def _check(kind: str, given: str) -> None:
    record = _record(kind)
    what, place = record.noun, record.place_of(given)
    here = Path(place).expanduser()
    if here.is_file() and record.folder:
        raise InputError(f"{what} {place}: is a file; give a folder")
    if here.is_dir() and record.file:
        raise InputError(f"{what} {place}: is a folder; give its file of weights")
    if here.exists():
        return
    path, colon, scale = place.rpartition(":")
    if kind == "lora" and colon and path[1:]:  # not the letter of a drive
        raise InputError(f"LoRA {given}: expected a number after the colon, not {scale!r}")
    if not is_hub_id(place, record.inside):
        raise InputError(f"no such {what}: {place}")


def _record(kind: str) -> AdapterKind:
    return OTHERS.get(kind) or KINDS[kind]
