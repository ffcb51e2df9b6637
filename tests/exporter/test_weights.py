"""Weights stay in their files, and nothing comes out differently for it."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentc.benchmarks.measure import run_child
from latentc.exporter import stored_weights as weights
from latentc.exporter.capture.graphs import capture, symbol_values, variant
from latentc.exporter.compiler import export as compile
from latentc.exporter.components.description import Description
from latentc.exporter.families import family_of
from latentc.exporter.source.adapters import kinds as ingredients
from latentc.exporter.source.resolving import load, load_model, resolve
from latentc.exporter.stored_weights import Stored, actual, later
from latentc.exporter.targets import get
from latentc.exporter.targets.onnx.weights import stood_in
from latentc.exporter.verification import builds as verification
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.backends.onnxruntime import OnnxRuntimeBackend
from latentc.runtimes.errors import SourceError
from latentc.runtimes.pipeline import pipeline
from tests.support.combinations import kept
from tests.support.tiny_transformers import t5_encoder, t5_tokenizer

torch = pytest.importorskip("torch")

FEW = 64  # elements: even tiny models have weights that large


@pytest.fixture
def low_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SMALLEST", FEW)


@pytest.fixture
def half_source(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny Stable Diffusion pipeline, its weights in float16."""
    import diffusers

    folder = tmp_path / "half"
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("sd"))
    pipe.to(torch.float16).save_pretrained(folder)
    return folder


def described(folder: Path) -> tuple[Any, Description]:
    source = resolve(folder)
    pipe = load(source)
    return pipe, family_of(source.pipeline_class).describe(pipe)


def parts(pipe: Any) -> list[Any]:
    return [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]


def stored(shape: tuple[int, ...], kind: Any = torch.float16) -> Stored:
    made = later(torch.randn(shape).to(kind), torch.float32)
    assert isinstance(made, Stored)
    return made


def test_operations_see_float32(low_threshold: None) -> None:
    matrix, kernel, table = stored((32, 16)), stored((8, 4, 3, 3)), stored((50, 16))
    ids = torch.tensor([[3, 49, 3]])
    made = torch.nn.functional.linear(torch.eye(16), matrix)
    assert torch.equal(made, matrix.stored.float().T)
    image = torch.randn(1, 4, 9, 9)
    expected = torch.nn.functional.conv2d(image, kernel.stored.float())
    assert torch.equal(torch.nn.functional.conv2d(image, kernel), expected)
    chosen = torch.nn.functional.embedding(ids, table)
    assert chosen.dtype is torch.float32
    assert torch.equal(chosen, table.stored.float()[ids])
    assert type(matrix.detach()) is Stored
    assert type(matrix + 1) is torch.Tensor


def test_a_stored_weight_is_not_written_to(low_threshold: None) -> None:
    weight = stored((32, 16))
    with pytest.raises(RuntimeError, match="cannot be written to"):
        weight.mul_(2)


def test_what_the_file_holds_is_not_copied(low_threshold: None) -> None:
    held = torch.nn.Parameter(torch.randn(32, 16).half(), requires_grad=False)
    wide = later(held, torch.float32)
    assert isinstance(wide, torch.nn.Parameter)
    assert later(wide, torch.float16).data_ptr() == held.data_ptr()
    assert copy.deepcopy(wide).stored.data_ptr() == held.data_ptr()


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("second", [torch.float16, torch.bfloat16])
def test_numbers_are_rounded_as_in_memory(first: Any, second: Any, low_threshold: None) -> None:
    held = torch.randn(64, 64).to(first)
    made = later(later(later(held, torch.float32), second), torch.float32)
    assert torch.equal(actual(made), held.float().to(second).float())


def test_files_of_one_half_type_stay_mapped(
    half_source: Path, low_threshold: None, tmp_path: Path
) -> None:
    pipe, _ = described(half_source)
    lazy = [p for part in parts(pipe) for p in part.parameters() if isinstance(p, Stored)]
    assert lazy
    assert all(p.dtype is torch.float32 for part in parts(pipe) for p in part.parameters())
    # A mapped tensor is a piece of the file's memory, or maps a page of its own.
    assert all(p.stored.dtype is torch.float16 for p in lazy)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_number_is_found(kind: Any) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.randn(300, 70).to(kind)
        assert weights.finite(weight)
        weight[150, 3] = bad
        assert not weights.finite(weight)
    assert weights.finite(torch.empty(0))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_the_whole_of_t5_stays_mapped(kind: Any, tmp_path: Path, low_threshold: None) -> None:
    """transformers widens some of its layers as it loads them in float16."""
    from transformers import T5EncoderModel

    made = t5_encoder(t5_tokenizer()).to(kind)
    made.save_pretrained(tmp_path)
    found = load_model(T5EncoderModel, tmp_path, None)
    large = {name: each for name, each in found.named_parameters() if each.numel() >= FEW}
    assert any(name.endswith(".wo.weight") for name in large)
    for name, each in large.items():
        assert isinstance(each, Stored), name
        assert torch.equal(each.stored, made.get_parameter(name))
    again = T5EncoderModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert again.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype is torch.float32


def test_the_pipeline_is_that_of_diffusers(half_source: Path, low_threshold: None) -> None:
    import diffusers

    pipe, _ = described(half_source)
    plain = diffusers.DiffusionPipeline.from_pretrained(half_source, torch_dtype=torch.float32)
    for ours, theirs in zip(parts(pipe), parts(plain), strict=True):
        for found, expected in (
            (dict(ours.named_parameters()), dict(theirs.named_parameters())),
            (dict(ours.named_buffers()), dict(theirs.named_buffers())),
        ):
            assert found.keys() == expected.keys()
            assert all(torch.equal(actual(found[name]), expected[name]) for name in found)
    images = [
        each(
            "a red circle",
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
        for each in (pipe, plain)
    ]
    assert (images[0] == images[1]).all()


def test_tables_are_not_rounded(low_threshold: None) -> None:
    """A table that no file holds is made again in float32."""

    class Tabled(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.weight = torch.nn.Parameter(torch.ones(16, 16))
            self.register_buffer("table", torch.linspace(0, 1, 300), persistent=False)

    module = Tabled(None).half()
    assert not torch.equal(module.table.float(), torch.linspace(0, 1, 300))
    weights.as_float32(module, torch.float16)
    assert torch.equal(module.table, torch.linspace(0, 1, 300))
    assert isinstance(module.weight, Stored)


@pytest.mark.parametrize(
    ("target", "passes"),
    [
        ("onnx", ()),
        ("onnx", ("fp16_weights",)),
        ("onnx", ("int8_weights", "fp16_weights")),
        ("onnx", ("fp16_compute",)),
        ("openvino", ("fp16_weights",)),
        ("openvino", ()),
    ],
)
def test_files_are_those_of_weights_in_memory(
    half_source: Path, tmp_path: Path, target: str, passes: tuple[str, ...], low_threshold: None
) -> None:
    _, description = described(half_source)
    graph = next(each for each in description.graphs if each.component.role == "decoder")
    made = {}
    for name in ("mapped", "memory"):
        if name == "memory":
            weights.materialise(graph.module)
        program = capture(
            graph, description.latents.multiple, symbol_values(description, traced=True)
        )
        kinds = {type(weight) for weight in program.state_dict.values()}
        assert (Stored in kinds) is (name == "mapped")
        (tmp_path / name).mkdir()
        get(target).lower(variant(program, passes), graph.component, tmp_path / name)
        made[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert made["mapped"].keys() == made["memory"].keys()
    for name, content in made["mapped"].items():
        assert content == made["memory"][name], name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "mapped", "memory"]


def test_the_optimiser_makes_the_same_graph_as_torchs(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Less one rule and the transposed weights, which end up as they would."""
    import onnx

    _, description = described(pipeline_folder("sd"))
    graph = next(each for each in description.graphs if each.component.role == "denoiser")
    program = capture(graph, description.latents.multiple, symbol_values(description, traced=True))
    with torch.no_grad():
        theirs = torch.onnx.export(
            program,
            opset_version=18,
            input_names=list(graph.component.inputs),
            output_names=list(graph.component.outputs),
            verbose=False,
        )
    from latentc.exporter.targets.onnx import lowering as target

    translations, target._translations = target._translations, dict  # type: ignore[assignment]
    try:
        target.lower(program, graph.component, tmp_path, 18)
    finally:
        target._translations = translations
    ours = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    counted = Counter(node.op_type for node in ours.graph.node)
    assert counted == Counter(node.op_type for node in theirs.model.graph)


def test_the_program_is_whole_again_after_it_was_lowered(
    half_source: Path, low_threshold: None
) -> None:
    _, description = described(half_source)
    graph = description.graphs[0]
    program = capture(graph, description.latents.multiple, symbol_values(description, traced=True))
    before = dict(program.state_dict)
    seen: list[Any] = []

    def fail_inside() -> None:
        with stood_in(program) as taken:
            assert taken
            seen.extend(program.state_dict.values())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert seen
    assert not any(isinstance(each, Stored) for each in seen)
    assert all(program.state_dict[name] is before[name] for name in before)


def test_a_large_build_is_verified(
    half_source: Path, low_threshold: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One component at a time, with weights left in their files."""
    monkeypatch.setattr(verification, "LARGE_BUILD", 1)
    monkeypatch.setattr(pipeline, "LEAN", 1)
    opened: list[bool] = []
    settings = OnnxRuntimeBackend._settings

    def look(self: OnnxRuntimeBackend, options: SessionOptions, place: Any) -> Any:
        opened.append(options.lean)
        return settings(self, options, place)

    monkeypatch.setattr(OnnxRuntimeBackend, "_settings", look)
    made = compile.export(
        half_source, tmp_path / "bundle", precision="fp16", steps=[4], schedulers=[]
    )
    found = made.manifest.builds[0].verification
    assert found is not None
    assert found.passed
    assert opened
    assert all(opened)


def test_what_writes_into_weights_has_them_in_memory(
    half_source: Path, low_threshold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = described(half_source)
    seen: list[bool] = []

    class Writing:
        @staticmethod
        def parts(pipeline_class: str) -> tuple[str, ...]:
            return ("unet",)

        @staticmethod
        def apply(pipe: Any, given: Any) -> None:
            seen.append(any(isinstance(each, Stored) for each in pipe.unet.parameters()))

    monkeypatch.setattr(ingredients, "kind", lambda name: Writing)
    ingredients.apply(pipe, [ingredients.Ingredient("lora", "a.safetensors", Path(), "", 1.0)])
    assert seen == [False]
    assert any(isinstance(each, Stored) for each in pipe.text_encoder.parameters())


def test_a_damaged_file_is_refused(half_source: Path) -> None:
    path = half_source / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match="damaged or cut short"):
        resolve(half_source)


def test_files_of_several_types_are_read_in_float32(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3).half(), "b": torch.ones(3)}, tmp_path / "mixed.safetensors")
    assert weights.stored_type([tmp_path / "mixed.safetensors"]) is torch.float32
    save_file({"a": torch.ones(3).half(), "n": torch.ones(3).int()}, tmp_path / "half.safetensors")
    assert weights.stored_type([tmp_path / "half.safetensors"]) is torch.float16
    assert list(weights.headers(tmp_path / "half.safetensors")) == [("F16", 6), ("I32", 12)]


# 400 MB of float16, of which a float32 copy would be 800: loaded, run, captured and written.
MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from latentc.benchmarks.measure import anonymous_memory, report
from latentc.exporter import stored_weights as weights
from latentc.exporter.capture.graphs import capture, variant
from latentc.exporter.components.description import Graph
from latentc.exporter.targets import get
from latentc.runtimes.bundle.structures import Component, TensorSpec
import onnx, onnxscript.optimizer, openvino
folder, target, *passes = Path(sys.argv[1]), *sys.argv[2:]
width, layers = 2048, 48
file = folder / "model.safetensors"
numbers = torch.randn(width, width).half() / width
save_file({f"{index}.weight": numbers + index for index in range(layers)}, file)
del numbers
with torch.device("meta"):
    inner = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
inner.load_state_dict(load_file(file), assign=True)
class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = inner
    def forward(self, sample):
        return (self.inner(sample),)
spec = TensorSpec("float32", ("batch", width))
graph = Graph(Component("denoiser", "denoiser", {"sample": spec}, {"prediction": spec}), Module())
def work(module, name, passes):
    program = capture(Graph(graph.component, module), 1, {"batch": 2})
    (folder / name).mkdir()
    get(target).lower(variant(program, passes), graph.component, folder / name)
class Small(Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(width, width)
work(Small(), "small", passes)
weights.as_float32(graph.module, torch.float16)
before, peak, over = anonymous_memory(), 0, False
def look():
    global peak
    while not over:
        peak = max(peak, anonymous_memory())
        time.sleep(0.005)
thread = threading.Thread(target=look)
thread.start()
with torch.no_grad():
    graph.module(torch.randn(2, width))
work(graph.module, "large", passes)
over = True
thread.join()
report([file.stat().st_size, peak - before])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
@pytest.mark.parametrize(
    ("target", "passes", "allowed"),
    kept(
        [("onnx", ["fp16_weights"], 0.25), ("onnx", [], 0.25), ("torch", ["fp16_weights"], 0.25)],
        ("onnx", ["fp16_weights"], 0.25),
    ),
)
def test_memory_does_not_grow_with_the_weights(
    tmp_path: Path, target: str, passes: list[str], allowed: float
) -> None:
    size, grown = run_child(["-c", MEMORY, str(tmp_path), target, *passes]).result
    assert size > 400e6
    assert grown < allowed * size, f"{grown / 1e6:.0f} MB for weights of {size / 1e6:.0f} MB"
