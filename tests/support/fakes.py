"""A hand-made bundle and a backend in numpy that runs it: the runtime without any engine.

The graphs are small enough to be worked out in a test: see `GRAPHS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import Feeds, Session
from latentc.runtimes.bundle.manifest import FORMAT_VERSION, MANIFEST, Manifest
from latentc.runtimes.bundle.structures import (
    Artifact,
    Build,
    Component,
    CreatedBy,
    Defaults,
    File,
    Loop,
    LoopProbe,
    Probes,
    ProgramCall,
    ProgramCheck,
    Schedule,
    Score,
    Source,
    TensorSpec,
    Tokenizer,
    Verification,
)
from latentc.runtimes.pipeline.pipeline import load
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.sampling.plan import PlanTable
from latentc.runtimes.version_1.fields import (
    Argument,
    Branch,
    CallFields,
    Embedding,
    Guidance,
    VectorInput,
)
from latentc.runtimes.version_1.tasks import Task
from latentc.runtimes.version_1.translation import program_of, with_positions

FACTOR = 2
MAX_LENGTH = 6
STEPS = (1, 2, 4)
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "large", "red", "blue", "circle", "square")
STATES = TensorSpec("float32", ("batch", MAX_LENGTH, 2))
SAMPLE = TensorSpec("float32", ("batch", 4, "height", "width"))


def text_encoder(feeds: Feeds) -> dict[str, Array]:
    ids = feeds["input_ids"].astype(np.float32)
    return {"encoder_hidden_states": np.stack([ids / 10, np.sin(ids)], axis=-1)}


def denoiser(feeds: Feeds) -> dict[str, Array]:
    states = feeds["encoder_hidden_states"].mean((1, 2))
    sizes = feeds["time_ids"].mean(1) / 100 if "time_ids" in feeds else 0.0
    condition = (states + sizes).reshape(-1, 1, 1, 1)
    prediction = 0.3 * feeds["sample"] + condition + feeds["timestep"] / 1000
    return {"prediction": prediction.astype(np.float32)}


def plain_denoiser(feeds: Feeds) -> dict[str, Array]:
    return {"prediction": np.float32(0.3) * feeds["sample"]}


def decoder(feeds: Feeds) -> dict[str, Array]:
    enlarged = feeds["latents"][:, :3].repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)
    return {"image": (1 / (1 + np.exp(-enlarged))).astype(np.float32)}


def broken(feeds: Feeds) -> dict[str, Array]:
    raise RuntimeError("the engine exploded\nwith details")


GRAPHS: Mapping[str, Callable[[Feeds], dict[str, Array]]] = {
    "text_encoder": text_encoder,
    "denoiser": denoiser,
    "plain_denoiser": plain_denoiser,
    "decoder": decoder,
    "broken": broken,
    "nan_text_encoder": lambda feeds: {
        name: value * np.nan for name, value in text_encoder(feeds).items()
    },
    "nan_denoiser": lambda feeds: {"prediction": feeds["sample"] * np.nan},
    "nan_decoder": lambda feeds: {name: v * np.nan for name, v in decoder(feeds).items()},
}


class FakeBackend(Backend):
    """Runs the graphs above; a graph's file holds the name of its function."""

    name: ClassVar[str] = "fake"
    package: ClassVar[str] = "fake"
    install: ClassVar[str] = "pip install fake"
    targets: ClassVar[tuple[str, ...]] = ("fake",)

    def version(self) -> str:
        return "1.0"

    def devices(self) -> list[str]:
        return ["cpu"]

    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        return FakeSession(GRAPHS[json.loads(entry.read_text())["graph"]], component)


class FakeSession(Session):
    def __init__(self, function: Callable[[Feeds], dict[str, Array]], component: Component) -> None:
        super().__init__(component.inputs, component.outputs)
        self._function = function

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._function(feeds)


def make_bundle(
    folder: Path, *, graphs: Mapping[str, str] | None = None, text: bool = True, **changes: Any
) -> Path:
    """Write a bundle; `graphs` replaces a component's graph, `changes` parts of the manifest, or of
    `CallFields` and `tasks`, which its programs are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    components = changes.get("components", _components(text))
    tasks = changes.pop("tasks", (Task("text-to-image" if text else "unconditional"),))
    own = {name: changes.pop(name) for name in _CALL_FIELDS if name in changes}
    fields = replace(_fields(components, text), **own)
    components = tuple(with_positions(each, fields.embeddings) for each in components)
    if "components" in changes:
        changes["components"] = components
    chosen = {"text_encoder": "text_encoder", "denoiser": "denoiser", "decoder": "decoder"}
    if not text:
        chosen["denoiser"] = "plain_denoiser"
    chosen |= graphs or {}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        programs=tuple(program_of(task, fields) for task in tasks),
        source=Source(
            id="fake",
            pipeline_class="FakePipeline",
            fingerprint="0" * 64,
            scheduler_class="FakeScheduler",
            scheduler_config={},
        ),
        created_by=CreatedBy(latentc="0", python="3", platform="any", libraries={}),
        tokenizers=_tokenizers(folder) if text else (),
        components=components,
        builds=(_build(folder, components, chosen),),
        schedules=tuple(_schedule(folder, name) for name in ("plain", "noisy")),
        defaults=Defaults(scheduler="plain", num_inference_steps=4),
    )
    checked = {"programs_checked": (program_check(tasks[0].name),)}
    manifest = msgspec.structs.replace(manifest, **{**checked, **changes})
    (folder / MANIFEST).write_bytes(manifest.encode())
    return folder


def program_check(name: str) -> ProgramCheck:
    """Return a record of a program: a call that was compared, and one that diffusers refused."""
    compared = ProgramCall(1, 1, (20,), 0, 3e-4, relative_l2=1.5e-6)
    refused = ProgramCall(2, 2, (20, 21, 22, 23), 0, 3e-4, refused="one prompt at a time")
    return ProgramCheck(name, "FakePipeline", (compared, refused))


_CALL_FIELDS = ("latents", "texts", "arguments", "vectors", "guidance", "embeddings")


def _fields(components: tuple[Component, ...], text: bool) -> CallFields:
    """Return what the calls of the bundle are made of."""
    encoded = Embedding("prompt_embeds", {"encoder_hidden_states": {"input_ids": 2}})
    numbers = (Argument("original_size", ("height", "width")), Argument("crop", (0.0,)))
    return CallFields(
        pipeline_class="FakePipeline",
        num_inference_steps=4,
        latents=Latents(channels=4, factor=FACTOR, multiple=2, default_height=16, default_width=16),
        texts={"input_ids": ("prompt_2", "prompt")} if text else {},
        arguments=numbers if text else (),
        vectors=(VectorInput("time_ids", ("original_size", "crop")),) if text else (),
        guidance=_guidance() if text else Guidance((Branch("image", "", "empty", 1.0),), "image"),
        components=components,
        embeddings=(encoded,) if text else (),
    )


def add_probes(folder: Path, error: float = 0.0) -> Manifest:
    """Give a bundle probes; what they expect is off by `error`, relatively."""
    manifest = Manifest.load(folder)
    (folder / "probes").mkdir(exist_ok=True)
    files = {}
    for component in manifest.components:
        arrays = {}
        for probe in ("random", "other"):
            inputs = {name: _example(spec, probe) for name, spec in component.inputs.items()}
            found = GRAPHS[component.name](inputs)
            arrays |= {f"{probe}/in/{name}": value for name, value in inputs.items()}
            arrays |= {f"{probe}/out/{name}": v * (1 + error) for name, v in found.items()}
        files[component.name] = _npz(folder, component.name, arrays)
    arguments: dict[str, str | int | float] = {"prompt": "a red circle", "guidance_scale": 2.0}
    probe = LoopProbe(arguments, "noisy", 2, seed=4, height=16, width=8)
    result = load(folder, FakeBackend())(
        **arguments,
        scheduler="noisy", num_inference_steps=2, seed=4, height=16, width=8, output_type="np",
    )  # fmt: skip
    image = (result.images * 255).round().astype(np.uint8)
    files["loop"] = _npz(
        folder, "loop", {"latents": result.latents * np.float32(1 + error), "image": image}
    )
    manifest = msgspec.structs.replace(manifest, probes=Probes(files, probe, "key"))
    (folder / MANIFEST).write_bytes(manifest.encode())
    return manifest


def file_of(folder: Path, path: str) -> File:
    """The manifest's record of a file that is there."""
    data = (folder / path).read_bytes()
    return File(path, len(data), hashlib.sha256(data).hexdigest())


def plan_table(noisy: bool) -> PlanTable:
    """sample -= 0.1 * prediction, and 0.5 * noise in all steps but the last."""
    counts = np.array(STEPS, np.int32)
    total = int(counts.sum())
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = np.zeros(total, bool)
    last[offsets[1:] - 1] = True
    draws = (~last & noisy).astype(np.uint8)
    return PlanTable(
        steps=counts,
        offsets=offsets,
        timesteps=np.concatenate([np.linspace(900, 100, n) for n in STEPS]),
        input_scale=np.ones(total),
        noise_draws=draws,
        rows=(draws == 0).astype(np.int32)[:, np.newaxis],
        state=np.ones((2, 1, 1)),
        prediction=np.full((2, 1), -0.1),
        clean=np.zeros((2, 1)),
        noise=np.array([[0.5 if noisy else 0.0], [0.0]]),
        clean_from=np.zeros((2, 2)),
        init_noise_scale=np.full(len(STEPS), 2.0),
        add_noise=np.full((total, 2), np.nan),
        known=np.full((total, 2), np.nan),
        log_low=np.full(total, np.nan),
        log_high=np.full(total, np.nan),
        clip=np.zeros(3),
        shift=np.zeros(len(STEPS)),
    )


def _example(spec: TensorSpec, seed: str) -> Array:
    sizes = {"batch": 2, "height": 6, "width": 4}
    shape = [sizes.get(dim, dim) for dim in spec.shape]  # type: ignore[call-overload]
    draw = np.random.default_rng(len(seed))
    if spec.dtype == "int64":
        return draw.integers(0, len(WORDS), shape)
    return draw.standard_normal(shape).astype(spec.dtype)


def _npz(folder: Path, name: str, arrays: Mapping[str, Array]) -> File:
    path = f"probes/{name}.npz"
    np.savez(folder / path, **arrays)  # type: ignore[arg-type]
    return file_of(folder, path)


def _components(text: bool) -> tuple[Component, ...]:
    encoder = Component(
        "text_encoder",
        "encoder",
        {"input_ids": TensorSpec("int64", ("batch", MAX_LENGTH))},
        {"encoder_hidden_states": STATES},
    )
    inputs = {"sample": SAMPLE, "timestep": TensorSpec("float32", (1,))}
    if text:
        inputs |= {
            "encoder_hidden_states": STATES,
            "time_ids": TensorSpec("float32", ("batch", 3)),
        }
    image = TensorSpec("float32", ("batch", 3, f"{FACTOR}*height", f"{FACTOR}*width"))
    return (
        *((encoder,) if text else ()),
        Component("denoiser", "denoiser", inputs, {"prediction": SAMPLE}),
        Component("decoder", "decoder", {"latents": SAMPLE}, {"image": image}),
    )


def _guidance() -> Guidance:
    return Guidance(
        branches=(
            Branch("negative", "negative_", "empty", 1.0, {"guidance_scale": -1.0}),
            Branch("positive", "", "empty", 0.0, {"guidance_scale": 1.0}),
        ),
        single="positive",
        scale="guidance_scale",
        defaults={"guidance_scale": 3.0},
    )


def _build(folder: Path, components: tuple[Component, ...], graphs: Mapping[str, str]) -> Build:
    artifacts = {}
    for component in components:
        path = f"fake-fp32/{component.name}/graph.json"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps({"graph": graphs[component.name]}))
        artifacts[component.name] = Artifact("key", path, (file_of(folder, path),), "fp32")
    return Build("fake-fp32", "fake", "fp32", artifacts)


def _schedule(folder: Path, name: str) -> Schedule:
    path = f"schedules/{name}.json"
    (folder / "schedules").mkdir(exist_ok=True)
    plan_table(name == "noisy").save(folder / path)
    return Schedule(name, f"{name.title()}Scheduler", file_of(folder, path), STEPS, "key")


def _tokenizers(folder: Path) -> tuple[Tokenizer, ...]:
    path = "tokenizer/tokenizer.json"
    (folder / "tokenizer").mkdir(exist_ok=True)
    word_tokenizer().save(str(folder / path))
    file = file_of(folder, path)
    return (Tokenizer("tokenizer", file, MAX_LENGTH, (1,), (2,), pad=0, vocabulary=len(WORDS)),)


def word_tokenizer() -> Any:
    """A tokenizer that knows `WORDS`, framed, padded and cut to `MAX_LENGTH`."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers, processors

    words = Words(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    words.enable_truncation(MAX_LENGTH)
    words.enable_padding(length=MAX_LENGTH, pad_id=0, pad_token="<pad>")
    return words


def add_build(
    folder: Path, precision: str, denoiser: str, psnr: float | None = None, right: int | None = None
) -> Manifest:
    """Give a bundle another build ``fake-PRECISION``, whose denoiser is the graph of that name;
    `psnr` and `right` (images of 50) are what its verification says."""
    manifest = Manifest.load(folder)
    path = f"fake-{precision}/denoiser/graph.json"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps({"graph": denoiser}))
    artifacts = dict(manifest.builds[0].artifacts)
    artifacts["denoiser"] = Artifact("key", path, (file_of(folder, path),), precision)
    found = None
    if psnr is not None:
        loop = Loop("plain", 4, 0.0, 0, psnr, 1.0, True)
        score = None if right is None else Score("even", right, 50, 0, True)
        found = Verification("fake", "1.0", "cpu", (), loop, score)
    build = Build(f"fake-{precision}", "fake", precision, artifacts, found)
    manifest = msgspec.structs.replace(manifest, builds=(*manifest.builds, build))
    (folder / MANIFEST).write_bytes(manifest.encode())
    return manifest
