"""A kind of adapters for docs/extending.md: a direction that is added to the states of the texts,
as much as each call says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from latentc.exporter.source import weight_files
from latentc.exporter.source.adapters.kinds import AdapterKind, Ingredient, Reading
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import SourceError
from latentc.runtimes.options import Option

if TYPE_CHECKING:
    from latentc.exporter.components.description import Description, Graph

SCALE, STATES = "steering_scale", "encoder_hidden_states"
STEERING = AdapterKind(
    module=__name__,
    noun="steering direction",
    option=Option("Steer towards a direction, as `day.safetensors`.", (), metavar="FILE"),
)


def find(asked: str, reading: Reading) -> Ingredient:
    """Return the file of a direction."""
    name, path = weight_files.find(asked, STEERING.noun, "", reading.allow_pickle)
    return Ingredient("steering", name, path, sha256(path))


def parts(pipeline_class: str) -> tuple[str, ...]:
    """Return the part whose graph is another one with a direction."""
    return ("unet",)


def apply(pipe: Any, ingredients: Sequence[Ingredient]) -> None:
    """Let the UNet keep the sum of the directions, [width]."""
    if not hasattr(pipe, "unet"):
        raise SourceError(f"{type(pipe).__name__} has no UNet to steer ({ingredients[0].id})")
    import torch

    width = pipe.unet.config.cross_attention_dim
    total = torch.zeros(width)
    for each in ingredients:
        direction = weight_files.tensors(each.path).get("direction")
        if direction is None or direction.shape != (width,):
            raise SourceError(f"{each.id}: expected a tensor `direction` of {width} numbers")
        total += direction
    pipe.unet.register_buffer("direction", total, persistent=False)


def described(pipe: Any, description: Description) -> Description:
    """Return the description whose calls take `steering_scale`, as the denoiser does."""
    from latentc.exporter.programs.changes import with_number_fed
    from latentc.runtimes.programs.statements import Numbers

    number = Numbers(name=SCALE, default=(1.0,))
    return replace(
        description,
        programs=tuple(with_number_fed(each, number, SCALE) for each in description.programs),
        graphs=tuple(
            _steered(graph, pipe.unet) if graph.component.role == "denoiser" else graph
            for graph in description.graphs
        ),
        call=_call(pipe, description.call),
        calling=lambda other: _call(other, description.calling(other)),
    )


def _steered(graph: Graph, unet: Any) -> Graph:
    """Return the denoiser's graph with the scale [batch, 1] as one more input."""
    import torch

    from latentc.exporter.components.extended import extended
    from latentc.exporter.components.signatures import named
    from latentc.runtimes.bundle.structures import TensorSpec

    class Steered(torch.nn.Module):
        def __init__(self, names: Sequence[str]) -> None:
            super().__init__()
            self.denoiser, self.unet = graph.module, unet
            self.forward: Callable[..., Any] = named(self._call, names)

        def _call(self, inputs: Mapping[str, torch.Tensor]) -> Any:
            others = {name: value for name, value in inputs.items() if name != SCALE}
            shift = inputs[SCALE][:, :, None] * self.unet.direction
            return self.denoiser(**{**others, STATES: inputs[STATES] + shift})

    scale = TensorSpec("float32", ("batch", 1))
    return extended(graph, {SCALE: scale}, lambda _, names: Steered(names))


def _call(pipe: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return what diffusers' pipeline does, steered: what the export is held against."""

    def steered(**arguments: Any) -> Any:
        scale = arguments.pop(SCALE, 1.0)

        def steer(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            return args, {**given, STATES: given[STATES] + scale * pipe.unet.direction}

        handle = pipe.unet.register_forward_pre_hook(steer, with_kwargs=True)
        try:
            return call(**arguments)
        finally:
            handle.remove()

    return steered
