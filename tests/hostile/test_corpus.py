"""Every reader of bundles refuses every bad bundle of the corpus that concerns it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latentc.runtimes.errors import VerificationError
from tests.hostile.bad_bundle import CASES, SECRET, BadBundle, Case, import_cases
from tests.hostile.corpus_lines import clauses, line_of
from tests.hostile.readers import READERS, Reader
from tests.hostile.worker import Answer, Worker

TIMEOUT = 60.0  # seconds, for one reader of one bundle

import_cases()

CLAUSES = clauses(CASES)
PAIRS = [
    pytest.param(
        case,
        reader,
        id=f"{case.name}-{reader.name}",
        marks=pytest.mark.fault(line_of(case.name), CLAUSES[line_of(case.name)]),
    )
    for case in CASES.values()
    for reader in READERS
    if case.part in reader.parts and reader.is_there
]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The process that the readers run in."""
    worker = Worker(tmp_path_factory.mktemp("cache"))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def spoilt(
    smallest_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case, bool], BadBundle]:
    """A function: case → the bad bundle, the same for all readers that do not write."""
    bundles: dict[str, BadBundle] = {}

    def make(case: Case, anew: bool) -> BadBundle:
        if anew or case.name not in bundles:
            bad = BadBundle(smallest_bundle, tmp_path_factory.mktemp("bad"))
            case.make(bad)
            bundles[case.name] = bad
        return bundles[case.name]

    return make


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 60
    used = {part for reader in READERS for part in reader.parts}
    assert {case.part for case in CASES.values()} <= used


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_reader_takes_the_good_bundle(
    reader: Reader, smallest_bundle: Path, worker: Worker, tmp_path: Path
) -> None:
    """A reader that refuses everything would pass the rest of the corpus."""
    copy = BadBundle(smallest_bundle, tmp_path)
    answer = worker.ask(reader.name, copy.root, tmp_path, TIMEOUT)
    assert answer.kind == "used", answer.said


@pytest.mark.parametrize(("case", "reader"), PAIRS)
def test_a_bad_bundle_is_refused(
    case: Case,
    reader: Reader,
    spoilt: Callable[[Case, bool], BadBundle],
    worker: Worker,
    tmp_path: Path,
) -> None:
    bad = spoilt(case, reader.writes)
    outside, inside = _listing(bad.outside), _listing(bad.root)
    answer = worker.ask(reader.name, bad.root, tmp_path, TIMEOUT)
    assert _listing(bad.outside) == outside, "something outside of the bundle was changed"
    assert (bad.outside / "secret").read_text() == SECRET
    assert SECRET.strip() not in answer.said, "something outside of the bundle was read"
    if not reader.writes:
        assert _listing(bad.root) == inside, "the bundle was changed"
    assert answer.kind in ("used", "refused"), answer.said
    assert not _control_characters(answer.said), answer.said
    if case.error is not None and not reader.tolerant:
        _check_refusal(case, reader, answer)


def _check_refusal(case: Case, reader: Reader, answer: Answer) -> None:
    assert case.error is not None
    assert answer.kind == "refused", f"used, although {case.what}"
    if reader.missed and answer.code == VerificationError.exit_code:
        return
    if answer.error == "Refused":  # a reader of another language has no classes of errors
        return
    codes = {kind.exit_code for kind in _with_subclasses(case.error)}
    assert answer.code in codes, f"{answer.error}: {answer.said}"
    assert case.said.lower() in answer.said.lower(), f"{case.said!r} is not in {answer.said!r}"
    if answer.error == "command":
        lines = [line for line in answer.said.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, answer.said
        assert "Traceback" not in answer.said


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _control_characters(text: str) -> list[str]:
    return [
        sign for sign in text if (ord(sign) < 32 and sign not in "\n\t") or 126 < ord(sign) < 160
    ]


def _listing(folder: Path) -> dict[str, str]:
    """Return what a folder holds: kinds of files, and digests of small regular ones."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file() and path.stat().st_size < 1 << 24:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "something else"
    return found


def test_cases_say_what_they_do() -> None:
    """The names stand in messages, and the sentences in reports."""
    for case in CASES.values():
        assert case.what.endswith("."), case.name
    assert json.dumps(sorted(CASES)) == json.dumps(sorted(set(CASES)))
