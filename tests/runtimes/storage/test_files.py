"""`latentc.runtimes.storage.files`: bounded reading of regular files, and replacing files as a
whole."""

from __future__ import annotations

import ast
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from latentc.runtimes.storage import files
from latentc.runtimes.storage.files import UnreadableFile, UnsafeTarget

ROOT = Path(__file__).resolve().parent.parent.parent.parent
PACKAGES = ("runtimes", "exporter", "latentc", "benchmarks")
TEMPORARY = {"TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp"}
RENAMING = {"replace", "rename", "renames", "move"}
LIMIT = 100


@pytest.fixture(autouse=True)
def swept_again() -> None:
    """Every test finds folders that were not swept yet."""
    files._swept.clear()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


NOT_REGULAR = {
    "FIFO": (fifo, "found a FIFO"),
    "folder": (Path.mkdir, "found a folder"),
    "socket": (unix_socket, "found a socket"),
    "endless device": (link_to("/dev/zero"), "found a device"),
    "terminal": (link_to("/dev/tty"), "found a device"),
}


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_only_regular_files_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = NOT_REGULAR[kind]
    monkeypatch.chdir(tmp_path)  # a socket's path is limited to 108 bytes
    path = Path("file")
    make(path)

    with pytest.raises(UnreadableFile, match=f"expected a regular file, {message}"):
        files.read_regular(path, LIMIT)


@pytest.mark.parametrize("size", [0, 1, LIMIT])
def test_a_file_within_its_bound_is_read_whole(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)

    assert files.read_regular(tmp_path / "file", LIMIT) == data
    assert files.read_regular(tmp_path / "file", LIMIT, root=tmp_path) == data


def test_a_file_beyond_its_bound_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)

    with pytest.raises(UnreadableFile, match=r"at most 100 bytes, found 1,099,511,627,776"):
        files.read_regular(path, LIMIT)


@pytest.mark.fault("1.4", "second look: a regular file that would wait, as some under /proc do")
def test_a_file_that_has_nothing_to_read_yet_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as /proc/kmsg, which is called regular; a FIFO that somebody writes to stands for it."""
    path = tmp_path / "waiting"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    monkeypatch.setattr(files, "_check_regular", lambda *_: None)
    assert files.read_regular(path, 10) == b""
    os.close(writer)


@pytest.mark.fault("1.4", "second look: sockets, memory of a process, files without a largest size")
def test_special_files_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
    (tmp_path / "memory").symlink_to("/proc/self/mem")
    (tmp_path / "pages").symlink_to("/proc/self/pagemap")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(100 << 30)
    for name in os.listdir(tmp_path):
        with pytest.raises(OSError, match=r"found a socket|output error|at most 1,000"):
            files.read_regular(tmp_path / name, 1000)


def test_a_file_whose_size_is_not_known_before_is_bounded_too() -> None:
    with pytest.raises(UnreadableFile, match="at most 10 bytes"):
        files.read_regular("/proc/self/status", 10)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_an_error_of_reading(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="no file can have this name"):
        files.read_regular(tmp_path / name, LIMIT)
    with pytest.raises(UnreadableFile):
        files.read_regular(tmp_path / name, LIMIT, root=tmp_path)


def test_links_are_followed_within_the_root_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "file").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (root / "folder" / "within").symlink_to("../file")
    (root / "out").symlink_to("../secret")
    (root / "up").symlink_to("..")

    assert files.read_regular(root / "folder" / "within", LIMIT, root=root) == b"inside"
    for name in ("out", "up/secret", "../secret"):
        with pytest.raises(UnreadableFile, match="leads out of"):
            files.read_regular(root / name, LIMIT, root=root)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    with suppress(KeyError), files.replacing(path) as file:
        file.write(b"half")
        raise KeyError

    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with files.replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "file", b"")
    finally:
        os.umask(before)

    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.fault("1.9", "a file is renamed into its place before it is on the disk")
@pytest.mark.parametrize("way", ["replacing", "move"])
def test_a_file_is_on_the_disk_before_it_is_renamed(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append("folder" if Path(name) == tmp_path else "file")
        fsync(descriptor)

    def renamed(source: str, target: str) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    if way == "replacing":
        files.write(tmp_path / "file", b"data")
    else:
        (tmp_path / "scratch").write_bytes(b"data")
        files.move(tmp_path / "scratch", tmp_path / "file")

    assert calls == ["file", "rename", "folder"]


def test_a_disk_without_fsync_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    files.write(tmp_path / "file", b"data")

    assert (tmp_path / "file").read_bytes() == b"data"


HOSTILE = {
    "the target": lambda root, out: (root / "file").symlink_to(out / "file"),
    "a dangling target": lambda root, out: (root / "file").symlink_to(out / "none"),
    "its folder": lambda root, out: (root / "folder").symlink_to(out),
    "a folder above": lambda root, out: (root / "upper").symlink_to(out),
}


@pytest.mark.parametrize("link", HOSTILE)
def test_nothing_is_written_through_a_link_in_the_root(link: str, tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    (out / "folder").mkdir(parents=True)
    (out / "file").write_text("kept")
    HOSTILE[link](root, out)
    names = {"its folder": "folder/file", "a folder above": "upper/new/file"}
    path = root / names.get(link, "file")

    with pytest.raises(UnsafeTarget, match="expected no link inside"):
        files.write(path, b"overwritten", root=root)
    if "folder" in link:
        with pytest.raises(UnsafeTarget):
            files.remove(path, root=root)

    assert (out / "file").read_text() == "kept"
    assert sorted(os.listdir(out)) == ["file", "folder"]


@pytest.mark.parametrize("path", ["../file", "folder/../../file", "/etc/file"])
def test_nothing_is_written_outside_of_the_root(path: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeTarget, match="expected a path inside"):
        files.write(tmp_path / path, b"", root=tmp_path)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to("../kept")

    files.remove(tmp_path / "root" / "link", root=tmp_path / "root")

    assert (tmp_path / "kept").read_text() == "kept"
    assert not os.listdir(tmp_path / "root")


def killed_while_writing(folder: Path) -> None:
    """Leave a scratch file and a scratch folder in `folder`, as a kill does."""
    script = """
import os, signal, sys
from pathlib import Path
from typing import Any
from latentc.runtimes.storage import files
with files.replacing(Path(sys.argv[1]) / "file") as file:
    file.write(b"half")
    file.flush()
    with files.scratch_folder(Path(sys.argv[1])) as made:
        (made / "engine").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, folder], cwd=ROOT, check=False)


@pytest.mark.fault("1.9", "temporary files of killed runs stay in caches and beside outputs")
def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    killed_while_writing(tmp_path)
    assert len(os.listdir(tmp_path)) == 2

    files.write(tmp_path / "file", b"whole")

    assert os.listdir(tmp_path) == ["file"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "file") as file, files.scratch_folder(tmp_path) as folder:
        before = os.listdir(tmp_path)
        files.sweep(tmp_path)
        script = "import sys; from latentc.runtimes.storage import files; files.sweep(sys.argv[1])"
        subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, check=True)
        assert sorted(os.listdir(tmp_path)) == sorted(before)
        file.write(b"data")
        (folder / "engine").write_bytes(b"data")
        files.move(folder / "engine", tmp_path / "engine")

    assert sorted(os.listdir(tmp_path)) == ["engine", "file"]


def test_without_locks_only_what_is_a_day_old_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_while_writing(tmp_path)
    monkeypatch.setattr(files, "fcntl", None)

    files.sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 2
    for name in os.listdir(tmp_path):
        os.utime(tmp_path / name, times=(0, time.time() - files._LEFT_BEHIND - 60))
    files.sweep(tmp_path)

    assert not os.listdir(tmp_path)


def test_other_hidden_files_and_links_are_not_swept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    names = [".file.tmp", ".latentc-12.tmp", ".latentc-0123456789abcdef.tmp.png"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".latentc-0123456789abcdef.tmp").symlink_to(kept)
    before = sorted(os.listdir(tmp_path))

    files.sweep(tmp_path)

    assert sorted(os.listdir(tmp_path)) == before
    assert (kept / "file").exists()


@pytest.mark.fault(
    "1.9", "second look: what only looks like a killed run's folder, and links in one"
)
def test_what_looks_like_scratch_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    left = tmp_path / ".latentc-0123456789abcdef.tmp"
    (left / "deep").mkdir(parents=True)
    (left / "link").symlink_to(kept)
    (left / "deep" / "link").symlink_to("/dev/zero")
    os.mkfifo(left / "fifo")
    os.mkfifo(tmp_path / ".latentc-1123456789abcdef.tmp")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's path is limited to 108 bytes
        listening.bind(".latentc-2123456789abcdef.tmp")

        files.sweep(tmp_path)

    assert not left.exists()
    assert (kept / "file").exists()
    assert len(os.listdir(tmp_path)) == 3  # a FIFO and a socket are none of ours


@pytest.mark.fault("1.9", "second look: a killed run's folder that may not be removed")
def test_what_cannot_be_removed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, in a shared cache: the next run goes on."""
    killed_while_writing(tmp_path)
    left = set(os.listdir(tmp_path))

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    for name in ("_open_to_lock", "_remove_if_left"):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, refuse)
            files.sweep(tmp_path)
            files._swept.clear()
            files.write(tmp_path / "file", b"whole")
        assert set(os.listdir(tmp_path)) == left | {"file"}
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        patch.setattr(os, "unlink", refuse)
        files.sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == left | {"file"}


def test_a_hard_link_takes_a_files_place(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("same")
    (tmp_path / "two").write_text("same")

    files.replace_by_link(tmp_path / "one", tmp_path / "two")

    assert (tmp_path / "one").samefile(tmp_path / "two")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def renames(tree: ast.AST) -> list[int]:
    """The lines of a module that rename a file, or import what does."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            if RENAMING & {name.name for name in node.names}:
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, node.func.value
            of_module = isinstance(owner, ast.Name) and owner.id in ("os", "shutil")
            of_path = name == "replace" and len(node.args) == 1 and not node.keywords
            if name in ("rename", "renames") or of_path or (of_module and name in RENAMING):
                lines.append(node.lineno)
    return lines


def test_the_search_for_renames_sees_each_way() -> None:
    text = "os.replace(a, b)\npath.replace(b)\npath.rename(b)\nos.renames(a, b)\nshutil.move(a, b)"
    assert renames(ast.parse(text)) == [1, 2, 3, 4, 5]
    assert renames(ast.parse("from os import replace")) == [1]
    assert renames(ast.parse("text.replace('a', 'b')\nstructs.replace(a, b=1)")) == []


@pytest.mark.fault("1.2", "files are renamed by code of their own in many places")
def test_files_are_renamed_in_one_module_only() -> None:
    modules = (path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    renaming = {
        path.relative_to(ROOT).as_posix()
        for path in modules
        if renames(ast.parse(path.read_text("utf-8")))
    }
    assert renaming == {"runtimes/storage/files.py"}


@pytest.mark.fault("1.9", "temporary folders of killed benchmarks are never removed")
def test_temporary_files_are_made_by_one_module_only() -> None:
    """Others would leave them behind when they are killed."""
    modules = (path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    making = {
        path.relative_to(ROOT).as_posix()
        for path in modules
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Name | ast.Attribute | ast.alias)
        if {getattr(node, name, None) for name in ("id", "attr", "name")} & TEMPORARY
    }
    assert making == set()


def test_a_temporary_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom latentc.runtimes.storage.files import temporary_folder\n"
        "with temporary_folder():\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    for text, left in ((script, 1), (script.split("    os")[0] + "    pass", 0)):
        subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
        assert len(list(tmp_path.iterdir())) == left
