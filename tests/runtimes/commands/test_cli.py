"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from latentc import cli
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import ProgramCall
from latentc.runtimes.calls import choosing as calls
from latentc.runtimes.pipeline.pipeline import Pipeline
from tests.conftest import Run
from tests.support.fakes import FakeBackend, add_probes, make_bundle

ROOT = Path(__file__).resolve().parents[3]


class Absent(FakeBackend):
    name = "absent"
    install = "pip install 'latentc[absent]'"
    targets = ("fake",)

    def __init__(self) -> None:
        raise ImportError("No module named 'absent'")


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backends, one of them not installed, and a cache of its own."""
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "BACKENDS", {"absent": "x:Absent", "fake": "x:FakeBackend"})
    real = engines.find
    kinds = {"absent": Absent, "fake": FakeBackend}
    monkeypatch.setattr(engines, "find", lambda name: kinds.get(name) or real(name))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text.strip()


# --- generate ----------------------------------------------------------------------------


def test_generate(bundle: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        *("generate", bundle, "a red circle", "--seed", 7, "--steps", 2, "-o", "made.png")
    )
    assert (code, err) == (0, "")
    assert "made.png  seed 7" in out
    assert "(2 steps)" in out
    with Image.open(tmp_path / "made.png") as image:
        assert image.size == (16, 16)
        settings = json.loads(image.info["parameters"])
    assert settings["prompt"] == "a red circle"
    assert settings["seed"] == 7


def test_every_option(bundle: Path, run: Run) -> None:
    code, out, _ = run(
        *("generate", bundle, "a", "--steps", 2, "--scheduler", "noisy", "--guidance-scale", 2),
        *("--negative-prompt", "blue", "--seed", 1, "--height", 8, "--width", 32, "--json"),
        *("--backend", "fake", "--device", "cpu", "--build", "fake-fp32", "--precision", "fp32"),
        *("--arg", "prompt_2=red", "--arg", "original_size=9,8.5", "--arg", "crop=1", "-n", 2),
        *("-o", "x.jpg", "--threads", 1),
    )
    assert code == 0
    found = json.loads(out)
    assert found["images"] == ["x-0.jpg", "x-1.jpg"]
    assert found["seeds"] == [1]
    assert len(found["timings"]["steps"]) == 2
    expected: dict[str, Any] = {
        "prompt": "a", "prompt_2": "red", "negative_prompt": "blue", "guidance_scale": 2.0,
        "original_size": [9.0, 8.5], "crop": 1.0, "num_inference_steps": 2,
        "scheduler": "noisy", "height": 8, "width": 32, "seed": 1, "num_images_per_prompt": 2,
        "build": "fake-fp32", "device": "cpu",
    }  # fmt: skip
    assert expected.items() <= found["settings"].items()


@pytest.mark.fault("3.1", "the call that is checked before the load is the one that is drawn")
def test_a_call_is_read_once(bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = calls.parse
    monkeypatch.setattr(calls, "parse", lambda *given: reads.append(given) or real(*given))
    code, out, _ = run("generate", bundle, "a", "--steps", 2, "--json")
    assert code == 0
    assert len(reads) == 1
    assert json.loads(out)["settings"]["num_inference_steps"] == 2


def test_numbered_names(bundle: Path, run: Run, tmp_path: Path) -> None:
    code, _, _ = run(
        "generate", bundle, "-p", "a", "-p", "red", "-o", "p{index}q.png", "-s", 1, "-s", 2
    )
    assert code == 0
    assert sorted(path.name for path in tmp_path.glob("p*.png")) == ["p0q.png", "p1q.png"]


def test_a_negative_prompt_for_each_prompt(bundle: Path, run: Run) -> None:
    given = ("--negative-prompt", "blue", "--negative-prompt", "circle", "--json")
    code, out, _ = run("generate", bundle, "a", "-p", "red", "--steps", 2, *given)
    assert code == 0
    assert json.loads(out)["settings"]["negative_prompt"] == ["blue", "circle"]
    code, _, err = run("generate", bundle, "a", "--steps", 2, *given)
    assert (code, "negative_prompt" in one_line(err)) == (2, True)


def test_generate_without_text(tmp_path: Path, run: Run) -> None:
    plain = make_bundle(tmp_path / "plain", text=False)
    assert run("generate", plain, "-n", 2)[0] == 0
    assert (tmp_path / "out-1.png").exists()


def test_a_long_prompt_warns_in_one_line(bundle: Path, run: Run) -> None:
    code, _, err = run("generate", bundle, "a red circle a blue square")
    assert code == 0
    assert one_line(err).startswith("warning: The following part of your input was truncated")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "nowhere", "a"], 4, "error: no bundle at nowhere: no such folder"),
        (["generate", "BUNDLE"], 2, "error: no text given: this bundle needs 'prompt'"),
        (["generate", "BUNDLE", "a", "--steps", "3"], 2, "error: scheduler 'plain': no sampling"),
        (["generate", "BUNDLE", "a", "--steps", "0"], 2, "'num_inference_steps' must be from 1 to"),
        (["generate", "BUNDLE", "a", "--steps", "x"], 2, "Invalid value for '--steps'"),
        (["generate", "BUNDLE", "a", "--height", "15"], 2, "height 15 is not a multiple of 4"),
        (["generate", "BUNDLE", "a", "--scheduler", "x"], 2, "it has: plain, noisy"),
        (["generate", "BUNDLE", "a", "--backend", "x"], 2, "there are: absent, fake"),
        (["generate", "BUNDLE", "a", "--backend", "absent"], 5, "pip install 'latentc[absent]'"),
        (["generate", "BUNDLE", "a", "--device", "npu"], 5, "no device 'npu' on this machine"),
        (["generate", "BUNDLE", "a", "--build", "x"], 2, "it has: fake-fp32 (fake, fp32)"),
        (["generate", "BUNDLE", "a", "--arg", "x"], 2, "expected NAME=VALUE"),
        (["generate", "BUNDLE", "a", "--arg", "x=1"], 2, "unknown argument 'x'"),
        (["generate", "BUNDLE", "a", "--arg", "crop=x"], 2, "are no numbers joined by commas"),
        (["generate", "BUNDLE", "a", "-o", "a.xyz"], 2, "the extension '.xyz' is none of"),
        (["generate", "BUNDLE", "a", "-o", "no/a.png"], 2, "the folder no does not exist"),
        (["generate", "BUNDLE", "a", "--seed", "1", "--seed", "2"], 2, "2 seeds for 1 images"),
        (["generate"], 2, "Missing argument 'BUNDLE'. (see: latentc generate --help)"),
        (["generate", "BUNDLE", "--nope"], 2, "no such option: --nope (see: latentc"),
        (["nonsense"], 2, "no such command: nonsense; there are: export,"),
        (["inspect", "nowhere"], 4, "no such folder"),
        (["verify", "BUNDLE"], 6, "holds no probes"),
    ],
)
def test_errors_are_one_line(
    bundle: Path, run: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    before = sorted(tmp_path.rglob("*.png"))
    found, _, err = run(*[str(bundle) if a == "BUNDLE" else a for a in arguments])
    assert message in err
    assert "Traceback" not in err
    assert found == code
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert sorted(tmp_path.rglob("*.png")) == before  # and nothing half-written


def test_nan_is_an_error(tmp_path: Path, run: Run) -> None:
    broken = make_bundle(tmp_path / "nan", graphs={"denoiser": "nan_denoiser"})
    code, _, err = run("generate", broken, "a")
    assert code == 5
    assert one_line(err).startswith("error: denoiser: the model returned NaN or infinity at step 1")
    assert not list(tmp_path.glob("*.png"))


def test_an_altered_file_is_an_error(bundle: Path, run: Run) -> None:
    size = (bundle / "schedules/plain.json").stat().st_size
    (bundle / "schedules/plain.json").write_bytes(b"")
    code, _, err = run("generate", bundle, "a")
    assert code == 4
    assert f"schedules/plain.json: expected {size:,} bytes" in one_line(err)


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTC_DEBUG", "1")
    with pytest.raises(Exception, match="no such folder"):
        run("inspect", "nowhere")


def test_ctrl_c(bundle: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentc.runtimes.interpreter.loop.denoise", interrupted)
    code, _, err = run("generate", bundle, "a")
    assert (code, err.split()) == (130, ["interrupted"])
    assert not list(tmp_path.glob("*.png"))


SWALLOWING = """
import signal, sys
from latentc.cli import run
from latentc.runtimes.bundle.manifest import Manifest

def load(*_):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise TypeError("unsupported operand type(s) for +") from None

Manifest.load = load
sys.exit(run(["inspect", "bundle"]))
"""


@pytest.mark.fault("1.9", "an interruption that a library swallows is told as an error of its own")
def test_an_interruption_that_a_library_swallows() -> None:
    """PyTorch makes a TypeError of it where it comes within an operator."""
    result = subprocess.run([sys.executable, "-c", SWALLOWING], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


# --- inspect, verify, backends -----------------------------------------------------------


def test_inspect(bundle: Path, run: Run) -> None:
    add_probes(bundle)
    code, out, _ = run("inspect", bundle)
    assert code == 0
    for text in ("fake-fp32", "text_encoder", "NoisyScheduler", "1-2, 4", "guidance_scale 3"):
        assert text in out
    code, out, _ = run("inspect", bundle, "--json")
    found = json.loads(out)
    assert found["sizes"]["total"] == sum(
        path.stat().st_size for path in bundle.rglob("*.*") if path.name != MANIFEST
    )
    assert found["builds"][0]["name"] == "fake-fp32"


def test_inspect_says_what_programs_were_held_against(bundle: Path, run: Run) -> None:
    """Each program has a line: the class, the errors of its calls, what diffusers refuses."""
    manifest = Manifest.load(bundle)
    (record,) = manifest.programs_checked

    def inspected(*calls: ProgramCall) -> str:
        checked = (msgspec.structs.replace(record, calls=calls),) if calls else ()
        changed = msgspec.structs.replace(manifest, programs_checked=checked)
        (bundle / MANIFEST).write_bytes(changed.checked())
        out = run("inspect", bundle)[1]
        (line,) = re.findall(r"^ *text-to-image +FakePipeline +(.*?) *$", out, re.MULTILINE)
        return re.sub(r" +", " ", line)

    compared, refused = record.calls
    assert inspected(compared) == "1 image: 1.5e-06 ok"
    small = msgspec.structs.replace(refused, refused=None, relative_l2=2e-6, miniature=True)
    several = "2 × 2 images, 4 seeds of a miniature: 2.0e-06 ok"
    assert inspected(compared, small) == f"1 image: 1.5e-06; {several}"
    off = msgspec.structs.replace(compared, relative_l2=0.1)
    assert inspected(off) == "1 image: 1.0e-01, allowed 3.0e-04 MISS"
    says = "2 × 2 images, 4 seeds: diffusers refuses (one prompt at a time)"
    assert inspected(refused) == says
    assert inspected() == "not verified"


def test_verify(bundle: Path, run: Run, tmp_path: Path) -> None:
    add_probes(bundle)
    code, out, err = run("verify", bundle, "--json", "figures.json")
    assert code == 0
    assert "± 0, 99 dB" in out
    assert "all files are as the manifest says" in err
    (record,) = json.loads((tmp_path / "figures.json").read_bytes())["verified"]
    assert (record["build"], record["backend"], record["passed"]) == ("fake-fp32", "fake", True)
    code, out, _ = run("verify", bundle, "--json", "-", "--backend", "fake", "--device", "cpu")
    assert (code, len(json.loads(out)["verified"])) == (0, 1)


def test_verify_names_what_it_cannot_check(bundle: Path, run: Run) -> None:
    add_probes(bundle)
    manifest = Manifest.load(bundle)
    other = msgspec.structs.replace(manifest.builds[0], name="apple-fp32", target="apple")
    builds = (*manifest.builds, other)
    (bundle / MANIFEST).write_bytes(msgspec.structs.replace(manifest, builds=builds).encode())
    code, out, err = run("verify", bundle)
    assert code == 0
    assert re.search(r"fake-fp32 .* fake 1.0, cpu", out)
    assert "apple-fp32: not checked, no backend that loads it is installed here" in err


def test_verify_misses(bundle: Path, run: Run) -> None:
    add_probes(bundle, 0.01)
    code, out, err = run("verify", bundle)
    assert code == 6
    assert "MISS" in out
    assert err.splitlines()[-1] == "error: does not reproduce PyTorch: fake-fp32 on fake"


def test_verify_hashes_everything(bundle: Path, run: Run) -> None:
    add_probes(bundle)
    path = bundle / "schedules/noisy.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, _, err = run("verify", bundle)
    assert code == 4
    assert "noisy.json: expected SHA-256" in one_line(err)
    assert run("verify", bundle, "--files-only")[0] == 4


def test_verify_files_only(bundle: Path, run: Run) -> None:
    assert run("verify", bundle, "--files-only")[0] == 0


def test_backends(run: Run) -> None:
    code, out, _ = run("backends")
    assert code == 0
    assert "pip install" in out
    records = {record["name"]: record for record in json.loads(run("backends", "--json")[1])}
    assert records["fake"]["installed"]
    assert records["fake"]["devices"] == ["cpu"]
    assert not records["absent"]["installed"]
    assert records["absent"]["install"] == Absent.install


# --- the process -------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert out.startswith("Usage: latentc")
    if command:
        assert "Examples:" in out


def test_version(run: Run) -> None:
    from latentc.runtimes.version import __version__

    assert run("--version") == (0, f"latentc, version {__version__}\n", "")


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    """Neither does that of a command of the runtime, whose options are declarations."""
    code = (
        "import sys; from latentc.cli import COMMANDS, run; run(['--help']); "
        "ours = [n for n, (place, _) in COMMANDS.items() if place.startswith('latentc.runtimes')]; "
        "codes = [run([name, '--help']) for name in ours]; assert codes == [0] * 9, codes; "
        "heavy = {'numpy', 'torch', 'rich', 'PIL', 'msgspec', 'tokenizers', 'latentc.exporter'}; "
        "heavy &= set(sys.modules); sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_python_m_latentc() -> None:
    done = python("-m", "latentc", "inspect", "/nowhere")
    assert done.returncode == 4
    assert done.stderr == "error: no bundle at /nowhere: no such folder\n"


def test_a_closed_pipe_is_no_error(bundle: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "latentc", "inspect", str(bundle), "--json"],
        cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.fault("3.1", "an image that is too large for its format fails after all steps")
def test_formats_are_known_before_the_work(
    bundle: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[Any] = []
    monkeypatch.setattr(Pipeline, "decode", lambda *_: worked.append("decoded"))
    large = ("--height", 16, "--width", 20_000, "--steps", 1)
    code, _, said = run("generate", bundle, "a", *large, "-o", tmp_path / "a.webp")
    assert code == 2
    assert "20000x16 pixels, and WEBP holds at most 16383 a side; use .png" in said
    assert not worked
    assert not (tmp_path / "a.webp").exists()


@pytest.mark.fault("3.7", "more images than any memory holds")
def test_more_images_than_any_memory_holds(bundle: Path, run: Run) -> None:
    code, _, said = run("generate", bundle, "a", "-n", 10**12)
    assert code == 2
    assert "at most 10000" in said


@pytest.mark.fault("3.4", "a character that the console's encoding lacks is a traceback")
@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-8"])
def test_consoles_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    bundle = make_bundle(tmp_path / "größe-日本")
    command = [sys.executable, "-m", "latentc", "inspect", str(bundle)]
    missing = [sys.executable, "-m", "latentc", "inspect", str(tmp_path / "日本\udc80")]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    for arguments, code in ((command, 0), (missing, 4)):
        made = subprocess.run(arguments, env=environment, capture_output=True, check=False)
        assert made.returncode == code
        assert b"Traceback" not in made.stderr
        assert made.stdout if code == 0 else made.stderr.startswith(b"error: ")


@pytest.mark.fault("3.4", "a lone surrogate in a prompt blames the bundle")
def test_a_prompt_that_is_no_text(bundle: Path, run: Run, tmp_path: Path) -> None:
    code, _, said = run("generate", bundle, "a \udcff", "-o", tmp_path / "a.png")
    assert code == 2
    assert "'prompt' holds a lone surrogate (U+DCFF at 2)" in said
