"""T2I-Adapters for a pipeline that has none: models in folders or on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentc.exporter.components.names import T2I_ADAPTER, numbered
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source import model_folders
from latentc.exporter.source.adapters.kinds import Ingredient, Reading
from latentc.exporter.source.resolving import load_model
from latentc.runtimes.errors import SourceError, UnsupportedPipeline, first_line

# Pipeline class → that of diffusers which takes adapters besides.
_WITH = {
    "StableDiffusionPipeline": "StableDiffusionAdapterPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLAdapterPipeline",
}


def find(asked: str, _: Reading | None = None) -> Ingredient:
    """Return the folder of a T2I-Adapter, or ``OWNER/NAME`` on the Hub."""
    return model_folders.find(asked, "t2i-adapter", "T2I-Adapter", "T2IAdapter")


def parts(pipeline_class: str) -> tuple[str, ...]:
    """Return the UNet, which takes the features."""
    return ("unet",)


def added(ingredients: Sequence[Ingredient]) -> dict[str, str]:
    """Return a component for each adapter, by name, with its digest."""
    return {numbered(T2I_ADAPTER, index): each.sha256 for index, each in enumerate(ingredients)}


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> Any:
    """Return the pipeline of the same parts that takes the adapters, in the order given."""
    import diffusers

    from latentc.exporter.components.adapters.t2i_adapter import features_of

    names = ", ".join(ingredient.id for ingredient in ingredients)
    _check(pipe, names)
    with quiet_loading():
        adapters = [load_model(diffusers.T2IAdapter, each.path, None) for each in ingredients]
        try:
            with_adapters = getattr(diffusers, _WITH[type(pipe).__name__]).from_pipe(
                pipe, adapter=diffusers.MultiAdapter(adapters) if adapters[1:] else adapters[0]
            )
        except Exception as error:
            raise SourceError(
                f"{type(pipe).__name__} does not take {names}: {first_line(error)}"
            ) from error
    try:
        features_of(with_adapters)
    except UnsupportedPipeline as error:
        raise SourceError(f"the T2I-Adapter {names} is for another family: {error}") from error
    with_adapters.set_progress_bar_config(disable=True)
    return with_adapters


def _check(pipe: Any, names: str) -> None:
    """Refuse pipelines that diffusers has none like, with adapters."""
    kind = type(pipe).__name__
    if kind not in _WITH:
        raise SourceError(
            f"{kind} takes no T2I-Adapter ({names}); those that do: {', '.join(_WITH)}"
        )
    if hasattr(getattr(pipe.unet, "encoder_hid_proj", None), "image_projection_layers"):
        raise SourceError(
            f"a T2I-Adapter ({names}) together with an IP-Adapter is not supported: give one of "
            "them"
        )
