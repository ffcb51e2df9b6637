"""ControlNets (Zhang, Rao and Agrawala 2023, https://arxiv.org/abs/2302.05543), fused with the
UNet: the denoiser takes the control images, and no residual leaves its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from latentc.exporter.components.description import Graph
from latentc.exporter.components.extended import Extended, extended
from latentc.exporter.components.names import numbered
from latentc.exporter.components.tasks.task import size_by
from latentc.exporter.components.text_to_image import vae_factor
from latentc.exporter.programs.draft import Draft, Phase
from latentc.runtimes.bundle.structures import TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.statements import During, Window

IMAGE = "control_image"  # as diffusers' pipelines call it that take other images as well
SCALE = "controlnet_conditioning_scale"
_WINDOW = ("control_guidance_start", "control_guidance_end")


def with_controlnets(
    pipe: Any, graphs: Sequence[Graph], drafts: Sequence[Draft]
) -> tuple[Graph, ...]:
    """Return the graphs with the pipeline's ControlNets in the denoiser, where it has any; every
    program takes their images besides.

    Raises:
        UnsupportedPipeline: a kind of ControlNet that nothing is known about.
    """
    nets = _nets(pipe)
    for draft in drafts if nets else ():
        _write(draft, len(nets), vae_factor(pipe.vae))
    return tuple(
        _controlled(graph, pipe, nets) if nets and graph.component.role == "denoiser" else graph
        for graph in graphs
    )


def _write(draft: Draft, count: int, factor: int) -> None:
    """Feed the control images, which are for the prompts, and how much each of them counts."""
    draft.image(IMAGE, count=count if count > 1 else None)
    size_by(draft, draft.images()[0])
    shape = _image_shape(factor)
    for index in range(count):
        name, item = numbered(IMAGE, index), index if count > 1 else None
        value = draft.pixels(f"_{name}", IMAGE, shape, Phase.IMAGES, item=item, for_prompts=True)
        draft.feed(name, value)
    scales = draft.row(f"_{SCALE}", [draft.number(SCALE, (1.0,) * count, spread=True)])
    start, stop = (
        draft.number(name, (usual,) * count, spread=True)
        for name, usual in zip(_WINDOW, (0.0, 1.0), strict=True)
    )
    draft.feed(SCALE, During(scales, Window(count="within", start=start, stop=stop)))


def call_with_controlnets(pipe: Any, call: Callable[..., Any], draft: Draft) -> Callable[..., Any]:
    """Return a call of diffusers' pipeline, which calls the control image ``image`` where there is
    no other."""
    if not _nets(pipe) or draft.images() != (IMAGE,):
        return call

    def run(**arguments: Any) -> Any:
        arguments["image"] = arguments.pop(IMAGE)
        return call(**arguments)

    return run


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


class _Controlled(Extended):
    """A denoiser whose UNet is given what the ControlNets make of its own inputs and their images.

    Inputs besides: for each an image [batch, 3, f*height, f*width] in [0, 1], and the conditioning
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
        """Return the UNet's arguments for the sums of what the ControlNets make."""
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
    image = TensorSpec("float32", ("batch", *_image_shape(vae_factor(pipe.vae))))
    inputs = {
        **{numbered(IMAGE, index): image for index in range(len(nets))},
        SCALE: TensorSpec("float32", ("batch", len(nets))),
    }
    return extended(graph, inputs, lambda own, names: _Controlled(own, pipe.unet, nets, names))


def _image_shape(factor: int) -> tuple[int | str, ...]:
    return (3, f"{factor}*height", f"{factor}*width")
