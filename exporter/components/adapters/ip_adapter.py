"""IP-Adapters (Ye et al. 2023, https://arxiv.org/abs/2308.06721), plain ones, Plus and full: the
image encoder with what projects its result, as a component that runs once for an image, and their
part of the denoiser with the scales as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from latentc.exporter.components.description import Graph
from latentc.exporter.components.extended import Extended, extended
from latentc.exporter.components.names import IP_IMAGE_ENCODER, numbered
from latentc.exporter.components.processors import Normalised
from latentc.exporter.components.text_to_image import feed_numbers
from latentc.exporter.programs.draft import Draft, Phase
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline

IMAGE, SCALE = "ip_adapter_image", "ip_adapter_scale"
TOKENS = "ip_adapter_tokens"
_POSITIVE, _NEGATIVE = "tokens", "negative"
_PLAIN = "ImageProjection"
_KINDS = (_PLAIN, "IPAdapterPlusImageProjection", "IPAdapterFullImageProjection")


def with_ip_adapter(
    pipe: Any, graphs: Sequence[Graph], drafts: Sequence[Draft]
) -> tuple[Graph, ...]:
    """Return the graphs with the pipeline's IP-Adapters, where it has any; every program takes
    their images besides.

    Raises:
        UnsupportedPipeline: a kind of adapter that nothing is known about.
    """
    projection = getattr(pipe.unet, "encoder_hid_proj", None)
    layers = getattr(projection, "image_projection_layers", None)
    if layers is None:
        return tuple(graphs)
    _check(layers)
    encoder = _encoder(pipe, layers)
    for draft in drafts:
        _write(draft, encoder.component, len(layers))
    adapted = (
        _adapted(graph, pipe.unet, encoder, len(layers))
        if graph.component.role == "denoiser"
        else graph
        for graph in graphs
    )
    return (*adapted, encoder)


def _write(draft: Draft, encoder: Component, count: int) -> None:
    """Feed the tokens of each image, to branches of a negative prompt those of no image."""
    draft.image(IMAGE, count=count if count > 1 else None)
    shape, phase = encoder.inputs["image"].shape[1:], Phase.BEFORE_NOISE
    for index in range(count):
        item = index if count > 1 else None
        positive, negative = numbered(_POSITIVE, index), numbered(_NEGATIVE, index)
        tokens = numbered(TOKENS, index)
        image = draft.pixels(
            *(f"_{encoder.name}_image", IMAGE, shape, phase),
            item=item,
            resample="bicubic",
            fit="crop",
        )
        gives = {positive: f"_{tokens}", negative: f"_{negative}"}
        values = draft.run(encoder.name, {"image": image}, gives, phase)
        draft.feed(tokens, values[positive], lambda branch: not branch.side)
        draft.feed(tokens, values[negative], lambda branch: bool(branch.side))
    feed_numbers(draft, SCALE, [draft.number(SCALE, (1.0,) * count, spread=True)])


def _check(layers: Sequence[Any]) -> None:
    others = sorted({type(layer).__name__ for layer in layers} - set(_KINDS))
    if others:
        raise UnsupportedPipeline(
            f"an IP-Adapter of the kind {', '.join(others)} is not supported yet, only the plain "
            f"one, Plus and full ({', '.join(_KINDS)})"
        )


class _Encoder(torch.nn.Module):
    """image [batch, 3, size, size] in [0, 1] → for each adapter the tokens that the denoiser looks
    at, [batch, 1, tokens, width], and of the same shape those of no image.

    The latter are constants: diffusers encodes pixels of 0 for adapters that take hidden states,
    and takes embeddings of 0 for the plain one.
    """

    def __init__(self, encoder: Any, processor: Any, layers: Sequence[Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = torch.nn.ModuleList(layers)
        self._plain = [type(layer).__name__ == _PLAIN for layer in layers]
        self.normalised = Normalised(processor)
        for index, tokens in enumerate(self._of_nothing(int(encoder.config.image_size))):
            self.register_buffer(numbered(_NEGATIVE, index), tokens, persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self._tokens(self.normalised(image))
        negative = [
            getattr(self, numbered(_NEGATIVE, index)).repeat(image.shape[0], 1, 1, 1)
            for index in range(len(made))
        ]
        return (*made, *negative)

    def _tokens(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the layers' tokens of normalised pixels, [images, 1, ...] each.

        A hidden state is that before the last layer.
        """
        encoded = self.encoder(pixels, output_hidden_states=not all(self._plain))
        return [
            layer(encoded.image_embeds if plain else encoded.hidden_states[-2])[:, None]
            for layer, plain in zip(self.layers, self._plain, strict=True)
        ]

    def _of_nothing(self, size: int) -> list[torch.Tensor]:
        width = int(self.encoder.config.projection_dim)
        with torch.no_grad():
            black = self._tokens(torch.zeros(1, 3, size, size))
            return [
                layer(torch.zeros(1, width))[:, None] if plain else tokens
                for layer, plain, tokens in zip(self.layers, self._plain, black, strict=True)
            ]


def _encoder(pipe: Any, layers: Sequence[Any]) -> Graph:
    size = int(pipe.image_encoder.config.image_size)
    module = _Encoder(pipe.image_encoder, pipe.feature_extractor, layers)
    shapes = [getattr(module, numbered(_NEGATIVE, index)).shape for index in range(len(layers))]
    outputs = {
        numbered(name, index): TensorSpec("float32", ("batch", *map(int, shape[1:])))
        for name in (_POSITIVE, _NEGATIVE)
        for index, shape in enumerate(shapes)
    }
    component = Component(
        IP_IMAGE_ENCODER,
        "image_encoder",
        {"image": TensorSpec("float32", ("batch", 3, size, size))},
        outputs,
    )
    return Graph(component, module)


class _Scale:
    """In the place of the attention processors' scale: a row of the batch has its own."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.reshape(-1, 1, 1)

    def __eq__(self, other: object) -> bool:
        return False  # they skip what is scaled by 0: a captured program may not

    __hash__ = None  # type: ignore[assignment]

    def __mul__(self, states: torch.Tensor) -> torch.Tensor:
        return self._values * states


class _Adapted(Extended):
    """A denoiser whose UNet is given the images' tokens.

    Inputs besides: of each adapter `TOKENS` [batch, 1, tokens, width], and `SCALE` [batch, number
    of adapters].
    """

    def __init__(self, graph: Graph, unet: Any, count: int, inputs: Sequence[str]) -> None:
        super().__init__(graph, unet, inputs)
        self._count = count

    def _more(
        self,
        inputs: Mapping[str, torch.Tensor],
        args: tuple[Any, ...],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        tokens = [inputs[numbered(TOKENS, index)] for index in range(self._count)]
        known = given.get("added_cond_kwargs") or {}
        return {"added_cond_kwargs": {**known, "image_embeds": tokens}}

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        (unet,) = self._unet
        processors = [each for each in unet.attn_processors.values() if hasattr(each, "to_k_ip")]
        usual = [processor.scale for processor in processors]
        unet.encoder_hid_proj.forward = _as_they_are  # the encoder has projected them
        try:
            for each in processors:
                each.scale = [_Scale(inputs[SCALE][:, index]) for index in range(self._count)]
            return super()._call(inputs)
        finally:
            del unet.encoder_hid_proj.forward
            for each, scale in zip(processors, usual, strict=True):
                each.scale = scale


def _as_they_are(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    return tokens


def _adapted(graph: Graph, unet: Any, encoder: Graph, count: int) -> Graph:
    made = encoder.component.outputs
    inputs = {
        **{numbered(TOKENS, i): made[numbered(_POSITIVE, i)] for i in range(count)},
        SCALE: TensorSpec("float32", ("batch", count)),
    }
    return extended(graph, inputs, lambda own, names: _Adapted(own, unet, count, names))
