"""Files of weights: where they are, and that they are safe to read and whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentc.exporter.source import hub
from latentc.exporter.stored_weights import check_finite
from latentc.runtimes.errors import SourceError
from latentc.runtimes.storage.files import require_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.storage.places import PICKLES as PICKLES
from latentc.runtimes.storage.places import SAFE as SAFE

if TYPE_CHECKING:
    import torch

TRUSTED = ", or trust who made it and give --allow-pickle"


@parser(SourceError, "path", "a whole file of weights: it is damaged or cut short")
def check(path: Path, hint: str = "") -> None:
    """Refuse what would run code when it is read, and what is damaged.

    Args:
        hint: what else there is to do about a pickle.

    Raises:
        SourceError: it is a pickle, or not a whole safetensors file.
    """
    from safetensors import safe_open

    if path.suffix.lower() in PICKLES:
        raise SourceError(
            f"{path.name} is a pickle, which can run whatever code it holds when it is read; "
            f"convert it to safetensors{hint}"
        )
    require_regular(path)
    with safe_open(path, framework="np"):
        pass


@parser(SourceError, "path", "a whole safetensors file")
def metadata(path: Path) -> Mapping[str, str]:
    """Return the texts that a safetensors file has in its header besides the tensors.

    Raises:
        SourceError: the file is damaged.
    """
    from safetensors import safe_open

    require_regular(path)
    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def find(place: str, what: str, usual: str, allow_pickle: bool = False) -> tuple[str, Path]:
    """Return a file's name without this machine's folders, and its path.

    It is named by its path, by the folder that holds it, or on the Hub by ``OWNER/NAME`` or
    ``OWNER/NAME/FILE``.

    Args:
        what: it is, for errors.
        usual: the file's name that is meant where there are several.
        allow_pickle: it may be a pickle (`tensors` reads it without running its code).

    Raises:
        SourceError: it is not there, several could be meant, or `check` refuses it.
    """
    path = Path(place).expanduser()
    local = path.exists()
    if path.is_dir():
        path = path / _only(place, [e.name for e in path.iterdir() if e.is_file()], usual)
    elif not local:
        path = _download(place, what, usual)
    if not (allow_pickle and path.suffix.lower() in PICKLES):
        check(path, TRUSTED)
    return (path.name if local else place), path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by their names; those of tables in a pickle are joined by dots.

    Raises:
        SourceError: the file is damaged, a pickle of something else than tensors, or holds NaN or
            infinity.
    """
    found = flattened(content(path))
    check_finite(path.name, found)
    return found


@parser(SourceError, "path", "a whole file of weights")
def content(path: Path) -> Any:
    """Return what a file of weights holds: for safetensors its tensors by name, for a pickle the
    object, read as data alone (`weights_only`)."""
    if path.suffix.lower() in PICKLES:
        import torch

        require_regular(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    require_regular(path)
    return load_file(path)


def flattened(held: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of nested tables by their names, joined by dots."""
    return dict(_flattened(held, ""))


def _flattened(value: Any, prefix: str) -> list[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        return [(prefix, value)]
    if not isinstance(value, Mapping):
        return []
    inner = value.get("state_dict") if not prefix else None
    pairs = (inner if isinstance(inner, Mapping) else value).items()
    return [
        each
        for name, held in pairs
        for each in _flattened(held, f"{prefix}.{name}" if prefix else str(name))
    ]


def _only(place: str, names: Sequence[str], usual: str) -> str:
    """Return the name of the one file of a folder that is meant; raise SourceError where none or
    several may be.
    """
    fitting = sorted(name for name in names if name.endswith(SAFE))
    if usual in fitting:
        return usual
    if len(fitting) != 1:
        raise SourceError(
            f"{place} holds {len(fitting) or 'no'} {SAFE} files; name the one that is meant"
        )
    return fitting[0]


def _download(place: str, what: str, usual: str) -> Path:
    def get() -> str:
        import huggingface_hub

        owner, inside = "/".join(pieces[:2]), "/".join(pieces[2:])
        inside = inside or _only(place, huggingface_hub.list_repo_files(owner), usual)
        return str(hub.file(owner, inside))

    pieces = place.split("/")
    return hub.fetch(place, what, "file", get, inside=True)
