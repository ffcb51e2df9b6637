"""The record of a run of every test, docs/verified/tests.json, which docs/support.md quotes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sized
from datetime import UTC, datetime
from pathlib import Path

RECORD = Path(__file__).resolve().parents[2] / "docs" / "verified" / "tests.json"
OUTCOMES = ("passed", "failed", "error", "skipped")


def write(path: Path, reports: Mapping[str, Sized], seconds: float) -> None:
    """Write how many tests passed, failed and were skipped, in how many seconds, when, and of which
    commit. `reports`: pytest's own, by outcome."""
    git = ("git", "-C", str(RECORD.parent), "rev-parse", "--short=12", "HEAD")
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    counts = {outcome: len(reports.get(outcome, ())) for outcome in OUTCOMES}
    record = {
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **counts,
        "seconds": round(seconds),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def sentence() -> str:
    """Return what the record says, as a line of docs/support.md; nothing without a record."""
    if not RECORD.exists():
        return ""
    record = json.loads(RECORD.read_text("utf-8"))
    failed = record["failed"] + record["error"]
    return (
        f"Every entry was run last on {record['date']} at commit {record['commit']} by `make "
        f"test-all`: {record['passed']:,} tests passed, {failed} failed, {record['skipped']} were "
        "skipped. `make test` runs one pipeline of each kind of graph.\n"
    )
