"""The JSON document of a table of sampling plans: its columns as lists, row by row.

A member has the name of an array of `PlanTable` and its values as nested lists in row-major order.
``null`` stands for NaN, which JSON cannot express; members of `LEARNED` that hold nothing else are
left out. Numbers have the fewest digits that give the
same float64 again, and there are no spaces: equal tables give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.errors import BundleError
from latentc.runtimes.sampling.plan_schema import DTYPES, LEARNED
from latentc.runtimes.strict import Strict

# Within what the arrays can hold: numpy would wrap larger numbers around, or overflow.
_Int32: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
_Byte: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=255)]


class _Columns(Strict, frozen=True, kw_only=True):
    """The document. How long the lists are is checked of the arrays that they become."""

    steps: list[_Int32]
    offsets: list[_Int32]
    timesteps: list[float]
    input_scale: list[float]
    noise_draws: list[_Byte]
    rows: list[list[_Int32]]
    state: list[list[list[float]]]
    prediction: list[list[float]]
    clean: list[list[float]]
    noise: list[list[float]]
    clean_from: list[list[float]]
    init_noise_scale: list[float]
    add_noise: list[list[float | None]]
    known: list[list[float | None]]
    log_low: list[float | None] | None = None
    log_high: list[float | None] | None = None
    clip: list[float]
    shift: list[float]


def encode(arrays: Mapping[str, Array]) -> bytes:
    """Return the document of arrays with the names of `DTYPES`, which passed `check_table`."""
    # msgspec writes NaN as null, and infinity as well, which no table has.
    names = [n for n in DTYPES if n not in LEARNED or not np.isnan(arrays[n]).all()]
    return msgspec.json.encode({name: arrays[name].tolist() for name in names})


def decode(data: bytes) -> dict[str, Array]:
    """Return the arrays of a document, C-contiguous and of the dtypes of `DTYPES`.

    Raises:
        BundleError: lists that stand side by side have different lengths, or one limit of a
            learned variance stands there alone.
        msgspec.DecodeError: `data` is no JSON, or a member is missing, unknown or of another type.
    """
    columns = msgspec.json.decode(data, type=_Columns)
    lists = {name: getattr(columns, name) for name in DTYPES}
    if lists["log_low"] is None and lists["log_high"] is None:
        lists |= dict.fromkeys(LEARNED, [None] * len(columns.timesteps))
    for name in LEARNED:
        if lists[name] is None:
            raise BundleError(f"{name}: expected both of {', '.join(LEARNED)}, or none of them")
    return {name: _array(name, lists[name], dtype) for name, dtype in DTYPES.items()}


def _array(name: str, values: list[Any], dtype: str) -> Array:
    """Return nested lists as an array; one list of all numbers is converted several times as fast
    as nested ones."""
    shape = [len(values)]
    while values and isinstance(values[0], list):
        lengths = set(map(len, values))
        if len(lengths) > 1:
            found = f"found {min(lengths)} and {max(lengths)} elements"
            raise BundleError(f"{name}: expected lists of one length, {found}")
        shape.extend(lengths)
        values = list(chain.from_iterable(values))
    return np.array(values, dtype).reshape(shape)
