"""PyTorch's program archives: what they may hold, and that nothing in them is ever run.

Each hostile archive tries to make a file. Loaded by `torch.export.load`, most of them do.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentc.exporter.targets.torch import lowering as target
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends import torch_archive, torch_program
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import BundleError, InputError, LatentcError

SIZES = TensorSpec("float32", ("batch", 4, "height", "width"))
COMPONENT = Component("denoiser", "denoiser", {"sample": SIZES, "scale": SIZES}, {"out": SIZES})
GRAPH = "models/model.json"
Members = dict[str, bytes]


class Small(torch.nn.Module):
    """A convolution, an attention mask, a list of results and symbolic sizes."""

    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.convolution = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.register_buffer("bias", torch.arange(4.0)[None, :, None, None], persistent=False)

    def forward(self, sample: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        """Give back something of the shape of `sample`."""
        first, second = self.convolution(sample).chunk(2, dim=1)
        unlikely = torch.full_like(first, float("-inf"))
        mixed = torch.where(second > 0, first, unlikely).clamp(min=-1)
        large = torch.nn.functional.interpolate(mixed, scale_factor=2.0)
        small = large.reshape(sample.shape[0], 4, -1).mean(-1)[:, :, None, None]
        return (mixed * scale + self.bias + small,)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a good archive, as the exporter writes it."""
    dims = {axis: torch.export.Dim(name, max=63) for axis, name in enumerate("bchw") if axis}
    dims = {0: torch.export.Dim("batch", max=63), 2: 2 * torch.export.Dim("h", max=9), 3: dims[3]}
    given = {name: torch.randn(2, 4, 8, 6) for name in ("sample", "scale")}
    shapes = dict.fromkeys(given, dims)
    made = torch.export.export(Small().eval(), (), kwargs=given, dynamic_shapes=shapes)
    folder = tmp_path_factory.mktemp("program")
    return folder / target.lower(made, COMPONENT, folder)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the file that hostile archives try to make."""
    return tmp_path / "made_by_the_archive"


def members_of(path: Path) -> Members:
    """Return an archive's members by their names below the root."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def written(members: Members, path: Path, root: str = "model/") -> Path:
    """Write an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{root}{name}", data)
    return path


def edited(
    members: Members, change: Callable[[Any], None], name: str = "models/model.json"
) -> None:
    """Change one of the documents."""
    document = json.loads(members[name])
    change(document)
    members[name] = json.dumps(document).encode()


def load_and_run(path: Path) -> np.ndarray:
    """Load the archive as a session does, and run it."""
    feeds = {name: np.full((2, 4, 8, 6), 0.5, np.float32) for name in COMPONENT.inputs}
    with engines.get("torch").open(path, COMPONENT) as session:
        return session.run(feeds)["out"]


class Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Say what to call."""
        return os.mkdir, (str(self.mark),)


def python(mark: Path) -> str:
    """Return an expression of Python that makes the file."""
    return f"__import__('os').mkdir({str(mark)!r})"


# --- what is right --------------------------------------------------------------------------


def test_the_same_numbers_as_pytorchs_own_loader(program: Path) -> None:
    feeds = {name: torch.randn(3, 4, 10, 7) for name in COMPONENT.inputs}
    with torch.inference_mode():
        expected = torch.export.load(program).module()(**feeds)[0]
        loaded = torch_program.load_program(torch, program, "cpu")
        found = loaded.module(*(feeds[name] for name in loaded.inputs))[0]
    assert torch.equal(expected, found)


def test_a_real_build_gives_the_same_numbers(sd_bundle: Path) -> None:
    """The denoiser of an exported pipeline, bit for bit."""
    manifest = Manifest.load(sd_bundle)
    build = next(each for each in manifest.builds if each.target == "torch")
    component = manifest.component("denoiser")
    path = sd_bundle / build.artifacts[component.name].entry
    loaded = torch_program.load_program(torch, path, "cpu")
    symbols = {"batch": 2, "height": 8, "width": 12, "sequence": 77}
    feeds = {
        name: torch.rand([n if isinstance(n, int) else symbols[n] for n in spec.shape])
        for name, spec in component.inputs.items()
    }
    with torch.inference_mode():
        expected = torch.export.load(path).module()(**feeds)
        found = loaded.module(*(feeds[name] for name in loaded.inputs))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("shape", [(64, 4, 8, 6), (2, 4, 20, 6), (2, 4, 9, 6)])
def test_sizes_that_it_was_not_captured_for(program: Path, shape: tuple[int, ...]) -> None:
    feeds = {name: np.zeros(shape, np.float32) for name in COMPONENT.inputs}
    with (
        engines.get("torch").open(program, COMPONENT) as session,
        pytest.raises(InputError, match=r"'sample': this build was made for .* in dimension"),
    ):
        session.run(feeds)


@pytest.mark.fault("1.1", "an archive holds a pickle")
def test_the_exporter_writes_no_pickle(program: Path) -> None:
    """The inputs that were traced with, which PyTorch keeps as one, are left out."""
    assert members_of(program)["data/sample_inputs/model.pt"] == b""


def test_numbers_of_dtypes_and_formats() -> None:
    from torch._export.serde import schema, serialize

    dtypes = serialize._SERIALIZE_TO_TORCH_DTYPE
    assert all(dtypes[n] is getattr(torch, name) for n, name in torch_program.DTYPES.items())
    formats = serialize._SERIALIZE_TO_TORCH_MEMORY_FORMAT
    assert all(formats[n] is getattr(torch, name) for n, name in torch_program.FORMATS.items())
    assert schema.SCHEMA_VERSION[0] == torch_archive.SCHEMA


@pytest.mark.fault("1.1", "operators that open files or call functions")
@pytest.mark.parametrize(
    "name",
    [
        *("torch.ops.aten.from_file.default", "torch.ops.aten.set_.source_Storage"),
        *("torch.ops.aten.resize_.default", "torch.os.system", "torch.load", "builtins.exec"),
        *("torch.ops.load_library", "torch.ops.aten.__class__.__base__", "_operator.methodcaller"),
        *("torch.ops.prim.Print.default", "torch.ops.higher_order.cond", "math.factorial"),
        *("torch.ops.aten.add.out", "torch.ops.aten.add", "#x:y", "torch.ops.aten.add.__call__"),
    ],
)
def test_what_a_program_may_not_call(name: str) -> None:
    assert torch_program.find_operator(torch, name) is None


@pytest.mark.fault("1.1", "operators that write and read beyond the end of a tensor")
@pytest.mark.parametrize(
    "name",
    [
        *("max_pool2d_with_indices_backward.default", "_adaptive_avg_pool2d_backward.default"),
        *("native_layer_norm_backward.default", "native_group_norm_backward.default"),
        *("convolution_backward.default", "avg_pool2d_backward.default"),
        *("_native_batch_norm_legit_no_training.default", "_native_batch_norm_legit.no_stats"),
    ],
)
def test_operators_that_trust_what_they_are_given(name: str) -> None:
    """The first one ends the process, or worse: its indices say where it writes."""
    operator, _, overload = name.partition(".")
    assert torch.Tag.core in getattr(getattr(torch.ops.aten, operator), overload).tags
    assert torch_program.find_operator(torch, f"torch.ops.aten.{name}") is None


class Attention(torch.nn.Module):
    """Attention over twice as many keys and values as queries."""

    def forward(self, sample: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        """Give back something of the shape of `sample`."""
        more = torch.cat([sample, scale], 2)
        return (torch.nn.functional.scaled_dot_product_attention(sample, more, more),)


@pytest.mark.fault("1.1", "operators that write and read beyond the end of a tensor")
def test_attention_reads_no_further_than_its_values(tmp_path: Path) -> None:
    """PyTorch's kernel reads a value for each key, whether it is there or not."""
    given = {name: torch.randn(2, 4, 8, 6) for name in ("sample", "scale")}
    exported = torch.export.export(Attention().eval(), (), kwargs=given)
    path = tmp_path / target.lower(exported, COMPONENT, tmp_path)

    def run(of: Path) -> torch.Tensor:
        module = torch_program.load_program(torch, of, "cpu").module
        with torch.inference_mode():
            return module(*given.values())[0]

    assert torch.equal(run(path), Attention()(**given)[0])
    members = members_of(path)

    def shorten(document: Any) -> None:
        (node,) = (
            node
            for node in document["graph_module"]["graph"]["nodes"]
            if "scaled_dot_product_attention" in node["target"]
        )
        node["inputs"][2]["arg"]["as_tensor"]["name"] = "sample"

    edited(members, shorten)
    with pytest.raises(BundleError, match="attention of tensors that do not fit"):
        run(written(members, tmp_path / "hostile.pt2"))


# --- what is hostile ------------------------------------------------------------------------

Attack = Callable[[Members, Path], None]


def expression(members: Members, mark: Path) -> None:
    """SymPy evaluates what it parses."""

    def change(document: Any) -> None:
        for size in document["graph_module"]["graph"]["sym_int_values"].values():
            size["as_expr"]["expr_str"] = python(mark)

    edited(members, change)


def guard(members: Members, mark: Path) -> None:
    """Guards are Python code."""
    edited(members, lambda document: document.update(guards_code=[f"{python(mark)} or True"]))


def weights_of_old(members: Members, mark: Path) -> None:
    members["data/weights/model.pt"] = pickle.dumps(Pickled(mark))


def constants_of_old(members: Members, mark: Path) -> None:
    members["data/constants/model.pt"] = pickle.dumps(Pickled(mark))


def constant(prefix: str) -> Attack:
    """A constant that is an object of a kind."""

    def attack(members: Members, mark: Path) -> None:
        members[f"data/constants/{prefix}0"] = pickle.dumps(Pickled(mark))
        name = "data/constants/model_constants_config.json"
        (payload,) = json.loads(members[name])["config"].values()
        payload |= {"path_name": f"{prefix}0", "use_pickle": prefix == "tensor_"}
        payload["tensor_meta"]["dtype"] = 1
        edited(members, lambda document: document["config"].update(x=payload), name)

    return attack


def weight(members: Members, mark: Path) -> None:
    """A weight that is marked as a pickle."""
    members["data/weights/weight_0"] = pickle.dumps(Pickled(mark))
    name = "data/weights/model_weights_config.json"
    edited(members, lambda d: d["config"]["convolution.weight"].update(use_pickle=True), name)


def sample_inputs(members: Members, mark: Path) -> None:
    members["data/sample_inputs/model.pt"] = pickle.dumps(Pickled(mark))


def call(name: str, **arguments: Any) -> Attack:
    """A node that calls a function by its name."""

    def attack(members: Members, mark: Path) -> None:
        def change(document: Any) -> None:
            graph = document["graph_module"]["graph"]
            inputs: list[Any] = [
                {"name": argument, "arg": {kind: value}, "kind": 1}
                for argument, (kind, value) in arguments.items()
            ]
            for each in inputs:
                if "as_string" in each["arg"]:
                    each["arg"]["as_string"] = each["arg"]["as_string"].format(mark=str(mark))
            outputs = [{"as_tensor": {"name": "called"}}]
            node = {"target": name, "inputs": inputs, "outputs": outputs, "name": "called"}
            graph["nodes"].insert(0, graph["nodes"][0] | node)
            graph["tensor_values"]["called"] = next(iter(graph["tensor_values"].values()))

        edited(members, change)

    return attack


def named_code(members: Members, mark: Path) -> None:
    """A name that stands in the Python code which torch.fx makes of a graph."""
    text = members["models/model.json"].decode()
    code = f"x = {python(mark)}; y".replace('"', "'")
    members["models/model.json"] = text.replace('"conv2d"', json.dumps(code)).encode()


def imported_module(members: Members, mark: Path) -> None:
    """The description of the arguments names an enumeration of a module, which is imported."""
    (mark.parent / "hostile_module.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")

    def change(document: Any) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        _, tree = json.loads(signature["in_spec"])
        key = {"__enum__": True, "fqn": "hostile_module:Kind", "name": "A"}
        tree["children_spec"][1]["context"] = json.dumps([key, "scale"])
        signature["in_spec"] = json.dumps([1, tree])

    edited(members, change)


from_file = call(
    "torch.ops.aten.from_file.default",
    filename=("as_string", "{mark}"),
    shared=("as_bool", True),
    size=("as_int", 8),
)
# By name, the fault that it is an instance of ("": it was refused before, too).
ATTACKS: dict[str, tuple[str, Attack]] = {
    "expression": ("symbolic expressions are evaluated", expression),
    "guard": ("guards are run", guard),
    "weights of old": ("weights of the older layout are unpickled", weights_of_old),
    "constants of old": ("constants of the older layout are unpickled", constants_of_old),
    "opaque object": ("constants that are objects are unpickled", constant("opaque_obj_")),
    "custom object": ("", constant("custom_obj_")),
    "pickled constant": ("", constant("tensor_")),
    "pickled weight": ("", weight),
    "sample inputs": ("", sample_inputs),
    "mkdir": (
        "",
        call("torch.os.mkdir", path=("as_string", "{mark}")),
    ),
    "exec": (
        "",
        call("torch.builtins.exec", code=("as_string", "import os; os.mkdir({mark!r})")),
    ),
    "file of an operator": ("operators that open files or call functions", from_file),
    "name": ("", named_code),
    "import": ("the description of arguments imports modules", imported_module),
}
HARMLESS_HERE = {"expression", "guard", "name"}  # what nothing reads


def _cases() -> list[Any]:
    return [
        pytest.param(name, attack, id=name, marks=[pytest.mark.fault("1.1", clause)] * bool(clause))
        for name, (clause, attack) in ATTACKS.items()
    ]


@pytest.mark.parametrize(("name", "attack"), _cases())
def test_nothing_is_run(
    program: Path,
    tmp_path: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    attack: Attack,
) -> None:
    """Refused; or loaded and run as if what is hostile were not there."""
    monkeypatch.syspath_prepend(tmp_path)
    members = members_of(program)
    attack(members, mark)
    path = written(members, tmp_path / "model.pt2")
    if name in HARMLESS_HERE:
        np.testing.assert_array_equal(load_and_run(path), load_and_run(program))
    else:
        with pytest.raises(BundleError):
            load_and_run(path)
    assert not mark.exists()


@pytest.mark.fault("1.1", "archives of older layouts")
def test_an_older_layout(tmp_path: Path, mark: Path) -> None:
    """PyTorch 2.7 and before wrote an archive like this: no folder, and pickles throughout."""
    pickled = pickle.dumps(Pickled(mark))
    names = ("state_dict", "constants", "example_inputs")
    members = {f"serialized_{name}.pt": pickled for name in names}
    members |= {"version": b"8.20", "serialized_exported_program.json": b"{}"}
    path = written(members, tmp_path / "model.pt2", root="")
    with pytest.raises(BundleError):
        load_and_run(path)
    assert not mark.exists()


@pytest.mark.fault("1.1", "members that are none of a program's")
@pytest.mark.parametrize(
    "name",
    [
        *("model/extra/notes.txt", "model/data/aotinductor/model/x.so", "model/data/weights/x"),
        *("model/data/constants/tensor_0.pt", "model/models/other.json", "other/models/model.json"),
        *("/etc/passwd", "model/../model/x", "model\\models\\model.json", "MODEL/x", "model/"),
        *("model/Models/model.json", "model/data/weights/weight_00", "model/models/model.json"),
        *("model/data/weights/weight_0\0.pt", "model//models/model.json"),
    ],
)
def test_members_that_are_none_of_a_programs(program: Path, tmp_path: Path, name: str) -> None:
    """Among them the name of one that is there already: two readers may take different ones."""
    path = written(members_of(program), tmp_path / "model.pt2")
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that are there already
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(BundleError):
        load_and_run(path)


@pytest.mark.fault("1.1", "compressed and overlapping members")
def test_members_that_are_larger_than_the_file(program: Path, tmp_path: Path) -> None:
    members = members_of(program)
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            kind = zipfile.ZIP_DEFLATED if name == "models/model.json" else zipfile.ZIP_STORED
            archive.writestr(f"model/{name}", data, kind)
    with pytest.raises(BundleError, match="is compressed"):
        load_and_run(path)
    inner = zipfile.ZipInfo("model/data/weights/weight_999")
    inner.CRC = inner.compress_size = inner.file_size = 0
    local = inner.FileHeader()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"model/{name}", data)
        archive.writestr("model/data/weights/weight_998", local)
        outer = archive.filelist[-1]
        inner.header_offset = outer.header_offset + 30 + len(outer.filename)
        archive.filelist.append(inner)
    with pytest.raises(BundleError, match="overlap"):
        load_and_run(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("byteorder", b"big"),
        ("archive_format", b"zip"),
        ("archive_version", b"1"),
        ("models/model.json", b"{}"),
        ("models/model.json", b"[" * 100_000),
        ("models/model.json", b"\xff\xfe"),
        ("data/weights/model_weights_config.json", b'{"config": {}}'),
        ("data/weights/weight_0", b"1"),
    ],
)
def test_damaged(program: Path, tmp_path: Path, name: str, data: bytes) -> None:
    path = written(members_of(program) | {name: data}, tmp_path / "model.pt2")
    with pytest.raises(BundleError):
        load_and_run(path)


def meta(field: str, value: Any) -> Callable[[Any], None]:
    """Change what a weight's document says of its tensor."""

    def change(document: Any) -> None:
        document["config"]["convolution.weight"]["tensor_meta"][field] = value

    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sizes", [{"as_int": 1 << 40}] * 4),
        ("sizes", [{"as_int": -1}] * 4),
        ("sizes", [{"as_int": 1}] * 100_000),
        ("strides", [{"as_int": 1 << 60}] * 4),
        ("storage_offset", {"as_int": 10_000}),
        ("storage_offset", {"as_expr": {"expr_str": "1"}}),
        ("dtype", 99),
        ("dtype", 8),
    ],
)
def test_tensors_that_are_not_as_large_as_they_say(
    program: Path, tmp_path: Path, field: str, value: Any
) -> None:
    members = members_of(program)
    edited(members, meta(field, value), "data/weights/model_weights_config.json")
    with pytest.raises(LatentcError):
        load_and_run(written(members, tmp_path / "model.pt2"))


def test_cut_short(program: Path, tmp_path: Path) -> None:
    data = program.read_bytes()
    for kept in range(0, len(data), max(1, len(data) // 40)):
        path = tmp_path / "model.pt2"
        path.write_bytes(data[:kept])
        with pytest.raises(BundleError):
            load_and_run(path)


@pytest.mark.fault("1.1", "what was checked is not what is loaded")
def test_a_file_that_is_replaced_while_it_is_loaded(
    program: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened once: what is checked is what is loaded."""
    members = members_of(program)
    call("torch.os.mkdir", path=("as_string", "{mark}"))(members, mark)
    hostile = written(members, tmp_path / "hostile.pt2")
    path = tmp_path / "model.pt2"
    path.write_bytes(program.read_bytes())
    opening = zipfile.ZipFile

    def replaced(*arguments: Any, **options: Any) -> zipfile.ZipFile:
        made = opening(*arguments, **options)
        if path.exists() and hostile.exists():
            os.replace(hostile, path)
        return made

    monkeypatch.setattr(zipfile, "ZipFile", replaced)
    found = load_and_run(path)
    monkeypatch.undo()
    np.testing.assert_array_equal(found, load_and_run(program))
    assert not mark.exists()
