"""These tests check what each engine makes of NaN and infinity, operator by operator.

Every row is an operator that our graphs have; one graph of each target has them all. Where PyTorch
returns something that is not finite, every engine must, so that the check of a component's outputs
sees it. What an engine hides all the same is listed in `HIDDEN`, and why it cannot happen.

Every row is an operator; one graph of each target has them all. Where PyTorch returns something
that is not finite, every engine must, so that the check of a component's outputs sees it. What an
engine hides all the same is listed in `HIDDEN`, and why it cannot happen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch.nn import functional

from latentc.exporter import targets
from latentc.exporter.capture.graphs import variant
from latentc.exporter.passes import Choices, Range
from latentc.exporter.passes.quantization import sites
from latentc.runtimes.backends.backend import SessionOptions, find
from latentc.runtimes.bundle.structures import Component, TensorSpec

CHANNELS, SIDE = 4, 8
Operator: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def attention(query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of queries that may be NaN to keys and values that are not."""
    rows = query.flatten(2)
    keys = torch.ones(2, CHANNELS, 6, SIDE**2)
    return functional.scaled_dot_product_attention(rows[:, :, None], keys, keys, attn_mask=mask)


KEPT = torch.tensor([[True, True, False, True, True, False]])
OPERATORS: Mapping[str, Operator] = {
    "relu": torch.relu,
    "relu in place": lambda x: functional.relu(x * 1.0, inplace=True),
    "relu of a sum": lambda x: torch.relu(x + x.flip(-1)),
    "relu6": functional.relu6,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp from below": lambda x: x.clamp(min=-0.5),
    "clamp from above": lambda x: x.clamp(max=0.5),
    "maximum": lambda x: torch.maximum(torch.zeros_like(x), x),
    "minimum": lambda x: torch.minimum(x, torch.zeros_like(x)),
    "maximum of two": lambda x: torch.maximum(x.flip(-1), x),
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: torch.tanh(x / 3) * 3,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "mish": functional.mish,
    "leaky relu": lambda x: functional.leaky_relu(x, 0.1),
    "softplus": functional.softplus,
    "exp": torch.exp,
    "softmax": lambda x: torch.softmax(x, -1),
    "softmax with a mask": lambda x: torch.softmax(x.masked_fill(torch.arange(8) > 5, -1e30), -1),
    "attention, mask of truth values": lambda x: attention(x, KEPT),
    "attention, mask of numbers": lambda x: attention(x, torch.where(KEPT, 0.0, -torch.inf)),
    "largest": lambda x: torch.amax(x, 1),
    "smallest": lambda x: torch.amin(x, 1),
    "max pool": lambda x: functional.max_pool2d(x, 3, 2, 1),
    "average pool": lambda x: functional.avg_pool2d(x, 2),
    "nearest": lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
    "bilinear": lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "bicubic": lambda x: functional.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "layer norm": lambda x: functional.layer_norm(x, (SIDE,)),
    "rms norm": lambda x: functional.rms_norm(x, (SIDE,)),
    "group norm": lambda x: functional.group_norm(x, 2),
    "choice": lambda x: torch.where(x < 0, torch.zeros_like(x), x),
    "product": lambda x: x @ x.transpose(2, 3),
    "top": lambda x: torch.topk(x, 3, -1)[0],
    "hard sigmoid": functional.hardsigmoid,
}
# By engine, operator → the values that it hides. ONNX Runtime: a clamp with one limit has the
# largest float32 as its other one; no graph of ours has one of floating-point numbers. A pool or an
# extreme hides some NaN among numbers, not a channel of NaN, and what comes before them here is a
# normalisation of whole channels. OpenVINO: no model that can be exported has these operators.
LARGEST = {name: {"nan"} for name in ("largest", "smallest", "top")}
HIDDEN: Mapping[str, Mapping[str, set[str]]] = {
    "onnxruntime": {
        **LARGEST,
        "max pool": {"nan"},
        "clamp from below": {"inf"},
        "clamp from above": {"-inf"},
    },
    "openvino": {"top": {"nan"}, "hard sigmoid": {"nan"}},
}
VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


class Operators(torch.nn.Module):
    """Image [2, 4, 8, 8] → the result of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(operator(image * self.one) for operator in OPERATORS.values())


def images(value: float) -> list[torch.Tensor]:
    """Images with the value in one place: in the vectors of a kernel, and at the end."""
    made = []
    for place in ((0, 1, 3, 2), (1, CHANNELS - 1, SIDE - 1, SIDE - 1)):
        image = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        image[place] = value
        made.append(image)
    return made


@pytest.fixture(scope="module")
def lowered(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Component, Path]]:
    """A function: target → the component with every operator, and the file that an engine opens."""
    entries: dict[str, tuple[Component, Path]] = {}
    (image, *_), module = images(0.0), Operators().eval()
    results = dict(zip(OPERATORS, module(image), strict=True))
    component = Component(
        "operators",
        "image_encoder",
        {"image": TensorSpec("float32", tuple(image.shape))},
        {name: TensorSpec("float32", tuple(value.shape)) for name, value in results.items()},
    )

    def lower(target: str) -> tuple[Component, Path]:
        if target not in entries:
            folder = tmp_path_factory.mktemp(target)
            program = torch.export.export(module, (image,))
            entry = targets.get(target).lower(program, component, folder)
            entries[target] = component, folder / entry
        return entries[target]

    return lower


@pytest.mark.fault("2.1", "operators of an engine that make a number of NaN or infinity")
@pytest.mark.parametrize(
    ("target", "engine"),
    [
        ("onnx", "onnxruntime"),
        ("onnx", "openvino"),
        ("onnx", "openvino bf16"),
        ("openvino", "openvino"),
        ("tensorrt", "onnxruntime"),
        ("tensorrt", "openvino"),
    ],
)
def test_operators(
    target: str, engine: str, lowered: Callable[[str], tuple[Component, Path]]
) -> None:
    component, entry = lowered(target)
    backend, _, compute = engine.partition(" ")
    options, hidden = SessionOptions(compute=compute or None), dict[str, set[str]]()
    tolerance = 0.1 if compute else 1e-4
    with find(backend)().open(entry, component, options=options) as session:
        for name, value in {"plain": 0.5, **VALUES}.items():
            for image in images(value):
                found = session.run({"image": image.numpy()})
                for operator, wanted in zip(OPERATORS, Operators()(image), strict=True):
                    if name == "plain":
                        np.testing.assert_allclose(
                            found[operator], wanted, tolerance, tolerance, err_msg=operator
                        )
                    elif not wanted.isfinite().all() and np.isfinite(found[operator]).all():
                        hidden.setdefault(operator, set()).add(name)
    assert hidden == HIDDEN[backend]


class Rounded(torch.nn.Module):
    """Image → four convolutions of it; passes round what the ones in the middle take."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((CHANNELS, 64), (64, 64), (64, 64), (64, CHANNELS))
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(taken, given, 3, padding=1) for taken, given in widths
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        for layer in self.layers:
            image = functional.silu(layer(image))
        return (image,)


def test_rounded_activations_hide(tmp_path: Path) -> None:
    """A limit that docs/precisions.md tells of: it can go when this fails."""
    torch.manual_seed(0)
    (image, *_), module = images(0.5), Rounded().eval()
    spec = TensorSpec("float32", tuple(image.shape))
    component = Component("denoiser", "denoiser", {"image": spec}, {"made": spec})
    program = torch.export.export(module, (image,))
    ranges = {node.name: Range(-3.0, 3.0) for site in sites(program) for node in site.layers}
    choices = Choices(ranges=ranges)
    rounded = variant(program, ("int8_activations", "int8_weights"), choices)
    entry = tmp_path / targets.get("openvino").lower(rounded, component, tmp_path)
    with find("openvino")().open(entry, component) as session:
        made = session.run({"image": image.numpy()})["made"]
        np.testing.assert_allclose(made, module(image)[0].detach(), atol=0.05)
        for value in VALUES.values():
            made = session.run({"image": images(value)[0].numpy()})["made"]
            assert np.isfinite(made).all()
