"""Files of weights: where they are, and that they are safe to read and whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter import hub
from runtimes.errors import SourceError
from runtimes.files import require_regular
from runtimes.parsing import parser

SAFE = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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


def find(place: str, what: str, usual: str) -> tuple[str, Path]:
    """A file by its path, by the folder that holds it, or on the Hub by ``OWNER/NAME`` or
    ``OWNER/NAME/FILE``: its name without this machine's folders, and where it is.

    Args:
        what: it is, for errors.
        usual: the file's name that is meant where there are several.

    Raises:
        SourceError: it is not there, several could be meant, or `check` refuses it.
    """
    path = Path(place).expanduser()
    local = path.exists()
    if path.is_dir():
        path = path / _only(place, [e.name for e in path.iterdir() if e.is_file()], usual)
    elif not local:
        path = _download(place, what, usual)
    check(path)
    return (path.name if local else place), path


def _only(place: str, names: Sequence[str], usual: str) -> str:
    """Which of a folder's files is meant."""
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
        return str(huggingface_hub.hf_hub_download(owner, inside))

    pieces = place.split("/")
    return hub.fetch(place, what, "file", get, inside=True)
