"""ControlNets (Zhang, Rao and Agrawala 2023, https://arxiv.org/abs/2302.05543), fused with the
UNet: the denoiser takes the control images, and no residual leaves its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from msgspec import structs

from exporter.families import Description, Graph, Offer
from exporter.families.extended import Extended, extended
from exporter.families.text_to_image import vae_factor
from exporter.names import numbered, pictures
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import TensorSpec
from runtimes.version_1.fields import Argument, VectorInput
from runtimes.version_1.tasks import Feed, Task

IMAGE = "control_image"  # as diffusers' pipelines call it that take other pictures as well
SCALE = "controlnet_conditioning_scale"
_WINDOW = ("control_guidance_start", "control_guidance_end")


def with_controlnets(pipe: Any, description: Description) -> Description:
    """The same with the pipeline's ControlNets in the denoiser, where it has any; every task takes
    their images besides.

    Raises:
        UnsupportedPipeline: a kind of ControlNet that nothing is known about.
    """
    nets = _nets(pipe)
    if not nets:
        return description
    names = pictures(IMAGE, len(nets))
    feeds = {numbered(IMAGE, index): Feed(name) for index, name in enumerate(names)}
    graphs = [
        _controlled(each, pipe, nets) if each.component.role == "denoiser" else each
        for each in description.graphs
    ]
    arguments = [
        Argument(name, (value,) * len(nets), spread=True)
        for name, value in ((SCALE, 1.0), *zip(_WINDOW, (0.0, 1.0), strict=True))
    ]
    others = description.probe_pictures
    return replace(
        description,
        task=_with_images(description.task, feeds),
        offers=tuple(
            Offer(_with_images(each.task, feeds), each.graphs) for each in description.offers
        ),
        graphs=tuple(graphs),
        arguments=(*description.arguments, *arguments),
        vectors=(*description.vectors, VectorInput(SCALE, (SCALE,), _WINDOW)),
        call=_called(description.call, bool(description.task.pictures)),
        probe_pictures=lambda height, width: {
            **(others(height, width) if others else {}),
            IMAGE: _probe_images(len(nets), height, width),
        },
    )


def _nets(pipe: Any) -> list[Any]:
    held = getattr(pipe, "controlnet", None)
    if held is None:
        return []
    nets = list(held.nets) if hasattr(held, "nets") else [held]
    for net in nets:
        if type(net).__name__ != "ControlNetModel":
            raise UnsupportedPipeline(
                f"a {type(net).__name__} is not supported, only ControlNetModel"
            )
        if net.config.global_pool_conditions:
            raise UnsupportedPipeline("a ControlNet with global_pool_conditions is not supported")
    return nets


def _with_images(task: Task, feeds: Mapping[str, Feed]) -> Task:
    every = {**task.pictures, **{feed.picture: "image" for feed in feeds.values()}}
    return structs.replace(
        task,
        pictures=every,
        inputs={**task.inputs, **feeds},
        size_of=task.size_of or next(iter(every)),
    )


def _called(call: Callable[..., Any], has_image: bool) -> Callable[..., Any]:
    """Where there is no other picture, diffusers calls the control image ``image``."""

    def run(**arguments: Any) -> Any:
        if not has_image:
            arguments["image"] = arguments.pop(IMAGE)
        return call(**arguments)

    return run


class _Controlled(Extended):
    """A denoiser whose UNet is given what the ControlNets make of its own inputs and their images.

    Inputs besides: for each a picture [batch, 3, f*height, f*width] in [0, 1], and the conditioning
    scales [batch, number of ControlNets].
    """

    def __init__(self, graph: Graph, unet: Any, nets: Sequence[Any], inputs: Sequence[str]) -> None:
        super().__init__(graph, unet, inputs)
        self.nets = torch.nn.ModuleList(nets)
        self._channels = [int(net.config.in_channels) for net in nets]

    def _more(
        self,
        inputs: Mapping[str, torch.Tensor],
        args: tuple[Any, ...],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        images = [inputs[numbered(IMAGE, index)] for index in range(len(self.nets))]
        return self._residuals(args, given, images, inputs[SCALE])

    def _residuals(
        self,
        args: tuple[Any, ...],
        given: Mapping[str, Any],
        images: Sequence[torch.Tensor],
        scales: torch.Tensor,
    ) -> dict[str, Any]:
        """The UNet's arguments for the sums of what the ControlNets make."""
        sample, timestep, states = args
        down: list[torch.Tensor] = []
        middle: Any = None
        for index, (net, image) in enumerate(zip(self.nets, images, strict=True)):
            made_down, made_middle = net(
                sample[:, : self._channels[index]],
                timestep,
                encoder_hidden_states=states,
                controlnet_cond=image,
                conditioning_scale=scales[:, index].reshape(-1, 1, 1, 1),
                added_cond_kwargs=given.get("added_cond_kwargs"),
                return_dict=False,
            )
            down = [a + b for a, b in zip(down, made_down, strict=True)] if down else made_down
            middle = made_middle if middle is None else middle + made_middle
        return {
            "down_block_additional_residuals": tuple(down),
            "mid_block_additional_residual": middle,
        }


def _controlled(graph: Graph, pipe: Any, nets: Sequence[Any]) -> Graph:
    factor = vae_factor(pipe.vae)
    picture = TensorSpec("float32", ("batch", 3, f"{factor}*height", f"{factor}*width"))
    inputs = {
        **{numbered(IMAGE, index): picture for index in range(len(nets))},
        SCALE: TensorSpec("float32", ("batch", len(nets))),
    }
    return extended(graph, inputs, lambda own, names: _Controlled(own, pipe.unet, nets, names))


def _probe_images(count: int, height: int, width: int) -> Any:
    """Outlines of a circle, and of a square for a second ControlNet, and so on."""
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width] / max(height, width) - 0.35
    made = []
    for index in range(count):
        distance = np.hypot(x, y) if index % 2 == 0 else np.maximum(np.abs(x), np.abs(y))
        line = (np.abs(distance - 0.2) < 0.03).astype(np.uint8) * 255
        made.append(Image.fromarray(np.stack([line] * 3, axis=-1)))
    return made if count > 1 else made[0]
