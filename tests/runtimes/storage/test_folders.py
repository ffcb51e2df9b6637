"""Where caches are: with a home folder, without one, and where somebody else has taken the name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from latentc.runtimes.backends.tensorrt.engine_store import engines_folder
from latentc.runtimes.storage import folders
from latentc.runtimes.storage.folders import cache_folder, expanded
from tests.support import fakes

ROOT = Path(__file__).resolve().parent.parent.parent.parent


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache is named, and temporary files go to a folder of the test."""
    import tempfile

    for name in ("LATENTC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders._private.cache_clear()


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither HOME nor an entry in passwd; the cache that is used instead."""
    import pwd

    def unknown(user: int) -> NoReturn:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path / f"latentc-{os.geteuid()}"


def test_the_environment_says_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path("~/.cache/latentc").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/two/latentc")
    monkeypatch.setenv("LATENTC_CACHE", "/one")
    assert cache_folder() == Path("/one")


@pytest.mark.fault("3.3", "a folder named ~ is made where files name paths that no shell expands")
def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("~").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "~/other")
    assert cache_folder() == home / "other" / "latentc"
    monkeypatch.setenv("LATENTC_CACHE", "~/own")
    assert cache_folder() == home / "own"
    assert expanded("~") == home
    assert expanded("a/~") == Path("a/~")
    assert engines_folder(Path("~/cache")) == home / "cache" / "engines"


@pytest.mark.fault("3.3", "without a home folder a folder named ~ is made in the working folder")
def test_without_a_home_folder_the_cache_is_a_temporary_folder_of_the_user(homeless: Path) -> None:
    assert cache_folder() == homeless
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert expanded("~/cache") == homeless / "cache"


@pytest.mark.fault("3.3", "without a home folder a folder named ~ is made in the working folder")
def test_a_root_folder_that_is_not_the_users_is_no_home(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker sets HOME=/ for a user without an entry in passwd."""
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_folder() == homeless


@pytest.mark.parametrize("taken", ["by a link", "for others to write"])
def test_a_temporary_folder_of_others_is_not_trusted(taken: str, homeless: Path) -> None:
    other = homeless.parent / "other"
    other.mkdir()
    if taken == "by a link":
        homeless.symlink_to(other)
    else:
        homeless.mkdir()
        homeless.chmod(0o777)

    folder = cache_folder()

    assert folder not in (homeless, other)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder
    assert not os.listdir(other)


SCRIPT = """
import pwd, sys
def unknown(user):
    raise KeyError(user)
pwd.getpwuid = unknown
from latentc.cli import run
sys.exit(run(["verify", "--files-only", sys.argv[1]]))
"""


@pytest.mark.fault("3.3", "without a home folder a folder named ~ is made in the working folder")
def test_a_command_without_a_home_folder_makes_none(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle")
    for path in bundle.rglob("*"):
        os.utime(path, (1e9, 1e9))  # old enough for digests to be kept
    work = tmp_path / "work"
    work.mkdir()
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}

    subprocess.run([sys.executable, "-c", SCRIPT, bundle], cwd=work, env=environment, check=True)

    assert not os.listdir(work)
    assert (tmp_path / f"latentc-{os.geteuid()}" / "hashes.json").is_file()
