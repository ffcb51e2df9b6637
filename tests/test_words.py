"""A docstring is a sentence: where "What" or "Whether" begins it, its subject or verb is missing.

"Return whether …" says what a function does; "Whether …" leaves that to the reader.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "examples", "exporter", "latentc", "runtimes", "tests")
FRAGMENT = re.compile(r"(What|Those|Of|Whether|How|Which|As|The same)\b")
QUOTED = re.compile(rf'"""\s*{FRAGMENT.pattern}')
KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fragments(source: str) -> list[str]:
    """Return the first line of each docstring in a module's source that begins as a fragment."""
    if not QUOTED.search(source):  # saves to parse nearly all files
        return []
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, KINDS))
    docstrings = (ast.get_docstring(node) or "" for node in nodes)
    return [text.partition("\n")[0] for text in docstrings if FRAGMENT.match(text)]


def sources() -> list[Path]:
    """Return the files of Python in the packages, the examples and the tests."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_docstrings_are_sentences() -> None:
    paths = sources()
    assert len(paths) > 600
    lines_by_path = {
        path.relative_to(ROOT).as_posix(): fragments(path.read_text(encoding="utf-8"))
        for path in paths
    }
    assert {path: lines for path, lines in lines_by_path.items() if lines} == {}


def test_fragments_are_seen() -> None:
    source = '''
"""What this is."""
class Lens:
    """How to look."""
    def is_open(self) -> bool:
        """Whether it is open."""
def half() -> None:
    """Return half of the length."""
def asked() -> None:
    """Ask for more."""
'''
    assert fragments(source) == ["What this is.", "How to look.", "Whether it is open."]
