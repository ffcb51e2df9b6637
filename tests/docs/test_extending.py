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
from PIL import Image

from latentc import load
from latentc.exporter import options, targets
from latentc.exporter.artifacts.source_closure import closure
from latentc.exporter.export_arguments import available_options
from latentc.exporter.families import family_of
from latentc.exporter.options import describing
from latentc.exporter.source.resolving import resolve
from latentc.runtimes import plugins
from latentc.runtimes.backends import backend
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.commands.declared_options import options_of
from latentc.runtimes.errors import InputError, LatentcError
from latentc.runtimes.pipeline import pipeline
from latentc.runtimes.verification import judges
from latentc.runtimes.verification.verify import relative_l2
from tests.conftest import Run
from tests.support.fakes import add_probes, make_bundle

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
EXAMPLE = ROOT / "examples" / "numpy_backend.py"
COMMANDS = "latentc.exporter.cli"


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
FAMILY = ROOT / "examples" / "plain_family.py"
STEERING = ROOT / "examples" / "steering_adapter.py"


def points(group: str) -> dict[str, dict[str, str]]:
    """Return the entry points of the page's package that has some of a group."""
    declared = (tomllib.loads(text)["project"]["entry-points"] for text in blocks("toml"))
    found: dict[str, dict[str, str]] = next(each for each in declared if group in each)
    return found


def block(name: str) -> str:
    """Return the page's Python code that defines a name."""
    return next(text for text in blocks("py") if name in text)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages are installed in this process, until the test ends."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    # It makes its options of the packages that are installed when it is imported.
    monkeypatch.delitem(sys.modules, COMMANDS, raising=False)
    before = set(sys.modules)
    yield folder
    sys.modules.pop(COMMANDS, None)
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
    install(packages, "latentc_plain", PLAIN.read_text("utf-8"), points("latentc.targets"))
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


@pytest.mark.parametrize("example", [PLAIN, FAMILY, STEERING])
def test_the_example_is_as_long_as_the_page_says(example: Path) -> None:
    lines = len(example.read_text("utf-8").splitlines())
    (behind,) = re.findall(rf"\(\.\./examples/{example.name}\)(.{{200}})", " ".join(PAGE.split()))
    assert f" in {lines} lines" in behind


def test_a_family_and_a_pass_from_outside(
    packages: Path, run: Run, smallest_unconditional: Path, tmp_path: Path
) -> None:
    import diffusers

    source, bundle, image = (tmp_path / name for name in ("source", "bundle", "image.png"))
    unet = diffusers.DDPMPipeline.from_pretrained(smallest_unconditional).unet
    diffusers.PNDMPipeline(unet, diffusers.PNDMScheduler()).save_pretrained(source)
    export = ("export", source, "-o", bundle, "--steps", 4, "--scheduler", "pndm")
    code, _, err = run(*export)
    assert code == 3, err
    assert "'PNDMPipeline' is not supported" in err
    install(packages, "latentc_pndm", FAMILY.read_text("utf-8"), points("latentc.pipelines"))
    install(packages, "latentc_smaller", block("SMALLER"), points("latentc.passes"))
    assert "latentc_pndm" in closure(*describing(resolve(source)))
    code, _, err = run(*export, "--precision", "fp32", "--precision", "fp32+smaller")
    assert code == 0, err
    manifest = Manifest.load(bundle)
    assert [check.pipeline_class for check in manifest.programs_checked] == ["PNDMPipeline"]
    assert {build.precision for build in manifest.builds} == {"fp32", "fp32+smaller"}
    errors = {}
    for build in manifest.builds:
        assert build.verification is not None
        assert build.verification.passed
        errors[build.precision] = max(each.relative_l2 for each in build.verification.checks)
    assert errors["fp32"] < 1e-4 < errors["fp32+smaller"] < 2e-1
    code, _, err = run("generate", bundle, "--steps", 4, "-o", image)
    assert code == 0, err
    assert image.exists()


def test_an_adapter_from_outside(packages: Path, run: Run, smallest: Path, tmp_path: Path) -> None:
    """Its flag is there, its code and file are in the keys, and calls draw what diffusers draws of
    steered states."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    install(packages, "latentc_steering", STEERING.read_text("utf-8"), points("latentc.adapters"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(smallest)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    width = pipe.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(width, generator=generator) for _ in range(2)]
    files = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for file, direction in zip(files, directions, strict=True):
        save_file({"direction": direction}, file)
    save_file({"direction": torch.zeros(width + 1)}, tmp_path / "wide.safetensors")
    bundle = tmp_path / "bundle"
    export = ("export", smallest, "-o", bundle, "--steps", 2, "--scheduler", "ddim")
    code, _, err = run(*export, "--steering", tmp_path / "wide.safetensors")
    assert code == 3, err
    assert f"wide.safetensors: expected a tensor `direction` of {width} numbers" in err
    code, _, err = run(*export, "--steering", tmp_path / "none.safetensors")
    assert code == 2, err
    assert "no such steering direction" in err
    assert not bundle.exists()
    code, _, err = run(*export, *(each for file in files for each in ("--steering", file)))
    assert code == 0, err
    manifest = Manifest.load(bundle)
    assert [(each.kind, each.id) for each in manifest.source.ingredients] == [
        ("steering", "0.safetensors"),
        ("steering", "1.safetensors"),
    ]
    source = resolve(smallest, asked={"steering": [str(files[0])]})
    assert "latentc_steering" in closure(*describing(source, ("unet",)))
    assert "latentc_steering" not in closure(*describing(source, ("vae",)))

    call = {"num_inference_steps": 2, "height": 32, "width": 48, "guidance_scale": 3.0}
    loaded = load(bundle)
    texts = pipe.encode_prompt("a cat", "cpu", 1, True, "dull")
    for scale in (1.0, -2.5):
        steered = [states + scale * sum(directions) for states in texts]
        theirs = pipe(
            prompt_embeds=steered[0],
            negative_prompt_embeds=steered[1],
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
            **call,
        ).images
        given = {} if scale == 1.0 else {"steering_scale": scale}
        ours = loaded("a cat", negative_prompt="dull", seed=5, scheduler="ddim", **given, **call)
        assert relative_l2(ours.latents, theirs.numpy()) <= 1e-4
    plain = loaded(
        "a cat", negative_prompt="dull", seed=5, scheduler="ddim", **call, steering_scale=0
    )
    assert relative_l2(plain.latents, ours.latents) > 1e-2


def test_a_judge_from_outside(packages: Path) -> None:
    install(
        packages,
        "latentc_red",
        block("RedJudge"),
        {"latentc.judges": {"red": "latentc_red:RedJudge"}},
    )
    assert "red" in judges.names()
    judge = judges.get("red")
    assert judge.prompts(2) == ["a red thing, number 0", "a red thing, number 1"]
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert [judge.agrees(image, "a red thing") for image in images] == [True, False]


BROKEN_FAMILIES = {
    "leaves": ("raise SystemExit(3)", "SystemExit"),
    "bare": ("x = 1", "has no COMPONENTS"),
    "absent": (None, "No module named"),
}


@pytest.mark.parametrize("name", BROKEN_FAMILIES)
def test_a_broken_family_concerns_nobody_else(
    name: str, packages: Path, run: Run, smallest_unconditional: Path, tmp_path: Path
) -> None:
    code, message = BROKEN_FAMILIES[name]
    if code is not None:
        (packages / f"family_{name}.py").write_text(code)
    record = (
        f"from latentc.exporter.classes import PipelineClass\nR = PipelineClass('family_{name}')\n"
    )
    install(
        packages,
        f"record_{name}",
        record,
        {"latentc.pipelines": {"PNDMPipeline": f"record_{name}:R"}},
    )
    other = ("--precision", "denoiser=fp16", "--dry-run")
    status, _, err = run("export", smallest_unconditional, "-o", tmp_path / "bundle", *other)
    assert status == 0, err
    with pytest.raises(InputError, match=f"pipeline class 'PNDMPipeline': .*{message}"):
        family_of("PNDMPipeline")


def test_a_precision_that_nothing_else_is_known_of(
    packages: Path, run: Run, tmp_path: Path
) -> None:
    named = points("latentc.targets")
    del named["latentc.precisions"]
    install(packages, "latentc_plain", PLAIN.read_text("utf-8"), named)
    given = ("source", "-o", tmp_path / "b", "--target", "plain", "--precision", "fp24")
    status, _, err = run("export", *given)
    assert status == 2
    assert "precision 'fp24' of target 'plain': nothing else is known of it" in err


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
    install(packages, "latentc_plain", plain, points("latentc.targets"))
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
    @options_of(available_options())
    def command(**_: Any) -> None: ...

    assert CliRunner().invoke(command, ["--grain", "5"]).exit_code == 0
    assert "--grain" in CliRunner().invoke(command, ["--help"]).output
