"""The runtime needs nothing that only POSIX has: with those names taken away, as on Windows, all
the rest runs.

Windows also renames and removes no file that is open, and opens no folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latentc.runtimes.bundle.manifest import MANIFEST
from tests.support import fakes

ROOT = Path(__file__).resolve().parent.parent.parent

# Libraries come first: their own builds for Windows do without.
TAKE_AWAY = """
import asyncio, multiprocessing, shutil, sys, tempfile
import click, msgspec, numpy, PIL.Image, PIL.PngImagePlugin, rich.console, rich.table, tokenizers
import warnings
import mmap, os
from pathlib import Path

for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
for name in (
    *("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "O_NOCTTY", "link", "symlink"),
    *("getuid", "geteuid", "getgid", "fork", "sched_getaffinity", "sysconf", "uname"),
    *("mkfifo", "wait4", "waitid", "killpg", "fchmod", "chown", "getpgid"),
):
    if hasattr(os, name):
        delattr(os, name)
for name in [name for name in dir(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]:
    delattr(mmap, name)
shutil._use_fd_functions = False

def is_open(path):
    real = os.path.realpath(path)
    there = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
    return os.path.isfile(real) and real in there

def refusing(function, folders=False):
    def call(path, *arguments, **named):
        if os.path.isdir(path) if folders else is_open(path):
            raise PermissionError(13, "The process cannot access the file", str(path))
        return function(path, *arguments, **named)
    return call

os.open = refusing(os.open, folders=True)
for name in ("replace", "rename", "unlink", "remove"):
    setattr(os, name, refusing(getattr(os, name)))
"""

GENERATE = """
from latentc.runtimes.backends import backend
backend.BACKENDS = {"fake": "tests.support.fakes:FakeBackend"}
from latentc.cli import run
bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
image = folder / "image.png"
codes = [
    run(["inspect", str(bundle)]),
    run(["verify", "--files-only", str(bundle)]),
    run(["generate", str(bundle), "a red circle", "--seed", "1", "-o", str(image)]),
    run(["plans", str(bundle), "-o", str(folder / "plans")]),
]
assert codes == [0] * 4, codes

from latentc.runtimes.backends.model_cache import ModelCache
cache = ModelCache(folder / "models")
with cache.scratch(10) as made:
    (made / "blob").write_bytes(b"x" * 10)
    cache.keep({"graph": "a"}, made / "blob")
assert cache.find({"graph": "a"}).read_bytes() == b"x" * 10

from latentc.runtimes.storage.locks import writing
from latentc.exporter.progress import Progress
from latentc.exporter.compiler.sharing import share
from latentc.exporter.artifacts.store import Store
from latentc.runtimes.bundle.manifest import Manifest
manifest = Manifest.load(bundle)
for _ in range(2):
    with writing(folder / "copy", Progress()):
        store = Store(folder / "copy", None, [bundle])
        for build in manifest.builds:
            for artifact in build.artifacts.values():
                assert store.keep(artifact.key)
        for file in manifest.files():
            target = store.staging / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / file.path, target)
        store.publish(manifest)
assert run(["verify", "--files-only", str(folder / "copy")]) == 0
"""


@pytest.mark.fault("1.8", "the runtime needs what only POSIX has")
def test_everything_runs_without_what_only_posix_has(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    document = json.loads((bundle / MANIFEST).read_bytes())
    for number, artifact in enumerate(document["builds"][0]["artifacts"].values()):
        artifact["key"] = f"key-{number}"
    (bundle / MANIFEST).write_text(json.dumps(document))
    work = tmp_path / "work"
    work.mkdir()

    done = subprocess.run(
        [sys.executable, "-c", TAKE_AWAY + GENERATE, bundle, work],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in work.iterdir()) == [
        "copy",
        "image.png",
        "models",
        "plans",
    ]


def test_an_engine_runs_without_what_only_posix_has(sd_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import onnxruntime\n" + TAKE_AWAY + "from latentc.cli import run\n"
        "sys.exit(run(['generate', sys.argv[1], 'a', '--steps', '1', '--backend', 'onnxruntime', "
        "'--seed', '1', '-o', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", script, str(sd_bundle), str(tmp_path / "image.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "image.png").stat().st_size > 0
