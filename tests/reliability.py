"""The figures of fuzzing, kills and long runs, and docs/reliability.md, which is made from them.

    python -m tests.reliability            writes the page
    python -m tests.reliability --check    fails if the page is not what the records say

A record is a file docs/verified/reliability/NAME.json, written by the command that measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "verified" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"

HEAD = """# Reliability

What latentc promises about files from strangers, kills, full disks and long runs
([SECURITY.md](../SECURITY.md)) is tested in four ways. This page is made by
`python -m tests.reliability` from the records that the commands below write to
[docs/verified/reliability](verified/reliability/README.md).

"""


def save(name: str, figures: Mapping[str, Any], record: Path | None) -> None:
    """Write a record; None is a run that is not to be shown, whose record goes to build/."""
    path = record or ROOT / "build" / "reliability" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        **figures,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def page(records: Mapping[str, Any]) -> str:
    """Return the page for these records; what has none says so."""
    sections = (_corpus(), _fuzz(records), _chaos(records), _soak(records))
    return HEAD + "\n".join(sections)


def records() -> dict[str, Any]:
    """Return the records that there are, by name."""
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(RECORDS.glob("*.json"))}


def _corpus() -> str:
    from tests.hostile.bad_bundle import CASES, import_cases
    from tests.hostile.readers import READERS

    import_cases()
    parts = Counter(case.part for case in CASES.values())
    table = _table(("Spoilt", "Cases"), [(part, count) for part, count in parts.items()])
    names = "; ".join(reader.name for reader in READERS)
    return f"""## Bad bundles

`tests/hostile/` spoils a good bundle in {len(CASES)} ways and holds every reader in the project
to each: {names}. Each case says which error it must give; nothing outside of the bundle may be
read or changed, nothing may be printed that steers a terminal, and no reader may hang or die.

```bash
make test PYTEST_ARGS="tests/hostile/test_corpus.py"
```

{table}
"""


def _fuzz(found: Mapping[str, Any]) -> str:
    record = found.get("fuzz")
    text = """## Fuzzing

Every function that reads something from outside is marked as a parser in the code, and the list of
them is what is fuzzed: by [atheris](https://pypi.org/project/atheris/), which goes after branches
that no input has reached yet. What was reached is kept in `build/fuzz`, so that the next run goes
on.

```bash
make fuzz
```

"""
    if record is None:
        return text + _missing("make fuzz")
    rows = [
        (f"`{each['parser']}`", f"{each['inputs']:,}", each["branches"], each["kept"])
        for each in record["parsers"]
    ]
    table = _table(("Parser", "Inputs", "Branches reached", "Inputs kept"), rows)
    return f"""{text}{_where(record)}: {record["inputs"]:,} inputs in {record["minutes"]} minutes, \
{record["faults"]} faults.

{table}
"""


def _chaos(found: Mapping[str, Any]) -> str:
    record = found.get("chaos")
    text = """## Kills, full disks, several writers

Real runs are killed at instants by chance, by SIGKILL, SIGTERM and SIGINT in turn. After each kill
the bundle that was there must verify, and the next run must go through and leave nothing behind.
The output, the cache and the temporary folder are put on disks that are too small; two and four
exports write into one folder at once; a reader reads a bundle that a writer replaces.

```bash
make chaos
```

"""
    if record is None:
        return text + _missing("make chaos")
    rows: list[Sequence[Any]] = [(f"`{name}`", count) for name, count in record["kills"].items()]
    rows.append(("all", sum(record["kills"].values())))
    beside = [
        (each["what"], each["processes"], each["rounds"], each["went_through"], each["refused"])
        for each in record["together"]
    ]
    heads = ("At once", "Processes", "Rounds", "Went through", "Refused with one line")
    folders = Counter(each["folder"] for each in record["full_disks"])
    disks = ", ".join(f"{name} {count}" for name, count in folders.items())
    skipped = f" Skipped: {record['skipped']}." if record["skipped"] else ""
    return f"""{text}{_where(record)}: seed {record["seed"]}, {record["minutes"]} minutes, \
{record["faults"]} faults. Runs with a full disk, by the folder on it: {disks or "none"}.{skipped}

{_table(("Command", "Kills while it ran"), rows)}

{_table(heads, beside)}
"""


def _soak(found: Mapping[str, Any]) -> str:
    record = found.get("soak")
    text = """## Long runs

Each backend that is installed makes images for long. Every image must be equal bit by bit, and
memory, file descriptors and threads must stay level: the resident size may grow by 8 KiB for each
call (64 KiB for a load) by its slope, descriptors and threads not at all.

```bash
make soak
```

"""
    if record is None:
        return text + _missing("make soak")
    rows = [
        (
            *(each["backend"], phase["name"], phase["count"], f"{phase['slope']:.0f}"),
            *(phase["descriptors"], phase["threads"]),
        )
        for each in record["backends"]
        for phase in each["phases"]
    ]
    heads = ("Backend", "What", "Times", "Bytes for each", "Descriptors more", "Threads more")
    return f"""{text}{_where(record)}: {record["minutes"]} minutes, {record["faults"]} faults. \
Beside these each backend made the image in three forked and three spawned processes.

{_table(heads, rows)}
"""


def _where(record: Mapping[str, Any]) -> str:
    return f"{record['date']}, commit {record['commit']}, {record['machine']}"


def _missing(command: str) -> str:
    return f"No record yet: `{command}` writes it.\n"


def _table(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if the page is another.")
def main(check: bool) -> None:
    """Make docs/reliability.md of the records."""
    text = page(records())
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != PAGE.read_text(encoding="utf-8"):
        click.echo(f"{PAGE} is not what the records say: run python -m tests.reliability", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
