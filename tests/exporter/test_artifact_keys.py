"""The keys of what an export makes change with every source that decides it, and with no other."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentc.exporter.artifacts import source_closure
from latentc.exporter.artifacts.source_closure import closure, code, imported_names
from latentc.exporter.options import artifact_keys, export_options
from latentc.exporter.schedulers.plans import Settings, key_of
from latentc.exporter.schedulers.shifting import Told
from latentc.exporter.source.adapters.kinds import Ingredient
from latentc.exporter.source.resolving import PipelineSource
from latentc.exporter.targets import TARGETS
from latentc.exporter.verification.probes import Probing
from latentc.runtimes.bundle.manifest import Manifest
from tests.support.fakes import make_bundle

ROOT = Path(__file__).resolve().parents[2]
DDIM = Settings("ddim", "DDIMScheduler", {}, Told())
PARTS = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
SOURCE = PipelineSource(
    "source",
    Path("source"),
    "StableDiffusionPipeline",
    dict.fromkeys(PARTS, ("library", "class")),
    dict.fromkeys(PARTS, "digest"),
)
LORA = replace(SOURCE, ingredients=(Ingredient("lora", "style", Path("style"), "digest"),))
ALL = {(target, precision) for target in TARGETS for precision in ("fp32", "fp16")}


def of(*targets: str) -> set[tuple[str, str]]:
    """Return the builds of some targets."""
    return {pair for pair in ALL if pair[0] in targets}


def edit(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let the source of a module be another one until the test ends."""
    read = source_closure._source
    assert source_closure._file(module) is not None

    def edited(name: str) -> Any:
        return replace(read(name), sha256="another") if name == module else read(name)

    monkeypatch.setattr(source_closure, "_source", edited)
    code.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    code.cache_clear()


def keys(source: PipelineSource = SOURCE, **options: Any) -> dict[tuple[str, str], dict[str, str]]:
    asked = {"targets": tuple(TARGETS), "precision": ("fp32", "fp16"), **options}
    return artifact_keys(source, export_options(**asked))


def changed(before: dict[Any, Any], after: dict[Any, Any]) -> set[Any]:
    """Return the builds whose artifacts all have other keys; all or none of a build's change."""
    whole = {pair for pair in before if not {*before[pair].values()} & {*after[pair].values()}}
    assert {pair for pair in before if before[pair] != after[pair]} == whole
    return whole


# What decides builds of Stable Diffusion.
DECIDING = {
    "exporter.families.stable_diffusion": ALL,
    "exporter.families": ALL,
    "exporter.components.text_to_image": ALL,
    "exporter.components.unet_programs": ALL,
    "exporter.components.adapters.controlnet": ALL,
    "exporter.components.tasks.image_tasks": ALL,
    "exporter.components.watermark": ALL,
    "exporter.programs.draft": ALL,
    "exporter.source.resolving": ALL,
    "exporter.source.single_file": ALL,
    "exporter.stored_weights": ALL,
    "exporter.compiler.requested": ALL,
    "exporter.capture.graphs": ALL,
    "exporter.capture.step_cache": ALL,
    "exporter.lowering.component": ALL,
    "exporter.lowering.overflow": ALL,
    "exporter.targets": ALL,
    "exporter.passes": ALL,
    "runtimes.programs.statements": ALL,
    "exporter.capture.decompose": ALL - of("torch"),
    "exporter.targets.onnx": of("onnx", "tensorrt"),
    "exporter.targets.onnx.lowering": of("onnx", "tensorrt"),
    "exporter.targets.onnx.attention": of("onnx", "tensorrt"),
    "exporter.targets.onnx.weights": of("onnx", "tensorrt"),
    "exporter.targets.tensorrt.lowering": of("tensorrt"),
    "exporter.targets.torch.lowering": of("torch"),
    "exporter.targets.openvino.int4": of("openvino"),
    "exporter.passes.plain_integers": of("openvino"),
    "exporter.targets.coreml": of("coreml"),
    "exporter.targets.coreml.options": of("coreml"),
    "exporter.targets.coreml.operations": of("coreml"),
    "exporter.passes.fp16_weights": {(t, "fp16") for t in ("onnx", "openvino", "torch")},
    "exporter.passes.fp16_compute": {("tensorrt", "fp16")},
    # Whether it overflows is looked for in what the whole pipeline meets.
    "exporter.verification.reference": {("tensorrt", "fp16")},
    "runtimes.interpreter.loop": {("tensorrt", "fp16")},
}
# What has no part in them.
OTHERS = (
    *(f"exporter.families.{name}" for name in ("dit", "flux", "stable_diffusion_xl", "wan")),
    *("exporter.components.qwen_image_graphs", "exporter.components.wan_video_decoder"),
    *("exporter.passes.int4_weights", "exporter.passes.downsampled_attention"),
    *("exporter.source.adapters.lora", "exporter.lowering.fidelity_floor"),
    *("exporter.lowering.trajectories", "exporter.verification.builds", "exporter.cli"),
    *("exporter.compiler.export", "exporter.compiler.preflight", "exporter.schedulers.plans"),
    *(f"runtimes.backends.{name}" for name in ("onnxruntime", "openvino", "tensorrt", "torch")),
    *("runtimes.commands.generate", "runtimes.verification.verify", "runtimes.tuning.tune"),
    *("benchmarks.measure", "cli", "demo", "wandb"),
)


@pytest.mark.parametrize("module", DECIDING)
def test_what_decides_a_build_changes_its_keys(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys()
    assert set(before) == ALL
    edit(monkeypatch, f"latentc.{module}")
    assert changed(before, keys()) == DECIDING[module]


@pytest.mark.parametrize("module", OTHERS)
def test_nothing_else_changes_keys(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    edit(monkeypatch, f"latentc.{module}")
    assert keys() == before


@pytest.mark.parametrize(
    ("module", "source", "options"),
    [
        ("exporter.source.adapters.lora", LORA, {}),
        ("exporter.source.adapters.lora_layers", LORA, {}),
        ("runtimes.verification.weight_differences", LORA, {}),
        ("exporter.lowering.trajectories", SOURCE, {"precision": ("denoiser=w8a8",)}),
        ("runtimes.interpreter.loop", SOURCE, {"precision": ("denoiser=w8a8",)}),
        ("exporter.passes.int8_weights", SOURCE, {"precision": ("denoiser=int4",)}),
        *(
            (module, SOURCE, {"precision": ("denoiser=int8",), "fidelity_floor": 40.0})
            for module in (
                *("exporter.lowering.fidelity_floor", "exporter.lowering.layer_ranking"),
                *("runtimes.verification.verify", "runtimes.backends.openvino"),
            )
        ),
    ],
)
def test_what_decides_a_build_as_asked(
    module: str, source: PipelineSource, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(source, targets=("openvino",), **options)
    edit(monkeypatch, f"latentc.{module}")
    after = keys(source, targets=("openvino",), **options)
    for pair, names in before.items():
        assert names["denoiser"] != after[pair]["denoiser"]


def test_an_ingredient_decides_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are taken over from a bundle without it."""
    word = Ingredient("textual-inversion", "cat", Path("cat"), "digest", token="<cat>")
    source = replace(SOURCE, ingredients=(word,))
    before = keys(source)
    edit(monkeypatch, "latentc.exporter.source.adapters.textual_inversion")
    for pair, names in keys(source).items():
        assert {name for name in names if names[name] != before[pair][name]} == {"text_encoder"}


def test_a_split_denoiser_is_another_one() -> None:
    whole, split = keys(), keys(passes=("step-cache",))
    for pair in ALL:
        assert {name for name in whole[pair] if whole[pair][name] != split[pair][name]} == {
            "denoiser"
        }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("exporter.schedulers.tracing", True),
        ("exporter.schedulers.rows", True),
        ("exporter.schedulers.checking", True),
        ("runtimes.sampling.plan_document", True),
        ("exporter.families.stable_diffusion", False),
        ("exporter.targets.onnx.lowering", False),
        ("runtimes.interpreter.loop", False),
        ("runtimes.commands.generate", False),
    ],
)
def test_plans(module: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("ddim", DDIM, [2])
    edit(monkeypatch, f"latentc.{module}")
    assert (key_of("ddim", DDIM, [2]) != before) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("exporter.verification.reference", True),
        ("exporter.verification.judging", True),
        ("runtimes.interpreter.loop", True),
        ("exporter.families.stable_diffusion", True),
        ("exporter.families.dit", False),
        ("exporter.targets.onnx.lowering", False),
        ("exporter.lowering.component", False),
        ("runtimes.backends.onnxruntime", False),
        ("runtimes.commands.generate", False),
    ],
)
def test_probes(
    module: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(make_bundle(tmp_path / "bundle"))
    described: Any = SimpleNamespace(program=manifest.programs[0])
    nothing: Any = None
    plan = manifest.schedules[0]
    probing = Probing(SOURCE, export_options(), described, manifest, plan, nothing, nothing)
    before = probing._key([], None, False)
    edit(monkeypatch, f"latentc.{module}")
    assert (probing._key([], None, False) != before) == expected


OUTSIDE = {
    "outer/__init__.py": "",
    "outer/target.py": (
        "from .helpers import (  # one (\n  first,\n)\nimport json, outer.plain as p\n"
    ),
    "outer/helpers/__init__.py": "from ..below import thing\n",
    "outer/helpers/first.py": "def run():\n    from outer import lazy\n",
    "outer/below.py": "import typing\nif typing.TYPE_CHECKING:\n    from outer.typed import a\n",
    "outer/plain.py": "if True: import latentc.exporter.targets.torch.lowering\n",
    "outer/lazy.py": "",
    "outer/typed.py": "",
    "outer/apart.py": "import outer.target\n",
}
REACHED = {
    *("outer", "outer.target", "outer.helpers", "outer.helpers.first", "outer.below"),
    *("outer.plain", "outer.lazy"),
}


def test_a_package_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in OUTSIDE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    reached = closure("outer.target")
    assert {name for name in reached if not name.startswith("latentc")} == REACHED
    assert "latentc.exporter.targets.torch.lowering" in reached
    assert "outer" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match=r"'outer\.missing'"):
        closure("outer.missing")


def _imported(text: str, package: str) -> Iterator[str]:
    """Yield what `imported_names` does, as Python's own parser reads it."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert not node.level
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("package", ["exporter", "runtimes"])
def test_imports_are_read_as_python_reads_them(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 100
    for file in files:
        text = file.read_text("utf-8")
        assert set(imported_names(text, "")) == set(_imported(text, "")), file
