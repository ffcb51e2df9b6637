"""The archive of a ``torch`` build (``.pt2``), read without running anything that stands in it.

`torch.export.load` is not used: PyTorch says that it must never see a file of unknown origin, and
it unpickles, evaluates expressions (SymPy's, and the Python code of guards) and looks up functions
by name in half a dozen places. The archive is a zip of JSON documents and raw tensors, which are
read here: JSON into the structures below, which hold what a graph is made of and nothing that
would have to be evaluated, and tensors as bytes. `latentc.runtimes.backends.torch_program` makes a
module of them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from latentc.runtimes.errors import BundleError
from latentc.runtimes.storage.files import open_regular
from latentc.runtimes.storage.parsing import parsing

_WHAT = "a program archive"
SCHEMA = 8  # torch._export.serde.schema.SCHEMA_VERSION[0] of PyTorch 2.13
_MODEL = "models/model.json"
_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_CONFIGS = (f"{_WEIGHTS}model_weights_config.json", f"{_CONSTANTS}model_constants_config.json")
_EMPTY = ("data/sample_inputs/model.pt",)  # a pickle, where it is not empty
# What these must say: the layout, its version, and the order of the bytes of a number.
_STATED: Mapping[str, bytes] = {
    "archive_format": b"pt2",
    "archive_version": b"0",
    "byteorder": b"little",
}
_IGNORED = (".data/version", ".data/serialization_id")
_NEEDED = {_MODEL, *_CONFIGS, *_STATED}
_TENSOR = re.compile(r"data/(?:weights/weight|constants/tensor)_(?:0|[1-9]\d{0,6})")
_ROOT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_MEMBERS = 1 << 17
_MOST_JSON = 256 << 20  # bytes; a large denoiser has 12 MiB
_LOCAL_HEADER = 30  # bytes of a zip member's own header, without its name
_CHUNK = 16 << 20
_NAMES_IN_UTF8 = 1 << 11
_SIZES_BEHIND = 1 << 3
_Document = TypeVar("_Document")


class Expression(msgspec.Struct):
    """A symbolic number, as SymPy writes it. It is matched, never evaluated."""

    expr_str: str


class Size(msgspec.Struct, forbid_unknown_fields=True):
    """A number, or a symbolic one."""

    as_int: int | None = None
    as_expr: Expression | None = None


class Device(msgspec.Struct):
    """Where a tensor was; it goes where the session runs."""

    type: str


class TensorMeta(msgspec.Struct):
    """Dtype (a number of PyTorch's), shape, strides and offset in elements."""

    dtype: int
    sizes: list[Size]
    strides: list[Size]
    storage_offset: Size


class Payload(msgspec.Struct):
    """Where a weight's or a constant's bytes are."""

    path_name: str
    use_pickle: bool
    tensor_meta: TensorMeta


class Payloads(msgspec.Struct):
    """Weights or constants by their names."""

    config: dict[str, Payload]


class Named(msgspec.Struct):
    """A tensor of the graph."""

    name: str


class Symbolic(msgspec.Struct, forbid_unknown_fields=True):
    """A number of the graph: by its name, or itself."""

    as_name: str | None = None
    as_int: int | None = None
    as_float: float | str | None = None
    as_bool: bool | None = None


class Optional(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor of the graph, or none."""

    as_tensor: Named | None = None
    as_none: bool | None = None


class Argument(msgspec.Struct, forbid_unknown_fields=True):
    """An argument or a result; exactly one field is set. PyTorch has more kinds: graphs, operators
    and objects, which are refused."""

    as_none: bool | UnsetType = UNSET
    as_tensor: Named | UnsetType = UNSET
    as_tensors: list[Named] | UnsetType = UNSET
    as_optional_tensors: list[Optional] | UnsetType = UNSET
    as_int: int | UnsetType = UNSET
    as_ints: list[int] | UnsetType = UNSET
    as_float: float | str | UnsetType = UNSET
    as_floats: list[float | str] | UnsetType = UNSET
    as_bool: bool | UnsetType = UNSET
    as_bools: list[bool] | UnsetType = UNSET
    as_string: str | UnsetType = UNSET
    as_sym_int: Symbolic | UnsetType = UNSET
    as_sym_ints: list[Symbolic] | UnsetType = UNSET
    as_sym_float: Symbolic | UnsetType = UNSET
    as_sym_bool: Symbolic | UnsetType = UNSET
    as_scalar_type: int | UnsetType = UNSET
    as_memory_format: int | UnsetType = UNSET
    as_layout: int | UnsetType = UNSET
    as_device: Device | UnsetType = UNSET

    def parted(self) -> tuple[str, Any]:
        """Return the field that is set, and its value.

        Raises:
            ValueError: none is, or several are.
        """
        fields = [
            (name, value)
            for name in self.__struct_fields__
            if (value := getattr(self, name)) is not UNSET
        ]
        if len(fields) != 1:
            raise ValueError(f"an argument of {len(fields)} kinds")
        return fields[0]


class Input(msgspec.Struct):
    """An argument of a node; `kind` 2 passes it by its name."""

    name: str
    arg: Argument
    kind: int | None = None


class Node(msgspec.Struct):
    """A call of an operator."""

    target: str
    inputs: list[Input]
    outputs: list[Argument]


class Graph(msgspec.Struct):
    """The nodes, in an order that they can run in; what stands for which input is in the
    signature."""

    nodes: list[Node]
    outputs: list[Argument]
    tensor_values: dict[str, TensorMeta]


class ParameterSpec(msgspec.Struct):
    """An input that is a parameter."""

    arg: Named
    parameter_name: str


class BufferSpec(msgspec.Struct):
    """An input that is a buffer; those that are not persistent stand among the constants."""

    arg: Named
    buffer_name: str


class ConstantSpec(msgspec.Struct):
    """An input that is a constant."""

    arg: Named
    tensor_constant_name: str


class ValueSpec(msgspec.Struct):
    """An input or an output of a call."""

    arg: Argument


class InputSpec(msgspec.Struct, forbid_unknown_fields=True):
    """An `InputSpec` says what stands for one input of the graph; no object or token can."""

    user_input: ValueSpec | None = None
    parameter: ParameterSpec | None = None
    buffer: BufferSpec | None = None
    tensor_constant: ConstantSpec | None = None


class OutputSpec(msgspec.Struct, forbid_unknown_fields=True):
    """One of the graph's outputs; changes of inputs and weights are refused."""

    user_output: ValueSpec


class Signature(msgspec.Struct):
    """A signature says what the graph's inputs and outputs are, in their order."""

    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]


class CallSignature(msgspec.Struct):
    """A `CallSignature` says how a module is called: `in_spec` is a JSON document (see `Tree`)."""

    in_spec: str


class Call(msgspec.Struct):
    """A module of the program; the first one, without a name, is the whole."""

    fqn: str
    signature: CallSignature | None = None


class GraphModule(msgspec.Struct):
    """The graph, and how it is called."""

    graph: Graph
    signature: Signature
    module_call_graph: list[Call]


class Range(msgspec.Struct):
    """The smallest and the largest value of a symbol."""

    min_val: int | None
    max_val: int | None


class Version(msgspec.Struct):
    """A `Version` holds the major version of the document's schema."""

    major: int


class Program(msgspec.Struct):
    """The document ``models/model.json``, as far as it is used. What else stands in it (guards as
    Python code, where each node came from, hints) is not read."""

    graph_module: GraphModule
    range_constraints: dict[str, Range]
    schema_version: Version


class Tree(msgspec.Struct):
    """Arguments that belong together."""

    type: str | None
    context: str | None
    children_spec: list[Tree]


@dataclass(frozen=True)
class Archive:
    """An opened archive whose members are known to be those that it may have."""

    name: str
    zipped: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]

    def program(self) -> Program:
        """Return the graph.

        Raises:
            BundleError: it is not what `Program` says.
        """
        program = self._document(_MODEL, Program)
        if program.schema_version.major != SCHEMA:
            raise BundleError(
                f"{self.name}: a program of version {program.schema_version.major}, but this "
                f"latentc reads {SCHEMA}; export the bundle again"
            )
        return program

    def payloads(self) -> Mapping[str, tuple[str, Payload]]:
        """Return the weights and the constants by name, each with the folder of its bytes.

        Raises:
            BundleError: one of them is marked as a pickle, or the document is damaged.
        """
        payloads: dict[str, tuple[str, Payload]] = {}
        for document, folder in zip(_CONFIGS, (_WEIGHTS, _CONSTANTS), strict=True):
            for name, payload in self._document(document, Payloads).config.items():
                if payload.use_pickle:
                    raise BundleError(f"{self.name}: {name!r} is a pickle; refusing to load it")
                if f"{folder}{payload.path_name}" not in self.members:
                    raise BundleError(f"{self.name}: {name!r} is in no member of the archive")
                payloads[name] = folder, payload
        return payloads

    def size(self, member: str) -> int:
        """Return a member's size in bytes."""
        return self.members[member].file_size

    def read_into(self, member: str, memory: memoryview) -> None:
        """Fill `memory`, of the member's size, with its bytes: they are in memory only once.

        Raises:
            BundleError: it is cut short, or its checksum is another.
        """
        with (
            parsing(self.name, BundleError, _WHAT),
            self.zipped.open(self.members[member]) as opened,
        ):
            for start in range(0, len(memory), _CHUNK):
                part = opened.read(min(_CHUNK, len(memory) - start))
                memory[start : start + len(part)] = part

    def _document(self, member: str, kind: type[_Document]) -> _Document:
        info = self.members[member]
        if info.file_size > _MOST_JSON:
            raise BundleError(f"{self.name}: {member} has {info.file_size} bytes")
        with parsing(self.name, BundleError, _WHAT):
            return msgspec.json.decode(self.zipped.read(info), type=kind)


@contextmanager
def opened(entry: Path) -> Iterator[Archive]:
    """Open an archive and check its members, before any of them is read.

    Raises:
        BundleError: it is damaged, or holds anything but a graph and tensors.
    """
    with (
        parsing(entry.name, BundleError, _WHAT),
        open_regular(entry) as file,
        zipfile.ZipFile(file) as zipped,
    ):
        archive = Archive(entry.name, zipped, _members(entry.name, zipped))
        for member, stated in _STATED.items():
            info = archive.members[member]
            if info.file_size != len(stated) or zipped.read(info) != stated:
                raise BundleError(f"{entry.name}: {member} does not say {stated.decode()!r}")
        yield archive


def _members(name: str, zipped: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members by their names below the archive's one folder."""
    infos = zipped.infolist()
    if len(infos) > _MOST_MEMBERS:
        raise BundleError(f"{name}: {len(infos)} members, at most {_MOST_MEMBERS} can be")
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1 or not all(_ROOT.fullmatch(root) for root in roots):
        raise BundleError(f"{name}: holds {len(roots)} folders; a program is one")
    members = {info.filename.partition("/")[2]: info for info in infos}
    if len(members) != len(infos):
        raise BundleError(f"{name}: holds two members of one name")
    for member, info in members.items():
        _check_member(name, member, info)
    if lacking := sorted(_NEEDED - members.keys()):
        raise BundleError(f"{name}: lacks {lacking[0]}; it is no program, or of an older layout")
    _check_apart(name, infos, zipped.fp)
    return members


def _check_member(name: str, member: str, info: zipfile.ZipInfo) -> None:
    if member in _EMPTY:
        if info.file_size:
            raise BundleError(
                f"{name}: {member} is a pickle; refusing to load it; export the bundle again, "
                "this version of latentc leaves it empty"
            )
    elif member not in (*_NEEDED, *_IGNORED) and not _TENSOR.fullmatch(member):
        raise BundleError(
            f"{name}: {member[:100]!r} is neither a graph nor a tensor; refusing to load it"
        )
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise BundleError(f"{name}: {member} is compressed; a program's members are stored")
    if info.flag_bits & ~(_NAMES_IN_UTF8 | _SIZES_BEHIND):
        raise BundleError(f"{name}: {member} is encrypted or patched")


def _check_apart(name: str, infos: list[zipfile.ZipInfo], file: IO[bytes] | None) -> None:
    """Refuse members that lie on one another: they could be larger together than the file."""
    end = 0
    for info in sorted(infos, key=lambda each: each.header_offset):
        if info.header_offset < end:
            raise BundleError(f"{name}: two members of the archive overlap")
        end = info.header_offset + _LOCAL_HEADER + len(info.filename) + info.compress_size
    if file is None or end > file.seek(0, 2):
        raise BundleError(f"{name}: cut short")
