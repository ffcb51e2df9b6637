"""IP-Adapters: weights that let a UNet look at a picture, and the image encoder that they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter import hub
from exporter.ingredients import Ingredient
from exporter.names import IP_IMAGE_ENCODER
from exporter.source import digest, digest_folder, quiet_loading
from exporter.weight_files import SAFE, check
from runtimes.errors import SourceError
from runtimes.session import first_line
from runtimes.trust import sha256

_ENCODER = "image_encoder"


def find(asked: str) -> Ingredient:
    """A file of weights with a folder ``image_encoder`` beside it; ``OWNER/NAME/PATH`` on the
    Hub."""
    path = Path(asked).expanduser()
    here = path.exists()
    file = path if here else _download(asked)
    if not file.is_file() or file.suffix not in (SAFE, ".bin"):
        raise SourceError(f"{asked} is no IP-Adapter: expected its file of weights ({SAFE})")
    check(file)
    folder = file.parent / _ENCODER
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"the IP-Adapter {asked} needs its image encoder, a folder {_ENCODER!r} beside the file"
        )
    name = file.name if here else asked
    sha = digest([sha256(file), digest_folder(folder, "transformers")])
    return Ingredient("ip-adapter", name, file, sha)


def parts(pipeline_class: str) -> tuple[str, ...]:
    return ("unet",)


def added(ingredients: Sequence[Ingredient]) -> dict[str, str]:
    """The image encoder."""
    return {IP_IMAGE_ENCODER: digest([each.sha256 for each in ingredients])}


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> None:
    """All of them at once, in the order in which they were given, with the image encoder beside
    the first."""
    names = ", ".join(each.id for each in ingredients)
    if not hasattr(pipe, "load_ip_adapter"):
        raise SourceError(f"{type(pipe).__name__} takes no IP-Adapter ({names})")
    try:
        with quiet_loading():
            pipe.load_ip_adapter(
                [str(each.path.parent) for each in ingredients],
                subfolder="",
                weight_name=[each.path.name for each in ingredients],
                image_encoder_folder=_ENCODER,
                local_files_only=True,
            )
    except Exception as error:
        verb = "do" if ingredients[1:] else "does"
        raise SourceError(
            f"the IP-Adapter {names} {verb} not fit this pipeline: {first_line(error)}"
        ) from error
    pipe.image_encoder.eval()


def _download(asked: str) -> Path:
    def get() -> str:
        import huggingface_hub

        owner, name, *path = asked.split("/")
        file = "/".join(path)
        beside = "/".join([*path[:-1], _ENCODER])
        wanted = [file, f"{beside}/*.json", f"{beside}/*{SAFE}"]
        folder = huggingface_hub.snapshot_download(f"{owner}/{name}", allow_patterns=wanted)
        return str(Path(folder) / file)

    return hub.fetch(asked, "IP-Adapter", "file", get, inside=True)
