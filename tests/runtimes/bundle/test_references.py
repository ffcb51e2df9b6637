"""A graph may make its engine open only what is in the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from latentc.runtimes.backends.backend import BACKENDS, find
from latentc.runtimes.backends.coreml.mil.package_files import MESSAGES
from latentc.runtimes.bundle import references as reading
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.structures import Artifact, Build, File
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import BundleError
from tests.support.fakes import FakeBackend
from tests.support.steps import steps_of

ELSEWHERE = "elsewhere.data"


def external(name: str = "w", location: str = ELSEWHERE) -> TensorProto:
    """Return a tensor whose data lies in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="8")
    return tensor


def model(*nodes: onnx.NodeProto, **fields: Any) -> onnx.ModelProto:
    """Return a model of one node or more."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    made = nodes or (helper.make_node("Identity", ["x"], ["y"]),)
    graph = helper.make_graph(list(made), "g", ends[:1], ends[1:], **fields)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def sparse() -> onnx.SparseTensorProto:
    """Return a sparse tensor whose values lie in another file."""
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    return onnx.SparseTensorProto(values=external("s"), indices=indices, dims=[4])


def nested() -> onnx.GraphProto:
    """Return a graph in which a constant of a node lies in another file."""
    return model(helper.make_node("Constant", [], ["y"], value=external())).graph


def _function() -> onnx.ModelProto:
    made = model()
    body = [helper.make_node("Constant", [], ["b"], value=external())]
    opsets = [helper.make_opsetid("", 18)]
    made.functions.append(helper.make_function("own", "f", ["a"], ["b"], body, opsets))
    return made


def _default_of_a_function() -> onnx.ModelProto:
    made = _function()
    made.functions[0].node[0].ClearField("attribute")
    made.functions[0].attribute_proto.append(helper.make_attribute("c", external()))
    return made


def _training() -> onnx.ModelProto:
    made = model()
    made.training_info.add().algorithm.CopyFrom(nested())
    return made


def _several_graphs() -> onnx.ModelProto:
    """A field that is there twice is merged."""
    first, second = model(initializer=[external()]), model()
    return onnx.ModelProto.FromString(first.SerializeToString() + second.SerializeToString())


def _node(**attributes: Any) -> onnx.ModelProto:
    return model(helper.make_node("Any", ["x"], ["y"], **attributes))


PLACES: dict[str, Callable[[], onnx.ModelProto]] = {
    "initializer": lambda: model(initializer=[external()]),
    "sparse initializer": lambda: model(sparse_initializer=[sparse()]),
    "constant": lambda: _node(value=external()),
    "list of tensors": lambda: _node(values=[external()]),
    "sparse tensor": lambda: _node(value=sparse()),
    "list of sparse tensors": lambda: _node(values=[sparse()]),
    "subgraph": lambda: _node(then_branch=nested()),
    "list of subgraphs": lambda: _node(branches=[nested()]),
    "function": _function,
    "default of a function": _default_of_a_function,
    "training": _training,
    "merged graphs": _several_graphs,
}


def artifact(root: Path, entry: str, files: list[str]) -> Build:
    """Return a build of one component that lists some of the files in `root`."""
    listed = tuple(
        File(name, (root / name).stat().st_size, "0" * 64)
        if not (root / name).is_file()
        else File(name, (root / name).stat().st_size, sha256(root / name))
        for name in files
    )
    return Build("b", "any", "fp32", {"denoiser": Artifact("k", entry, listed, "fp32")})


def entry_of(root: Path, files: list[str], backend: Any) -> Path:
    """Return what a backend is given of the first of these files."""
    bundle: Any = Bundle(Path(os.path.realpath(root)), None)  # type: ignore[arg-type]
    return Path(bundle.entry(artifact(root, files[0], files), "denoiser", backend))


@pytest.mark.fault("1.3", "external data of ONNX graphs that is not in the manifest")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", FakeBackend])
@pytest.mark.parametrize("place", PLACES)
def test_external_data(tmp_path: Path, place: str, backend: Any) -> None:
    (tmp_path / "model.onnx").write_bytes(PLACES[place]().SerializeToString())
    (tmp_path / ELSEWHERE).write_bytes(np.float32([1, 2]).tobytes())
    kind = find(backend) if isinstance(backend, str) else backend
    with pytest.raises(BundleError, match=r"refers to .*elsewhere\.data, which the manifest does"):
        entry_of(tmp_path, ["model.onnx"], kind)
    entry_of(tmp_path, ["model.onnx", ELSEWHERE], kind)


@pytest.mark.fault("1.3", "external data of ONNX graphs that is not in the manifest")
@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "sub/../../x", "*/_ORT_MEM_ADDR_/*", "", "a\0b", "."]
)
def test_places_that_no_file_of_a_bundle_has(tmp_path: Path, location: str) -> None:
    made = model(initializer=[external(location=location)])
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(BundleError, match="refers to"):
        entry_of(tmp_path, ["model.onnx"], FakeBackend)


def _long(number: int) -> bytes:
    """A number in more bytes than it takes."""
    return bytes([number & 0x7F | 0x80, 0x80, 0x00])


@pytest.mark.fault("1.3", "external data of ONNX graphs that is not in the manifest")
def test_unusual_encodings(tmp_path: Path) -> None:
    """Numbers in more bytes than needed, the value before the key, and a value that is there
    twice: the last one counts."""
    key, value = b"location", ELSEWHERE.encode()
    place = b"\x12\x01x" + b"\x12" + bytes([len(value)]) + value + b"\x0a" + _long(8) + key
    tensor = b"\x08\x02" + _long(13 << 3 | 2) + _long(len(place)) + place
    graph = _long(5 << 3 | 2) + _long(len(tensor)) + tensor
    data = b"\x08\x0a" + b"\x3a" + _long(len(graph)) + graph
    understood = onnx.ModelProto.FromString(data).graph.initializer[0].external_data[0]
    assert (understood.key, understood.value) == ("location", ELSEWHERE)
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"refers to .*elsewhere\.data"):
        entry_of(tmp_path, ["model.onnx"], FakeBackend)


@pytest.mark.parametrize(
    "data",
    [b"\x3a", b"\x3a\xff\xff\xff\xff\x7f", b"\xff" * 40, b"\x3b", b"\x3a\x02\x32\x40", b"\x0d"],
)
def test_damaged_graphs(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="not an ONNX graph"):
        entry_of(tmp_path, ["model.onnx"], FakeBackend)


@pytest.mark.fault("1.3", "compiled code in an ONNX graph")
def test_compiled_code_in_a_graph(tmp_path: Path) -> None:
    """A node of ONNX Runtime's names a file, or holds what its provider has compiled."""
    made = model(helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft"))
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(BundleError, match="compiled code"):
        entry_of(tmp_path, ["model.onnx"], find("onnxruntime"))


def test_embedded_weights_are_not_looked_at(tmp_path: Path) -> None:
    """The work is in proportion to the graph."""
    path = tmp_path / "model.onnx"

    def steps(numbers: int, nodes: int = 1) -> int:
        weight = helper.make_tensor(
            "w", TensorProto.FLOAT, [numbers], b"\0" * 4 * numbers, raw=True
        )
        operators = [helper.make_node("Identity", ["x"], ["y"]) for _ in range(nodes)]
        path.write_bytes(model(*operators, initializer=[weight]).SerializeToString())
        return steps_of(lambda: reading.references(path))

    assert steps(1 << 20) - steps(16) < 200
    assert steps(16, 2000) <= 2.2 * steps(16, 1000)


# --- OpenVINO ---------------------------------------------------------------------------------


@pytest.mark.fault("1.3", "a file of weights beside the IR that is not in the manifest")
@pytest.mark.parametrize("kind", ["file", "link", "broken link", "fifo", "folder"])
def test_weights_beside_the_ir(tmp_path: Path, kind: str) -> None:
    """OpenVINO opens it wherever it is there."""
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "model.xml").write_text("<net/>")
    weights = root / "model.bin"
    (tmp_path / "secret").write_bytes(b"1234")
    match kind:
        case "file":
            weights.write_bytes(b"1234")
        case "link":
            weights.symlink_to(tmp_path / "secret")
        case "broken link":
            weights.symlink_to(tmp_path / "nothing")
        case "fifo":
            os.mkfifo(weights)
        case _:
            weights.mkdir()
    with pytest.raises(BundleError, match=r"refers to .*model\.bin, which the manifest does not"):
        entry_of(root, ["model.xml"], find("openvino"))
    if kind == "file":
        entry_of(root, ["model.xml", "model.bin"], find("openvino"))
    elif kind != "broken link":
        with pytest.raises(BundleError, match=r"leads out of the bundle|regular file"):
            entry_of(root, ["model.xml", "model.bin"], find("openvino"))


def ir(head: str = '<?xml version="1.0"?>') -> bytes:
    """Return an IR that adds two weights to two numbers, as OpenVINO writes it."""
    port, dim = '<port id="{}" precision="FP32" names="{}">{}</port>', "<dim>2</dim>"
    layers = (
        ("Parameter", '<data shape="2" element_type="f32"/>', (), ((0, "x"),)),
        ("Const", '<data element_type="f32" shape="2" offset="0" size="8"/>', (), ((0, "w"),)),
        ("Add", '<data auto_broadcast="numpy"/>', ((0, ""), (1, "")), ((2, "y"),)),
        ("Result", "", ((0, ""),), ()),
    )
    written = "".join(
        f'<layer id="{number}" name="{kind}" type="{kind}" version="opset1">{data}'
        + "".join(
            f"<{way}>{''.join(port.format(*each, dim) for each in ports)}</{way}>"
            for way, ports in (("input", inputs), ("output", outputs))
            if ports
        )
        + "</layer>"
        for number, (kind, data, inputs, outputs) in enumerate(layers)
    )
    edges = "".join(
        f'<edge from-layer="{a}" from-port="{b}" to-layer="{c}" to-port="{d}"/>'
        for a, b, c, d in ((0, 0, 2, 0), (1, 0, 2, 1), (2, 2, 3, 0))
    )
    net = f'<net name="m" version="11"><layers>{written}</layers><edges>{edges}</edges></net>'
    return f"{head}{net}".encode()


def _field(number: int, content: bytes) -> bytes:
    """Return a field of a message of Protocol Buffers."""
    return (
        onnx.StringStringEntryProto(value=content)
        .SerializeToString()
        .replace(b"\x12", bytes([number << 3 | 2]), 1)
    )


_ADDING = helper.make_node("Add", ["x", "w"], ["y"])
# What OpenVINO reads by what it holds: name, content, and the file that it opens then.
DISGUISED: dict[str, tuple[str, bytes, str]] = {
    "ONNX as IR": (
        "model.xml",
        model(_ADDING, initializer=[external("w")]).SerializeToString(),
        ELSEWHERE,
    ),
    "IR in the name of an ONNX graph's maker": (
        "model.onnx",
        b"\x08\x0a" + _field(2, ir()),
        "model.bin",
    ),
    "IR in a text of an ONNX graph": ("model.onnx", b"\x08\x0a" + _field(6, ir()), "model.bin"),
    "IR in a field that ONNX does not have": ("model.onnx", _field(15, ir()), "model.bin"),
}


@pytest.mark.fault("1.3", "a graph of another kind than its name says")
@pytest.mark.parametrize("how", DISGUISED)
def test_graphs_of_other_kinds_than_their_names(tmp_path: Path, how: str) -> None:
    """OpenVINO does read them, and the file that each refers to, which nobody has checked."""
    openvino = pytest.importorskip("openvino")
    name, content, opened = DISGUISED[how]
    (tmp_path / name).write_bytes(content)
    (tmp_path / opened).write_bytes(np.float32([7, 8]).tobytes())
    core = openvino.Core()
    given = core.compile_model(core.read_model(tmp_path / name), "CPU")([np.ones(2, np.float32)])
    assert given[0].tolist() == [8, 9]
    with pytest.raises(BundleError, match=r"refers to|not an OpenVINO IR"):
        entry_of(tmp_path, [name], find("openvino"))


@pytest.mark.fault("1.3", "an IR that declares entities")
@pytest.mark.parametrize(
    "content",
    [
        ir(head='<!DOCTYPE net [<!ENTITY e SYSTEM "file:///etc/passwd">]>'),
        ir(head='<?xml version="1.0"?>\n\n<!-- a --><!DOCTYPE net [<!ENTITY e "2">]>'),
        ir(head='<?xml version="1.0"?><!DOCTYPE net SYSTEM "http://localhost/net.dtd">'),
        ir(head='<!DOCTYPE net [<!ENTITY e "2">]>').decode().encode("utf-16"),
    ],
    ids=["external", "further down", "elsewhere", "two bytes a character"],
)
def test_entities(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.xml").write_bytes(content)
    (tmp_path / "model.bin").write_bytes(np.float32([7, 8]).tobytes())
    with pytest.raises(BundleError, match="not an OpenVINO IR"):
        entry_of(tmp_path, ["model.xml", "model.bin"], find("openvino"))


def test_an_ordinary_ir(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_bytes(ir())
    (tmp_path / "model.bin").write_bytes(np.float32([7, 8]).tobytes())
    entry_of(tmp_path, ["model.xml", "model.bin"], find("openvino"))


@pytest.mark.fault("1.3", "an entry of another framework")
@pytest.mark.parametrize(
    "name", ["model.pdmodel", "model.pb", "model.tflite", "model.ort", "model"]
)
@pytest.mark.parametrize("backend", [n for n in BACKENDS if find(n).targets])
def test_entries_of_other_kinds(tmp_path: Path, name: str, backend: str) -> None:
    """OpenVINO takes the name's end for a framework's, and opens that one's files."""
    (tmp_path / name).write_bytes(b"1")
    with pytest.raises(BundleError, match="expected a file"):
        entry_of(tmp_path, [name], find(backend))


# --- Core ML and TensorRT ---------------------------------------------------------------------


def ml_program(weights: str, where: str = "attribute") -> Any:
    """Return a Core ML model with the name of a file of weights in a place."""
    from coremltools.proto import Model_pb2

    made = Model_pb2.Model(specificationVersion=8)
    function = made.mlProgram.functions["main"]
    operation = function.block_specializations["CoreML8"].operations.add(type="const")
    value = {
        "attribute": lambda: operation.attributes["val"],
        "argument": lambda: operation.inputs["x"].arguments.add().value,
        "tuple": lambda: operation.attributes["val"].immediateValue.tuple.values.add(),
        "function": lambda: function.attributes["val"],
        "type": lambda: operation.outputs.add().type.tensorType.attributes["val"],
        "block": lambda: operation.blocks.add().operations.add().attributes["val"],
    }[where]()
    value.blobFileValue.fileName = weights
    return made


def package(
    root: Path,
    items: dict[str, str] | None = None,
    weights: str = "@model_path/weights/weight.bin",
) -> list[str]:
    """Make a package of a graph and weights; return its files."""
    folder = root / "model.mlpackage" / "Data" / "com.apple.CoreML"
    (folder / "weights").mkdir(parents=True)
    (folder / "model.mlmodel").write_bytes(ml_program(weights).SerializeToString())
    (folder / "weights" / "weight.bin").write_bytes(b"2")
    paths = items or {"a": "com.apple.CoreML/model.mlmodel", "b": "com.apple.CoreML/weights"}
    document = {"itemInfoEntries": {key: {"path": path} for key, path in paths.items()}}
    (root / "model.mlpackage" / "Manifest.json").write_text(json.dumps(document))
    (root / "model.json").write_text(json.dumps({"packages": ["model.mlpackage"]}))
    files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    return sorted(files, key=lambda name: name != "model.json")


@pytest.mark.fault("1.3", "files of a Core ML package that are not in the manifest")
@pytest.mark.parametrize("backend", ["coreml", "coreml-reference"])
def test_files_of_packages(tmp_path: Path, backend: str) -> None:
    files = package(tmp_path)
    kind = find(backend)
    entry_of(tmp_path, files, kind)
    for lacking in files[1:]:
        with pytest.raises(BundleError, match="which the manifest does not list"):
            entry_of(tmp_path, [name for name in files if name != lacking], kind)
    link = tmp_path / "model.mlpackage/Data/com.apple.CoreML/more"
    link.symlink_to("/usr")
    with pytest.raises(BundleError, match=r"refers to .*more, which the manifest does not list"):
        entry_of(tmp_path, files, kind)


@pytest.mark.fault("1.3", "files of a Core ML package that are not in the manifest")
@pytest.mark.parametrize("path", ["../../../secret", "/etc/passwd", "a\\b", 5, "missing"])
def test_packages_that_name_files_elsewhere(tmp_path: Path, path: Any) -> None:
    files = package(tmp_path, {"a": path})
    with pytest.raises(BundleError, match=r"the manifest does not list|not a Core ML package"):
        entry_of(tmp_path, files, find("coreml-reference"))


@pytest.mark.fault("1.3", "files of a Core ML package that are not in the manifest")
@pytest.mark.parametrize(
    "name",
    ["@model_path/../../../secret", "/etc/passwd", "weights/weight.bin", "@model_path/missing.bin"],
)
@pytest.mark.parametrize("where", ["attribute", "argument", "tuple", "function", "type", "block"])
def test_weights_that_a_program_names(tmp_path: Path, name: str, where: str) -> None:
    files = package(tmp_path)
    model = tmp_path / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    model.write_bytes(ml_program("@model_path/weights/weight.bin", where).SerializeToString())
    entry_of(tmp_path, files, find("coreml-reference"))
    model.write_bytes(ml_program(name, where).SerializeToString())
    with pytest.raises(BundleError, match=r"not inside of its package|the manifest does not list"):
        entry_of(tmp_path, files, find("coreml-reference"))


@pytest.mark.fault("1.3", "files of a Core ML package that are not in the manifest")
def test_models_that_are_linked_to_others(tmp_path: Path) -> None:
    files = package(tmp_path)
    linked = ml_program("@model_path/weights/weight.bin")
    linked.linkedModel.linkedModelFile.linkedModelFileName.defaultValue = "secret"
    path = tmp_path / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    path.write_bytes(linked.SerializeToString())
    with pytest.raises(BundleError, match="not an ML Program"):
        entry_of(tmp_path, files, find("coreml-reference"))


def test_the_messages_are_core_mls() -> None:
    """Every way to the name of a file is in the table."""
    from coremltools.proto import Model_pb2

    messages: dict[str, Any] = {}

    def collect(message: Any) -> None:
        if message.full_name not in messages:
            messages[message.full_name] = message
            for field in message.fields:
                if field.message_type is not None:
                    collect(field.message_type)

    collect(Model_pb2.Model.DESCRIPTOR.fields_by_name["mlProgram"].message_type)
    leading = {next(name for name in messages if name.endswith(".BlobFileValue"))}
    while True:
        more = {
            name
            for name, message in messages.items()
            if any(f.message_type and f.message_type.full_name in leading for f in message.fields)
        }
        if more <= leading:
            break
        leading |= more
    for name in leading:
        own = MESSAGES[name.rpartition(".")[2]]
        ways = {
            field.number: field.message_type.full_name.rpartition(".")[2]
            for field in messages[name].fields
            if field.message_type and field.message_type.full_name in leading
        }
        assert own == ways, name


@pytest.mark.fault("1.3", "TensorRT's recipe that is not in the manifest")
def test_recipes(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model().SerializeToString())
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(BundleError, match=r"refers to .*recipe\.json"):
        entry_of(tmp_path, ["model.onnx"], find("tensorrt"))
    entry_of(tmp_path, ["model.onnx", "recipe.json"], find("tensorrt"))
