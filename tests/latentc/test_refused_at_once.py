"""Each command refuses values before it does any work: a row for every option that has values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import click
import pytest
from click.testing import CliRunner

from latentc.cli import COMMANDS, cli
from latentc.runtimes.backends import backend as engines
from tests.conftest import Run
from tests.exporter.compiler.test_refused_at_once import BESIDE, OPTIONS
from tests.support.fakes import FakeBackend, make_bundle

# What every work begins with; reaching one of them fails the test. Manifests are read, no more.
WORK = (
    "latentc.runtimes.bundle.files.check_file",  # any other file of a bundle
    "latentc.runtimes.backends.backend.Backend.open",
    "latentc.runtimes.pipeline.pipeline.Sessions",
    "latentc.runtimes.tuning.tune.Search.run",
    "latentc.runtimes.building.engines._built_all",
    "latentc.benchmarks.bench.runner.run",
    "latentc.exporter.schedulers.plans.writing",
    "latentc.exporter.compiler.export.resolve",
)
# Arguments after the bundle ({here} is a folder with `file` and `folder` in it), and the message.
REFUSED: tuple[tuple[str, str, str], ...] = (
    ("inspect", "--program coffee", "no program 'coffee' in this bundle"),
    ("generate", "a --output {here}/none/a.png", "does not exist"),
    ("generate", "a -o {here}/a.bmp", "the extension '.bmp'"),
    ("generate", "a --num-images 0", "num_images_per_prompt"),
    ("generate", "a --num-images 1000000000", "at most 10000"),
    ("generate", "a --scheduler coffee", "no scheduler 'coffee' in this bundle"),
    ("generate", "a --steps 0", "num_inference_steps"),
    ("generate", "a --steps 999", "no sampling plan for 999 steps"),
    ("generate", "a --height 7", "height 7 is not a multiple of 4"),
    ("generate", "a --width 70000", "width 70000"),
    ("generate", "a -o {here}/a.webp --width 16400", "16400"),
    ("generate", "a --num-frames 5", "unknown argument 'num_frames'"),
    ("generate", "a --guidance-scale nan", "guidance_scale"),
    ("generate", "a --guidance-rescale 0.5", "guidance_rescale"),
    ("generate", "a --guidance-start 2", "guidance_start"),
    ("generate", "a --guidance-stop 0", "guidance_stop"),
    ("generate", "a --cache-interval 2", "no shallow part"),
    ("generate", "a --denoising-end 2", "denoising_end"),
    ("generate", "a --max-embeddings-multiples 0", "max_embeddings_multiples"),
    ("generate", "a --negative-prompt b --arg negative_prompt_3=b", "negative_prompt_3"),
    ("generate", "a --seed " + "9" * 40, "seed"),
    ("generate", "a --seed 1 --seed 2", "seed"),
    ("generate", "a --arg coffee=1", "coffee"),
    ("generate", "a --arg crop", "expected NAME=VALUE"),
    ("generate", "a --strength 0.5", "strength"),
    ("generate", "a --image {here}/none.png", "no such file"),
    ("generate", "a --mask {here}/file", "{here}/file"),
    ("generate", "a --control-image {here}/none.png", "no such file"),
    ("generate", "a --ip-adapter-image {here}/none.png", "no such file"),
    ("generate", "a --mask-blur 3", "mask_blur"),
    ("generate", "a --padding-mask-crop 3", "padding_mask_crop"),
    ("generate", "--prompt-embeds {here}/file", "--prompt-embeds"),
    ("generate", "a --refiner {here}/bundle", "image"),
    ("generate", "a --refiner {here}/bundle --denoising-end 0.5 --device npu", "npu"),
    ("generate", "a --preset coffee", "no preset 'coffee'"),
    ("generate", "a --backend coffee", "no backend named 'coffee'"),
    ("generate", "a --backend onnxruntime", "loads builds for onnx"),
    ("generate", "a --device npu", "no device 'npu'"),
    ("generate", "a --build coffee", "no build 'coffee'"),
    ("generate", "a --precision coffee", "coffee"),
    ("generate", "a --threads -1", "--threads"),
    ("generate", "a --threads 99999", "threads"),
    ("generate", "a --cache {here}/file", "is a file; give a folder"),
    ("generate", "a --cache {here}/folder --no-cache", "--no-cache says to use none"),
    ("generate", "a --compute coffee", "cannot be asked to compute in 'coffee'"),
    ("generate", "a --compile", "has nothing to compile"),
    ("generate", "a --option coffee=1", "has no option 'coffee'; did you mean 'COFFEES'?"),
    ("generate", "a --option coffee", "expected KEY=VALUE"),
    ("generate", "a --value latents={here}/file", "--value latents"),
    ("compute", "latents -o {here}/a.npz --prompt \ud800", "lone surrogate"),
    ("compute", "latents -o {here}/none/a.npz", "does not exist"),
    ("verify", "--backend coffee", "no backend named 'coffee'"),
    ("verify", "--backend fake --device npu", "no device 'npu'"),
    ("verify", "--device cpu", "give --backend too"),
    ("verify", "--build coffee", "no build 'coffee'"),
    ("verify", "--json {here}/folder", "is a folder; give a file"),
    ("verify", "--json {here}/none/figures.json", "does not exist"),
    ("plans", "--output {here}/file", "is a file; give a folder"),
    ("plans", "-o {here}/file/in", "nothing can be written in"),
    ("plans", "-o {here}/" + "a" * 300, "File name too long"),
    ("plans", "-o {here}/plans --scheduler coffee", "no scheduler 'coffee'"),
    ("plans", "-o {here}/plans --steps 0", "'steps' must be at least 1, not 0"),
    ("schedule", "--scheduler coffee", "unknown scheduler 'coffee'"),
    ("schedule", "--scheduler CoffeeScheduler", "unknown scheduler 'CoffeeScheduler'"),
    ("schedule", "--scheduler euler --scheduler flow_euler", "is not for models of diffusion"),
    ("schedule", "--scheduler euler --steps 0", "--steps"),
    ("bench run", "--output {here}/file", "is a file"),
    ("bench run", "-o {here}/file/in", "nothing can be written in"),
    ("bench run", "-o {here}/report --build coffee", "no build 'coffee'"),
    ("bench run", "-o {here}/report --backend coffee", "no backend named 'coffee'"),
    ("bench run", "-o {here}/report --device npu", "no device 'npu'"),
    ("bench run", "-o {here}/report --compute coffee", "cannot be asked to compute in 'coffee'"),
    ("bench run", "-o {here}/report --compile", "has nothing to compile"),
    ("bench run", "-o {here}/report --batch 0", "--batch"),
    ("bench run", "-o {here}/report --batch 1000000", "num_images_per_prompt"),
    ("bench run", "-o {here}/report --size coffee", "expected WIDTHxHEIGHT"),
    ("bench run", "-o {here}/report --size 18x16", "width 18 is not a multiple of 4"),
    ("bench run", "-o {here}/report --size 0x16", "expected WIDTHxHEIGHT"),
    ("bench run", "-o {here}/report --size 99999996x16", "width 99999996"),
    ("bench run", "-o {here}/report --threads 99999", "threads"),
    ("bench run", "-o {here}/report --steps 0", "--steps"),
    ("bench run", "-o {here}/report --steps 3", "no sampling plan for 3 steps"),
    ("bench run", "-o {here}/report --call coffee=1", "unknown argument 'coffee'"),
    ("bench run", "-o {here}/report --call guidance_start=2", "guidance_start"),
    ("bench run", "-o {here}/report --call coffee", "expected NAME=NUMBER"),
    ("bench run", "-o {here}/report --scenario coffee", "no scenario 'coffee'"),
    ("bench run", "-o {here}/report --cases {here}/none.toml", "none.toml"),
    ("bench run", "-o {here}/report --cases {here}/cases.toml", "has no option 'coffee'"),
    ("bench run", "-o {here}/report --baseline coffee", "--baseline"),
    ("bench run", "-o {here}/report --source {here}/none --baseline none", "{here}/none"),
    ("bench run", "-o {here}/report --peer coffee", "not 'coffee'"),
    ("bench run", "-o {here}/report --peer-settings coffee", "--peer-settings"),
    ("bench run", "-o {here}/report --rounds 0", "--rounds"),
    ("bench run", "-o {here}/report --repeats 0", "--repeats"),
    ("bench run", "-o {here}/report --guidance-scale nan", "guidance_scale"),
    ("bench run", "-o {here}/report --seed " + "9" * 40, "seed"),
    ("bench run", "-o {here}/report --score -1", "--score"),
    ("bench run", "-o {here}/report --timeout nan", "--timeout"),
    ("bench run", "-o {here}/report --memory-limit inf", "--memory-limit"),
    ("bench run", "-o {here}/report --wandb-project coffee", "give --wandb too"),
    ("build", "--target coffee", "nothing to build"),
    ("build", "--build coffee", "nothing to build"),
    ("build", "--device npu", "no device 'npu'"),
    ("build", "--images 1:x:2", "--images"),
    ("build", "--height coffee", "--height"),
    ("build", "--width 6", "width 6 is not a multiple of 4"),
    ("build", "--width " + "9" * 5000, "--width"),
    ("build", "--num-frames 1:5:9", "this bundle has no num_frames; leave --num-frames out"),
    ("build", "--workspace nan", "--workspace"),
    ("build", "--cache {here}/file", "nothing can be written in"),
    ("tune", "--backend coffee --prompt a", "no backend named 'coffee'"),
    ("tune", "--backend onnxruntime --prompt a", "loads builds for onnx"),
    ("tune", "--device npu --prompt a", "no device 'npu'"),
    ("tune", "--seconds 600", "holds no probes with a prompt"),
    ("tune", "--seconds 0", "--seconds"),
    ("tune", "--seconds nan --prompt a", "--seconds"),
    ("tune", "--steps 3 --prompt a", "no sampling plan of 'plain' for 3 steps"),
)
# What both commands take is refused by both in the same words.
REFUSED += tuple(
    ("compute", f"denoised -o {{here}}/a.npz {options}".replace(" a --", " --prompt a --"), message)
    for command, options, message in REFUSED
    if command == "generate" and not {*options.split()} & {"-o", "--output", "--refiner"}
)
CODES: Mapping[str, int] = {"no device 'npu'": 5, "npu": 5, "{here}/none": 3}  # the others: 2
# Options with values of which none is wrong in itself.
ANY_VALUE = {
    *(("generate", "--prompt"), ("export", "--model")),
    *(("generate", "--negative-prompt"), ("bench run", "--prompt"), ("tune", "--prompt")),
    *(("bench run", "--negative-prompt"), ("bench compare", "--scenario")),
    ("bench compare", "--threshold"),
    *(("export", "--revision"), ("export", "--variant")),  # those that the source has
}


class Choosy(FakeBackend):
    """Says what options it has."""

    computes: ClassVar[tuple[str, ...]] = ("fp32",)

    def option_names(self, device: str) -> list[str]:
        return ["COFFEES"]


class Built(FakeBackend):
    """Has to build engines from the same graphs."""

    name: ClassVar[str] = "built"
    builds: ClassVar[bool] = True


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    cases = '[[case]]\nbuild = "fake-fp32"\nbackend = "fake"\noptions = {coffee = "1"}\n'
    (tmp_path / "cases.toml").write_text(cases)
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    table = {"fake": "tests.latentc.test_refused_at_once:Choosy", **engines.BACKENDS}
    monkeypatch.setattr(engines, "BACKENDS", table)
    return tmp_path


@pytest.fixture
def nothing_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginning any work fails the test."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("the work was begun")

    for name in WORK:
        monkeypatch.setattr(name, reached)


@pytest.mark.fault("3.1", "each command refuses bad names, numbers and outputs at once")
@pytest.mark.parametrize(("command", "arguments", "message"), REFUSED)
@pytest.mark.usefixtures("nothing_begun")
def test_commands(
    command: str,
    arguments: str,
    message: str,
    here: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command == "build":
        both = {**engines.BACKENDS, "built": "tests.latentc.test_refused_at_once:Built"}
        monkeypatch.setattr(engines, "BACKENDS", both)
    before = sorted(here.rglob("*"))
    given = [each.format(here=here) for each in arguments.split()]
    code, _, errors = run(*command.split(), here / "bundle", *given)
    expected = CODES.get(message, 2)
    assert (code, message.format(here=here) in errors) == (expected, True), errors
    assert sorted(here.rglob("*")) == before


def options() -> Iterator[tuple[str, click.Option]]:
    """Every option of every command that takes values."""
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        parts = {name: command}
        if isinstance(command, click.Group):
            parts = {f"{name} {part}": each for part, each in command.commands.items()}
        for label, each in parts.items():
            for parameter in each.params:
                if isinstance(parameter, click.Option) and not parameter.is_flag:
                    yield label, parameter


@pytest.mark.fault("3.1", "every option with values is tried with a bad one")
def test_every_option_has_a_row() -> None:
    rows = [*REFUSED, *(("export", " ".join(row), "") for row, _ in (OPTIONS | BESIDE).values())]
    rows.append(("export", "--output .", ""))
    tried = {(command, word) for command, given, _ in rows for word in given.split()}
    for command, option in options():
        names = {(command, name) for name in option.opts}
        assert names & (tried | ANY_VALUE), f"latentc {command} {option.opts[-1]}: no bad value"


@pytest.mark.fault("3.1", "folders that cannot be written, of each command that writes one")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("plans", "-o {here}/new"),
        ("bench", "-o {here}/new"),
        ("schedule", "--scheduler euler"),
        ("verify", "--json {here}/new.json"),
        ("tune", "--prompt a"),
    ],
)
@pytest.mark.usefixtures("nothing_begun")
def test_folders_that_cannot_be_written(
    command: str, arguments: str, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    given = [each.format(here=here) for each in arguments.split()]
    code, _, errors = run(command, here / "bundle", *given)
    assert (code, "nothing can be written in" in errors) == (2, True), errors


@pytest.mark.fault("3.1", "the demo's output")
def test_the_demos_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentc import demo

    monkeypatch.setattr(demo, "compile_builtin", lambda *_: pytest.fail("the work was begun"))
    for output in (here / "file", here / "file" / "in"):
        assert CliRunner().invoke(demo.main, ["-o", str(output)]).exit_code == 2
