"""IP-Adapters (Ye et al. 2023, https://arxiv.org/abs/2308.06721): the image encoder as a component
that runs once for a call, and its part of the denoiser with the scale as an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from exporter.families import Description, Graph, Offer
from exporter.signatures import named
from runtimes.errors import UnsupportedPipeline
from runtimes.manifest import Argument, Component, TensorSpec, VectorInput
from runtimes.tasks import Feed, Preparation, Task

IMAGE, SCALE = "ip_adapter_image", "ip_adapter_scale"
EMBEDS = "ip_adapter_image_embeds"
_NAME = "ip_image_encoder"


def with_ip_adapter(pipe: Any, description: Description) -> Description:
    """The same with the pipeline's IP-Adapter, where it has one; every task takes its picture
    besides.

    Raises:
        UnsupportedPipeline: a kind of adapter that nothing is known about.
    """
    projection = getattr(pipe.unet, "encoder_hid_proj", None)
    layers = getattr(projection, "image_projection_layers", None)
    if layers is None:
        return description
    kinds = [type(each).__name__ for each in layers]
    if kinds != ["ImageProjection"]:
        raise UnsupportedPipeline(
            f"an IP-Adapter of the kind {', '.join(kinds)} is not supported yet, only the plain "
            "one (ImageProjection)"
        )
    encoder = _encoder(pipe)
    graphs = [
        _adapted(each, pipe.unet, encoder) if each.component.role == "denoiser" else each
        for each in description.graphs
    ]
    positive = tuple(b.name for b in description.guidance.branches if not b.prefix)
    pictures = description.probe_pictures
    call = description.call
    return replace(
        description,
        task=_with_picture(description.task, positive),
        offers=tuple(
            Offer(_with_picture(each.task, positive), each.graphs) for each in description.offers
        ),
        graphs=(*graphs, encoder),
        arguments=(*description.arguments, Argument(SCALE, (1.0,))),
        vectors=(*description.vectors, VectorInput(SCALE, (SCALE,))),
        call=lambda **arguments: call(**arguments),
        probe_pictures=lambda height, width: {
            **(pictures(height, width) if pictures else {}),
            IMAGE: _probe_picture(),
        },
    )


def _with_picture(task: Task, branches: tuple[str, ...]) -> Task:
    """Branches of a negative prompt get zeros, as in diffusers."""
    feed = Feed(IMAGE, resample="bicubic", fit="crop")
    made = Preparation(_NAME, {"image": feed}, {"image_embeds": EMBEDS}, branches)
    return structs.replace(
        task,
        pictures={**task.pictures, IMAGE: "image"},
        preparations=(*task.preparations, made),
    )


class _Encoder(torch.nn.Module):
    """image [batch, 3, size, size] in [0, 1] → image_embeds [batch, 1, width]."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, encoder: Any, processor: Any) -> None:
        super().__init__()
        self.encoder = encoder
        for name, values in (("mean", processor.image_mean), ("deviation", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        made = self.encoder((image - self.mean) / self.deviation)
        return (made.image_embeds[:, None],)


def _encoder(pipe: Any) -> Graph:
    size = int(pipe.image_encoder.config.image_size)
    width = int(pipe.image_encoder.config.projection_dim)
    component = Component(
        _NAME,
        "image_encoder",
        {"image": TensorSpec("float32", ("batch", 3, size, size))},
        {"image_embeds": TensorSpec("float32", ("batch", 1, width))},
    )
    return Graph(component, _Encoder(pipe.image_encoder, pipe.feature_extractor))


class _Scale:
    """In the place of the attention processors' scale: a row of the batch has its own."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.reshape(-1, 1, 1)

    def __eq__(self, other: object) -> bool:
        return False  # they skip what is scaled by 0: a captured program may not

    __hash__ = None  # type: ignore[assignment]

    def __mul__(self, states: torch.Tensor) -> torch.Tensor:
        return self._values * states


class _Adapted(torch.nn.Module):
    """A denoiser whose UNet is given the embedded picture.

    Inputs besides: `EMBEDS` [batch, 1, width] and `SCALE` [batch, 1].
    """

    def __init__(self, graph: Graph, unet: Any, inputs: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = graph.module
        self._unet = [unet]  # a part of the denoiser, not another one
        self._own = tuple(graph.component.inputs)
        self.forward: Callable[..., Any] = named(self._call, inputs)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        def look(
            _: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            known = given.get("added_cond_kwargs") or {}
            return args, {**given, "added_cond_kwargs": {**known, "image_embeds": [inputs[EMBEDS]]}}

        (unet,) = self._unet
        processors = [each for each in unet.attn_processors.values() if hasattr(each, "to_k_ip")]
        usual = [each.scale for each in processors]
        handle = unet.register_forward_pre_hook(look, with_kwargs=True)
        try:
            for each in processors:
                each.scale = [_Scale(inputs[SCALE])]
            made: tuple[torch.Tensor, ...] = self.denoiser(**{n: inputs[n] for n in self._own})
            return made
        finally:
            handle.remove()
            for each, scale in zip(processors, usual, strict=True):
                each.scale = scale


def _adapted(graph: Graph, unet: Any, encoder: Graph) -> Graph:
    inputs = {
        **graph.component.inputs,
        EMBEDS: encoder.component.outputs["image_embeds"],
        SCALE: TensorSpec("float32", ("batch", 1)),
    }
    return replace(
        graph,
        component=structs.replace(graph.component, inputs=inputs),
        module=_Adapted(graph, unet, list(inputs)),
    )


def _probe_picture() -> Any:
    """Bands of colour."""
    from PIL import Image

    bands = Image.linear_gradient("L")
    return Image.merge("RGB", [bands, bands.rotate(90), bands.rotate(180)])
