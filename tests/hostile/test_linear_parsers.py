"""No parser's work grows faster than its input, whichever list in it grows: steps are counted.

The parsers are those of the code (`tests.fuzz.targets.names`). One without an entry in `GROWING`
fails here.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from latentc.benchmarks.bench import compare, model
from latentc.benchmarks.bench.pages import texts
from latentc.benchmarks.wandb_report import mapped
from latentc.runtimes.sampling.plan_document import encode
from latentc.runtimes.sampling.plan_schema import DTYPES
from latentc.runtimes.texts.prompt_weights import parse
from latentc.runtimes.texts.tokenizer import TextTokenizer
from latentc.runtimes.texts.tokenizer_rules import LONGEST_TEXT
from tests.fuzz import targets
from tests.hostile.test_linear_work import plans
from tests.runtimes.version_1.test_plans import save_plans
from tests.support import bench_reports, fakes
from tests.support.steps import steps_of

COUNT = 300
MOST = 2.2  # times the steps, for twice the input
Growing = Callable[[int], bytes]


def _json(make: Callable[[int], Any]) -> Growing:
    return lambda count: json.dumps(make(count)).encode()


def _texts(make: Callable[[int], str]) -> Growing:
    return lambda count: make(count).encode()


def _map(count: int, value: Any = "a") -> dict[str, Any]:
    return {f"name_{index}": value for index in range(count)}


def _numbered(document: Mapping[str, Any], name: str, make: Callable[[int], Any]) -> Growing:
    """Return a document in which one member grows."""
    return _json(lambda count: {**document, name: make(count)})


def _safetensors(count: int) -> bytes:
    from safetensors.numpy import save

    return save({f"layer_{n}.weight": np.zeros(2, np.float32) for n in range(count)})


def _pickle(count: int) -> bytes:
    import torch

    data = io.BytesIO()
    torch.save({f"layer_{n}": torch.zeros(2) for n in range(count)}, data)
    return data.getvalue()


def _header(count: int) -> bytes:
    from safetensors.numpy import save

    return save({"emb_params": np.zeros(2, np.float32)}, _map(count))


def _archive(count: int) -> bytes:
    data = io.BytesIO()
    np.savez(data, **{f"array_{n}": np.zeros(2, np.float32) for n in range(count)})
    return data.getvalue()


def _array(count: int) -> bytes:
    data = io.BytesIO()
    np.save(data, np.zeros(count, np.float32))
    return data.getvalue()


def _images(count: int) -> bytes:
    data = io.BytesIO()
    pixels = {"images": np.zeros((count, 4, 4, 3), np.uint8)}
    np.savez(data, **pixels, latents=np.zeros((count, 4, 2, 2), np.float32))
    return data.getvalue()


def _written_out(count: int) -> bytes:
    """A Netpbm image, whose decoder is of Python."""
    return f"P2 {count} 1 255 {'7 ' * count}".encode()


def _png(count: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (count, count)).save(data, "PNG")
    return data.getvalue()


def _plans(count: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        plans(count).save(Path(folder) / "plans.json")
        return (Path(folder) / "plans.json").read_bytes()


def _archive(count: int) -> bytes:
    """An archive whose member has so many plans in the place of one."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for steps in (1, 2, 4):
            archive.writestr(f"{steps}.json", _plans(count))
    return data.getvalue()


def _old_plans(count: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return save_plans(Path(folder) / "plans.npz", plans(count)).read_bytes()


def _slots(count: int) -> bytes:
    """A table of which each row has so many numbers."""
    rows, slots = 3 * count // COUNT, 40
    table = plans(1)
    arrays = {name: getattr(table, name) for name in DTYPES}
    arrays["state"] = np.zeros((rows, slots, slots))
    arrays |= {name: np.zeros((rows, slots)) for name in ("prediction", "clean", "noise")}
    arrays["clean_from"] = np.zeros((rows, 2))
    return encode(arrays)


def _program(count: int) -> bytes:
    """A program of so many operators in a row."""
    import torch

    class Row(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(count // 30):
                x = torch.nn.functional.silu(x)
            return x

    data = io.BytesIO()
    torch.export.save(torch.export.export(Row(), (torch.zeros(4, 2),)), data)
    return data.getvalue()


def _onnx(count: int) -> bytes:
    """A graph of so many nodes, each with a weight in a file beside it."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("v0", f"v{count}")]
    weights, nodes = [], []
    for n in range(count):
        weight = TensorProto(name=f"w{n}", data_type=TensorProto.FLOAT, dims=[2])
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=f"data{n}")
        weights.append(weight)
        nodes.append(helper.make_node("Add", [f"v{n}", f"w{n}"], [f"v{n + 1}"]))
    graph = helper.make_graph(nodes, "row", ends[:1], ends[1:], weights)
    return helper.make_model(graph).SerializeToString()


def _graphs_in_graphs(count: int) -> bytes:
    """Branches side by side, each with a graph of its own."""
    from onnx import TensorProto, helper

    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "inner", [], [result])
    branches = {"then_branch": inner, "else_branch": inner}
    nodes = [helper.make_node("If", ["c"], [f"y{n}"], **branches) for n in range(count)]
    return helper.make_model(helper.make_graph(nodes, "outer", [], [])).SerializeToString()


def _ir(count: int) -> bytes:
    layer = '<layer id="{0}" name="l{0}" type="Const" version="opset1"><data size="8"/></layer>'
    edge = '<edge from-layer="{0}" from-port="0" to-layer="{0}" to-port="0"/>'
    layers, edges = ("".join(each.format(n) for n in range(count)) for each in (layer, edge))
    return (
        f'<net name="a" version="11"><layers>{layers}</layers><edges>{edges}</edges></net>'.encode()
    )


def _tokenizer(name: str, make: Callable[[int], Any]) -> Growing:
    def grown(count: int) -> bytes:
        document = json.loads(fakes.word_tokenizer().to_str())
        place = document["model"] if name == "vocab" else document
        old = place[name]
        place[name] = old | make(count) if isinstance(old, dict) else make(count)
        return json.dumps(document).encode()

    return grown


def _added(count: int) -> list[dict[str, Any]]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return [
        {"id": 10 + n, "content": f"<{n}>", **dict.fromkeys(flags, False)} for n in range(count)
    ]


def _old_manifest(member: str) -> Growing:
    """Return a manifest of format 1 in which a list grows."""
    document = targets.old_manifest()
    (entry, *_) = document[member]
    return _numbered(document, member, lambda count: [entry] * count)


def _manifest(count: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        bundle = fakes.make_bundle(Path(folder) / "bundle")
        document = json.loads((bundle / "manifest.json").read_bytes())
    document["left_out"] = [{"name": f"part_{n}", "why": "asked"} for n in range(count)]
    document["optional"] = _map(count, {"a": [1]})
    return json.dumps(document).encode()


def _report(count: int) -> model.Report:
    """Return a report of so many cases, each with rows of its own."""
    few = bench_reports.make_report({"onnx-fp32": 2.0})
    own = {"samples": {"load": few.cases[1].samples["load"]}, "baseline": few.cases[0].id}
    cases = [msgspec.structs.replace(few.cases[1], id=f"case {n}", **own) for n in range(count)]
    rows = [msgspec.structs.replace(few.rows[-1], case=each.id, speedup=None) for each in cases]
    return msgspec.structs.replace(few, cases=[few.cases[0], *cases], rows=rows)


_CHOICE = {
    **{"build": "a", "backend": "b", "version": "1", "device": "cpu", "compute": None},
    **{"threads": 1, "static": False, "arguments": {}, "seconds": 1.0},
    **{"image_psnr": None, "points": None},
}
_RECORD = {
    **{"bundle": "0", "place": "a", "machine": {}, "tuned": "2030", "steps": 4},
    "presets": {"fast": _CHOICE},
}
_CASE = '[[case]]\nname = "a{0}"\nprompt = "a red circle"\nsize = "64x64"\nsteps = 2\n'
_FILE = {"path": "a/b", "size": 3, "sha256": "0" * 64}

GROWING: Mapping[str, tuple[Growing, ...]] = {
    "latentc.runtimes.calls.given_images:read": (_written_out, _png),
    "latentc.runtimes.backends.torch_program:load_program": (_program,),
    "latentc.runtimes.bundle.references:_of_onnx": (_onnx, _graphs_in_graphs),
    "latentc.runtimes.bundle.references:_of_ir": (_ir,),
    "latentc.runtimes.verification.weight_differences:read": (_safetensors, _header),
    "latentc.runtimes.backends.coreml.mil.package_files:_weights": (
        lambda count: b"\n\x1e@model_path/weights/weight.bin" * count,
    ),
    "latentc.runtimes.backends.coreml.mil.package_files:_items": (
        _json(lambda count: {"itemInfoEntries": _map(count, {"path": "weights/b.bin"})}),
    ),
    "latentc.exporter.source.adapters.lora:_parsed": (
        _json(lambda count: {"unet.alpha_pattern": _map(count, 2.0)}),
        _json(lambda count: {f"{n}.lora_alpha": 1 for n in range(count)}),
    ),
    "latentc.exporter.source.model_files:_shards": (
        _json(lambda count: {"weight_map": _map(count, "b.safetensors")}),
        _json(lambda count: {"weight_map": {f"a{n}": f"{n}.safetensors" for n in range(count)}}),
    ),
    "latentc.exporter.source.model_files:read_configuration": (_json(_map),),
    "latentc.runtimes.texts.tokenizer:TextTokenizer.load": (
        _tokenizer("vocab", lambda count: {f"word{n}": 100 + n for n in range(count)}),
        _tokenizer("added_tokens", _added),
    ),
    "latentc.runtimes.texts.prompt_weights:parse": tuple(
        _texts(lambda count, part=part: part * count)  # type: ignore[misc]
        for part in ("a ", "a", "(a:1.1) ", "(", "[a]", "a++ ", "+", "\\(", "(a)+b", ": ", ")")
    ),
    "latentc.runtimes.bundle.recipe:Recipe.load": (
        _numbered(
            {"graph": "model.onnx", "precision": "fp32"}, "profile", lambda n: _map(n, [1, 2, 4])
        ),
    ),
    "latentc.runtimes.bundle.recipe:parse_range": (
        _texts(lambda count: "1:" * count),
        _texts(lambda count: "1" * count),
        _texts(lambda count: "." * count),
    ),
    "latentc.runtimes.presets.records:_load": (
        _numbered(_RECORD, "presets", lambda count: _map(count, _CHOICE)),
        _numbered(_RECORD, "machine", _map),
        _numbered(
            _RECORD, "presets", lambda count: {"a": {**_CHOICE, "arguments": _map(count, 1)}}
        ),
    ),
    "latentc.runtimes.backends.model_cache:_load": (_json(_map),),
    "latentc.runtimes.backends.tensorrt.engine_store:_load": (_json(_map),),
    "latentc.runtimes.bundle.precision:canonical": (
        _texts(lambda count: "fp32" + "".join(f",part{n}=fp16" for n in range(count))),
        _texts(lambda count: "fp32" + "+downsampled-attention" * count),
        _texts(lambda count: "," * count),
    ),
    "latentc.runtimes.sampling.plan:PlanTable.load": (_plans, _slots),
    "latentc.runtimes.sampling.plan_archive:_from_archive": (_archive,),
    "latentc.runtimes.version_1.plans:read_plans": (_old_plans,),
    "latentc.runtimes.version_1.manifest:Manifest.decode": tuple(
        _old_manifest(member)
        for member, value in targets.old_manifest().items()
        if isinstance(value, list)
    ),
    "latentc.runtimes.bundle.trust:_known_hashes": (
        _json(lambda count: {f"/a/{n}": [1, 2, 3, 4, "0" * 64] for n in range(count)}),
    ),
    "latentc.runtimes.backends.coreml.mil.session:packages_of": (
        _json(lambda count: {"packages": [f"{n}.mlpackage" for n in range(count)]}),
    ),
    "latentc.runtimes.storage.npz:read_arrays": (_archive,),
    "latentc.runtimes.storage.npz:read_array": (_array,),
    "latentc.runtimes.bundle.manifest:Manifest.decode": (_manifest,),
    "latentc.exporter.source.model_folders:configured_class": (_json(_map),),
    "latentc.exporter.source.weight_files:check": (_safetensors,),
    "latentc.exporter.calibration_prompts:read_prompts": (
        _texts(lambda count: "a red circle\n" * count),
        _texts(lambda count: "\r\n#\n" * count),
    ),
    "latentc.exporter.source.resolving:_read_index": (
        _json(lambda count: {**targets._INDEX, **_map(count, ["diffusers", "UNet"])}),
    ),
    "latentc.exporter.stored_weights:headers": (_safetensors,),
    "latentc.exporter.source.adapters.textual_inversion:_held": (_safetensors, _pickle),
    "latentc.exporter.source.weight_files:metadata": (_safetensors,),
    "latentc.exporter.source.model_card:_front_matter": (
        _texts(lambda count: "---\nlicense: mit\ntags:\n" + "- a\n" * count + "---\n"),
        _texts(lambda count: "---\n" * count),
    ),
    "latentc.exporter.source.weight_files:content": (_safetensors, _pickle),
    "latentc.exporter.source.adapters.ip_adapter_files:_configured": (
        _json(lambda count: {"vision_config": _map(count)}),
    ),
    "latentc.exporter.verification.judging:read": (
        _json(lambda count: {"judge": {"name": "shapes", "prompts": ["a"] * count, "images": 4}}),
    ),
    "latentc.exporter.artifacts.store:_read_item": (
        _json(lambda count: {"files": [_FILE] * count, "meta": {"entry": "b"}}),
        _json(lambda count: {"files": [_FILE], "meta": _map(count)}),
    ),
    "latentc.benchmarks.bench.model:read": (lambda count: model.encode(_report(count)),),
    "latentc.benchmarks.bench.peers:_answer": (
        _json(lambda count: {"error": None, "seconds": [1.0] * count, "memory": 3}),
    ),
    "latentc.benchmarks.bench.fidelity:Images.load": (_images,),
    "latentc.benchmarks.bench.fidelity:Images.of_file": (_written_out,),
    "latentc.benchmarks.bench.cases:read": (
        _texts(lambda count: "".join(_CASE.format(n) for n in range(count))),
    ),
    "latentc.benchmarks.bench.cases:parse_size": (_texts(lambda count: "1" * count + "x64"),),
    "latentc.benchmarks.bench.pages.html:small": (_png,),
}


def _check(steps: Callable[[int], int], what: object = "") -> None:
    """Compare the steps for `COUNT` and for twice as much."""
    steps(COUNT)  # what is done once: imports, compiled patterns
    least, most = steps(COUNT), steps(2 * COUNT)
    assert most <= MOST * least + 20, (what, least, most)


@pytest.mark.fault("1.6", "work that grows with the square of what a parser reads")
@pytest.mark.parametrize("name", targets.names())
def test_every_parser(name: str) -> None:
    assert name in GROWING, f"{name}: enter in GROWING how each list in its input grows"
    run = targets.target(name).run
    for index, grow in enumerate(GROWING[name]):
        inputs = {count: grow(count) for count in (COUNT, 2 * COUNT)}
        _check(lambda count, of=inputs: steps_of(lambda: run(of[count])), index)  # type: ignore[misc]


@pytest.mark.fault("1.6", "work that grows with the square of a report's cases")
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda report: compare.as_text(compare.compare(report, report)), id="compare"),
        pytest.param(texts.markdown, id="markdown"),
        pytest.param(texts.table_csv, id="csv"),
        pytest.param(
            lambda report: mapped(msgspec.to_builtins(report), Path("no folder")), id="logged"
        ),
    ],
)
def test_what_is_made_of_a_report(
    use: Callable[[model.Report], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentc.benchmarks.bench.statistics.RESAMPLES", 4)
    reports = {count: _report(count // 3) for count in (COUNT, 2 * COUNT)}
    _check(lambda count: steps_of(lambda: use(reports[count])))


@pytest.mark.fault("1.6", "work that grows with the square of a prompt")
@pytest.mark.parametrize("part", ["red ", "(red:1.2) ", "<a> ", "circle++ ", "\u2581", "a,"])
def test_prompts(part: str) -> None:
    """Up to the longest: read with weights, its words written out, in chunks of an encoder."""
    tokenizer = TextTokenizer(fakes.word_tokenizer(), fakes.MAX_LENGTH, "words", {"<a>": "b c"})

    def steps(count: int) -> int:
        times = LONGEST_TEXT // (4 * COUNT * len(part)) * count
        return steps_of(lambda: tokenizer.chunks(parse(part * times), most=LONGEST_TEXT))

    _check(steps)
