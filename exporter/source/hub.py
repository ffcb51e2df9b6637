"""This module loads what an id on the Hub names, where no file or folder of that name is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from latentc.exporter.resources import GIB, free_disk
from latentc.runtimes.errors import SourceError, first_line
from latentc.runtimes.storage.places import is_hub_id, names_weights


def fetch(place: str, what: str, kind: str, get: Callable[[], str], inside: bool = False) -> Path:
    """Return the path where `get` has put what ``OWNER/NAME`` names.

    Args:
        what: was looked for, and `kind` what it would be here ("file", "folder"), for errors.
        inside: ``OWNER/NAME/PATH`` may be asked for as well.

    Raises:
        SourceError: it is no id, or it could not be had.
    """
    if not is_hub_id(place, inside):
        raise SourceError(f"no such {'file' if names_weights(place) else what}: {place}")
    try:
        return Path(get())
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{place} is no {kind} here, and it could not be had from the Hub: {first_line(error)}"
        ) from error


def snapshot(place: str, **options: Any) -> str:
    """Return the folder with the files of a repository, as `huggingface_hub.snapshot_download`
    does.

    Raises:
        SourceError: what is still to be downloaded does not fit on the disk of the cache.
    """
    import huggingface_hub

    return _in_room(huggingface_hub.snapshot_download, place, options)


def file(place: str, name: str, revision: str | None = None) -> str:
    """Return the path of a file of a repository, as `huggingface_hub.hf_hub_download` does.

    Args:
        revision: the commit or branch; None is the Hub's default one.

    Raises:
        SourceError: as `snapshot`.
    """
    import huggingface_hub

    options = {"filename": name} | ({} if revision is None else {"revision": revision})
    return _in_room(huggingface_hub.hf_hub_download, place, options)


@contextmanager
def with_room() -> Iterator[None]:
    """Inside, pipelines that diffusers downloads must fit on the disk (see `snapshot`). Which files
    it takes it tells nobody but the function that downloads them."""
    from diffusers.pipelines import pipeline_utils

    download = pipeline_utils.snapshot_download

    def in_room(place: str, **options: Any) -> str:
        return _in_room(download, place, options)

    with mock.patch.object(pipeline_utils, "snapshot_download", in_room):
        yield


def _in_room(download: Callable[..., Any], place: str, options: dict[str, Any]) -> str:
    planned: list[Any] = []
    with suppress(Exception):  # without a network, the cache may have everything all the same
        found = download(place, **options, dry_run=True)
        planned = found if isinstance(found, list) else [found]
    _check_room(place, options.get("cache_dir"), planned)
    return str(download(place, **options))


def _check_room(place: str, cache: str | Path | None, planned: list[Any]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(cache or HF_HUB_CACHE)
    wanted = sum(each.file_size or 0 for each in planned if each.will_download)
    free = free_disk(folder)
    if wanted > free:
        raise SourceError(
            f"{place}: the download takes {wanted / GIB:.1f} GiB, and {free / GIB:.1f} GiB are "
            f"free at {folder}; make room there, or set HF_HOME to a folder on another disk"
        )
