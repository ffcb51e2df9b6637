"""Weights that stay in their files: mapped, in the type that they are stored in, and widened to
float32 one at a time, when an operation wants them.

A pipeline in half precision would take twice its size in memory in float32. What a file holds is
mapped instead, which the system can drop and read again, and each large weight becomes a `Stored`:
to PyTorch a float32 tensor, whose numbers are made for the length of one operation. Widening is
exact, so results are those of the pipeline that was loaded in float32.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from latentc.runtimes.errors import SourceError
from latentc.runtimes.storage.files import require_regular, scratch_folder
from latentc.runtimes.storage.parsing import parser

# Elements; what is smaller is kept as it is used. All the norms and biases of a UNet together
# are a few MB.
SMALLEST = 1 << 14
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_HALVES = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


class Stored(torch.Tensor):
    """A tensor of another type than `stored`, whose values it has. Read-only."""

    stored: torch.Tensor

    @staticmethod
    def __new__(cls, stored: torch.Tensor, dtype: torch.dtype) -> Stored:
        made: Stored = torch.Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=0,
            dtype=dtype,
            device=stored.device,
        )
        made.stored = stored
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(args[0].stored, args[0].dtype)
        if func is _aten.embedding.default and isinstance(args[0], cls):
            # Some rows of a table: no need to widen all of it.
            return func(args[0].stored, *args[1:], **(kwargs or {})).to(args[0].dtype)
        if func._schema.is_mutable and any(
            isinstance(value, cls)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ):
            raise RuntimeError(f"{func}: a weight that is stored in a file cannot be written to")
        made = pytree.tree_map_only(cls, actual, (args, dict(kwargs or {})))
        return func(*made[0], **made[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = _like(self, Stored(self.stored, self.dtype))
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Stored({tuple(self.shape)}, {self.dtype} of {self.stored.dtype})"


def actual(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, or of a `Stored` one a copy in memory."""
    return tensor.stored.to(tensor.dtype) if isinstance(tensor, Stored) else tensor


def finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity.

    `torch.isfinite` makes copies of it to tell.
    """
    if not tensor.numel():
        return True
    if isinstance(tensor, Stored) and _widened(tensor.stored.dtype, tensor.dtype):
        tensor = tensor.stored  # has the same numbers
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # PyTorch compares no numbers of 8 bits
    least, most = torch.aminmax(actual(tensor))  # NaN, if there is one
    return bool(torch.isfinite(least) and torch.isfinite(most))


def check_finite(place: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise SourceError, which names the first tensor that holds NaN or infinity, if one does.

    Args:
        place: the file or folder that has them, for the error.
    """
    for name, tensor in sorted(tensors.items()):
        if not finite(tensor):
            raise SourceError(
                f"{place}: its tensor {name!r} holds NaN or infinity; the file is damaged, or "
                "was made in a type that is too small"
            )


def later(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` in another type.

    It is what its file holds, where that is it, or a `Stored` one if it is large. Weights are
    parameters again.
    """
    base = tensor.stored if isinstance(tensor, Stored) else tensor.detach()
    exact = not isinstance(tensor, Stored) or _widened(base.dtype, tensor.dtype)
    if base.dtype is dtype and exact:
        converted = base
    elif base.numel() < SMALLEST or not exact:
        converted = actual(tensor).detach().to(dtype)
    else:
        converted = Stored(base, dtype)
    return _like(tensor, converted)


def _widened(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Return whether `dtype` has every number of `stored`."""
    return torch.promote_types(stored, dtype) is dtype


def _like(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made


def stored_type(files: Iterable[Path]) -> torch.dtype:
    """Return the one type of the floating-point weights in safetensors `files`, if that is a half.

    Else it is float32, which all of them can be read in.
    """
    kinds = {kind for path in files for kind, _ in headers(path) if kind in _FLOATS}
    only = _FLOATS[kinds.pop()] if len(kinds) == 1 else torch.float32
    return only if only in _HALVES else torch.float32


@parser(SourceError, "path", "a whole safetensors file")
def headers(path: Path) -> list[tuple[str, int]]:
    """Return the type (as safetensors calls it) and bytes of every tensor in a file."""
    from safetensors import safe_open

    require_regular(path)
    types = []
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            piece = file.get_slice(name)
            count = 1
            for size in piece.get_shape():
                count *= size
            types.append((piece.get_dtype(), count * _bytes(piece.get_dtype())))
    return types


def _bytes(kind: str) -> int:
    """Return the bytes of one number of a safetensors type, such as F16, I64, BOOL or F8_E4M3."""
    digits = "".join(each for each in kind.partition("_")[0] if each.isdigit())
    return max(int(digits) // 8, 1) if digits else 1


@contextmanager
def as_stored(*classes: type) -> Iterator[None]:
    """Inside, models of these classes load all their weights in the type that is asked for.
    transformers widens some of them when it loads halves, lest computing in halves overflows: T5's
    second linear layers, 4 GiB of those of FLUX.1. Here nothing is computed in halves."""
    name = "_keep_in_fp32_modules"
    owners = {each for cls in classes for each in cls.__mro__ if vars(each).get(name)}
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(mock.patch.object(owner, name, None))
        yield


def taken_over(module: torch.nn.Module, loaded: torch.dtype, place: str) -> None:
    """Make a module that was loaded from `place` in the type `loaded` one of float32, and look at
    all of its weights: every model that is exported passes here, before anything is made of it.

    Raises:
        SourceError: a weight holds NaN or infinity; says which.
    """
    as_float32(module, loaded)
    check_finite(place, module.state_dict())


def as_float32(module: torch.nn.Module, loaded: torch.dtype) -> None:
    """Make a module that was loaded in the type `loaded` one of float32: large weights in halves
    `Stored`, all else in memory. Weights that are used twice stay one."""
    if loaded is torch.float32:
        return
    _make_tables_again(module)
    _widen(module)
    config = getattr(module, "config", None)
    if getattr(config, "dtype", None) in _HALVES:  # transformers'
        config.dtype = torch.float32  # type: ignore[union-attr]


def _make_tables_again(module: torch.nn.Module) -> None:
    """Make tables again that no file holds: they were computed, or rounded, in half precision."""
    from accelerate import init_empty_weights

    in_files = module.state_dict().keys()
    tables = [
        name
        for name, table in module.named_buffers()
        if name not in in_files and table.is_floating_point()
    ]
    if not tables:
        return
    with init_empty_weights(include_buffers=False):
        make: Any = getattr(type(module), "from_config", type(module))
        fresh = dict(make(module.config).named_buffers())
    for name in tables:
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._buffers[attribute] = fresh[name].to(torch.float32)


def _widen(module: torch.nn.Module) -> None:
    known: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.dtype in _HALVES:
                    if id(tensor) not in known:
                        known[id(tensor)] = later(tensor, torch.float32)
                    held[name] = known[id(tensor)]  # type: ignore[assignment]


def materialise(module: torch.nn.Module) -> None:
    """Bring all weights of a module into memory, for code that writes to them."""
    known: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if isinstance(tensor, Stored):
                    if id(tensor) not in known:
                        known[id(tensor)] = _like(tensor, actual(tensor))
                    held[name] = known[id(tensor)]  # type: ignore[assignment]


@contextmanager
def stood_in(module: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, tensors that nobody may read stand for a module's `Stored` weights, whose names and
    selves it yields: tracers look at shapes and types only, and know no `Stored`."""
    real: dict[str, torch.Tensor] = {}
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    known: dict[int, torch.Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if isinstance(tensor, Stored):
                    real[f"{prefix}.{name}".lstrip(".")] = tensor
                    places.append((held, name, tensor))
                    known.setdefault(id(tensor), stand_in(tensor))
    try:
        for held, name, tensor in places:
            held[name] = known[id(tensor)]
        yield real
    finally:
        for held, name, tensor in places:
            held[name] = tensor


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, strides and type whose memory nobody has touched.

    The system gives none to it.
    """
    size = max(tensor.numel(), 1) * tensor.dtype.itemsize
    memory = torch.frombuffer(_untouched(size), dtype=torch.uint8).view(tensor.dtype)
    return _like(tensor, memory.as_strided(tensor.shape, tensor.stride()))


def _untouched(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # Nothing is set aside for it either, where the system counts what it promises.
    aside = getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | aside)


@contextmanager
def in_one_file(held: dict[str, torch.Tensor], folder: Path) -> Iterator[None]:
    """Inside, plain tensors stand for the `Stored` ones among `held`: for converters that want all
    weights at once. They are written to a temporary file beside `folder`, and mapped from there."""
    stored = {name: weight for name, weight in held.items() if isinstance(weight, Stored)}
    try:
        with scratch_folder(folder.parent) as beside:
            # The mapping keeps the file: nobody will find it, nor need to remove it. Windows keeps
            # it until the mapping is gone, and a later run removes it.
            held.update(_written(stored, beside / "weights"))
        yield
    finally:
        held.update(stored)


def _written(weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    sizes = {name: weight.numel() * weight.dtype.itemsize for name, weight in weights.items()}
    total = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes.values())
    if not total:
        return {}
    with path.open("wb") as file:
        file.truncate(total)
    room: Any = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=total)
    flat = torch.empty(0, dtype=torch.uint8).set_(room)
    made: dict[str, torch.Tensor] = {}
    begin = 0
    for name, size in sizes.items():
        place = flat[begin : begin + size].view(weights[name].dtype).view(weights[name].shape)
        place.copy_(actual(weights[name]).detach())
        made[name] = _like(weights[name], place)
        begin += -(-size // _ALIGNED) * _ALIGNED
    return made


_ALIGNED = 64  # bytes
