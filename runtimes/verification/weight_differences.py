"""This module reads what an adapter's file adds to each weight.

It knows LoRA, LoHa, LoKr and full differences, and DoRA.

Only numpy is needed here. The formulas are those of their authors' packages: LoRA and DoRA of PEFT
(peft/tuners/lora), LoHa, LoKr, full differences and norms of LyCORIS (lycoris/functional). Each is
multiplied by alpha / rank of its own layer; a layer without an alpha counts as one whose alpha is
its rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentc.runtimes.errors import SourceError
from latentc.runtimes.storage.files import open_regular
from latentc.runtimes.storage.parsing import parser

Floats = NDArray[np.float32]

# How the end of a tensor's name says what it is. Of several that fit, the longest counts.
_ROLES: Mapping[str, str] = {
    "down.weight": "down",  # after a layer's name that ends in _lora
    "up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{name: name for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
_LONGEST_FIRST = sorted(_ROLES, key=len, reverse=True)
# What makes a difference of a weight, and what only changes one.
_LORA, _LOHA = {"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR = tuple(
    {*one, *other}
    for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for other in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
# What each kind of difference needs, and what of its own it may have besides.
_READ: tuple[tuple[set[str], set[str]], ...] = (
    (_LORA, {"mid", "up_bias", "magnitude"}),
    (_LOHA, {"hada_t1", "hada_t2"}),
    *((needed, {"lokr_t2"} if "lokr_w2_a" in needed else set()) for needed in _LOKR),
    ({"diff"}, set()),
)
_FOR_ALL = {"dora_scale", "diff_b"}
# Of these only the first would be read.
_EXCLUSIVE = (("magnitude", "dora_scale"), ("up_bias", "diff_b"))
_KINDS = "LoRA, DoRA, LoHa, LoKr and full differences"
_SHOWN = 3
_HEADER_BYTES = 8
_MOST_HEADER = 100 << 20  # bytes, the limit of safetensors
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer of a file, by what they are.

    Attributes:
        alpha: None is the rank.
        rank_root: the difference is divided by the root of the rank (rsLoRA).
    """

    name: str
    tensors: Mapping[str, Floats]
    alpha: float | None = None
    rank_root: bool = False


@parser(SourceError, "path", "a safetensors file of an adapter")
def read(path: Path) -> tuple[dict[str, Floats], dict[str, str]]:
    """Return the tensors of a safetensors file in single precision, and its metadata.

    Raises:
        SourceError: the file is damaged, or has tensors of a type that adapters do not have.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(_HEADER_BYTES), "little")
        if size > _MOST_HEADER:
            raise ValueError(f"its header would be of {size} bytes")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", _HEADER_BYTES + size)
    metadata = header.pop("__metadata__", {})
    return {name: _tensor(data, entry) for name, entry in header.items()}, dict(metadata)


def _tensor(data: Any, entry: Mapping[str, Any]) -> Floats:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError("a tensor lies outside the file")
    found = data[begin:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16":  # the upper half of a single's bits
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(found, np.float32)


def layers(tensors: Mapping[str, Floats], rank_root: bool = False) -> dict[str, Layer]:
    """Return the layers of a file by their names in it.

    Raises:
        SourceError: a tensor is of no kind that is known, belongs to no difference, or is one that
            nothing would read because of another.
    """
    unknown: list[str] = []
    parts: dict[str, dict[str, Floats]] = {}
    for key, value in tensors.items():
        ending = next((each for each in _LONGEST_FIRST if key.endswith(f".{each}")), None)
        if ending is None:
            unknown.append(key)
            continue
        name, role = key.removesuffix(f".{ending}"), _ROLES[ending]
        if role in parts.setdefault(name, {}):
            raise SourceError(f"has the same tensor of {name} under two names, such as {key}")
        parts[name][role] = value
    unknown += [f"{name}.alpha" for name, roles in parts.items() if set(roles) <= {"alpha"}]
    if unknown:
        raise SourceError(
            f"has {len(unknown)} tensors of {len(tensors)} that are not of {_KINDS}: "
            f"{', '.join(sorted(unknown)[:_SHOWN])}"
        )
    return {name: _layer(name, roles, rank_root) for name, roles in parts.items()}


def _layer(name: str, roles: Mapping[str, Floats], rank_root: bool) -> Layer:
    tensors = {role: value for role, value in roles.items() if role != "alpha"}
    unread = _unread(set(tensors))
    if unread:
        others = ", ".join(sorted(set(tensors) - unread))
        raise SourceError(
            f"has tensors of {name} that would be lost: {', '.join(sorted(unread))} beside {others}"
        )
    alpha = roles.get("alpha")
    if alpha is not None and (alpha.size != 1 or not np.isfinite(alpha).all()):
        raise SourceError(
            f"has an alpha of {name} that is no number: expected one, found {alpha.tolist()!s:.80}"
        )
    return Layer(name, tensors, None if alpha is None else float(alpha.item()), rank_root)


def _unread(roles: set[str]) -> set[str]:
    """Return those of a layer's tensors that another kind of difference of the same layer would
    hide.
    """
    for shown, hidden in _EXCLUSIVE:
        if {shown, hidden} <= roles:
            return {hidden}
    for needed, own in _READ:
        if needed <= roles:
            return roles - needed - own - _FOR_ALL
    return set()  # incomplete, which `difference` says


def fused(
    weight: Floats, bias: Floats | None, layer: Layer, scale: float
) -> tuple[Floats, Floats | None]:
    """Return a layer's weight and bias with `scale` times what a file adds to them.

    Args:
        weight: f4 of the layer's own shape, [out, in, …] or [out] of a norm.

    Raises:
        SourceError: the file's tensors are incomplete, are for another shape, or make numbers that
            are NaN or infinity.
    """
    made, shifted = _fused(weight, bias, layer, scale)
    if not all(np.isfinite(each).all() for each in (made, shifted) if each is not None):
        raise SourceError(f"{layer.name} makes weights that are NaN or infinity")
    return made, shifted


def _fused(
    weight: Floats, bias: Floats | None, layer: Layer, scale: float
) -> tuple[Floats, Floats | None]:
    made = weight + scale * difference(layer, weight.shape)
    tensors = layer.tensors
    if "magnitude" in tensors:  # PEFT's DoRA: the norm of each row is learnt
        length = _norm(made, tuple(range(1, made.ndim)))
        made = made / length * tensors["magnitude"].reshape(length.shape)
    elif "dora_scale" in tensors:
        made = weight + scale * (_with_norms(weight, layer) - weight)
    addition = _bias_difference(layer)
    if addition is None:
        return np.asarray(made, np.float32), bias
    if bias is None or bias.size != addition.size:
        raise SourceError(f"{layer.name} changes a bias, and the layer has no such bias")
    return np.asarray(made, np.float32), bias + np.float32(scale) * addition.reshape(bias.shape)


def difference(layer: Layer, shape: tuple[int, ...]) -> Floats:
    """Return what a file adds to a weight of this shape, alpha included, zeros if nothing.

    Raises:
        SourceError: as `fused`.
    """
    roles = set(layer.tensors)
    if roles >= _LORA:
        made = _scale(layer, layer.tensors["down"].shape[0]) * _lora(layer.tensors)
    elif roles >= _LOHA:
        made = _scale(layer, layer.tensors["hada_w1_b"].shape[0]) * _loha(layer.tensors)
    elif any(role.startswith("lokr_") for role in roles):
        made = _lokr(layer)
    elif "diff" in roles:
        made = layer.tensors["diff"]
    elif roles == {"diff_b"}:
        return np.zeros(shape, np.float32)
    else:
        raise SourceError(f"{layer.name} is incomplete: it has only {', '.join(sorted(roles))}")
    if made.size != math.prod(shape) or made.shape[0] != shape[0]:
        raise SourceError(
            f"{layer.name} is for a weight of shape {list(made.shape)}, and the layer's is "
            f"{list(shape)}"
        )
    return made.reshape(shape)


def _scale(layer: Layer, rank: int) -> np.float32:
    if rank == 0:
        raise SourceError(f"{layer.name} is of rank 0")
    alpha = rank if layer.alpha is None else layer.alpha
    return np.float32(alpha / (math.sqrt(rank) if layer.rank_root else rank))


def _lora(tensors: Mapping[str, Floats]) -> Floats:
    """[out, in, …]: up after down, of matrices or of convolutions with a kernel in `down`, or in
    `mid` between two without."""
    down, up = tensors["down"], tensors["up"]
    rank = down.shape[0]
    up = up.reshape(-1, rank)
    if "mid" in tensors:
        inner = down.reshape(rank, -1)
        return _product("ij...,pi,jr->pr...", tensors["mid"], up, inner)
    return _reshaped(up @ down.reshape(rank, -1), (up.shape[0], *down.shape[1:]))


def _loha(tensors: Mapping[str, Floats]) -> Floats:
    """[out, in, …]: the product of two low-rank matrices, number by number."""
    one, other = (
        _low_rank(*(tensors.get(f"hada_{each}") for each in (f"t{n}", f"w{n}_a", f"w{n}_b")))
        for n in (1, 2)
    )
    return one * other


def _low_rank(core: Floats | None, left: Floats | None, right: Floats | None) -> Floats:
    assert left is not None
    assert right is not None
    if core is not None:  # Tucker's decomposition of a convolution
        return _product("ij...,ip,jr->pr...", core, left, right)
    return left.reshape(-1, left.shape[1]) @ right.reshape(right.shape[0], -1)


def _lokr(layer: Layer) -> Floats:
    """[out, in, …]: Kronecker's product of two matrices, each of them whole or of low rank."""
    tensors = layer.tensors
    rank = None
    factors = []
    for name, core in (("lokr_w1", None), ("lokr_w2", tensors.get("lokr_t2"))):
        left, right = tensors.get(f"{name}_a"), tensors.get(f"{name}_b")
        if name in tensors:
            factors.append(tensors[name])
        elif left is None or right is None:
            raise SourceError(f"{layer.name} is incomplete: it has no {name}")
        else:
            rank = rank or right.shape[0]
            made = _low_rank(core, left, right)
            kernel = right.shape[1:] if core is None else made.shape[1:]
            factors.append(_reshaped(made, (made.shape[0], *kernel)))
    small, large = factors
    small = small.reshape(*small.shape, *[1] * (large.ndim - small.ndim))
    product: Floats = np.kron(small, large)
    # Whole matrices have no rank, and LyCORIS gives them no scale.
    return product if rank is None else _scale(layer, rank) * product


def _with_norms(weight: Floats, layer: Layer) -> Floats:
    """The weight with the difference, whose rows (or columns) have the lengths that the file says,
    as LyCORIS and the scripts of kohya-ss write DoRA."""
    lengths = layer.tensors["dora_scale"]
    made = weight + difference(layer, weight.shape)
    by_row = lengths.ndim < 2 or (lengths.shape[0] == made.shape[0] and lengths.shape[1] == 1)
    kept = 0 if by_row else 1
    length = _norm(made, tuple(axis for axis in range(made.ndim) if axis != kept))
    if lengths.size != length.size:
        raise SourceError(f"{layer.name} has a dora_scale of shape {list(lengths.shape)}")
    return made * (lengths.reshape(length.shape) / (length + np.finfo(np.float32).eps))


def _bias_difference(layer: Layer) -> Floats | None:
    if "up_bias" in layer.tensors:
        return _scale(layer, layer.tensors["down"].shape[0]) * layer.tensors["up_bias"]
    return layer.tensors.get("diff_b")


def _norm(values: Floats, axes: tuple[int, ...]) -> Floats:
    return np.sqrt(np.sum(values * values, axis=axes, keepdims=True, dtype=np.float32))


def _product(how: str, *factors: Floats) -> Floats:
    made: Floats = np.einsum(how, *factors, optimize=True)
    return made


def _reshaped(values: Floats, shape: tuple[int, ...]) -> Floats:
    return values.reshape(shape)
