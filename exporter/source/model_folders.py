"""Models of diffusers that are given beside a pipeline, each a folder or an id on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from latentc.exporter.source import hub
from latentc.exporter.source.adapters.kinds import Ingredient
from latentc.exporter.source.resolving import digest_folder
from latentc.runtimes.errors import SourceError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser

CONFIG = "config.json"


def find(asked: str, kind: str, what: str, class_name: str) -> Ingredient:
    """Return the folder of such a model, or ``OWNER/NAME`` on the Hub.

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
        name = configured_class(folder / CONFIG)
    except SourceError as error:
        raise SourceError(
            f"{asked} is no {what}: expected a folder with the {CONFIG} of a diffusers model "
            f"({error})"
        ) from error
    if name != class_name:
        raise SourceError(f"{asked} is no {what} that is supported: it is a {name}")
    folder_name = path.resolve().name if here else asked
    return Ingredient(kind, folder_name, folder, digest_folder(folder))


@parser(SourceError, "path", "the configuration of a diffusers model")
def configured_class(path: Path) -> str:
    """Return the name of the class that a ``config.json`` is for.

    Raises:
        SourceError: it is missing, damaged or names no class.
    """
    config = json.loads(read_regular(path, LARGEST_DOCUMENT))
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError("it has no _class_name")
    return str(config["_class_name"])


def _download(asked: str, what: str) -> Path:
    def get() -> str:
        return str(hub.snapshot(asked, allow_patterns=["*.json", "*.safetensors"]))

    return hub.fetch(asked, what, "folder", get)
