"""This module says which known fault (`tests.faults.LINES`) each bad bundle of the corpus stands
for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

# Patterns of cases' names, of which the first one that fits counts.
_LINES: Mapping[str, str] = {
    "archive-*": "1.1",
    "source-with-odd-*": "1.1",
    "manifest-nan": "3.4",
    "*-nan": "2.1",
    "*-with-nan": "2.1",
    "*-nan-in-*": "2.1",
    "*-image-infinite": "2.1",
    "*-as-declared": "2.2",
    "onnx-result-*": "2.2",
    "onnx-image*": "2.2",
    "onnx-text-*": "2.2",
    "onnx-with*": "2.2",
    "openvino-result-*": "2.2",
    "openvino-image-*": "2.2",
    "onnx-*": "1.3",
    "openvino-*": "1.3",
    "unlisted-*": "1.3",
    "temporary-manifest-*": "1.2",
    "schedules-folder-*": "1.2",
    "names-*": "1.9",
    "*-vocabulary*": "2.10",
    "tokenizer-fifo": "1.4",
    **dict.fromkeys(("tokenizer-frame-*", "tokenizer-that-*"), "2.10"),
    "tokenizer-*": "1.5",
    "manifest-20000-*": "1.6",
    "*-overflow": "1.6",
    **dict.fromkeys(("*-without-end", "*-more-than-any-memory", "*-what-readers-allow"), "1.6"),
    **dict.fromkeys(("*-thousand-statements", "*-seventeen*", "bins-too-many"), "1.6"),
    "*-unpack-to-much": "1.6",
    "*-huge-image": "1.6",
    "*-lie-about-*": "1.6",
    **dict.fromkeys(("manifest-fifo", "manifest-folder", "manifest-link-*"), "1.4"),
    **dict.fromkeys(("manifest-missing", "manifest-too-large", "path-*"), "1.4"),
    **dict.fromkeys(("file-*", "side-file-*", "folder-*", "hash-*", "size-*"), "1.4"),
    "*": "3.4",
}


def line_of(name: str) -> str:
    """Return the line of a case by its name."""
    return next(line for pattern, line in _LINES.items() if fnmatchcase(name, pattern))


def clauses(names: Iterable[str]) -> dict[str, str]:
    """Return for each line that has cases a clause that names them all."""
    by_line: dict[str, list[str]] = {}
    for name in sorted(names):
        by_line.setdefault(line_of(name), []).append(name)
    return {line: f"bad bundles ({', '.join(cases)})" for line, cases in by_line.items()}
