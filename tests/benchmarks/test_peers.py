"""The runner of peers, with a stand-in that is a script and an environment of a few files."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from latentc import builtin_model
from latentc.benchmarks import peers
from latentc.benchmarks.peers.__main__ import cli
from latentc.runtimes.errors import BackendError, InputError

# A peer with no packages: it draws one colour, and says what was asked of it.
STAND_IN = """
import os, sys, time
from pathlib import Path
from _common import Peer, PeerError, main

class Pixel:
    def save(self, path):
        Path(path).write_bytes(b"an image")

class StandIn(Peer):
    packages = ("no-such-package",)
    def check(self, request):
        if request.prompt == "refuse":
            raise PeerError("it is too small")
    def convert(self, request, folder):
        if request.prompt == "break":
            print("no weights"); sys.exit(3)
        (folder / "converted").write_text("x")
        with open(Path(request.work) / "conversions", "a") as log:
            log.write("x")
    def load(self, request, folder):
        assert (folder / "converted").exists()
        with open(Path(request.work) / "loads", "a") as log:
            log.write("x")
        if request.prompt == "wait":
            time.sleep(60)
        return object()
    def draw(self, loaded, request, stages):
        stages.add("denoiser_call", 0.5)
        return [Pixel()]
    def describe(self, request, folder):
        return {"path": os.environ.get("PYTHONPATH")}

main(StandIn())
"""
REQUEST: dict[str, Any] = {
    "prompt": "a star",
    "steps": 2,
    "height": 64,
    "width": 64,
    "scenario": "end_to_end",
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peers.Peer:
    """A peer whose environment is this test's own Python."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "stand-in.py").write_text(STAND_IN)
    (folder / "stand-in.txt").write_text("# nothing\n")
    (folder / "_common.py").write_bytes((peers.HERE / "_common.py").read_bytes())
    peer = peers.Peer("stand-in", "for tests", folder)
    monkeypatch.setattr(peers, "PEERS", {"stand-in": peer})
    monkeypatch.setenv(peers.HOME, str(tmp_path / "environments"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return peer


@pytest.fixture
def ready(stand_in: peers.Peer) -> peers.Peer:
    environment = peers.home() / "stand-in"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    stamp(environment, stand_in.digest)
    return stand_in


def stamp(environment: Path, digest: str) -> None:
    text = json.dumps({"requirements": digest, "packages": []})
    (environment / "latentc-peer.json").write_text(text)


def request(tmp_path: Path, **changed: Any) -> dict[str, Any]:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "model_index.json").write_text("{}")
    return {**REQUEST, "model": str(model), "work": str(tmp_path / "work"), **changed}


def test_a_missing_environment_names_its_command(stand_in: peers.Peer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"python -m latentc\.benchmarks\.peers create stand-in$"):
        peers.run(stand_in, request(tmp_path), tmp_path / "r.json")
    with pytest.raises(InputError, match=r"create stand-in --into /somewhere$"):
        peers.python(stand_in, Path("/somewhere"))


def test_an_environment_of_other_requirements_is_refused(ready: peers.Peer) -> None:
    assert peers.python(ready).is_file()
    ready.requirements.write_text("# something else\n")
    with pytest.raises(InputError, match="made from other requirements"):
        peers.python(ready)


def test_an_unfinished_environment_is_refused(ready: peers.Peer) -> None:
    (peers.home() / "stand-in" / "latentc-peer.json").unlink()
    with pytest.raises(InputError, match="is unfinished"):
        peers.python(ready)


def test_making_an_environment(stand_in: peers.Peer, tmp_path: Path) -> None:
    stand_in.requirements.write_text(f"nothing @ file://{tmp_path}/nowhere\n")
    with pytest.raises(InputError, match="ended with code 1"):
        peers.create(stand_in)
    with pytest.raises(InputError, match="is unfinished"):
        peers.python(stand_in)
    stand_in.requirements.write_text("# nothing\n")
    folder = peers.create(stand_in)
    assert peers.python(stand_in).is_relative_to(folder)
    assert peers.run(stand_in, request(tmp_path), tmp_path / "r.json")["ok"]


def test_one_process_and_several_images(ready: peers.Peer, tmp_path: Path) -> None:
    asked = request(tmp_path, repeats=3, warmup=2)
    found = peers.run(ready, asked, tmp_path / "r.json")
    assert (found["ok"], found["error"], found["versions"]) == (True, None, {})
    assert found["settings"] == {"settings": "default", "path": None}
    stages = found["stages"]
    assert (len(stages["load"]), len(stages["end_to_end"])) == (1, 3)
    assert stages["denoiser_call"] == [0.5] * 3  # those of the warm-up are gone
    assert "first_image" not in stages
    assert found["peak_memory_bytes"] > 1 << 20
    assert Path(found["image"]).read_bytes() == b"an image"
    assert found["image"] == str(tmp_path / "r.png")
    assert sorted(path.name for path in tmp_path.glob("r*")) == ["r.json", "r.png"]


def test_a_cold_start_is_a_process_each(ready: peers.Peer, tmp_path: Path) -> None:
    asked = request(tmp_path, scenario="cold_start", repeats=2, warmup=1)
    stages = peers.run(ready, asked, tmp_path / "r.json")["stages"]
    assert (len(stages["first_image"]), len(stages["load"])) == (2, 2)
    assert (tmp_path / "work" / "loads").read_text() == "xxx"


def test_a_conversion_is_kept_until_something_changes(ready: peers.Peer, tmp_path: Path) -> None:
    asked = request(tmp_path)
    log = tmp_path / "work" / "conversions"
    for _ in range(2):
        peers.run(ready, asked, tmp_path / "r.json")
    assert log.read_text() == "x"
    peers.run(ready, {**asked, "scheduler": "DDIMScheduler"}, tmp_path / "r.json")
    assert log.read_text() == "xx"
    os.utime(Path(asked["model"]) / "model_index.json", (1, 1))
    peers.run(ready, asked, tmp_path / "r.json")
    assert log.read_text() == "xxx"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "refuse"}, "it is too small"),
        ({"prompt": "break"}, "its conversion ended with code 3: no weights"),
        ({"scenario": "guess"}, "scenario must be one of"),
        ({"nonsense": 1}, "is no request"),
        ({"guidance_scale": None}, "guidance_scale must be float, not None"),
        ({"steps": "4"}, "steps must be int, not '4'"),
        ({"model": "/nowhere"}, "is not a diffusers folder"),
    ],
)
def test_a_peers_failure_is_in_its_result(
    ready: peers.Peer, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    found = peers.run(ready, request(tmp_path, **changed), tmp_path / "r.json")
    assert not found["ok"]
    assert message in found["error"]
    assert found["image"] is None


def test_a_failed_conversion_is_not_taken_for_one(ready: peers.Peer, tmp_path: Path) -> None:
    peers.run(ready, request(tmp_path, prompt="break"), tmp_path / "r.json")
    assert peers.run(ready, request(tmp_path), tmp_path / "r.json")["ok"]


def test_no_result_is_an_error(ready: peers.Peer, tmp_path: Path) -> None:
    ready.script.write_text("import sys; sys.exit('it broke')")
    with pytest.raises(BackendError, match="wrote no result: it broke"):
        peers.run(ready, request(tmp_path), tmp_path / "r.json")


def test_out_of_time(ready: peers.Peer, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(BackendError, match="not done after 2 s"):
        peers.run(ready, request(tmp_path, prompt="wait"), tmp_path / "r.json", timeout=2)
    assert time.monotonic() - begun < 50  # its children were ended, too


def test_commands(ready: peers.Peer, tmp_path: Path) -> None:
    asked, result = tmp_path / "request.json", tmp_path / "r.json"
    asked.write_text(json.dumps(request(tmp_path)))
    listed = CliRunner().invoke(cli, ["list"])
    assert "stand-in" in listed.output
    assert "ready" in listed.output
    done = CliRunner().invoke(cli, ["run", "stand-in", str(asked), str(result)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["ok"]
    asked.write_text(json.dumps(request(tmp_path, prompt="refuse")))
    done = CliRunner().invoke(cli, ["run", "stand-in", str(asked), str(result)])
    assert (done.exit_code, "it is too small" in done.output) == (5, True)
    done = CliRunner().invoke(cli, ["run", "nobody", str(asked), str(result)])
    assert (done.exit_code, "there are: stand-in" in done.output) == (2, True)
    done = CliRunner().invoke(
        cli, ["run", "stand-in", str(asked), str(result), "--into", str(tmp_path / "none")]
    )
    assert (done.exit_code, "peers create stand-in" in done.output) == (2, True)


def test_every_peer_has_a_script_and_requirements() -> None:
    for peer in peers.PEERS.values():
        assert peer.script.is_file()
        lines = [line for line in peer.requirements.read_text().splitlines() if line[0] != "#"]
        assert all("<" in line or "==" in line for line in lines), "a tested range each"
        compile(peer.script.read_text(), str(peer.script), "exec")


def common() -> Any:
    spec = importlib.util.spec_from_file_location("_common", peers.HERE / "_common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_common"] = module
    spec.loader.exec_module(module)
    return module


def safetensors(path: Path, names: list[str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for index, name in enumerate(names):
        place = [4 * index, 4 * index + 4]
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": place}
    text = json.dumps(header).encode()
    data = np.arange(len(names), dtype=np.float32).tobytes()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("prefixed", [False, True])
def test_text_encoders_weights_get_the_names_that_are_wanted(
    tmp_path: Path, prefixed: bool
) -> None:
    """An older transformers draws random weights for names that it does not find."""
    from safetensors.numpy import load_file

    short, long = ["a.weight", "b.bias"], ["text_model.a.weight", "text_model.b.bias"]
    stored, wanted = (long, short) if prefixed else (short, long)
    path = tmp_path / "model.safetensors"
    safetensors(path, stored)
    common().rename(path, set(wanted))
    found = load_file(path)
    assert {name: float(value[0]) for name, value in found.items()} == {wanted[0]: 0, wanted[1]: 1}
    before = path.read_bytes()
    common().rename(path, set(wanted))
    assert path.read_bytes() == before
    with pytest.raises(Exception, match="lacks weights: c"):
        common().rename(path, {*wanted, "c"})


def test_configurations_become_json(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"lambda_min_clipped": -Infinity, "steps_offset": 1}')
    common().finite(path, _class_name="DDIMScheduler")
    assert json.loads(path.read_text()) == {"steps_offset": 1, "_class_name": "DDIMScheduler"}


# The real ones. Make an environment by: python -m latentc.benchmarks.peers create NAME


def environment_of(name: str) -> peers.Peer:
    peer = peers.find(name)
    try:
        peers.python(peer)
    except InputError as error:
        pytest.skip(str(error))
    return peer


@pytest.mark.peers
@pytest.mark.parametrize("settings", ["default", "best"])
@pytest.mark.parametrize("name", ["optimum-onnx", "optimum-intel", "openvino-genai"])
def test_a_real_peer_draws_what_was_asked_for(tmp_path: Path, name: str, settings: str) -> None:
    peer = environment_of(name)
    asked = {
        **REQUEST,
        "model": str(builtin_model()),
        "work": str(Path("build") / "tests" / "peers"),
        "prompt": "a large red circle",
        "steps": 25,
        "guidance_scale": 2.0,
        "settings": settings,
    }
    found = peers.run(peer, asked, tmp_path / "r.json")
    assert found["ok"], found["error"]
    assert len(found["stages"]["denoiser_call"]) == 25  # no step is skipped
    image = np.asarray(Image.open(found["image"])).astype(int)
    assert image.shape == (64, 64, 3)
    red = (image[..., 0] > 150) & (image[..., 1] < 100) & (image[..., 2] < 100)
    assert 0.1 < red.mean() < 0.6  # random weights would not know


@pytest.mark.peers
def test_stable_diffusion_cpp_says_why_not(tmp_path: Path) -> None:
    peer = environment_of("stable-diffusion-cpp-python")
    asked = {**REQUEST, "model": str(builtin_model()), "work": str(tmp_path / "work")}
    found = peers.run(peer, asked, tmp_path / "r.json")
    assert not found["ok"]
    assert "runs models with the sizes of Stable Diffusion" in found["error"]
