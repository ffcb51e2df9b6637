"""Quantised programs: right in PyTorch, and the same numbers on every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from latentc.exporter import targets
from latentc.exporter.calibration_prompts import Calibration
from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values, variant
from latentc.exporter.capture.interpreter import Watched
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.families import family_of
from latentc.exporter.lowering import layer_ranking as floor
from latentc.exporter.lowering.calibration import ranges
from latentc.exporter.lowering.trajectories import trajectories
from latentc.exporter.passes import (
    TYPED_INTEGERS,
    W8A8,
    WEIGHTS,
    Choices,
    Range,
    int4_weights,
    int8_activations,
    int8_weights,
)
from latentc.exporter.passes.quantization import operators, sites
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.backends import backend as backends
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import ExportError
from latentc.runtimes.verification.verify import relative_l2
from tests.support.uncaptured import uncaptured

PASSES = {**WEIGHTS, **W8A8}
EXACT = 1e-5
# Engines order sums differently, and a value between two steps of 8 bits may fall to either
# side: two right answers then differ by as much as either differs from float32.
ROUNDED = None
HALF = 5e-3  # graphs of float16, which ONNX Runtime computes in float32 on the CPU
ENGINES = [
    ("onnx", "onnxruntime", "int8", EXACT),
    ("onnx", "onnxruntime", "int4", EXACT),
    ("openvino", "openvino", "int8", EXACT),
    ("openvino", "openvino", "int4", EXACT),
    ("openvino", "openvino", "w8a8", ROUNDED),
    ("tensorrt", "onnxruntime", "int8", HALF),
    ("tensorrt", "onnxruntime", "w8a8", ROUNDED),
]


@pytest.fixture(scope="module")
def pipe(pipeline_folder: Callable[[str], Path]) -> Any:
    return load(resolve(pipeline_folder("sd"), None, None))


@pytest.fixture(scope="module")
def description(pipe: Any) -> Description:
    return family_of("StableDiffusionPipeline").describe(pipe)


@pytest.fixture(scope="module")
def denoiser(description: Description) -> Graph:
    return next(graph for graph in description.graphs if graph.component.role == "denoiser")


@pytest.fixture(scope="module")
def program(description: Description, denoiser: Graph) -> ExportedProgram:
    return capture(denoiser, description.latents.multiple, symbol_values(description, traced=True))


@pytest.fixture(scope="module")
def samples(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Mapping[str, torch.Tensor]]:
    counts: list[int] = []
    made: Any = None

    def examine(_: Any, description: Description, draft: Manifest, root: Path) -> None:
        nonlocal made
        wanted = Calibration(("a", "b"), 10)
        made = trajectories(description, draft, root, wanted, counts.append)
        for graph in description.graphs:
            assert all(each.keys() == graph.component.inputs.keys() for each in made.of(graph))

    folder = tmp_path_factory.mktemp("sd") / "bundle"
    uncaptured(pipeline_folder("sd"), folder, steps=(8,), examine=examine).close()
    assert len(made.inputs["denoiser"]) == counts[-1] == 10
    assert len(counts) == 2  # runs: PNDM calls the denoiser once more than it has steps
    assert len(made.inputs["vae_decoder"]) == 2 <= len(made.inputs["text_encoder"])
    calls: list[Mapping[str, torch.Tensor]] = made.inputs["denoiser"]
    return calls


@pytest.fixture(scope="module")
def choices(program: ExportedProgram, samples: list[Mapping[str, torch.Tensor]]) -> Choices:
    return Choices(ranges=ranges(program, samples, lambda _: None))


def run(program: ExportedProgram, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = program.module()(**inputs)[0]
    return made.detach()


def test_int8_is_the_nearest_integer_of_each_channel() -> None:
    weight = torch.randn(24, 16, 3, 3) * torch.logspace(-3, 2, 24).view(-1, 1, 1, 1)
    weight[3] = 0
    integers, scale = int8_weights.quantize(weight)
    assert integers.dtype is torch.int8
    assert scale.shape == (24,)
    error = (integers * scale.view(-1, 1, 1, 1) - weight).abs()
    assert (error <= scale.view(-1, 1, 1, 1) / 2 * 1.0001).all()
    assert integers.abs().flatten(1).amax(1)[4:].eq(127).all()


def test_int4_scales_lose_less_than_the_plain_ones() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    integers, scale = int4_weights.quantize(weight, 32)
    assert (int(integers.min()), int(integers.max())) == (-8, 7)
    grouped = weight.view(32, 4, 32)
    found = integers.view(32, 4, 32) * scale[..., None]
    plain = grouped.abs().amax(2, keepdim=True) / 8
    usual = (grouped / plain).round().clamp(-8, 7) * plain
    lost = [(each - grouped).square().mean(2) for each in (found, usual)]
    assert (lost[0] <= lost[1] * 1.0001).all()
    assert lost[0].mean() < 0.98 * lost[1].mean()


def test_first_and_last_layers_and_small_ones_stay(program: ExportedProgram) -> None:
    names = {site.name for site in sites(program)}
    every = {name for name, value in program.state_dict.items() if value.dim() > 1}
    kept = {name.rpartition("unet.")[2] for name in every - names}
    assert kept == {"conv_in.weight", "conv_out.weight"}


@pytest.mark.parametrize("precision", PASSES)
def test_program_computes_with_the_integers(
    program: ExportedProgram,
    samples: list[Mapping[str, torch.Tensor]],
    choices: Choices,
    precision: str,
) -> None:
    """The quantised program is the captured one with every weight replaced by what its
    integers stand for; kept weights stay as they were."""
    exact = run(program, samples[4])
    kept = frozenset([site.name for site in sites(program)][:5])
    every = run(variant(program, PASSES[precision], choices), samples[4])
    some = run(variant(program, PASSES[precision], Choices(kept, choices.ranges)), samples[4])
    limit = {"int8": 2e-2, "int4": 2e-1, "w8a8": 6e-2}[precision]
    assert 1e-4 < relative_l2(every.numpy(), exact.numpy()) < limit
    assert relative_l2(some.numpy(), every.numpy()) > 1e-5
    torch.testing.assert_close(run(program, samples[4]), exact)  # it was not changed
    if precision == "int8":
        by_hand = variant(program, ())
        state = dict(program.state_dict)
        try:
            for site in sites(program):
                integers, scale = int8_weights.quantize(state[site.name].detach())
                wide = scale.view(-1, *[1] * (integers.dim() - 1))
                by_hand.state_dict[site.name] = torch.nn.Parameter(integers * wide)
            for name, value in by_hand.state_dict.items():
                if value.is_floating_point() and value.numel() >= 1024 and value.dim() > 1:
                    done = value if any(name == s.name for s in sites(program)) else value.half()
                    by_hand.state_dict[name] = torch.nn.Parameter(done.float())
            torch.testing.assert_close(run(by_hand, samples[4]), every, rtol=1e-4, atol=1e-5)
        finally:
            program.state_dict.update(state)


def test_all_weights_kept_is_half_precision(
    program: ExportedProgram, samples: list[Mapping[str, torch.Tensor]], choices: Choices
) -> None:
    kept = Choices(frozenset(site.name for site in sites(program)), choices.ranges)
    half = run(variant(program, ("fp16_weights",)), samples[0])
    for passes in PASSES.values():
        assert torch.equal(run(variant(program, passes, kept), samples[0]), half)


@pytest.mark.parametrize(("target", "engine", "precision", "limit"), ENGINES)
def test_engines_compute_what_pytorch_does(
    program: ExportedProgram,
    description: Description,
    denoiser: Graph,
    choices: Choices,
    tmp_path: Path,
    target: str,
    engine: str,
    precision: str,
    limit: float | None,
) -> None:
    """At a size and batch that were not traced."""
    made = variant(program, targets.TARGETS[target].precisions[precision], choices)
    entry = targets.get(target).lower(made, denoiser.component, tmp_path)
    inputs = example_inputs(denoiser, symbol_values(description, traced=False), seed=7)
    expected = run(made, inputs).numpy()
    session = backends.get(engine).open(
        tmp_path / entry, denoiser.component, backends.get(engine).device(None), SessionOptions()
    )
    with session:
        feeds = {name: value.numpy() for name, value in inputs.items()}
        (found,) = session.run(feeds).values()
    if limit is None:
        exact = run(program, inputs).numpy()
        assert relative_l2(found, exact) <= 1.25 * relative_l2(expected, exact)
        assert relative_l2(found, expected) <= 1.5 * relative_l2(expected, exact)
    else:
        assert relative_l2(found, expected) <= limit
    full = sum(value.numel() * 4 for value in program.state_dict.values())
    written = sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != "model.xml")
    assert written < {"int8": 0.5, "w8a8": 0.5, "int4": 0.45}[precision] * full + 200_000


def test_integers_stand_in_the_files(
    program: ExportedProgram, denoiser: Graph, tmp_path: Path
) -> None:
    """Weights of 4 bits are stored in 4 bits, by both formats."""
    import onnx
    import openvino

    made = variant(program, PASSES["int4"])
    linear = sum(site.linear for site in sites(program))
    targets.get("onnx").lower(made, denoiser.component, tmp_path)
    targets.get("openvino").lower(made, denoiser.component, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    kinds = [tensor.data_type for tensor in graph.initializer]
    read = openvino.Core().read_model(tmp_path / "model.xml")
    types = [
        op.get_element_type().to_string()
        for op in read.get_ops()
        if op.get_type_name() == "Constant"
    ]
    assert 0 < kinds.count(onnx.TensorProto.INT4) == types.count("i4") <= linear
    assert kinds.count(onnx.TensorProto.INT8) == types.count("i8") > 0


def test_ranges_hold_what_was_met(
    program: ExportedProgram, samples: list[Mapping[str, torch.Tensor]], choices: Choices
) -> None:
    layers = list(int8_activations.quantized_layers(program, frozenset()))
    assert {layer.name for layer in layers} == set(choices.ranges)
    assert all(found.low < found.high for found in choices.ranges.values())
    assert not any("time" in layer.name for layer in layers)
    narrow = Choices(ranges=ranges(program, samples[:1], lambda _: None))
    assert narrow.ranges != choices.ranges  # every sample counts


def test_a_range_is_clipped_where_that_loses_less() -> None:
    from latentc.exporter.lowering.calibration import _clipped

    even = torch.linspace(-1, 3, 4096)
    assert _clipped(Range(-1.0, 3.0), even) == Range(-1.0, 3.0)
    outlier = torch.cat([torch.randn(1 << 15), torch.tensor([9.0])])
    assert _clipped(Range(-4.5, 9.0), outlier).high < 9.0


def test_symmetric_zero_points(program: ExportedProgram, choices: Choices) -> None:
    for passes, zero in ((W8A8, False), (TYPED_INTEGERS, True)):
        made = variant(program, passes["w8a8"], choices)
        points = {
            node.args[2]
            for node in made.graph.nodes
            if node.target is operators.quantize_per_tensor.default
        }
        assert (points == {0}) is zero


def test_a_layer_that_was_not_calibrated(program: ExportedProgram, choices: Choices) -> None:
    name = next(iter(choices.ranges))
    rest = {key: value for key, value in choices.ranges.items() if key != name}
    with pytest.raises(ExportError, match=f"{name}: calibration has not met"):
        variant(program, PASSES["w8a8"], Choices(ranges=rest))


def test_zero_is_always_a_step() -> None:
    from latentc.exporter.passes.int8_activations import _numbers

    for found in (Range(0.5, 2.0), Range(-3.0, -1.0), Range(-0.3, 7.1), Range(0.0, 0.0)):
        scale, point = _numbers(found, symmetric=False)
        assert scale > 0
        assert -128 <= point <= 127
        assert np.isclose((point - point) * scale, 0)


@pytest.mark.parametrize("precision", ["int8", "int4", "w8a8"])
def test_one_layer_at_a_time_is_what_the_passes_make_of_it(
    program: ExportedProgram,
    choices: Choices,
    samples: list[Mapping[str, torch.Tensor]],
    precision: str,
) -> None:
    """`latentc.exporter.lowering.layer_ranking` ranks layers by values rounded on the way, not by
    rewritten programs."""
    passes = tuple(name for name in PASSES[precision] if not name.startswith("fp16"))
    rounding = floor.Rounding(passes, choices.ranges)
    watched = Watched(program)
    every = {site.name for site in sites(program)}
    exact = watched.run(samples[4])[0]
    for site in list(sites(watched.program))[::7]:
        one = Choices(frozenset(every - {site.name}), choices.ranges)
        expected = run(variant(program, passes, one), samples[4])
        (found,) = rounding.run(watched, site, samples[4])
        assert relative_l2((found - exact).numpy(), (expected - exact).numpy()) < 1e-3, site.name
        assert (watched.run(samples[4])[0] == exact).all()
