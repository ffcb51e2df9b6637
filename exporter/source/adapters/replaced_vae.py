"""Another VAE in the place of a pipeline's own, such as a tiny autoencoder or a repaired one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source import hub
from latentc.exporter.source.adapters.kinds import Ingredient, Reading
from latentc.exporter.source.model_folders import CONFIG, configured_class
from latentc.exporter.source.resolving import digest_folder, load_model
from latentc.runtimes.errors import SourceError

_PART = "vae"


def find(asked: str, _: Reading | None = None) -> Ingredient:
    """Return the folder of a VAE, or of a pipeline that has one; ``OWNER/NAME`` on the Hub."""
    path = Path(asked).expanduser()
    here = path.exists()
    folder = path if here else _download(asked)
    if not (folder / CONFIG).is_file():
        folder = folder / _PART
    _class_of(folder, asked)
    name = path.resolve().name if here else asked
    return Ingredient("vae", name, folder, digest_folder(folder))


def parts(pipeline_class: str) -> tuple[str, ...]:
    return (_PART,)


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> None:
    """Replace the pipeline's VAE.

    Only one can be meant, and its latents must have the form of the pipeline's own.
    """
    if len(ingredients) > 1:
        names = ", ".join(ingredient.id for ingredient in ingredients)
        raise SourceError(f"a pipeline has one VAE; {len(ingredients)} were given ({names})")
    (replacement,) = ingredients
    old_vae = getattr(pipe, _PART, None)
    if old_vae is None:
        raise SourceError(f"{type(pipe).__name__} has no VAE to replace with {replacement.id}")
    with quiet_loading():
        new_vae = load_model(_class_of(replacement.path, replacement.id), replacement.path, None)
    for what in ("latent_channels", "block_out_channels"):
        ours, theirs = (_form(vae, what) for vae in (old_vae, new_vae))
        if ours != theirs:
            raise SourceError(
                f"the VAE {replacement.id} does not fit: {what.replace('_', ' ')} {theirs}, and "
                f"the pipeline's own has {ours}"
            )
    pipe.register_modules(vae=new_vae)


def _form(vae: Any, what: str) -> int:
    """Return a number of the VAE's configuration; of blocks, how many there are, which says how
    many pixels a latent has.
    """
    value = getattr(vae.config, what)
    return value if isinstance(value, int) else len(value)


def _class_of(folder: Path, asked: str) -> Any:
    import diffusers

    try:
        name = configured_class(folder / CONFIG)
    except SourceError as error:
        raise SourceError(
            f"{asked} is no VAE: expected a folder with the {CONFIG} of a diffusers model, or a "
            f"pipeline's with {_PART}/{CONFIG} ({error})"
        ) from error
    if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
        raise SourceError(f"{asked} is no VAE: it is a {name}")
    return getattr(diffusers, name)


def _download(asked: str) -> Path:
    def get() -> str:
        wanted = ["*.json", "*.safetensors"]
        own = [*wanted, *(f"{_PART}/{each}" for each in wanted)]
        return str(hub.snapshot(asked, allow_patterns=own))

    return hub.fetch(asked, "VAE", "folder", get)
