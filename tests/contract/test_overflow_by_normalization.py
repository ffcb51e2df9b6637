"""These tests check what engines that calculate in float16 make of a variance beyond float16.

Every row is a normalisation, written as PyTorch, diffusers or transformers have it; one graph of
each target has them all. The values are within float16, their squares are not. An engine may give
what PyTorch gives in float32, or something that is not finite, which the check of a component's
outputs sees. What it may not give are other numbers: 1 / infinity is 0, and an image would be grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch.nn import functional

from latentc.exporter import targets
from latentc.exporter.capture.graphs import variant
from latentc.exporter.targets.options import Settings
from latentc.runtimes.backends.backend import SessionOptions, find
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.verification.verify import relative_l2

CHANNELS, SIDE = 4, 8
SCALES = (1.0, 600.0, 6000.0)
Normalization: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def by_root(x: torch.Tensor) -> torch.Tensor:
    """diffusers' `RMSNorm` and T5's layer norm."""
    return x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)


def by_product(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def by_power(x: torch.Tensor) -> torch.Tensor:
    return x * (torch.square(x).sum(-1, keepdim=True) + 1e-6) ** -0.5


def by_deviation(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + 1e-3)


def by_variance(x: torch.Tensor) -> torch.Tensor:
    variance = torch.var(x, -1, keepdim=True, correction=0)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5)


def on_tokens(normalize: Normalization) -> Normalization:
    """Apply it to the image as tokens [2, 64, 4], as transformers do."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        tokens = normalize(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape)

    return apply


NORMALIZATIONS: Mapping[str, Normalization] = {
    "group_norm": lambda x: functional.group_norm(x, 2),
    "group_norm_of_whole_channels": lambda x: functional.group_norm(x, CHANNELS),
    "layer_norm": on_tokens(lambda x: functional.layer_norm(x, (CHANNELS,))),
    "rms_norm": on_tokens(
        lambda x: functional.rms_norm(x, (CHANNELS,), torch.ones(CHANNELS), 1e-6)
    ),
    "rms_norm_by_its_root": on_tokens(by_root),
    "rms_norm_by_a_product": on_tokens(by_product),
    "rms_norm_by_a_power": on_tokens(by_power),
    "deviation": on_tokens(by_deviation),
    "variance": on_tokens(by_variance),
    "softmax": lambda x: torch.softmax(x, -1),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
}


class Normalizations(torch.nn.Module):
    """Image [2, 4, 8, 8] → the result of every normalisation of half of it.

    What a convolution returns is in half precision where that is asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        torch.nn.init.dirac_(self.layer.weight)
        self.layer.weight.data /= 2

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = self.layer(image)
        return tuple(normalize(values) for normalize in NORMALIZATIONS.values())


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Component, Path]]:
    """A function: target → the component, and the file that an engine opens."""
    entries: dict[str, tuple[Component, Path]] = {}
    image, module = torch.randn(2, CHANNELS, SIDE, SIDE), Normalizations().eval()
    spec = TensorSpec("float32", tuple(image.shape))
    component = Component(
        "norms", "image_encoder", {"image": spec}, dict.fromkeys(NORMALIZATIONS, spec)
    )

    def lower(target: str) -> tuple[Component, Path]:
        if target not in entries:
            precision = "fp32" if target == "openvino" else "fp16"
            folder = tmp_path_factory.mktemp(target)
            own = targets.TARGETS[target].options()
            latents = Latents(CHANNELS, 1, 1, SIDE, SIDE)
            told: dict[str, Any] = {}
            if target == "coreml":
                told = {"settings": Settings(precision, own, latents)}
            program = torch.export.export(module, (image,))
            program = variant(program, targets.passes(target, precision, own))
            entry = targets.get(target).lower(program, component, folder, **told)
            entries[target] = component, folder / entry
        return entries[target]

    return lower


# OpenVINO: what it hides, no model that can be exported has.
HIDDEN: Mapping[tuple[str, str], set[str]] = {
    ("tensorrt", "openvino"): {"deviation"},
    ("openvino", "openvino"): {"rms_norm_by_a_power"},
}


@pytest.mark.fault("2.1", "a variance beyond float16 makes a normalisation's result 0")
@pytest.mark.parametrize(
    ("target", "engine"),
    [
        ("coreml", "coreml-reference"),
        ("tensorrt", "onnxruntime"),
        ("tensorrt", "openvino"),
        ("openvino", "openvino"),
    ],
)
def test_engines(
    target: str, engine: str, lowered: Callable[[str], tuple[Component, Path]]
) -> None:
    component, entry = lowered(target)
    options = SessionOptions(compute="fp16" if engine == "openvino" else None)
    with find(engine)().open(entry, component, options=options) as session:
        hidden = hidden_by(lambda image: session.run({"image": image.numpy()}))
    assert hidden == HIDDEN.get((target, engine), set())


@pytest.mark.fault("2.1", "squares that are written as products are typed as float16")
def test_a_program_typed_as_float16() -> None:
    """TensorRT keeps a graph's types; ONNX Runtime has no float16 of its own for most of them."""
    program = torch.export.export(Normalizations().eval(), (torch.randn(2, CHANNELS, SIDE, SIDE),))
    module = variant(program, ("fp16_compute",)).module()

    def run(image: torch.Tensor) -> dict[str, np.ndarray]:
        found = zip(NORMALIZATIONS, module(image), strict=True)
        return {name: value.detach().numpy() for name, value in found}

    assert not hidden_by(run)


def hidden_by(run: Callable[[torch.Tensor], Mapping[str, np.ndarray]]) -> set[str]:
    """The normalisations that give finite numbers which are not those of PyTorch in float32."""
    image = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    hidden = set()
    for scale in SCALES:
        found = run(image * scale)
        for name, wanted in zip(NORMALIZATIONS, Normalizations()(image * scale), strict=True):
            expected = wanted.detach().numpy()
            if scale == 1:
                np.testing.assert_allclose(found[name], expected, 0.02, 0.02, err_msg=name)
            elif np.isfinite(found[name]).all() and relative_l2(found[name], expected) > 0.02:
                hidden.add(name)
    return hidden
