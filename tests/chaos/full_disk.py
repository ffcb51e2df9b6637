"""A full disk, in a private mount of a small tmpfs: ``unshare -m python -m tests.chaos.full_disk``.

The process prints one JSON object. It is run by `tests.chaos`, which skips it, and says so, where
the system does not allow private mounts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import processes
from tests.chaos.operations import OPERATIONS, Place, leftovers

ROOT = Path(__file__).resolve().parents[2]
# In KiB: nothing fits, something does, nearly everything does.
_SIZES = {"output": (64, 400, 900), "cache": (4, 16, 64), "tmp": (4, 16, 64)}
_CODES = (1, 2, 5, 7)  # errors that say that the disk is full


@dataclass(frozen=True)
class Full:
    """A `Full` says what one full disk gave: which folder was on it, its KiB, the command, its exit
    code, what it said, and what was wrong.
    """

    folder: str
    kibibytes: int
    operation: str
    code: int
    said: str
    fault: str = ""


def is_allowed() -> bool:
    """Return whether this user may mount a tmpfs that nobody else sees."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False


def trials(good: Path, source: Path, base: Path) -> list[Full]:
    """Run every command on every kind of full disk, each in a mount of its own."""
    command = ["unshare", "-m", sys.executable, "-m", "tests.chaos.full_disk"]
    arguments = [str(good), str(source), str(base)]
    ended = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise AssertionError(f"the trials of a full disk fail: {ended.stderr[-1000:]}")
    return [Full(**each) for each in json.loads(ended.stdout.splitlines()[-1])]


def _trial(folder: str, kibibytes: int, name: str, good: Path, source: Path, base: Path) -> Full:
    operation = next(each for each in OPERATIONS if each.name == name)
    place = Place(Path(tempfile.mkdtemp(prefix="full-", dir=base)), good, source)
    place.make(False)
    mounted = {"output": place.output.parent, "cache": place.cache, "tmp": place.temporary}[folder]
    size = kibibytes + (3000 if folder == "output" and operation.had_bundle else 0)
    _mount(mounted, size)
    if operation.had_bundle:
        import shutil

        shutil.copytree(good, place.output)
    code = processes.run(place, operation.arguments(place))
    said = (place.root / "run.txt").read_text(errors="replace").strip()
    return Full(folder, kibibytes, name, code, said[-300:], _fault(operation, place, code, said))


def _fault(operation: object, place: Place, code: int, said: str) -> str:
    if "Traceback" in said:
        return "a traceback"
    if code not in (0, *_CODES):
        return f"ends with {code}"
    try:
        processes.checked(place, operation.check)  # type: ignore[attr-defined]
    except AssertionError as error:
        return str(error)
    left = leftovers(place) if code == 0 else []
    return f"left behind: {left}" if left else ""


def _mount(folder: Path, kibibytes: int) -> None:
    options = f"size={kibibytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def main() -> None:
    """Run the trials in this process's own mounts."""
    good, source, base = map(Path, sys.argv[1:4])
    subprocess.run(["mount", "--make-rprivate", "/"], check=False)
    processes.import_everything()
    commands = {"output": ("export", "export over", "schedule"), "cache": ("tune",)}
    commands["tmp"] = ("schedule", "export")
    found = [
        vars(_trial(folder, size, name, good, source, base))
        for folder, names in commands.items()
        for name in names
        for size in _SIZES[folder]
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
