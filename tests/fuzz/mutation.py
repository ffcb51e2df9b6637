"""Damage by chance, for where there is no fuzzer that looks at branches: seeded, and quick."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_WORDS = (
    *(b"\0", b"\xff", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"\xed\xa0\x80"),
    *(b"[" * 3000, b'{"a":' * 1000, b"null", b"true", b'""', b"\xfe\xff", b"\xff\xff\xff\x7f"),
    *(b"\x80\x96\x98\0", b"../", b"\\ud800", b"((((", b":1e9)", b"PK\x03\x04"),
)


def damaged(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Yield the seeds, then `count` inputs made from them by one to four changes each."""
    yield from seeds
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            _change(data, chance, seeds)
        yield bytes(data[:65536])


def _change(data: bytearray, chance: random.Random, seeds: Sequence[bytes]) -> None:
    begin = chance.randrange(len(data) + 1)
    end = min(len(data), begin + chance.choice((1, 1, 2, 4, 16, 64)))
    match chance.randrange(7):
        case 0 if begin < len(data):
            data[begin] ^= 1 << chance.randrange(8)
        case 1 if begin < len(data):
            data[begin] = chance.randrange(256)
        case 2:
            del data[begin:end]
        case 3:
            data[begin:end] = data[begin:end] * chance.choice((2, 3, 50))
        case 4:
            data[begin:end] = chance.choice(_WORDS)
        case 5:
            other = chance.choice(seeds)
            data[begin:] = other[chance.randrange(len(other) + 1) :]
        case _:
            data[begin:] = b""
