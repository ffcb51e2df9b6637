"""The packages have rooms: no circle of imports, and no more files in a room than can be looked
over. Their floors, import-linter checks (pyproject.toml); docs/architecture.md is the map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_AT_THE_TOP, MOST_IN_A_ROOM = 12, 15


@pytest.fixture(scope="module")
def imports() -> Mapping[str, set[str]]:
    """Return what each module imports of ours; lazily, and for types alone, too."""
    graph = grimp.build_graph("latentc", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, or nothing."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_circle_of_imports(imports: Mapping[str, set[str]]) -> None:
    assert len(imports) > 300
    assert circle(imports) == []


def test_a_circle_would_be_found(imports: Mapping[str, set[str]]) -> None:
    low, high = "latentc.runtimes.errors", "latentc.runtimes.pipeline.pipeline"
    assert circle({**imports, low: {*imports[low], high}})


def crowded(files: Iterator[Path]) -> dict[str, int]:
    """Return the folders that hold more files than can be looked over, and how many."""
    counts = Counter(
        file.parent.as_posix() for file in files if file.name not in ("__init__.py", "__main__.py")
    )
    return {
        folder: count
        for folder, count in counts.items()
        if count > (MOST_IN_A_ROOM if "/" in folder else MOST_AT_THE_TOP)
    }


def test_no_room_is_crowded() -> None:
    files = (
        file.relative_to(ROOT)
        for package in ("latentc", "exporter", "runtimes")
        for file in (ROOT / package).rglob("*.py")
    )
    assert crowded(files) == {}


def test_a_crowded_room_would_be_found() -> None:
    files = (Path("runtimes/hall") / f"file_{number}.py" for number in range(16))
    assert crowded(files) == {"runtimes/hall": 16}
