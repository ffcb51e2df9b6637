"""The helpers that every benchmark stands on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latentc.benchmarks import measure

MIB = 1 << 20
# Written as pages: memory that is only reserved does not count.
ALLOCATE = "block = bytearray(b'x') * (200 << 20)"


def test_summary_of_a_series() -> None:
    assert measure.summarise([3.0, 1.0, 10.0]) == measure.Summary(3.0, 1.0, 10.0, 3)
    assert measure.summarise([1.0, 2.0]).median == 1.5
    with pytest.raises(ValueError, match="no values"):
        measure.summarise([])


def test_cases_take_turns_in_alternating_order() -> None:
    seen: list[str] = []

    def case(name: str) -> int:
        seen.append(name)
        return len(seen)

    results = measure.take_turns({"a": lambda: case("a"), "b": lambda: case("b")}, 3)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_a_childs_memory_is_seen() -> None:
    ours = bytearray(b"x") * (100 << 20)  # a large parent must not show in its children
    small = measure.run_script("pass", [])
    large = measure.run_script(ALLOCATE, [])
    assert small.peak_memory < len(ours)
    assert 195 * MIB < large.peak_memory - small.peak_memory < 210 * MIB
    assert large.max_rss > large.peak_memory - MIB  # the kernel counts roughly
    assert large.seconds > 0
    assert large.cpu > 0


def test_a_child_reports_its_result_and_its_own_peak() -> None:
    code = (
        f"from latentc.benchmarks.measure import report\n{ALLOCATE}\nreport({{'answer': [1, 2.5]}})"
    )
    child = measure.run_child(["-c", code])
    assert child.result == {"answer": [1, 2.5]}
    assert 200 * MIB <= child.peak_memory < child.max_rss + MIB


def test_freed_memory_still_counts_in_the_peak() -> None:
    code = f"from latentc.benchmarks.measure import report\n{ALLOCATE}\ndel block\nreport(None)"
    assert measure.run_child(["-c", code]).peak_memory > 200 * MIB


def test_a_child_gets_the_environment() -> None:
    code = "import os\nfrom latentc.benchmarks.measure import report\nreport(os.environ['SETTING'])"
    assert measure.run_child(["-c", code], {"SETTING": "7"}).result == "7"
    assert "SETTING" not in os.environ


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(measure.ChildFailed, match=r"(?s)code 1.*ValueError: too bad"):
        measure.run_child(["-c", "raise ValueError('too bad')"])


def test_what_a_child_writes_can_be_kept(tmp_path: Path) -> None:
    measure.run_child(["-c", "print('hello')"], output=tmp_path / "said.txt")
    assert (tmp_path / "said.txt").read_text() == "hello\n"


def test_outside_a_benchmark_a_report_goes_nowhere() -> None:
    measure.report({"answer": 1})


def test_the_machine_is_described(tmp_path: Path) -> None:
    found = measure.machine()
    assert found.cpu
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory > 256 * MIB
    assert "numpy" in found.versions
    assert f"{found.cores} cores" in found.line()
    measure.write_json(tmp_path / "new" / "report.json", {"answer": 1})
    document = json.loads((tmp_path / "new" / "report.json").read_text())
    assert document["answer"] == 1
    assert document["machine"]["cpu"] == found.cpu


def test_a_table_is_aligned() -> None:
    assert measure.table(("case", "s"), [("a", "1.5"), ("longer", "10.25")]) == (
        "case        s\na         1.5\nlonger  10.25"
    )


def test_sizes_are_written_in_binary_units() -> None:
    assert measure.gib(3 * 2**29) == "1.50 GiB"
    assert measure.mib(5.4 * MIB) == "5 MiB"
