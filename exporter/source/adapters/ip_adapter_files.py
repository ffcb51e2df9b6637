"""IP-Adapters: weights that let a UNet look at an image, and the image encoder that they need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentc.exporter.artifacts.versions import digest
from latentc.exporter.components.names import IP_IMAGE_ENCODER
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source import hub, unread_keys, weight_files
from latentc.exporter.source.adapters.kinds import Ingredient, Reading
from latentc.exporter.source.resolving import digest_folder, load_model
from latentc.exporter.source.weight_files import SAFE
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import SourceError, first_line
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser

if TYPE_CHECKING:
    import torch

_ENCODER = "image_encoder"
_CONFIG = "config.json"
_PLAIN = Reading()
# The first layer of an adapter's projection, and what of the image encoder's it takes: of a plain
# one the projected image, of a Plus or a full one the states of the layer before the last.
_WIDTHS = {
    "proj.weight": "projection_dim",
    "proj_in.weight": "hidden_size",
    "proj.0.weight": "hidden_size",
}


def find(asked: str, reading: Reading = _PLAIN) -> Ingredient:
    """Return the file of weights of an IP-Adapter, with its image encoder.

    A folder ``image_encoder`` lies beside it, or another is named; ``OWNER/NAME/PATH`` names one on
    the Hub.

    Raises:
        SourceError: it is not there, or is for an image encoder of another width.
    """
    path = Path(asked).expanduser()
    here = path.exists()
    file = path if here else _download(asked)
    if not file.is_file() or file.suffix.lower() not in (SAFE, *weight_files.PICKLES):
        raise SourceError(f"{asked} is no IP-Adapter: expected its file of weights ({SAFE})")
    if not (reading.allow_pickle and file.suffix.lower() in weight_files.PICKLES):
        weight_files.check(file, weight_files.TRUSTED)
    folder = _encoder(reading.image_encoder) if reading.image_encoder else file.parent / _ENCODER
    if not (folder / _CONFIG).is_file():
        raise SourceError(
            f"the IP-Adapter {asked} needs its image encoder, a folder {_ENCODER!r} beside the "
            "file, or one that --image-encoder names"
        )
    _check_width(file, folder)
    name = file.name if here else asked
    sha = digest([sha256(file), digest_folder(folder, "transformers")])
    return Ingredient("ip-adapter", name, file, sha, encoder=folder)


def _encoder(asked: str) -> Path:
    """Return the folder of an image encoder, or the one in a folder.

    ``OWNER/NAME`` is one on the Hub, or names a folder in there.
    """
    path = Path(asked).expanduser()
    folder = path if path.exists() else _download_encoder(asked)
    return folder if (folder / _CONFIG).is_file() else folder / _ENCODER


def _check_width(file: Path, folder: Path) -> None:
    """Refuse an adapter whose first layer takes something else than the image encoder gives."""
    weights = weight_files.tensors(file)
    config = _configured(folder / _CONFIG)
    for name, entry in _WIDTHS.items():
        layer = weights.get(f"image_proj.{name}")
        given = config.get(entry)
        if layer is None or given is None:
            continue
        if layer.shape[-1] != given:
            raise SourceError(
                f"the IP-Adapter {file.name} is for an image encoder with a {entry} of "
                f"{layer.shape[-1]}, and {folder} has {given}: name the other one with "
                "--image-encoder"
            )
        return


@parser(SourceError, "path", "the configuration of an image encoder")
def _configured(path: Path) -> Mapping[str, Any]:
    config = json.loads(read_regular(path, LARGEST_DOCUMENT))
    if not isinstance(config, dict):
        raise ValueError("it is no object")
    inner = config.get("vision_config")  # of a whole CLIP
    return {**config, **inner} if isinstance(inner, dict) else config


def parts(pipeline_class: str) -> tuple[str, ...]:
    return ("unet",)


def added(ingredients: Sequence[Ingredient]) -> dict[str, str]:
    """Return the image encoder, with a digest of the adapters that it works for."""
    return {IP_IMAGE_ENCODER: digest([ingredient.sha256 for ingredient in ingredients])}


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> None:
    """Load all of them at once, in the order in which they were given.

    The image encoder is that of the first.
    """
    names = ", ".join(ingredient.id for ingredient in ingredients)
    if not hasattr(pipe, "load_ip_adapter"):
        raise SourceError(f"{type(pipe).__name__} takes no IP-Adapter ({names})")
    import transformers

    encoder = ingredients[0].encoder
    if encoder is not None:
        for each in ingredients[1:]:
            _check_width(each.path, encoder)
        cls = transformers.CLIPVisionModelWithProjection
        with quiet_loading():
            pipe.register_modules(image_encoder=load_model(cls, encoder, None))
    files = [weight_files.tensors(each.path) for each in ingredients]
    numbered = {f"{i}.{key}": value for i, file in enumerate(files) for key, value in file.items()}
    try:
        with quiet_loading(), unread_keys.watching(numbered) as watch:
            pipe.load_ip_adapter(
                [_halves(file) for file in files],
                subfolder="",
                weight_name=[each.path.name for each in ingredients],
                image_encoder_folder=None,
                local_files_only=True,
            )
    except Exception as error:
        verb = "do" if ingredients[1:] else "does"
        raise SourceError(
            f"the IP-Adapter {names} {verb} not fit this pipeline: {first_line(error)}"
        ) from error
    for index, each in enumerate(ingredients):
        beginning = f"{index}."
        unread = {key for key in watch.keys - watch.read if key.startswith(beginning)}
        unread_keys.refuse(
            f"the IP-Adapter {each.id}",
            type(pipe).__name__,
            (key.removeprefix(beginning) for key in unread),
        )
    pipe.image_encoder.eval()


def _halves(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return an adapter's tensors as diffusers takes them: the projection of images and the layers'
    own.
    """
    return {
        half: {
            key.removeprefix(f"{half}."): value
            for key, value in tensors.items()
            if key.startswith(f"{half}.")
        }
        for half in ("image_proj", "ip_adapter")
    }


def _download(asked: str) -> Path:
    def get() -> str:
        owner, name, *path = asked.split("/")
        file = "/".join(path)
        beside = "/".join([*path[:-1], _ENCODER])
        wanted = [file, f"{beside}/*.json", f"{beside}/*{SAFE}"]
        folder = hub.snapshot(f"{owner}/{name}", allow_patterns=wanted)
        return str(Path(folder) / file)

    return hub.fetch(asked, "IP-Adapter", "file", get, inside=True)


def _download_encoder(asked: str) -> Path:
    def get() -> str:
        owner, name, *inside = asked.split("/")
        beside = "/".join(["", *inside]).lstrip("/")
        wanted = [f"{beside}/{each}".lstrip("/") for each in ("*.json", f"*{SAFE}")]
        folder = hub.snapshot(f"{owner}/{name}", allow_patterns=wanted)
        return str(Path(folder) / beside)

    return hub.fetch(asked, "image encoder", "folder", get, inside=True)
