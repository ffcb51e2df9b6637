"""An installed latentc has one import name, `latentc`, whatever else the environment holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# Modules of other people that have the names of our folders.
HOSTILE = ("runtimes", "exporter", "benchmarks")


def built(project: Path, output: Path) -> dict[str, Path]:
    """Build the wheel and the source distribution of a project, with no network; return each by
    its kind. Links in the checkout are not followed into the wheel twice."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(output)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    return {"wheel": next(output.glob("*.whl")), "sdist": next(output.glob("*.tar.gz"))}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that has the wheel, the libraries of this one by a path file, and
    modules that fail where they are imported, in front of everything."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    wheel = distributions["wheel"]
    install = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", *install, wheel],
        check=True,
    )
    packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    for name in HOSTILE:
        (packages / f"{name}.py").write_text("raise ImportError('not the one')\n", "utf-8")
    return home


def test_the_wheel_has_one_name_at_its_top(distributions: dict[str, Path]) -> None:
    tops = {name.split("/")[0] for name in names_in(distributions["wheel"])}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"latentc"}


def test_the_wheel_holds_what_the_checkout_does(distributions: dict[str, Path]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "latentc", *HOSTILE], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("this is no checkout")
    files = {
        name if name.startswith("latentc/") else f"latentc/{name}"
        for name in tracked.stdout.splitlines()
        if not (ROOT / name).is_symlink()
    }
    shipped = {name for name in names_in(distributions["wheel"]) if name.startswith("latentc/")}
    assert shipped == files


def test_a_wheel_of_the_source_distribution_is_the_same(
    distributions: dict[str, Path], tmp_path: Path
) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = built(source, tmp_path / "dist")["wheel"]
    assert names_in(again) == names_in(distributions["wheel"])


@pytest.mark.skipif(os.name == "nt", reason="environments are laid out otherwise on Windows")
def test_an_image_beside_modules_of_the_same_names(
    installed: Path, smallest_bundle: Path, tmp_path: Path
) -> None:
    for name in HOSTILE:  # in the working folder, too
        (tmp_path / f"{name}.py").write_text("raise ImportError('not the one')\n", "utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = ["generate", smallest_bundle, "a red circle", "--steps", "1", "-o", "image.png"]
    for start in ([installed / "bin" / "latentc"], [installed / "bin" / "python", "-m", "latentc"]):
        subprocess.run(
            [*start, *command, "--backend", "onnxruntime"],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
        )
        with Image.open(tmp_path / "image.png") as image:
            assert min(image.size) > 0
        (tmp_path / "image.png").unlink()
    origin = "import latentc.runtimes as r, latentc; print(r.__file__, latentc.__file__)"
    places = subprocess.check_output(
        [installed / "bin" / "python", "-c", origin], cwd=tmp_path, env=environment, text=True
    ).split()
    assert all(Path(place).is_relative_to(installed) for place in places)


@pytest.mark.skipif(os.name == "nt", reason="environments are laid out otherwise on Windows")
@pytest.mark.parametrize("module", ["latentc.benchmarks.loop_overhead", "latentc.benchmarks.peers"])
def test_commands_that_measure(installed: Path, module: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    help_text = subprocess.check_output(
        [installed / "bin" / "python", "-m", module, "--help"], cwd=tmp_path, env=environment
    )
    assert b"Usage" in help_text or b"usage" in help_text


def test_a_checkout_without_links(tmp_path: Path) -> None:
    """Where git cannot make links, it writes files with the place in them."""
    root = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "runtimes", root / "runtimes", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "latentc").mkdir()
    shutil.copy(ROOT / "latentc" / "__init__.py", root / "latentc")
    (root / "latentc" / "runtimes").write_text("../runtimes", "utf-8")
    code = (
        "import latentc, latentc.runtimes.pipeline.pipeline as p; print(p.__file__, latentc.load)"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": "."}, text=True
    )
    assert Path(printed.split()[0]).is_relative_to(root / "runtimes")
