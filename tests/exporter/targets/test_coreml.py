"""The Core ML target: every variant converted, read back from disk, and computed without Core ML.

Most tests lower a network of a few layers with all that matters (a time embedding, group
normalisation, attention to tokens, skip connections); one exports a whole pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch.export import ExportedProgram

import latentc
from latentc.exporter.capture.graphs import capture, example_inputs, variant
from latentc.exporter.compiler.export import export
from latentc.exporter.components.description import Graph
from latentc.exporter.options import artifact_keys, export_options
from latentc.exporter.passes import Choices, split_einsum_attention
from latentc.exporter.source.resolving import resolve
from latentc.exporter.targets.coreml import lowering as coreml
from latentc.exporter.targets.coreml.options import CoreMLOptions
from latentc.exporter.targets.options import Settings
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.coreml.mil.package import limits_of, read_spec
from latentc.runtimes.backends.session import Session
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.sizes import fix
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import InputError
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.verification.verify import relative_l2

SIZES = {"batch": 2, "height": 8, "width": 12, "sequence": 7}
LATENTS = Latents(channels=4, factor=2, multiple=2, default_height=16, default_width=16)
SAMPLE = TensorSpec("float32", ("batch", 4, "height", "width"))
COMPONENT = Component(
    name="denoiser",
    role="denoiser",
    inputs={
        "sample": SAMPLE,
        "timestep": TensorSpec("float32", (1,)),
        "encoder_hidden_states": TensorSpec("float32", ("batch", "sequence", 24)),
    },
    outputs={"prediction": SAMPLE},
)
LIMITS = {"fp32": 1e-5, "fp16": 2e-3, "int8": 3e-2, "palette8": 3e-2, "palette6": 1e-1}
LIMITS["palette4"] = 3e-1


class Network(torch.nn.Module):
    """A denoiser of a few layers."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(16, 32)
        self.first = torch.nn.Conv2d(4, 32, 3, padding=1)
        self.norm = torch.nn.GroupNorm(8, 32)
        self.down = torch.nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.query = torch.nn.Linear(32, 64)
        self.key, self.value = torch.nn.Linear(24, 64), torch.nn.Linear(24, 64)
        self.out = torch.nn.Linear(64, 32)
        self.last = torch.nn.Conv2d(64, 4, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        time = self.time(self.frequencies(timestep.expand(sample.shape[0])))
        skip = F.silu(self.norm(self.first(sample) + time[:, :, None, None]))
        hidden = self.down(skip)
        batch, channels, height, width = hidden.shape
        tokens = hidden.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            *(
                layer(values).view(batch, -1, 4, 16).transpose(1, 2)
                for layer, values in (
                    (self.query, tokens),
                    (self.key, encoder_hidden_states),
                    (self.value, encoder_hidden_states),
                )
            )
        )
        tokens = tokens + self.out(attended.transpose(1, 2).reshape(batch, -1, 64))
        hidden = tokens.transpose(1, 2).reshape(batch, channels, height, width)
        hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
        return (self.last(torch.cat([hidden, skip], 1)),)


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return Graph(COMPONENT, Network().eval())


@pytest.fixture(scope="module")
def dynamic(graph: Graph) -> ExportedProgram:
    return capture(graph, LATENTS.multiple, SIZES)


@pytest.fixture(scope="module")
def fixed(graph: Graph) -> tuple[Graph, ExportedProgram]:
    component = fix(COMPONENT, {"height": 8, "width": 12})
    made = Graph(component, graph.module)
    return made, capture(made, LATENTS.multiple, SIZES)


def lowered(
    program: ExportedProgram,
    component: Component,
    folder: Path,
    precision: str = "fp32",
    **options: Any,
) -> Session:
    """Lower a program and open what was written."""
    own = CoreMLOptions(**options)
    program = variant(program, own.passes())
    entry = coreml.lower(program, component, folder, settings=Settings(precision, own, LATENTS))
    return engines.get("coreml-reference").open(folder / entry, component)


def error(session: Session, graph: Graph, **sizes: int) -> float:
    """Relative L2 against PyTorch at sizes of one's choice."""
    inputs = example_inputs(graph, SIZES | sizes, seed=1)
    with torch.no_grad():
        (expected,) = graph.module(**inputs)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    assert session.accepts(feeds)
    found = session.run(feeds)["prediction"]
    assert found.dtype == np.float32
    return relative_l2(found, expected.numpy())


def kinds(package: Path) -> dict[str, set[str]]:
    """The operations of a package, and the dtypes of their (first) outputs."""
    from coremltools.proto.MIL_pb2 import DataType

    function = read_spec(package).mlProgram.functions["main"]
    found: dict[str, set[str]] = {}
    for each in function.block_specializations[function.opset].operations:
        dtype = DataType.Name(each.outputs[0].type.tensorType.dataType)
        found.setdefault(each.type, set()).add(dtype)
    return found


@pytest.mark.parametrize("precision", list(LIMITS))
def test_precisions(precision: str, dynamic: ExportedProgram, graph: Graph, tmp_path: Path) -> None:
    session = lowered(dynamic, COMPONENT, tmp_path, precision)
    found = error(session, graph, height=6, width=4, batch=3)
    assert found <= LIMITS[precision]
    assert found > LIMITS[precision] / 1000
    operations = kinds(tmp_path / "model.mlpackage")
    assert operations["sin"] == {"FLOAT32"}  # the time embedding stays exact
    assert operations["conv"] == {"FLOAT32" if precision == "fp32" else "FLOAT16"}
    compressed = {name for name in operations if name.startswith("constexpr")}
    assert bool(compressed) == (precision not in ("fp32", "fp16"))


@pytest.mark.parametrize("system", ["iOS17", "macOS15", "iOS26"])
def test_deployment_targets(
    system: str, dynamic: ExportedProgram, graph: Graph, tmp_path: Path
) -> None:
    session = lowered(dynamic, COMPONENT, tmp_path, "fp16", coreml_target=system)
    assert error(session, graph, height=6, width=4) <= LIMITS["fp16"]
    fused = "scaled_dot_product_attention" in kinds(tmp_path / "model.mlpackage")
    assert fused == (system != "iOS17")


@pytest.mark.parametrize("precision", ["int8", "palette4"])
def test_compressed_weights_of_the_newest_target(
    precision: str, dynamic: ExportedProgram, graph: Graph, tmp_path: Path
) -> None:
    """From iOS 18 on, compressed weights are other operations."""
    session = lowered(dynamic, COMPONENT, tmp_path, precision, coreml_target="iOS18")
    assert error(session, graph) <= LIMITS[precision]


def test_split_einsum(dynamic: ExportedProgram, graph: Graph, tmp_path: Path) -> None:
    session = lowered(dynamic, COMPONENT, tmp_path, coreml_attention="split_einsum", coreml_batch=2)
    assert error(session, graph, height=6, width=4) <= LIMITS["fp32"]
    assert {"einsum", "softmax"} <= kinds(tmp_path / "model.mlpackage").keys()
    assert "matmul" not in kinds(tmp_path / "model.mlpackage")


def test_fixed_size_in_two_chunks(
    fixed: tuple[Graph, ExportedProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With split attention, queries in chunks, and half precision."""
    from latentc.exporter.passes import split_einsum_v2_attention

    monkeypatch.setattr(split_einsum_v2_attention, "QUERY_CHUNK", 10)
    made, program = fixed
    session = lowered(
        program,
        made.component,
        tmp_path,
        "fp16",
        coreml_attention="split_einsum_v2",
        chunk_denoiser=True,
    )
    assert error(session, made, batch=3) <= LIMITS["fp16"]
    packages = json.loads((tmp_path / "model.json").read_text())["packages"]
    assert packages == ["chunk1.mlpackage", "chunk2.mlpackage"]
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).rglob("*.bin")) for n in packages]
    assert min(sizes) > 0.2 * sum(sizes)
    einsums = [kinds(tmp_path / name).get("einsum") for name in packages]
    assert {"FLOAT16"} in einsums
    feeds = {name: value.numpy() for name, value in example_inputs(made, SIZES).items()}
    with pytest.raises(InputError, match=r"expected shape \['batch', 4, 8, 12\]"):
        session.run(feeds | {"sample": np.zeros((2, 4, 6, 12), np.float32)})


def test_enumerated_sizes(dynamic: ExportedProgram, graph: Graph, tmp_path: Path) -> None:
    session = lowered(dynamic, COMPONENT, tmp_path, coreml_sizes="24x16,16x16")
    for height, width in ((8, 12), (8, 8)):
        assert error(session, graph, height=height, width=width) <= LIMITS["fp32"]
    inputs = example_inputs(graph, SIZES | {"height": 12, "width": 8}, seed=1)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    assert not session.accepts(feeds)
    with pytest.raises(InputError, match=r"takes \[1, 4, 8, 12\] or \[1, 4, 8, 8\]"):
        session.run(feeds)
    inputs = example_inputs(graph, SIZES | {"sequence": 9}, seed=1)
    with pytest.raises(InputError, match=r"'encoder_hidden_states'.*takes \[1, 7, 24\]"):
        session.run({name: value.numpy() for name, value in inputs.items()})


def test_ranges(dynamic: ExportedProgram, graph: Graph, tmp_path: Path) -> None:
    session = lowered(dynamic, COMPONENT, tmp_path, coreml_sizes="16-40", coreml_batch=2)
    limits = limits_of(read_spec(tmp_path / "model.mlpackage"))
    assert str(limits["sample"]) == "[2, 4, 8 to 20, 8 to 20]"
    assert error(session, graph, height=20, width=8, batch=3) <= LIMITS["fp32"]
    inputs = example_inputs(graph, SIZES | {"height": 22}, seed=1)
    with pytest.raises(InputError, match="8 to 20"):
        session.run({name: value.numpy() for name, value in inputs.items()})


class Attention(torch.nn.Module):
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (
            F.scaled_dot_product_attention(query, key, value, scale=0.3),
            F.scaled_dot_product_attention(query, key, value, is_causal=True),
        )


@pytest.mark.parametrize("chunk", [0, 5, 100])
@pytest.mark.parametrize("free", [False, True])
def test_the_pass(chunk: int, free: bool) -> None:
    """On structure and on numbers; masked attention is left alone."""
    inputs = (torch.randn(2, 3, 17, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8))
    shapes = tuple({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO} for _ in inputs)
    program = torch.export.export(Attention(), inputs, dynamic_shapes=shapes if free else None)
    expected = Attention()(*inputs)
    assert split_einsum_attention.run(program, Choices(), chunk) == 1
    for found, wanted in zip(program.module()(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.aten.scaled_dot_product_attention.default) == 1
    parts = -(-17 // chunk) if chunk and not free else 1
    assert targets.count(torch.ops.aten.einsum.default) == 3 * 2 * parts


@pytest.mark.parametrize(
    ("options", "fixed_size", "message"),
    [
        ({"coreml_sizes": "16by16"}, False, "expected up to 128 sizes"),
        ({"coreml_sizes": "16x18"}, False, "18 must be a multiple of 4"),
        ({"coreml_sizes": "40-16"}, False, "empty"),
        ({"coreml_sizes": "16x16"}, True, "either --coreml-sizes, or --height"),
        ({"coreml_batch": 0}, False, "at least 1"),
        ({"chunk_denoiser": True}, False, "--chunk-denoiser needs a fixed size"),
        ({"coreml_attention": "split_einsum_v2"}, False, "split_einsum_v2 needs a fixed size"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], fixed_size: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CoreMLOptions(**options).check(LATENTS, fixed_size)


@pytest.mark.fault("3.8", "Core ML: sizes that packages are made for are those of the model")
def test_sizes_beyond_the_model() -> None:
    latents = msgspec.structs.replace(LATENTS, maximum=16)
    CoreMLOptions(coreml_sizes="32x32").check(latents, False)
    for sizes in ("32x64", "16-64"):
        with pytest.raises(InputError, match=r"64 is too large, this pipeline .* of up to 32"):
            CoreMLOptions(coreml_sizes=sizes).check(latents, False)


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        (
            {"coreml_size": "red"},
            ("coreml",),
            "did you mean 'coreml_sizes'",
        ),
        ({"coreml_target": "iOS16"}, ("onnx",), "--coreml-target is for target 'coreml'"),
        ({"coreml_target": "iOS9"}, ("coreml",), "'coreml_target' must be one of iOS16, iOS17"),
        ({"coreml_batch": "two"}, ("coreml",), "'coreml_batch' must be an integer"),
        ({"chunk_denoiser": 1}, ("coreml",), "'chunk_denoiser' must be True or False"),
    ],
)
def test_bad_options(given: Mapping[str, Any], asked: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_options(targets=asked, **given)


def test_pairs_that_do_not_exist(tmp_path: Path, pipeline_folder: Callable[[str], Path]) -> None:
    message = r"'onnx' has no precision 'palette6'; there are: onnx: fp32.*coreml:.* palette6"
    with pytest.raises(InputError, match=message):
        export(pipeline_folder("unconditional"), tmp_path / "b", precision="palette6")


def test_a_changed_option_rebuilds(pipeline_folder: Callable[[str], Path]) -> None:
    source = resolve(pipeline_folder("unconditional"), None, None)

    def keys(**options: Any) -> dict[tuple[str, str], dict[str, str]]:
        return artifact_keys(source, export_options(targets=("onnx", "coreml"), **options))

    before, after = keys(), keys(coreml_attention="split_einsum")
    assert before["onnx", "fp32"] == after["onnx", "fp32"]
    assert not set(before["coreml", "fp32"].values()) & set(after["coreml", "fp32"].values())
    assert before == keys(coreml_target="iOS16")


def test_a_pipeline(coreml_bundle: Path) -> None:
    """A whole export in both precisions, the loop included, and an image from it."""
    manifest = Manifest.load(coreml_bundle)
    for build in manifest.builds:
        verification = build.verification
        assert verification is not None
        assert verification.loop is not None
        worst = max(check.relative_l2 for check in verification.checks)
        assert worst <= LIMITS[build.precision]
        assert verification.loop.image_psnr >= {"fp32": 50, "fp16": 35}[build.precision]
        assert {"random-1", "trajectory-0"} <= {check.probe for check in verification.checks}
    assert {
        "coreml-fp16/denoiser/model.json",
        "coreml-fp16/denoiser/model.mlpackage/Manifest.json",
        "coreml-fp16/denoiser/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    } <= {file.path for file in manifest.files()}
    with latentc.load(coreml_bundle, build="coreml-fp16", verify=True) as pipe:
        made = pipe("a red circle", num_inference_steps=2, seed=1, height=48, width=32)
        assert pipe.backend.name in ("coreml-reference", "coreml")
        assert made.images[0].size == (32, 48)
        with pytest.raises(InputError, match="to 64"):
            pipe("a red circle", num_inference_steps=2, seed=1, height=256, width=32)
