"""docs/reliability.md is made from the records; what measures is tried on what leaks."""

from __future__ import annotations

import os

import pytest

from tests import reliability
from tests.soak.phases import Soak, _slope


def test_the_page_is_what_the_records_say() -> None:
    said = reliability.PAGE.read_text(encoding="utf-8")
    assert said == reliability.page(reliability.records()), "run python -m tests.reliability"


def test_the_page_shows_records() -> None:
    general = {"date": "2026-01-01", "commit": "abc", "machine": "2 cores", "minutes": 3}
    phase = {"name": "calls", "count": 10, "slope": 3.2, "descriptors": 0, "threads": 0}
    parser = {"parser": "a:b", "inputs": 70_000, "branches": 12, "kept": 4}
    together = {"what": "w", "processes": 2, "rounds": 3, "went_through": 4, "refused": 2}
    records = {
        "fuzz": {**general, "inputs": 70_000, "faults": 0, "parsers": [parser]},
        "soak": {**general, "faults": 1, "backends": [{"backend": "x", "phases": [phase]}]},
        "chaos": {
            **general,
            **{"seed": 5, "kills": {"export": 34}, "together": [together], "faults": 0},
            **{"full_disks": [{"folder": "cache"}], "skipped": ""},
        },
    }
    page = reliability.page(records)
    for line in ("| `a:b` | 70,000 | 12 | 4 |", "| x | calls | 10 | 3 | 0 | 0 |", "seed 5"):
        assert line in page
    assert "No record yet" not in page
    assert page.count("No record yet") < reliability.page({}).count("No record yet")


def test_a_leak_of_memory_is_found() -> None:
    assert _slope([(0, 100), (10, 1100), (20, 2100)]) == pytest.approx(100)
    soak, kept = Soak("none"), []
    soak.measure("calls", 200, lambda: kept.append(os.urandom(1 << 18)))
    assert any("bytes each" in fault for fault in soak.faults)


def test_a_leak_of_descriptors_is_found() -> None:
    soak, kept = Soak("none"), []
    soak.measure("calls", 100, lambda: kept.append(os.open(os.devnull, os.O_RDONLY)))
    for descriptor in kept:
        os.close(descriptor)
    assert any("descriptors" in fault for fault in soak.faults)
