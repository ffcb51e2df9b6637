"""Whatever is read from a file is a regular file, inside of its bundle, and of a bounded size.

A FIFO would block, a device never ends, a link leads to what the user did not name.
"""

from __future__ import annotations

import ast
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from latentc.exporter.source import model_files
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.errors import BundleError, LatentcError, SourceError
from latentc.runtimes.storage.parsing import PARSERS
from tests.conftest import Run
from tests.fuzz import targets
from tests.support import fakes

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("runtimes", "exporter", "benchmarks/bench", "latentc")
HUGE = 1 << 40  # bytes, of a file with no block on the disk
# Parsers that are given a text or what was read already.
NO_PATH = ("text", "origin")
# What files are called that parsers look for in a folder.
IN_FOLDERS = ("model_index.json", "latentc.json")
# "file:function": why reading a file directly is right there.
DIRECTLY = {
    "runtimes/storage/files.py:open_regular": "has checked the file",
    "runtimes/storage/files.py:link_or_copy": "its callers have checked the file",
    "runtimes/storage/files.py:_new_file": "writes a file that it has made",
    "runtimes/storage/mapped.py:__init__": "maps a file of a bundle, which was checked",
    "runtimes/machine.py:processor": "/proc",
    "runtimes/backends/tensorrt/cuda.py:driver": "/proc",
    "runtimes/backends/openvino.py:_read": "reads a file of a bundle, which was checked",
    "exporter/memory.py:_forget_pages": "/proc",
    "exporter/compiler/preflight.py:_number": "/sys",
    "exporter/compiler/preflight.py:_files_of": "/proc",
    "exporter/compiler/preflight.py:_left": "/sys",
    "exporter/artifacts/source_closure.py:read_source": "latentc's own code, and that of plugins",
    "exporter/stored_weights.py:_written": "writes",
    "exporter/schedulers/plans.py:_extended": "reads what it has just written",
    "exporter/targets/coreml/lowering.py:_forget_empty_folders": "reads what was just written",
    "benchmarks/bench/energy.py:read": "/sys",
    "benchmarks/bench/worker.py:": "reads what its parent has just written",
    "benchmarks/bench/roofline.py:": "reads what its parent has just written",
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


ODD: tuple[Callable[[Path], None], ...] = (fifo, endless, folder, huge)


def readers() -> list[str]:
    """The parsers that are given a path."""
    names = targets.names()
    for name in names:
        import_module(name.partition(":")[0])
    return [name for name in names if PARSERS[name].source not in NO_PATH]


@pytest.mark.fault("1.4", "a file that is read whole is a FIFO, a device, a folder or endless")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("name", readers())
def test_every_reader_refuses_what_is_no_bounded_regular_file(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    known = PARSERS[name]
    module, _, path = name.partition(":")
    owner: Any = import_module(module)
    for part in path.split("."):
        owner = getattr(owner, part)
    place = tmp_path / "place"
    if known.source == "folder":
        place.mkdir()
        for each in IN_FOLDERS:
            make(place / each)
    else:
        make(place)
    arguments = (
        (place, 4) if name == "latentc.runtimes.texts.tokenizer:TextTokenizer.load" else (place,)
    )
    if name == "latentc.exporter.verification.judging:read" and make is not huge:
        assert owner(*arguments) is None  # counts as a pipeline without such a file
        return

    with pytest.raises(known.error):
        owner(*arguments)


@pytest.mark.fault("1.4", "a manifest is a FIFO, a device, endless or outside of its bundle")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", ODD)
def test_a_manifest_is_a_bounded_regular_file(
    make: Callable[[Path], None], tmp_path: Path, run: Run
) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    (bundle / MANIFEST).unlink()
    make(bundle / MANIFEST)

    code, _, errors = run("inspect", bundle)

    assert code == BundleError.exit_code
    expected = "a regular file" if make in (fifo, folder) else "at most|leads out"
    with pytest.raises(BundleError, match=expected):
        Manifest.load(bundle)
    assert errors.startswith(f"error: {bundle / MANIFEST}: ")


@pytest.mark.fault("1.4", "a manifest is a FIFO, a device, endless or outside of its bundle")
def test_a_manifest_outside_of_its_bundle_is_refused(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    shutil.move(bundle / MANIFEST, tmp_path / "elsewhere.json")
    (bundle / MANIFEST).symlink_to("../elsewhere.json")

    with pytest.raises(BundleError, match="a link leads out of"):
        Manifest.load(bundle)


def test_a_manifest_that_a_link_inside_of_the_bundle_leads_to_is_read(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    (bundle / MANIFEST).rename(bundle / "own.json")
    (bundle / MANIFEST).symlink_to("own.json")
    (tmp_path / "link").symlink_to("bundle")

    assert Manifest.load(tmp_path / "link") == Manifest.load(bundle)


@pytest.mark.fault("1.4", "what the user names is a FIFO, a device, a folder or endless")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize(
    "option",
    ["--image", "--mask", "--control-image", "--ip-adapter-image", "--prompt-embeds"],
)
def test_what_a_call_names_is_a_bounded_regular_file(
    option: str,
    make: Callable[[Path], None],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "latentc.runtimes.backends.backend.BACKENDS", {"fake": "tests.support.fakes:FakeBackend"}
    )
    bundle = fakes.make_bundle(tmp_path / "bundle")
    make(tmp_path / "odd")

    code, _, errors = run(
        "generate", bundle, "a", option, tmp_path / "odd", "-o", tmp_path / "out.png"
    )

    assert code == 2
    assert str(tmp_path / "odd") in errors or "prompt-embeds" in errors


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def memory(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


@pytest.mark.fault("1.4", "second look: each file that a command may name, sockets, /proc")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("make", [fifo, endless, huge, listening, memory])
def test_every_file_that_a_command_names(
    make: Callable[[Path], None], tmp_path: Path, run: Run, smallest: Path
) -> None:
    odd = tmp_path / "odd.safetensors"
    make(odd)
    new = tmp_path / "new"
    options = ("--lora", "--textual-inversion", "--vae", "--controlnet", "--ip-adapter")
    options += ("--t2i-adapter", "--calibration-prompts", "--share-with")
    calls: list[tuple[Any, ...]] = [
        *(("export", smallest, "-o", new, "--dry-run", option, odd) for option in options),
        ("export", odd, "-o", new, "--dry-run"),
        ("export", smallest, "-o", odd, "--dry-run"),
        ("bench", "compare", odd, odd),
        ("schedule", odd, "--scheduler", "ddim"),
        *((command, odd) for command in ("inspect", "verify", "generate")),
    ]
    for call in calls:
        code, _, errors = run(*call)
        assert code in (2, 3, 4), (call, code, errors)
        assert "odd.safetensors" in errors, (call, errors)
        assert "Traceback" not in errors
    assert not new.exists()


@pytest.mark.fault("1.4", "a configuration that a library reads whole is endless")
def test_a_configuration_of_a_part_is_bounded(tmp_path: Path) -> None:
    huge(tmp_path / "config.json")

    with pytest.raises(SourceError, match="at most"):
        model_files.configuration(tmp_path)


@pytest.mark.fault("1.4", "a file is read past the one helper")
def test_files_are_read_by_the_one_helper_only() -> None:
    found = {
        place
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for place in _direct(ast.parse(path.read_text("utf-8")), str(path.relative_to(ROOT)))
    }
    assert found == set(DIRECTLY), "use latentc.runtimes.storage.files, or say in DIRECTLY why not"


def _direct(tree: ast.Module, path: str) -> Iterator[str]:
    """Where a file is opened or read by Python's own means."""

    def visit(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            own = isinstance(node.func, ast.Attribute) and node.func.attr in (
                *("read_bytes", "read_text"),
                *(("open",) if _opens_a_path(node.func) else ()),
            )
            if own or name == "open":
                yield f"{path}:{function}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(tree, "")


def _opens_a_path(function: ast.Attribute) -> bool:
    """Return whether ``x.open(…)`` is of a path: others are of an archive, a bundle, an engine."""
    return ast.unparse(function.value) in ("path", "file", "place", "entry", "output")


def test_an_error_names_the_file_and_what_it_is(tmp_path: Path) -> None:
    fifo(tmp_path / "cases.toml")
    from latentc.benchmarks.bench import cases

    with pytest.raises(LatentcError, match=r"cases.toml: .*expected a regular file, found a FIFO"):
        cases.read(tmp_path / "cases.toml")
