"""This module lists what is fuzzed: every function that is marked
`latentc.runtimes.storage.parsing.parser`.

`names` finds them in the code. A parser is called with a damaged file, text or folder; what else it
takes, and the good input that the damage starts from, stands in `SEEDS` and `ARGUMENTS`. A parser
without seeds has no target, which is an error.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtimes", "exporter", "benchmarks", "latentc")
# Inputs that were faults once, one folder for each parser.
FOUND = Path(__file__).with_name("found")

# Parameters that are folders, and the files in them that a parser reads.
_FOLDERS = {"folder": ("model_index.json", "latentc.json"), "package": ("Manifest.json",)}

_PICKLES = (b"PK", b"\x80\x02")  # begin files of weights that are told by their names

Seeds = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Target:
    """A parser and good inputs for it. `run` raises what no parser may raise."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def module_name(path: Path) -> str:
    """Return the import name of a file of the packages, which are installed as `latentc`."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["latentc", *([] if folder == "latentc" else [folder]), *parts])


def names() -> list[str]:
    """Return the names of all parsers, "module:qualified name", without importing them."""
    return [
        f"{module_name(path)}:{name}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in _marked(ast.parse(path.read_text("utf-8")), "")
    ]


def target(name: str) -> Target:
    """Return the target of a parser.

    Raises:
        LookupError: no seeds are entered for it.
    """
    from latentc.runtimes.storage.parsing import PARSERS

    if name not in SEEDS:
        raise LookupError(f"{name} has no target: enter good inputs for it in {__name__}.SEEDS")
    module, _, path = name.partition(":")
    function: Any = import_module(module)
    for part in path.split("."):
        function = getattr(function, part)
    known = PARSERS[name]
    others = ARGUMENTS.get(name, dict)()
    as_text = known.source == "text"
    as_data = "data" in inspect.signature(function).parameters

    def run(data: bytes) -> None:
        if as_text:
            arguments: dict[str, Any] = {"text": data.decode("utf-8", "surrogateescape")}
        elif as_data:
            arguments = {"data": data, known.source: "manifest.json"}
        else:
            arguments = {known.source: _placed(known.source, data)}
        try:
            function(**arguments, **others)
        except known.error as error:
            _check_message(str(error))

    return Target(name, run, tuple(SEEDS[name]()))


def _check_message(message: str) -> None:
    """Raise AssertionError for a message that is no line for a terminal."""
    if len(message) > 20_000:
        raise AssertionError(f"a message of {len(message)} characters")


@cache
def _folder() -> Path:
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="latentc-fuzz-", dir=base))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _placed(source: str, data: bytes) -> Path:
    """Return where a parser finds its input."""
    folder = _folder()
    if source in _FOLDERS:
        for name in _FOLDERS[source]:
            (folder / name).write_bytes(data)
        return folder
    path = folder / ("input.bin" if data[:2] in _PICKLES else "input")
    path.write_bytes(data)
    return path


def _marked(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _marked(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and is_parser(child):
            yield prefix + child.name


def is_parser(function: ast.FunctionDef) -> bool:
    """Return whether a function is marked with `latentc.runtimes.storage.parsing.parser`."""
    return any(ast.unparse(mark).startswith("parser(") for mark in function.decorator_list)


# Good inputs, made by the code that writes them wherever there is such code


def _json(*values: Any) -> Seeds:
    return lambda: [json.dumps(value).encode() for value in values]


def _texts(*values: str) -> Seeds:
    return lambda: [value.encode() for value in values]


def _bundle_files(*names: str) -> Seeds:
    def read() -> Iterator[bytes]:
        from tests.support import fakes

        with tempfile.TemporaryDirectory() as folder:
            bundle = fakes.make_bundle(Path(folder) / "bundle")
            for name in names:
                yield (bundle / name).read_bytes()

    return read


def _plans() -> Iterator[bytes]:
    """Tables without noise, with noise, and with noise of a learned variance."""
    from tests.support import fakes

    yield from _bundle_files("schedules/plain.json", "schedules/noisy.json")()
    noisy = fakes.plan_table(noisy=True)
    low = np.where(noisy.noise_draws == 1, -2.0, np.nan)
    yield replace(noisy, log_low=low, log_high=low + 1).encoded()


def _archives() -> Iterator[bytes]:
    """Archives of tables without noise and with noise."""
    from latentc.runtimes.sampling.plan_archive import write_archive
    from tests.support import fakes

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plans.zip"
        for noisy in (False, True):
            write_archive(fakes.plan_table(noisy), path)
            yield path.read_bytes()


def _images() -> Iterator[bytes]:
    from PIL import Image

    pixels = np.arange(3 * 64, dtype=np.uint8).reshape(8, 8, 3)
    image = Image.fromarray(pixels)
    kinds = (("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "1"), ("JPEG", "RGB"))
    for kind, mode in (*kinds, ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "L")):
        data = io.BytesIO()
        source = image.convert("L") if mode == "I;16" else image
        source.convert(mode).save(data, kind)
        yield data.getvalue()


def _npz(**arrays: Any) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def _array() -> Iterator[bytes]:
    for dtype in ("<f4", "<f8", ">i8", "|u1", "|b1"):
        data = io.BytesIO()
        np.save(data, np.arange(6).astype(dtype).reshape(2, 3))
        yield data.getvalue()


def _arrays() -> Iterator[bytes]:
    yield _npz(a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.arange(3))
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        member = io.BytesIO()
        np.save(member, np.zeros((4, 4), np.float16))
        archive.writestr("x.npy", member.getvalue())
    yield data.getvalue()


def old_manifest() -> dict[str, Any]:
    """Return a small manifest of format 1."""
    file = {"path": "tokenizer/tokenizer.json", "size": 3, "sha256": "0" * 64}
    sample = {"dtype": "float32", "shape": ["batch", 4, "height", "width"]}
    inputs = {"sample": sample, "timestep": {"dtype": "float32", "shape": [1]}}
    image = {"dtype": "float32", "shape": ["batch", 3, "8*height", "8*width"]}
    decoder = {"inputs": {"latents": sample}, "outputs": {"image": image}}
    denoiser = {"inputs": inputs, "outputs": {"prediction": sample}}
    source = {"id": "a", "pipeline_class": "A", "fingerprint": "0", "scheduler_class": "S"}
    branch = {"name": "only", "prefix": "", "missing": "empty", "constant": 1.0}
    latents = {"channels": 4, "factor": 8, "multiple": 8}
    return {
        "format_version": 1,
        "tasks": [{"name": "text-to-image"}],
        "source": {**source, "scheduler_config": {"beta": 1}},
        "created_by": {"latentc": "0", "python": "3", "platform": "any", "libraries": {}},
        "latents": {**latents, "default_height": 64, "default_width": 64},
        "tokenizers": [{"file": file, "input": "ids", "max_length": 6, "texts": ["prompt"]}],
        "arguments": [{"name": "size", "default": ["height", 0.0]}],
        "vectors": [{"input": "sizes", "arguments": ["size"]}],
        "guidance": {"branches": [branch], "single": "only"},
        "components": [
            {"name": "denoiser", "role": "denoiser", **denoiser},
            {"name": "decoder", "role": "decoder", **decoder},
        ],
        "builds": [{"name": "b", "target": "onnx", "precision": "fp32", "artifacts": {}}],
        "schedules": [
            {"name": "s", "class_name": "S", "file": file, "steps": [1], "key": "k"},
        ],
        "defaults": {"scheduler": "s", "num_inference_steps": 1},
        "left_out": [{"name": "watermark", "why": "it needs another package"}],
    }


def _old_plans() -> Iterator[bytes]:
    from tests.runtimes.version_1.test_plans import save_plans
    from tests.support import fakes

    with tempfile.TemporaryDirectory() as folder:
        for noisy in (False, True):
            yield save_plans(Path(folder) / "old.npz", fakes.plan_table(noisy)).read_bytes()


def _saved_images() -> Iterator[bytes]:
    yield _npz(images=np.zeros((1, 4, 4, 3), np.uint8), latents=np.zeros((1, 4, 2, 2), np.float32))


def _safetensors() -> Iterator[bytes]:
    from safetensors.numpy import save

    yield save({"weight": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float16)})
    yield save({"emb_params": np.zeros((2, 8), np.float32)}, {"modelspec.title": "a"})


def _weights() -> Iterator[bytes]:
    import torch

    yield from _safetensors()
    for held in (
        {"<cat>": torch.zeros(2, 3)},
        {"string_to_param": {"*": torch.zeros(2, 3)}, "name": "cat", "step": 5},
    ):
        data = io.BytesIO()
        torch.save(held, data)
        yield data.getvalue()


def _reports() -> Iterator[bytes]:
    from latentc.benchmarks.bench import model
    from tests.support import bench_reports

    yield model.encode(bench_reports.make_report())


def _programs() -> Iterator[bytes]:
    import torch

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.layer(x)).reshape(x.shape[0], -1)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Small(), (torch.zeros(4, 2),), dynamic_shapes={"x": {0: rows}})
    data = io.BytesIO()
    torch.export.save(program, data)
    yield data.getvalue()


def _torch() -> Mapping[str, Any]:
    import torch

    return {"torch": torch, "device": "cpu"}


def _graphs() -> Iterator[bytes]:
    from onnx import TensorProto, helper

    sizes = ["n", 2]
    given, result = (helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes) for n in "xy")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "model.onnx.data", "offset": "0", "length": "8"}.items():
        weight.external_data.add(key=key, value=value)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    yield helper.make_model(
        helper.make_graph([node], "small", [given], [result], [weight])
    ).SerializeToString()


_RECIPE = {
    "graph": "model.onnx",
    "precision": "fp32",
    "profile": {"batch": [1, 2, 4], "height": [8, 64, 128]},
}
_ITEM = {"files": [{"path": "a/b", "size": 3, "sha256": "0" * 64}], "meta": {"entry": "b"}}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
_IR = """<?xml version="1.0"?>
<net name="small" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="?,2" element_type="f32"/>
<output><port id="0" precision="FP32" names="x"><dim>-1</dim></port></output></layer>
<layer id="1" name="w" type="Const" version="opset1"><data offset="0" size="8" shape="2"/></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>
"""
_CASES = """
title = "Two"
[[case]]
name = "a"
prompt = "a red circle"
size = "64x64"
steps = 2
"""

SEEDS: Mapping[str, Seeds] = {
    "latentc.runtimes.calls.given_images:read": _images,
    "latentc.runtimes.backends.torch_program:load_program": _programs,
    "latentc.runtimes.bundle.references:_of_onnx": _graphs,
    "latentc.runtimes.bundle.references:_of_ir": _texts(_IR),
    "latentc.runtimes.verification.weight_differences:read": _safetensors,
    "latentc.runtimes.backends.coreml.mil.package_files:_weights": lambda: [
        b"\n\x1e@model_path/weights/weight.bin"
    ],
    "latentc.runtimes.backends.coreml.mil.package_files:_items": _json(
        {"itemInfoEntries": {"a": {"path": "weights/b.bin"}}}
    ),
    "latentc.exporter.source.adapters.lora:_parsed": _json(
        {"unet.lora_alpha": 4, "unet.alpha_pattern": {"a": 2.0}}
    ),
    "latentc.exporter.source.model_files:_shards": _json({"weight_map": {"a": "b.safetensors"}}),
    "latentc.exporter.source.model_files:read_configuration": _json(
        {"_class_name": "UNet2DModel", "sample_size": 8}
    ),
    "latentc.runtimes.texts.tokenizer:TextTokenizer.load": _bundle_files(
        "tokenizer/tokenizer.json"
    ),
    "latentc.runtimes.texts.prompt_weights:parse": _texts(
        "a (red:1.3) circle, [blue] sky++ and (a (b:0.5)++ c)--", "\\(a\\) ((((b))))"
    ),
    "latentc.runtimes.bundle.recipe:Recipe.load": _json(_RECIPE),
    "latentc.runtimes.bundle.recipe:parse_range": _texts("1:2:4", "8", "1..4"),
    "latentc.runtimes.presets.records:_load": _json(
        {"format_version": 1, "presets": {}, "machine": {}}
    ),
    "latentc.runtimes.backends.model_cache:_load": _json(
        {"engine": "1", "key": "a", "seconds": 1.5}
    ),
    "latentc.runtimes.backends.tensorrt.engine_store:_load": _json(
        {"recipe": "a", "device": "b", "version": "1"}
    ),
    "latentc.runtimes.bundle.precision:canonical": _texts(
        "fp32", "fp32,denoiser=int8+downsampled-attention"
    ),
    "latentc.runtimes.sampling.plan:PlanTable.load": _plans,
    "latentc.runtimes.sampling.plan_archive:_from_archive": _archives,
    "latentc.runtimes.version_1.plans:read_plans": _old_plans,
    "latentc.runtimes.version_1.manifest:Manifest.decode": lambda: [
        json.dumps(old_manifest()).encode()
    ],
    "latentc.runtimes.bundle.trust:_known_hashes": _json({"/a/b": [1, 2, 3, 4, "0" * 64]}),
    "latentc.runtimes.backends.coreml.mil.session:packages_of": _json(
        {"packages": ["a.mlpackage", "b.mlpackage"]}
    ),
    "latentc.runtimes.storage.npz:read_arrays": _arrays,
    "latentc.runtimes.storage.npz:read_array": _array,
    "latentc.runtimes.bundle.manifest:Manifest.decode": _bundle_files("manifest.json"),
    "latentc.exporter.source.model_folders:configured_class": _json(
        {"_class_name": "AutoencoderKL"}
    ),
    "latentc.exporter.source.weight_files:check": _safetensors,
    "latentc.exporter.source.weight_files:metadata": _safetensors,
    "latentc.exporter.source.model_card:_front_matter": _texts(
        "---\nlicense: other\nlicense_name: own\nbase_model:\n- a/b\n- c/d\n---\n# Card\n",
        "---\nauthors: [a, 'b']\nwidget: {text: >-\n  x}\n---",
    ),
    "latentc.exporter.calibration_prompts:read_prompts": _texts("a\nb\n\n# c\n", "\ufeffa\r\nb"),
    "latentc.exporter.source.resolving:_read_index": _json(_INDEX),
    "latentc.exporter.stored_weights:headers": _safetensors,
    "latentc.exporter.source.adapters.textual_inversion:_held": _weights,
    "latentc.exporter.source.weight_files:content": _weights,
    "latentc.exporter.source.adapters.ip_adapter_files:_configured": _json(
        {"vision_config": {"patch_size": 2}}
    ),
    "latentc.exporter.verification.judging:read": _json(
        {"judge": {"name": "shapes", "prompts": ["a"], "images": 4}}
    ),
    "latentc.exporter.artifacts.store:_read_item": _json(_ITEM),
    "latentc.benchmarks.bench.model:read": _reports,
    "latentc.benchmarks.bench.peers:_answer": _json({"error": None, "seconds": [1.0], "memory": 3}),
    "latentc.benchmarks.bench.fidelity:Images.load": _saved_images,
    "latentc.benchmarks.bench.fidelity:Images.of_file": _images,
    "latentc.benchmarks.bench.cases:read": _texts(_CASES),
    "latentc.benchmarks.bench.cases:parse_size": _texts("512x512", "64"),
    "latentc.benchmarks.bench.pages.html:small": _images,
}

# What a parser takes besides its input.
ARGUMENTS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "latentc.runtimes.texts.tokenizer:TextTokenizer.load": lambda: {"max_length": 6},
    "latentc.runtimes.bundle.recipe:parse_range": lambda: {"name": "--images"},
    "latentc.runtimes.sampling.plan_archive:_from_archive": lambda: {
        "listed": (1, 2, 4),
        "wanted": (2,),
    },
    "latentc.runtimes.backends.torch_program:load_program": _torch,
}
