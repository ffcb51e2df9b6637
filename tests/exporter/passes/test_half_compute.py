"""Half-precision arithmetic as a pass: exact where it matters, refused where it would overflow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from torch.export import ExportedProgram

from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values, variant
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.families import family_of
from latentc.exporter.lowering import overflow as headroom
from latentc.exporter.lowering.component import Lowering
from latentc.exporter.options import export_options
from latentc.exporter.passes import COMPUTED, computes
from latentc.exporter.programs.draft import Draft
from latentc.exporter.progress import Progress
from latentc.exporter.source.resolving import load, resolve
from latentc.runtimes.bundle.recipe import Recipe
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import ExportError, InputError
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.verification.verify import relative_l2

LIMITS = {"fp16_compute": 2e-3, "bf16_compute": 2e-2}
IMAGE = TensorSpec("float32", ("batch", 4, "height", "width"))


@pytest.fixture(scope="module")
def description(smallest: Path) -> Description:
    pipe = load(resolve(smallest, None, None))
    return family_of("StableDiffusionPipeline").describe(pipe)


def run(program: ExportedProgram, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [value.detach() for value in program.module()(**inputs)]


def captured(module: torch.nn.Module, **inputs: torch.Tensor) -> ExportedProgram:
    return torch.export.export(module.eval(), (), kwargs=inputs)


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "vae_decoder"])
def test_close_to_float32(description: Description, name: str, tmp_path: Path) -> None:
    """At sizes that were not traced, computed in PyTorch, which really is half there; the program
    is still one that PyTorch saves and reads."""
    graph = next(each for each in description.graphs if each.component.name == name)
    program = capture(graph, description.latents.multiple, symbol_values(description, traced=True))
    inputs = example_inputs(graph, symbol_values(description, traced=False), seed=5)
    expected = run(program, inputs)
    for pass_name, limit in LIMITS.items():
        half = getattr(torch, computes(pass_name) or "")
        made = variant(program, (pass_name,))
        found = run(made, inputs)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype is torch.float32
            assert 1e-6 < relative_l2(a.numpy(), b.numpy()) <= limit
        torch.export.save(made, tmp_path / f"{pass_name}.pt2")
        again = run(torch.export.load(tmp_path / f"{pass_name}.pt2"), inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
        matrices = [  # what is multiplied; a VAE's other half is there, and used by nothing
            node.meta["val"]
            for node in made.graph.nodes
            if node.op == "placeholder" and node.name.startswith("p_") and node.users
        ]
        assert {value.dtype for value in matrices if value.dim() > 1} == {half}
        assert headroom.problem(program, half, [inputs]) == ""
        if name == "denoiser":
            _check_time_embedding(made)
    torch.testing.assert_close(run(program, inputs)[0], expected[0])  # it was not changed


def _check_time_embedding(program: ExportedProgram) -> None:
    nodes = list(program.graph.nodes)
    waves = [node for node in nodes if node.name in ("sin", "cos", "exp", "arange")]
    assert len(waves) == 4
    assert {node.meta["val"].dtype for node in waves} == {torch.float32}


class Attention(torch.nn.Module):
    """A mask as float32 minus infinity's stand-in, and queries as long as `scale` makes them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 8)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float32).min).triu(1)
        q = self.project(x) * self.scale
        made = torch.nn.functional.scaled_dot_product_attention(q, q, x, attn_mask=mask)
        return (made,)


def test_masks_stay_finite() -> None:
    x = torch.randn(1, 6, 8)
    program = captured(Attention(1.0), x=x)
    found = run(variant(program, ("fp16_compute",)), {"x": x})[0]
    assert relative_l2(found.numpy(), run(program, {"x": x})[0].numpy()) <= 2e-3
    assert headroom.problem(program, torch.float16, [{"x": x}]) == ""


def test_attention_scores_that_overflow_within() -> None:
    """Nothing infinite is left in the output: a softmax of one large number is one."""
    x = torch.randn(1, 6, 8)
    program = captured(Attention(300.0), x=x)
    assert torch.isfinite(run(program, {"x": x})[0]).all()
    found = headroom.problem(program, torch.float16, [{"x": x}])
    assert "scaled_dot_product_attention reaches" in found
    assert "ends at 6.55e+04" in found
    assert headroom.problem(program, torch.bfloat16, [{"x": x}]) == ""


def test_a_weight_out_of_range() -> None:
    module = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(module.weight, 1e6)
    program = captured(Tupled(module), x=torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"weight is outside torch.float16's range"):
        variant(program, ("fp16_compute",))
    variant(program, ("bf16_compute",))


class Tupled(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.module(x),)


class Loud(torch.nn.Module):
    """A decoder whose middle is a hundred thousand times as loud as its ends."""

    def __init__(self, volume: float) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)
        self.volume = volume

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.last(self.first(latents) * self.volume) / self.volume,)


@pytest.mark.parametrize(("volume", "kept"), [(1.0, False), (1e5, True)])
def test_a_component_that_would_overflow_stays_float32(
    tmp_path: Path, volume: float, kept: bool, recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    graph = Graph(
        Component("decoder", "decoder", {"latents": IMAGE}, {"image": IMAGE}), Loud(volume)
    )
    lowering = Lowering(
        graph, described(graph), export_options(), Progress(None), probes_of, lambda: []
    )
    lowering.write("tensorrt", "fp16", frozenset(), tmp_path)
    recipe = Recipe.load(tmp_path / "recipe.json")
    said = [str(w.message) for w in recwarn if "stays in float32" in str(w.message)]
    if kept:
        assert recipe.precision == "float32"
        assert "mul reaches" in recipe.note or "conv2d_1 reaches" in recipe.note
        assert said == [f"decoder stays in float32: {recipe.note}"]
    else:
        assert (recipe.precision, recipe.note, said) == ("float16", "", [])


def described(graph: Graph) -> Any:
    latents = Latents(channels=4, factor=1, multiple=1, default_height=16, default_width=16)
    draft = Draft("unconditional", DDPMPipeline, latents)
    draft.branch("image")
    program = draft.program()
    return SimpleNamespace(graphs=(graph,), latents=latents, program=program, programs=(program,))


def probes_of(graph: Graph) -> Any:
    return headroom.probe_samples(graph, None, Path())


def test_pairs_of_target_and_precision() -> None:
    options = export_options()
    assert options.passes("tensorrt", "bf16") == COMPUTED["bf16"]
    with pytest.raises(InputError) as caught:
        options.passes("onnx", "bf16")
    assert str(caught.value) == (
        "target 'onnx' has no precision 'bf16'; there are: onnx: fp32, fp16, int8, int4; "
        "openvino: fp32, fp16, bf16, int8, int4, w8a8; torch: fp32, fp16, bf16; "
        "tensorrt: fp32, fp16, bf16, int8, w8a8; "
        "coreml: fp32, fp16, int8, palette8, palette6, palette4"
    )
