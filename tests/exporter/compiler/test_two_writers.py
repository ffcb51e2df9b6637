"""Several processes that write one bundle: the others wait, and the bundle is whole."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from latentc.exporter.artifacts.store import Store, recover
from latentc.exporter.compiler.export import export
from latentc.exporter.progress import Event as Stage
from latentc.exporter.progress import Progress
from latentc.exporter.schedulers import plans as schedules
from latentc.exporter.schedulers.plans import add_to_bundle
from latentc.exporter.targets.onnx import lowering as onnx_target
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.errors import BundleError, ExportError
from latentc.runtimes.storage.locks import WAITING, writing
from tests.support import fakes
from tests.support import tiny_configurations as tiny

ROOT = Path(__file__).resolve().parent.parent.parent.parent
LONGEST = 120  # seconds for a thread to get where it is waited for

# Puts a bundle's files into the staging folder and publishes them, as an export does at its end.
WRITER = """
import shutil, sys, time
from pathlib import Path
from latentc.runtimes.storage.locks import writing
from latentc.exporter.progress import Progress
from latentc.exporter.artifacts.store import Store, recover
from latentc.runtimes.bundle.manifest import Manifest

output, template, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
manifest = Manifest.load(template)
for _ in range(rounds):
    with writing(output, Progress()):
        recover(output)
        store = Store(output, None)
        for file in manifest.files():
            target = store.staging / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(template / file.path, target)
            time.sleep(0.002)
        store.publish(manifest)
"""


@pytest.mark.fault("1.8", "two exports into one folder at once publish a damaged bundle")
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_leave_one_whole_bundle(processes: int, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    graphs = [{}, {"denoiser": "plain_denoiser"}, {"decoder": "broken"}, {"denoiser": "broken"}]
    running = []
    for index in range(processes):
        template = fakes.make_bundle(tmp_path / f"template-{index}", graphs=graphs[index])
        command = [sys.executable, "-c", WRITER, str(output), str(template), "5"]
        running.append(subprocess.Popen(command, cwd=ROOT))

    assert [process.wait(timeout=LONGEST) for process in running] == [0] * processes
    assert Bundle.open(output, hashing="always").check() > 0
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("template-")}
    assert left == {"bundle"}


def _publish(output: Path, template: Path) -> None:
    """Publish a bundle as an export does at its end."""
    manifest = Manifest.load(template)
    store = Store(output, None)
    for file in manifest.files():
        (store.staging / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template / file.path, store.staging / file.path)
    store.publish(manifest)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A bundle with a newer one, of another graph, in the folder ``newer`` beside it."""
    fakes.make_bundle(tmp_path / "newer", graphs={"denoiser": "plain_denoiser"})
    return fakes.make_bundle(tmp_path / "bundle")


@pytest.mark.skipif(sys.platform != "linux", reason="renames twice")
@pytest.mark.fault("1.8", "a reader finds no bundle while an export replaces it")
def test_a_bundle_is_there_at_every_moment(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, after_each = os.replace, []

    def observed(source: Any, target: Any) -> None:
        replace(source, target)
        after_each.append((published / MANIFEST).exists())

    monkeypatch.setattr(os, "replace", observed)
    _publish(published, published.parent / "newer")

    assert after_each
    assert all(after_each)
    assert Bundle.open(published, hashing="always").check() > 0
    assert sorted(os.listdir(published.parent)) == ["bundle", "newer"]


@pytest.mark.parametrize("lacks", ["the disk", "the library"])
def test_a_system_that_cannot_exchange_renames_twice(
    published: Path, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    class Library:
        if lacks == "the disk":
            renameat2 = staticmethod(lambda *_: -1)

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
    _publish(published, published.parent / "newer")

    assert Manifest.load(published) == Manifest.load(published.parent / "newer")
    assert sorted(os.listdir(published.parent)) == ["bundle", "newer"]


@pytest.mark.fault("1.8", "a reader finds no bundle while an export replaces it")
def test_a_kill_just_after_the_exchange_loses_nothing(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "discard", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            _publish(published, published.parent / "newer")
    assert Manifest.load(published) == Manifest.load(published.parent / "newer")
    recover(published)
    assert sorted(os.listdir(published.parent)) == ["bundle", "newer"]


# Where the export puts what is its own, and what stands there before it. Kinds of things by name.
IN_THE_WAY = [
    (f"{place} {kind}", place, kind)
    for place in (".bundle.partial", ".bundle.partial/.done", ".bundle.partial/.work")
    for kind in ("link", "file", "fifo")
] + [
    *((f".bundle.old {kind}", ".bundle.old", kind) for kind in ("link", "file", "fifo")),
    ("link of items", ".bundle.partial/schedules", "link"),
    ("link of marks", ".bundle.partial/.done/key", "link"),
]


@pytest.mark.fault("1.2", "what stands in the way of an export's own files is an odd error")
@pytest.mark.parametrize(("place", "kind"), [p[1:] for p in IN_THE_WAY], ids=lambda each: each)
def test_what_stands_in_the_way_is_neither_followed_nor_written(
    published: Path, place: str, kind: str
) -> None:
    victim, there = published.parent / "victim", published.parent / place
    victim.mkdir()
    (victim / "precious").write_text("precious")
    there.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "link":
            there.symlink_to(victim)
        case "file":
            there.write_text("something")
        case _:
            os.mkfifo(there)

    def make(folder: Path) -> dict[str, Any]:
        (folder / "a.json").write_bytes(b"a")
        return {}

    try:
        recover(published)
        Store(published, None).item("key", "schedules", make)
        _publish(published, published.parent / "newer")
    except ExportError:
        pass
    assert [(each.name, each.read_text()) for each in victim.iterdir()] == [("precious",) * 2]
    assert Bundle.open(published, hashing="always").check() > 0
    assert not published.is_symlink()


@pytest.mark.fault(
    "1.2", "a link that is called like a bundle that was moved aside takes its place"
)
def test_a_link_is_not_taken_for_a_bundle_that_was_moved_aside(published: Path) -> None:
    aside = published.parent / ".bundle.old"
    aside.symlink_to(published.parent / "newer")
    shutil.rmtree(published)
    recover(published)
    assert not published.is_symlink()
    assert Bundle.open(published.parent / "newer", hashing="always").check() > 0


def told(events: list[Stage], wanted: Event) -> Any:
    """A callback that keeps events and sets `wanted` once one says that somebody waits."""

    def report(event: Stage) -> None:
        events.append(event)
        if event.stage == WAITING:
            wanted.set()

    return report


@pytest.mark.fault("1.8", "two exports into one folder at once publish a damaged bundle")
def test_a_second_export_into_the_same_folder_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.unconditional(tmp_path / "source", tiny.SMALLEST_UNCONDITIONAL)
    output = tmp_path / "bundle"
    reached, go_on, waiting = Event(), Event(), Event()
    lower = onnx_target.lower

    def slow(*arguments: Any) -> Any:
        reached.set()
        assert go_on.wait(LONGEST)
        return lower(*arguments)

    monkeypatch.setattr(onnx_target, "lower", slow)
    settings: dict[str, Any] = {"steps": (4,), "schedulers": (), "verify": False}
    events: list[Stage] = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(export, tmp_path / "source", output, **settings)
        assert reached.wait(LONGEST)
        second: Future[Any] = pool.submit(
            export, tmp_path / "source", output, report=told(events, waiting), **settings
        )
        waited = waiting.wait(LONGEST / 4)
        go_on.set()
        assert waited, "the second export did not wait"
        assert first.result().made
        assert not second.result().made

    # It read what the first one had published before it decided that nothing was to be done.
    assert [event.stage for event in events if event.subject == "bundle"] == [WAITING, WAITING]
    assert Bundle.open(output, hashing="always").check() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "source"]


@pytest.mark.fault("1.8", "plans are added to a bundle while an export replaces it")
def test_adding_plans_waits_for_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_add_locked", lambda *arguments: "added")
    bundle = fakes.make_bundle(tmp_path / "bundle")
    waiting = Event()
    with ThreadPoolExecutor(1) as pool:
        with writing(bundle, Progress()):
            report = told([], waiting)
            adding = pool.submit(
                add_to_bundle, bundle, schedulers=["euler"], steps=[2], report=report
            )
            assert waiting.wait(LONGEST / 4)
            assert not adding.done()
        assert adding.result() == "added"
    assert os.listdir(tmp_path) == ["bundle"]


def test_no_lock_is_made_beside_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        add_to_bundle(tmp_path / "nothing" / "here", schedulers=["ddim"], steps=[2])
    assert not os.listdir(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; "
        "from latentc.runtimes.storage.locks import writing; "
        "from latentc.exporter.progress import Progress; "
        "held = writing(Path(sys.argv[1]), Progress()); "
        "held.__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "bundle"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".bundle.lock"]

    events: list[Stage] = []
    with writing(tmp_path / "bundle", Progress(events.append)):
        assert not events

    assert not os.listdir(tmp_path)


def test_a_link_to_a_bundle_has_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "link").symlink_to("bundle")
    waiting = Event()

    def other() -> None:
        with writing(tmp_path / "link", Progress(told([], waiting))):
            pass

    with ThreadPoolExecutor(1) as pool, writing(tmp_path / "bundle", Progress()):
        pool.submit(other)
        assert waiting.wait(LONGEST / 4)


def test_where_nothing_can_be_written_beside_a_bundle_its_lock_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    real_open = os.open

    def refusing(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(os.fspath(path)).parent == tmp_path:
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    with writing(tmp_path / "bundle", Progress()):
        assert os.listdir(tmp_path / "bundle") == [".lock"]
    assert not os.listdir(tmp_path / "bundle")
    with pytest.raises(ExportError, match=r"cannot write .*new: Permission denied"):
        writing(tmp_path / "new", Progress()).__enter__()


@pytest.mark.parametrize("place", [".bundle.lock", "bundle/.lock"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder", "hard link"])
def test_what_stands_where_the_lock_goes_is_not_written(
    tmp_path: Path, place: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle can bring a file of that name, and so can the folder that it was unpacked into."""
    (tmp_path / "bundle").mkdir()
    victim, lock = tmp_path / "victim", tmp_path / place
    victim.write_text("precious")
    match kind:
        case "link":
            lock.symlink_to(victim)
        case "dangling link":
            lock.symlink_to(tmp_path / "new")
        case "fifo":
            os.mkfifo(lock)
        case "folder":
            lock.mkdir()
        case _:
            os.link(victim, lock)
    if place.startswith("bundle"):
        real_open = os.open

        def refusing(path: Any, *arguments: Any, **named: Any) -> int:
            if Path(os.fspath(path)).parent == tmp_path:
                raise PermissionError(13, "Permission denied", path)
            return real_open(path, *arguments, **named)

        monkeypatch.setattr(os, "open", refusing)
    refused = pytest.raises(ExportError, match=re.escape(str(lock)))
    with refused if kind.endswith(("link", "folder")) and kind != "hard link" else nullcontext():
        writing(tmp_path / "bundle", Progress()).__enter__()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()


@pytest.mark.fault("1.9", "a bundle that a killed export moved aside stays beside the new one")
def test_the_old_bundle_of_a_killed_export_is_removed(
    smallest_unconditional: Path, smallest_unconditional_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(smallest_unconditional, tmp_path / "source")
    settings: dict[str, Any] = {"steps": (4,), "schedulers": (), "verify": False}
    settings["share_with"] = smallest_unconditional_bundle
    output = export(tmp_path / "source", tmp_path / "bundle", **settings).bundle
    shutil.copytree(output, tmp_path / ".bundle.old")

    assert not export(tmp_path / "source", output, **settings).made

    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "source"]
