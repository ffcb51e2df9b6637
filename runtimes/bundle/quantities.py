"""Sizes and numbers in words."""

from __future__ import annotations

from collections.abc import Iterable

from latentc.runtimes.bundle.structures import Build


def build_size(build: Build) -> int:
    """Return the bytes of a build's files, shared ones counted once."""
    files = {file.path: file.size for a in build.artifacts.values() for file in a.files}
    return sum(files.values())


def megabytes(size: int) -> str:
    """Return a size as a text in MB with one decimal, in kB below 100 kB."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as a text with runs joined: 1, 2, 3, 5 → '1-3, 5'."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
