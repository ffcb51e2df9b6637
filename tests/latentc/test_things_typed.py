"""These tests type what somebody types who comes from another tool, or who mistypes."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import latentc
from latentc.cli import COMMANDS, cli
from latentc.exporter.compiler.export import export
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.commands.declared_options import SpelledOption
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from latentc.runtimes.unknown_names import near_names
from tests.conftest import Run
from tests.support.fakes import FakeBackend, make_bundle

MODEL = latentc.builtin_model()
_TO_EXPORT = f"latentc export {MODEL} -o BUNDLE"
# A command line ({bundle} is one), its exit code, and what it prints.
TYPED: tuple[tuple[str, int, str], ...] = (
    # commands
    ("", 0, "Usage: latentc [OPTIONS] COMMAND"),
    ("bench", 0, "Usage: latentc bench"),
    ("genrate {bundle} a", 2, "no such command: genrate; did you mean 'generate'?"),
    ("convert builtin", 2, "no such command: convert; did you mean 'export'?"),
    ("run {bundle} a", 2, "did you mean 'generate'?"),
    ("txt2img {bundle} a", 2, "did you mean 'generate'?"),
    ("info {bundle}", 2, "did you mean 'inspect'?"),
    ("benchmark {bundle}", 2, "did you mean 'bench'?"),
    ("coffee", 2, "no such command: coffee; there are: export, schedule, generate"),
    ("bench compair a b", 2, "no such command: compair; did you mean 'compare'?"),
    # what is no bundle, and no source
    (f"generate {MODEL} a", 4, f"is a diffusers pipeline, not a bundle yet: {_TO_EXPORT}"),
    (f"inspect {MODEL}", 4, _TO_EXPORT),
    ("generate owner/name a", 4, "on the Hub: latentc export owner/name -o BUNDLE"),
    ("generate sd.ckpt a", 4, "no such file: sd.ckpt; a bundle is the folder that latentc export"),
    ("generate {weights} a", 4, "is a file of weights, not a bundle yet: latentc export {weights}"),
    ("generate nowhere a", 4, "no bundle at nowhere: no such folder"),
    ("export sd.ckpt -o {here}/new", 3, "no such file: sd.ckpt"),
    ("export models/sd.safetensors -o {here}/new", 3, "no such file: models/sd.safetensors"),
    (f"export sd.ckpt --config {MODEL} -o {{here}}/new", 3, "no such file: sd.ckpt"),
    ("export {bundle} -o {here}/new", 3, "is a bundle already: latentc inspect"),
    # prompts
    ("generate {bundle} a large red circle", 2, 'latentc generate {bundle} "a large red circle"'),
    ("generate {bundle} a large red circle", 2, "{bundle} -p a -p large -p red -p circle"),
    ("generate {bundle} \\$5 note", 2, "latentc generate {bundle} '$5 note'"),
    ("generate {bundle} -p a -p red", 0, "out-1.png"),
    ("generate {bundle} --prompt a", 0, "out.png"),
    ("generate {bundle} 赤い円 青い円", 0, "out-1.png"),
    # options of diffusers and stable-diffusion.cpp
    ("generate {bundle} a --num-inference-steps 4", 0, "(4 steps)"),
    ("generate {bundle} a --num_inference_steps 4", 0, "(4 steps)"),
    ("generate {bundle} a --num-images-per-prompt 2", 0, "out-1.png"),
    ("generate {bundle} a -s 7", 0, "seed 7"),
    ("generate {bundle} a --cfg-scale 2 -H 16 -W 16", 0, "out.png"),
    ("generate {bundle} a --sampling-method noisy", 0, "out.png"),
    ("generate {bundle} a -m model", 2, "no such option: -m; the model or the bundle comes first"),
    ("generate {bundle} a --eta 0", 2, "no such option: --eta; the sampling plans have eta"),
    ("generate {bundle} a --clip-skip 2", 2, "no such option: --clip-skip; the text encoder's"),
    ("generate {bundle} a --negativ-prompt b", 2, "did you mean --negative-prompt?"),
    ("generate {bundle} a --step 4", 2, "no such option: --step; did you mean --steps"),
    ("generate {bundle} a --coffee", 2, "no such option: --coffee (see: latentc generate --help)"),
    ("generate {bundle} a --arg eta=1", 2, "unknown argument 'eta'; the sampling plans have eta"),
    ("generate {bundle} a --arg guidance=2", 2, "did you mean 'guidance_"),
    # options of optimum-cli
    ("export -m builtin -o {here}/new --target onxn", 2, "unknown target 'onxn'; did you mean"),
    ("export --model builtin -o {here}/new --target onxn", 2, "did you mean 'onnx'?"),
    ("export builtin --model builtin -o {here}/new", 2, "one SOURCE is exported"),
    ("export -o {here}/new", 2, "Missing argument 'SOURCE'"),
    ("export builtin -o {here}/new --weight-format fp8", 2, "target 'onnx' has no precision 'fp8'"),
    ("export builtin -o {here}/new --dtype float16", 2, "did you mean 'fp16'?"),
    (
        "export builtin -o {here}/new --fp16",
        2,
        "no such option: --fp16; fp16 is a precision, which",
    ),
    ("export builtin -o {here}/new --int8", 2, "which is a value: --precision int8"),
    ("export builtin -o {here}/new --opset 17", 2, "the lowering chooses the opset"),
    ("export builtin -o {here}/new --device cuda", 2, "an export is for every device"),
    ("generate {bundle} a --weight-format int8", 2, "latentc export --precision int8"),
    # names of things
    ("export builtin -o {here}/new -t ort", 2, "unknown target 'ort'; did you mean 'onnx'?"),
    ("export builtin -o {here}/new -t trt", 2, "did you mean 'tensorrt'?"),
    ("export builtin -o {here}/new --pass step_cache", 2, "did you mean 'step-cache'?"),
    ("export builtin -o {here}/new --task img2img", 2, "did you mean 'image-to-image'?"),
    ("export builtin -o {here}/new --task inpaint", 2, "did you mean 'inpainting'?"),
    ("export builtin -o {here}/new --scheduler k_euler", 2, "did you mean 'euler'"),
    ("export builtin -o {here}/new --scheduler 'DPM++ 2M Karras'", 2, "mean 'dpmpp_2m_karras'?"),
    ("export builtin -o {here}/new --coreml-target ios17", 2, "did you mean 'iOS17'?"),
    (
        "generate {bundle} a --scheduler noise",
        2,
        "no scheduler 'noise' in this bundle; did you",
    ),
    ("generate {bundle} a --build fake_fp32", 2, "no build 'fake_fp32'; did you mean 'fake-fp32'?"),
    ("generate {bundle} a --precision float32", 2, "no precision 'float32'; did you mean 'fp32'"),
    ("generate {bundle} a --backend ort", 2, "no backend named 'ort'; did you mean 'onnxruntime'"),
    ("generate {bundle} a --device cpu:0", 5, "no device 'cpu:0' on this machine; did you mean"),
    ("generate {bundle} a --device npu", 5, "no device 'npu' on this machine; it has: cpu"),
    ("generate {bundle} a --preset fastest", 2, "no preset 'fastest'; did you mean 'fast'?"),
    ("inspect {bundle} --program text2image", 2, "no program 'text2image' in this bundle; did you"),
    ("compute {bundle} latent -o {here}/a.npz -n 1", 2, "no value 'latent' can be asked for; did"),
    ("bench {bundle} -o {here}/report --scenario cold-start", 2, "did you mean 'cold_start'?"),
)
_LOADED = "latentc.load(bundle, backend=…, device=…)"
_EXPORTED = "latentc.export(source, folder), then load the bundle"
# What is done in Python, and what is raised.
DONE: tuple[tuple[Callable[[Pipeline], object], str], ...] = (
    (lambda pipe: pipe.to("cuda"), _LOADED),
    (lambda pipe: pipe.cuda(), _LOADED),
    (lambda pipe: pipe.enable_model_cpu_offload(), "latentc.load(bundle, low_memory=True)"),
    (lambda pipe: pipe.enable_attention_slicing(), "latentc.load(bundle, low_memory=True)"),
    (lambda pipe: pipe.enable_vae_tilling(), "enable_vae_tiling"),
    (lambda pipe: pipe.tokenizer, "the parts of a bundle are fixed when it is exported"),
    (lambda pipe: pipe.set_progress_bar_config(disable=True), "pipe.stream"),
    (lambda pipe: pipe.decoded, "did you mean 'decode'?"),
    (lambda pipe: Pipeline.from_pretrained("x"), _EXPORTED),
    (lambda pipe: latentc.from_pretrained("x"), _EXPORTED),
    (lambda pipe: latentc.StableDiffusionPipeline, _EXPORTED),
    (lambda pipe: latentc.loads, "no attribute 'loads'; did you mean 'load'?"),
    (lambda pipe: pipe("a", eta=0.0), "unknown argument 'eta'; the sampling plans have eta as"),
    (lambda pipe: pipe("a", clip_skip=1), "or give prompt_embeds"),
    (lambda pipe: pipe("a", cross_attention_kwargs={"scale": 0.5}), "export --lora FILE:SCALE"),
    (lambda pipe: pipe("a", callback=print, callback_steps=1), "give callback_on_step_end"),
    (lambda pipe: pipe("a", steps=4), "did you mean 'num_inference_steps'?"),
    (lambda pipe: pipe("a", cfg_scale=4), "did you mean 'guidance_scale'?"),
    (lambda pipe: pipe("a", promt="b"), "unknown argument 'promt'; did you mean 'prompt'"),
    (lambda pipe: pipe("a", noise_level=1), "unknown argument 'noise_level'; this bundle takes: "),
    (lambda pipe: pipe("a", generator=3), "'generator' must be a torch.Generator on the CPU"),
    (lambda pipe: pipe("a", return_dict="no"), "'return_dict' must be True or False"),
    (lambda pipe: pipe.stream("a", return_dict=True), "a call of the pipeline takes it"),
    (lambda pipe: pipe.encode_prompt("a", negative_promt="b"), "did you mean 'negative_prompt'"),
    (lambda pipe: load("x", torch_dtype="float16"), "precision='fp16'"),
    (lambda pipe: load("x", provider="CUDAExecutionProvider"), "backend='onnxruntime'"),
    (lambda pipe: load("x", num_threads=2), "did you mean 'threads'?"),
    (lambda pipe: export("x", "y", dtype="fp16"), "did you mean 'precision'?"),
    (lambda pipe: export("x", "y", target="onnx"), "did you mean 'targets'?"),
    (lambda pipe: export("x", "y", opset=17), "the lowering chooses the opset"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    table = {"fake": "tests.support.fakes:FakeBackend", **engines.BACKENDS}
    monkeypatch.setattr(engines, "BACKENDS", table)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pipe(here: Path) -> Iterator[Pipeline]:
    with load(here / "bundle", FakeBackend()) as made:
        yield made


@pytest.mark.parametrize(("line", "code", "answer"), TYPED)
def test_command_lines(line: str, code: int, answer: str, here: Path, run: Run) -> None:
    places = {"bundle": here / "bundle", "here": here, "weights": here / "weights.safetensors"}
    found, output, errors = run(*shlex.split(line.format(**places)))
    assert (found, answer.format(**places) in output + errors) == (code, True), output + errors
    assert "Traceback" not in errors
    assert ("error:" in errors) == (code != 0)


@pytest.mark.parametrize(("do", "answer"), DONE)
def test_python(do: Callable[[Pipeline], object], answer: str, pipe: Pipeline) -> None:
    with pytest.raises((latentc.InputError, AttributeError), match=re.escape(answer)):
        do(pipe)


def test_a_tuple_in_the_place_of_a_result(pipe: Pipeline) -> None:
    call: dict[str, Any] = {"seed": 3, "output_type": "np"}
    (images,) = pipe("a", **call, return_dict=False)
    assert (images == pipe("a", **call, return_dict=True).images).all()


@pytest.mark.parametrize(
    ("name", "known"), [("gpu", "cpu"), ("--weight-format", "--height"), ("coffee", "compute")]
)
def test_names_that_are_not_near(name: str, known: str) -> None:
    assert near_names(name, [known]) == []


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield name, command
        parts = command.commands if isinstance(command, click.Group) else {}
        yield from ((f"{name} {part}", each) for part, each in parts.items())


def test_no_spelling_means_two_things() -> None:
    counted = 0
    for label, command in commands():
        options = [each for each in command.params if isinstance(each, click.Option)]
        spelled = [s for option in options for s in (*option.opts, *option.secondary_opts)]
        others = [s for each in options if isinstance(each, SpelledOption) for s in each.aliases]
        twice = [spelling for spelling, n in Counter(spelled + others).items() if n > 1]
        assert not twice, f"latentc {label}: {twice}"
        counted += len(others)
    assert counted > 50
