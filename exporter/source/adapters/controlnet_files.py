"""ControlNets for a pipeline that has none: models in folders or on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source import model_folders
from latentc.exporter.source.adapters.kinds import Ingredient, Reading
from latentc.exporter.source.resolving import load_model
from latentc.runtimes.errors import SourceError, first_line


def find(asked: str, _: Reading | None = None) -> Ingredient:
    """Return the folder of a ControlNet, or ``OWNER/NAME`` on the Hub."""
    return model_folders.find(asked, "controlnet", "ControlNet", "ControlNetModel")


def parts(pipeline_class: str) -> tuple[str, ...]:
    """Return the UNet, which a ControlNet is fused with."""
    return ("unet",)


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> Any:
    """Return the pipeline of the same parts that takes the ControlNets, in the order given."""
    from diffusers import AutoPipelineForText2Image, ControlNetModel

    nets = []
    with quiet_loading():
        for ingredient in ingredients:
            net = load_model(ControlNetModel, ingredient.path, None)
            _check(pipe, net, ingredient.id)
            nets.append(net)
        try:
            with_nets = AutoPipelineForText2Image.from_pipe(
                pipe, controlnet=nets if len(nets) > 1 else nets[0]
            )
        except Exception as error:
            raise SourceError(
                f"{type(pipe).__name__} takes no ControlNet: {first_line(error)}"
            ) from error
    with_nets.set_progress_bar_config(disable=True)
    return with_nets


def _check(pipe: Any, net: Any, name: str) -> None:
    """Refuse one for another family."""
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise SourceError(f"{type(pipe).__name__} has no UNet for the ControlNet {name}")
    for what in ("cross_attention_dim", "block_out_channels", "addition_embed_type"):
        ours, theirs = (_plain(getattr(each.config, what, None)) for each in (unet, net))
        if ours != theirs:
            raise SourceError(
                f"the ControlNet {name} is for another family: its {what} is {theirs}, and the "
                f"pipeline's UNet has {ours}"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
