"""The wire format of Protocol Buffers, walked without the messages' classes and without reading
what is not asked for: a field is skipped by its length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

_LONGEST_VARINT = 70  # bits
_LEAST_TAG = 1 << 3


class Buffer(Protocol):
    """Bytes, or a mapped file."""

    @overload
    def __getitem__(self, place: int, /) -> int: ...
    @overload
    def __getitem__(self, place: slice, /) -> bytes: ...


@dataclass(frozen=True)
class Kind:
    """A kind of message, as far as it is of interest.

    Attributes:
        inner: fields that are messages to be entered: number → place among the kinds.
        wanted: numbers of the fields whose content is asked for.
        only: numbers of all fields that it may have; None is any.
    """

    inner: Mapping[int, int]
    wanted: frozenset[int] = frozenset()
    only: frozenset[int] | None = None


def walk(data: Buffer, size: int, kinds: Sequence[Kind]) -> Iterator[tuple[int, int, bytes]]:
    """Yield kind, number and content of the wanted fields of a message of the first kind and of
    those in it.

    Every field is looked at once, so that the work is at most in proportion to the size.

    Raises:
        ValueError, IndexError: this is no message, or has a field that it may not have.
    """
    waiting = [(0, size, 0)]
    while waiting:
        at, end, place = waiting.pop()
        kind = kinds[place]
        inner, wanted, only = kind.inner, kind.wanted, kind.only
        while at < end:
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = _varint(data, at - 1)
            if tag < _LEAST_TAG:  # no field has the number 0, and a hole in a file has nothing else
                raise ValueError("a field without a number")
            if only is not None and tag >> 3 not in only:
                raise ValueError(f"a field that is not known ({tag >> 3})")
            match tag & 7:
                case 2:
                    length = data[at]
                    at += 1
                    if length >= 0x80:
                        length, at = _varint(data, at - 1)
                    stop = at + length
                    if stop > end:
                        raise ValueError("a field that is longer than what it is in")
                    field = tag >> 3
                    if field in inner:
                        waiting.append((at, stop, inner[field]))
                    elif field in wanted:
                        yield place, field, bytes(data[at:stop])
                    at = stop
                case 0:
                    _, at = _varint(data, at)
                case 5:
                    at += 4
                case 1:
                    at += 8
                case other:
                    raise ValueError(f"a field of the kind {other}")
        if at > end:
            raise ValueError("a field that is longer than what it is in")


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    """Return a number of seven bits for each byte, the lowest first, and where it ends."""
    value = shift = 0
    while shift < _LONGEST_VARINT:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number that does not end")
