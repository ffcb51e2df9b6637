"""docs/extending.md is true: its backend, installed by its entry point, makes images."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from latentc.exporter import options, targets
from latentc.exporter.export_arguments import export_options
from latentc.runtimes import plugins
from latentc.runtimes.backends import backend
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.commands.declared_options import options_of
from latentc.runtimes.errors import InputError, LatentcError
from latentc.runtimes.pipeline import pipeline
from latentc.runtimes.verification import judges
from tests.conftest import Run
from tests.support.fakes import add_probes, make_bundle

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
EXAMPLE = ROOT / "examples" / "numpy_backend.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the page's package is installed."""
    project = tomllib.loads(blocks("toml")[0])
    points = project["project"]["entry-points"]["latentc.backends"]
    module = points["numpy"].partition(":")[0]
    shutil.copy(EXAMPLE, tmp_path / f"{module}.py")
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 1.0\n"
    )
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[latentc.backends]", *lines, ""]))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "LATENTC_CACHE": str(tmp_path / "cache")}


def latentc(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "latentc", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_quotes_the_example() -> None:
    example = EXAMPLE.read_text("utf-8")
    quoted = [block for block in blocks("python") if "latentc.load" not in block]
    assert len(quoted) == 2
    for block in quoted:
        assert block.rstrip("\n") in example, block


def test_the_backend_is_found(installed: dict[str, str]) -> None:
    records = {each["name"]: each for each in json.loads(latentc(installed, "backends", "--json"))}
    assert records["numpy"]["installed"]
    assert records["numpy"]["targets"] == ["onnx"]


def test_the_backend_verifies_and_generates(
    installed: dict[str, str], sd_bundle: Path, tmp_path: Path
) -> None:
    # The onnx package refuses files with several hard links, as bundles that share files have.
    shutil.copytree(sd_bundle, tmp_path / "bundle")
    bundle, image = str(tmp_path / "bundle"), tmp_path / "circle.png"
    found = json.loads(latentc(installed, "verify", bundle, "--backend", "numpy", "--json", "-"))
    assert [each["passed"] for each in found["verified"]] == [True]
    latentc(
        installed, "generate", bundle, "a large red circle", "--backend", "numpy",
        "--steps", "1", "-o", str(image),
    )  # fmt: skip
    assert image.exists()


PLAIN = ROOT / "examples" / "plain_target.py"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages are installed in this process, until the test ends."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in {*sys.modules} - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def install(folder: Path, module: str, code: str, points: dict[str, dict[str, str]]) -> None:
    """Put a package with entry points into a folder of `sys.path`."""
    (folder / f"{module}.py").write_text(code, "utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = []
    for group, named in points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in named.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
    importlib.invalidate_caches()


@pytest.mark.fault("3.2", "a target, precision and backend from outside fail in the preflight")
def test_a_target_from_outside(packages: Path, run: Run, smallest: Path, tmp_path: Path) -> None:
    project = tomllib.loads(blocks("toml")[1])["project"]
    install(packages, "latentc_plain", PLAIN.read_text("utf-8"), project["entry-points"])
    bundle = tmp_path / "bundle"
    export = ("export", smallest, "-o", bundle, "--target", "plain", "--precision", "fp24")
    code, out, err = run(*export, "--dry-run")
    assert code == 0, err
    assert "GiB of memory" in out + err
    code, out, err = run(*export, "--steps", 2)
    assert code == 0, err
    rounded = onnx.load(bundle / Manifest.load(bundle).builds[0].artifacts["denoiser"].entry)
    weights = [onnx.numpy_helper.to_array(each) for each in rounded.graph.initializer]
    largest = max((each for each in weights if each.dtype == np.float32), key=np.size)
    assert not (largest.view(np.uint32) & 0xFF).any()  # by the package's own pass
    code, out, err = run("verify", bundle, "--json", "-")
    assert code == 0, err
    assert [each["passed"] for each in json.loads(out)["verified"]] == [True]
    image = tmp_path / "image.png"
    code, out, err = run("generate", bundle, "a", "--steps", 2, "-o", image)
    assert code == 0, err
    assert image.exists()
    code, out, err = run("backends", "--json")
    assert "plain" in {each["name"] for each in json.loads(out)}


def test_the_example_is_as_long_as_the_page_says() -> None:
    assert f"in {len(PLAIN.read_text('utf-8').splitlines())} lines" in " ".join(PAGE.split())


BROKEN = {
    "exits": "import sys; sys.exit(3)",
    "library": "raise OSError('libengine.so.3: cannot open shared object file')",
    "fails": "raise RuntimeError('no driver\\nhere')",
    "syntax": "def (",
    "absent": "import there_is_no_such_engine",
    "memory": "raise MemoryError",
    "other": "class Backend: pass",
    "bare": (
        "from latentc.runtimes.backends.backend import Backend as Base\nclass Backend(Base): pass"
    ),
    "panics": "class PanicException(BaseException): pass\nraise PanicException('index')",
}
STARTS = """
from latentc.runtimes.backends.backend import Backend as Base
class Backend(Base):
    name, package, install, targets = "starts", "p", "pip install p", ("fake",)
    def __init__(self): {init}
    def version(self): {version}
    def devices(self): {devices}
    def _open(self, *a): raise RuntimeError
"""
BROKEN |= {
    "starting": STARTS.format(init="raise SystemExit(1)", version="return ''", devices="return []"),
    "driver": STARTS.format(
        init="raise OSError(2, 'no')", version="return ''", devices="return []"
    ),
    "version": STARTS.format(init="pass", version="1 / 0", devices="return ['cpu']"),
    "devices": STARTS.format(init="pass", version="return '1'", devices="raise SystemExit(2)"),
}
OPENS = """
from tests.support.fakes import FakeBackend
class Backend(FakeBackend):
    name = {name!r}
    def _open(self, *given):
        {body}
        return super()._open(*given)
    def version(self): {version}
"""
# Engines that fail when they are used, and what `latentc verify` says of each.
FAILING = {
    "raises": ("raise RuntimeError('no driver')", "return '1'", "could not load", "no driver"),
    "leaves": ("raise SystemExit(3)", "return '1'", "could not load", "SystemExit"),
    "imports": ("import there_is_none", "return '1'", "could not load", "there_is_none"),
    "counts": ("pass", "raise KeyError('version')", "backend 'counts' fails", "version"),
    "ends": ("pass", "raise SystemExit(4)", "backend 'ends' fails", "SystemExit"),
    "works": ("pass", "return '1'", "", ""),
}


@pytest.mark.fault("3.2", "an engine that fails to open ends verify for all the others")
def test_failing_engines_do_not_end_verify(packages: Path, run: Run, tmp_path: Path) -> None:
    for name, (body, version, *_) in FAILING.items():
        code = OPENS.format(name=name, body=body, version=version)
        points = {"latentc.backends": {name: f"failing_{name}:Backend"}}
        install(packages, f"failing_{name}", code, points)
    bundle = make_bundle(tmp_path / "bundle")
    add_probes(bundle)
    figures = tmp_path / "figures.json"
    status, out, err = run("verify", bundle, "--json", figures)
    assert status == 5
    assert "works 1, cpu" in out
    found = json.loads(figures.read_bytes())
    assert [each["backend"] for each in found["verified"]] == ["works"]
    failed = {each["backend"]: each["error"] for each in found["failed"]}
    assert set(failed) == set(FAILING) - {"works"}
    for name, (_, _, *words) in FAILING.items():
        for word in words if name in failed else ():
            assert word in failed[name]
            assert f"{name} failed: " in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.fault("3.2", "an engine whose import raises anything takes all others down")
def test_broken_packages_concern_nobody_else(packages: Path, run: Run, tmp_path: Path) -> None:
    for name, code in BROKEN.items():
        kinds = ("backends", "targets", "judges")
        points = {f"latentc.{kind}": {name: f"broken_{name}:Backend"} for kind in kinds}
        install(packages, f"broken_{name}", code, points)
    good = STARTS.format(init="pass", version="return '1'", devices="return ['cpu']")
    install(packages, "good_engine", good, {"latentc.backends": {"good": "good_engine:Backend"}})
    code, out, err = run("backends", "--json")
    assert code == 0, err
    records = {each["name"]: each for each in json.loads(out)}
    assert records["good"]["installed"]
    assert records["onnxruntime"]["installed"]
    for name in BROKEN:
        assert not records[name]["installed"]
        assert records[name]["problem"]
    bundle = make_bundle(tmp_path / "bundle")
    build = Manifest.load(bundle).builds[0]
    assert set(backend.for_build(build)) == {"devices", "good", "version"}
    for name in BROKEN:
        with pytest.raises(LatentcError):
            pipeline.load(bundle, name)
        with pytest.raises(InputError, match=f"'{name}'"):
            targets.get(name)
        with pytest.raises(InputError, match=f"'{name}'"):
            judges.get(name)
    assert set(targets.TARGETS) == {"onnx", "openvino", "torch", "tensorrt", "coreml"}
    code, _, err = run("export", "nowhere", "-o", tmp_path / "b", "--target", "exits")
    assert code == 2
    assert "target 'exits': broken_exits:Backend fails: SystemExit" in err


BROKEN_PASSES = {
    "not_there": ("", "not_there"),
    "no_run": ("x = 1", "has no function run"),
    "quits": ("raise SystemExit(3)", "SystemExit"),
}


@pytest.mark.fault("3.2", "a precision from outside has passes of its own")
@pytest.mark.parametrize("name", BROKEN_PASSES)
def test_passes_of_a_broken_package(
    name: str, packages: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = BROKEN_PASSES[name]
    if code:
        (packages / f"{name}.py").write_text(code)
    plain = PLAIN.read_text("utf-8").replace("(__name__,)", repr((name,)))
    project = tomllib.loads(blocks("toml")[1])["project"]
    install(packages, "latentc_plain", plain, project["entry-points"])
    monkeypatch.setattr(
        "latentc.exporter.compiler.export.resolve", lambda *_: pytest.fail("the source was read")
    )
    given = ("source", "-o", tmp_path / "b", "--target", "plain", "--precision", "fp24")
    status, _, err = run("export", *given)
    assert (status, message in err) == (2, True), err


@pytest.mark.fault("3.2", "a package with unreadable metadata takes all others down")
def test_unreadable_metadata(packages: Path) -> None:
    install(packages, "good_engine", "", {"latentc.backends": {"good": "good_engine:Backend"}})
    (packages / "odd-1.0.dist-info").mkdir()
    (packages / "odd-1.0.dist-info" / "METADATA").write_bytes(b"Metadata-Version: 2.1\nName: odd\n")
    (packages / "odd-1.0.dist-info" / "entry_points.txt").write_bytes(b"[latentc.backends]\n\xff")
    importlib.invalidate_caches()
    assert plugins.entry_points("latentc.backends")["good"] == "good_engine:Backend"


GRAINY = """
from typing import Annotated, ClassVar, TypedDict

from latentc.exporter.targets import TargetInfo
from latentc.exporter.targets.options import TargetOptions
from latentc.runtimes.options import Option


class Arguments(TypedDict, total=False):
    grain: Annotated[int, Option("How fine.", default=3, least=1)]


class Options(TargetOptions):
    ARGUMENTS: ClassVar[type] = Arguments


target = TargetInfo("grainy", "onnxruntime", (), {"fp32": ()}, options=Options)
"""


def test_options_of_a_target_from_outside(packages: Path) -> None:
    """They are keywords and flags, and are checked as those of our targets are."""
    install(packages, "grainy", GRAINY, {"latentc.targets": {"grainy": "grainy:target"}})
    read: Any = options.export_options  # which knows our targets' options
    assert read(targets="grainy").of("grainy").values == {"grain": 3}
    assert read(targets="grainy", grain=5).of("grainy").values == {"grain": 5}
    with pytest.raises(InputError, match="'grain' must be at least 1, not 0"):
        read(targets="grainy", grain=0)
    with pytest.raises(InputError, match="--grain is for target 'grainy', which is not asked for"):
        read(grain=5)

    @click.command()
    @options_of(export_options())
    def command(**_: Any) -> None: ...

    assert CliRunner().invoke(command, ["--grain", "5"]).exit_code == 0
    assert "--grain" in CliRunner().invoke(command, ["--help"]).output
