"""Models of diffusers that are given beside a pipeline, each a folder or an id on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from exporter import hub
from exporter.ingredients import Ingredient
from exporter.source import digest_folder
from runtimes.errors import SourceError

_CONFIG = "config.json"


def find(asked: str, kind: str, what: str, class_name: str) -> Ingredient:
    """The folder of such a model, or ``OWNER/NAME`` on the Hub.

    Args:
        kind: of the ingredient, and `what` it is called in errors.
        class_name: that of diffusers which it must be of.

    Raises:
        SourceError: it is not there, or is something else.
    """
    path = Path(asked).expanduser()
    here = path.exists()
    folder = path if here else _download(asked, what)
    try:
        name = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SourceError(
            f"{asked} is no {what}: expected a folder with the {_CONFIG} of a diffusers model"
        ) from None
    if name != class_name:
        raise SourceError(f"{asked} is no {what} that is supported: it is a {name}")
    own = path.resolve().name if here else asked
    return Ingredient(kind, own, folder, digest_folder(folder))


def _download(asked: str, what: str) -> Path:
    def get() -> str:
        import huggingface_hub

        return str(
            huggingface_hub.snapshot_download(asked, allow_patterns=["*.json", "*.safetensors"])
        )

    return hub.fetch(asked, what, "folder", get)
