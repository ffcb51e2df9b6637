"""Measures one case in this process, which makes nothing else.

    python -m latentc.benchmarks.bench.worker REQUEST.json

`LATENTC_BENCH_STARTED` in the environment is `time.perf_counter()` from just before the process was
made (the clock is the system's, not the process's): the first image's time is counted from there.
So nothing but what the case itself needs is imported before that image.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter

_BEGUN = perf_counter()

from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from contextlib import contextmanager, suppress  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Protocol  # noqa: E402

STARTED = "LATENTC_BENCH_STARTED"
_SCORE_SEED = 1000
_SCORE_GUIDANCE = 2.0  # the built-in model's best, see its card


@dataclass
class Call:
    """One image (or batch): seconds by stage; `steps` are those after the first, which also
    holds what comes between the text and the loop. Images are RGB images, latents float32."""

    total: float
    encode: float | None
    steps: list[float]
    decode: float
    images: list[Any]
    latents: Any
    extra: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Something loaded that makes images."""

    compiles: bool

    def call(self, prompt: Any, steps: int, seed: Any, guidance: float | None) -> Call: ...

    def describe(self) -> dict[str, Any]: ...


class Latentc:
    """A build of a bundle on one backend."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from latentc.benchmarks.bench import latentc_case
        from latentc.runtimes.pipeline.pipeline import open_pipeline

        self.compiles = bool(request["case"]["compile"])
        self._request = request
        self._arguments = latentc_case.arguments
        self.pipe = open_pipeline(latentc_case.loading(request["bundle"], request))

    def call(self, prompt: Any, steps: int, seed: Any, guidance: float | None) -> Call:
        known = self.pipe.signature
        arguments = self._arguments(self._request, known, prompt, steps, seed, guidance)
        self.pipe.encoded.clear()  # each call is timed as one with texts of its own
        begun = perf_counter()
        result = self.pipe(**arguments)
        total = perf_counter() - begun
        times = result.timings
        encode = times.tokenize + times.encode if self.pipe.signature.texts else None
        each = times.steps[1:] or times.steps
        if self._request["case"]["call"]:  # steps differ by design
            each = [sum(times.steps) / len(times.steps)]
        return Call(total, encode, each, times.decode,
                    list(result.images), result.latents)  # fmt: skip

    def describe(self) -> dict[str, Any]:
        backend = self.pipe.backend
        return {
            "version": f"{backend.name} {backend.version()}",
            "device": self.pipe.device,
            "computed_in": None,  # the manifest says it
        }


class Torch:
    """The diffusers pipeline as its users run it: eager, channels-last, in bf16, or compiled."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import torch
        from diffusers import DiffusionPipeline

        case = request["case"]
        self._torch = torch
        self._case = case
        self._negative = request["negative_prompt"]
        if case["threads"]:
            torch.set_num_threads(case["threads"])
        self.compiles = "compile" in case["variant"]
        self.device = case["device"] or "cpu"
        _quiet()
        pipe = DiffusionPipeline.from_pretrained(request["source"], local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(self.device)
        if "bf16" in case["variant"]:
            self.pipe = pipe.to(torch.bfloat16)
        if case["variant"] != "torch":
            for module in self._modules().values():
                module.to(memory_format=torch.channels_last)
        if self.compiles:
            pipe.unet = torch.compile(pipe.unet)
            if getattr(pipe, "vae", None) is not None:
                pipe.vae.decode = torch.compile(pipe.vae.decode)

    def call(self, prompt: Any, steps: int, seed: Any, guidance: float | None) -> Call:
        with self._marks() as marks:
            arguments = self._arguments(prompt, steps, seed, guidance)
            begun = perf_counter()
            images = self.pipe(**arguments).images
            self._wait()
            end = perf_counter()
        ends = marks["steps"]
        between = [b - a for a, b in pairwise(ends)]
        return Call(
            end - begun,
            marks["encode"],
            between or [ends[0] - begun - (marks["encode"] or 0.0)],
            end - ends[-1],
            images,
            marks["latents"].float().cpu().numpy(),
        )

    def operations(self, prompt: Any, seed: int, guidance: float | None) -> dict[str, Any]:
        """Return the work of each stage, counted by running the pipeline under a counter.

        It is [operations, bytes of weights, bytes of inputs and outputs] by stage.
        """
        from latentc.benchmarks.bench import roofline

        with roofline.counting() as counter, self._marks(counter) as marks:
            self.pipe(**self._arguments(prompt, self._case["steps"], seed, guidance))
            total = counter()
        steps = marks["operations"]
        first = marks["encode_operations"]
        modules = self._modules()
        weights = {name: _weights(module) for name, module in modules.items()}
        encoders = sum(size for name, size in weights.items() if "encoder" in name)
        decoder = sum(_weights(getattr(modules["vae"], part)) for part in
                      ("decoder", "post_quant_conv") if getattr(modules["vae"], part, None)
                      is not None) if "vae" in modules else 0  # fmt: skip
        latents = marks["latents"].numel() * 4
        pixels = 3 * 4 * self._case["batch"] * self._case["height"] * self._case["width"]
        evaluations = len(steps)
        per_step = (steps[-1] - first) // evaluations
        unet = weights.get("unet", 0)
        return {
            "text_encode": [first, encoders, 0],
            "denoiser_step": [per_step, unet, 2 * latents],
            "vae_decode": [total - steps[-1], decoder, latents + pixels],
            "end_to_end": [
                total,
                encoders + evaluations * unet + decoder,
                2 * evaluations * latents + latents + pixels,
            ],
        }

    def describe(self) -> dict[str, Any]:
        matmul = self._torch.get_float32_matmul_precision()
        kind = str(self.pipe.unet.dtype).removeprefix("torch.")
        names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        computed = names.get(kind, kind) if matmul == "highest" else f"{kind} ({matmul} products)"
        return {
            "version": f"torch {self._torch.__version__}",
            "device": self.device,
            "computed_in": computed,
        }

    def _arguments(
        self, prompt: Any, steps: int, seed: Any, guidance: float | None
    ) -> dict[str, Any]:
        import inspect

        torch, batch = self._torch, self._case["batch"]
        many = isinstance(prompt, list)
        if isinstance(seed, list):
            generator: Any = [torch.Generator().manual_seed(each) for each in seed]
        else:
            generator = torch.Generator().manual_seed(seed)
        found: dict[str, Any] = {"num_inference_steps": steps, "generator": generator}
        known = inspect.signature(self.pipe.__call__).parameters
        if "prompt" not in known:
            return {**found, "batch_size": batch}
        found |= {"prompt": prompt, "height": self._case["height"], "width": self._case["width"]}
        if not many:
            found |= {"num_images_per_prompt": batch, "negative_prompt": self._negative}
        if self.pipe.unet.dtype is not torch.float32 and "latents" in known:
            found["latents"] = self._noise(generator, len(prompt) if many else batch)
        if guidance is not None:
            found["guidance_scale"] = guidance
        return found

    def _noise(self, generator: Any, images: int) -> Any:
        """Return the noise of float32.

        In another dtype diffusers draws another, of another image.
        """
        from diffusers.utils.torch_utils import randn_tensor

        factor, unet = self.pipe.vae_scale_factor, self.pipe.unet
        sides = self._case["height"] // factor, self._case["width"] // factor
        shape = (images, unet.config.in_channels, *sides)
        return randn_tensor(shape, generator, dtype=self._torch.float32).to(unet.dtype)

    def _modules(self) -> dict[str, Any]:
        parts = self.pipe.components.items()
        return {name: part for name, part in parts if isinstance(part, self._torch.nn.Module)}

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            self._torch.cuda.synchronize()

    @contextmanager
    def _marks(self, counter: Callable[[], int] | None = None) -> Iterator[dict[str, Any]]:
        """Note when the text is encoded and when each step ends, at the pipeline's own seams."""
        import functools

        marks: dict[str, Any] = {"encode": None, "steps": [], "latents": None}
        marks |= {"operations": [], "encode_operations": 0}
        step = self.pipe.scheduler.step

        # Pipelines look at the signature to see whether a step takes a generator.
        @functools.wraps(step)
        def marked_step(*inputs: Any, **named: Any) -> Any:
            result = step(*inputs, **named)
            self._wait()
            marks["steps"].append(perf_counter())
            marks["latents"] = result[0] if isinstance(result, tuple) else result.prev_sample
            if counter:
                marks["operations"].append(counter())
            return result

        encode = getattr(self.pipe, "encode_prompt", None)

        def marked_encode(*inputs: Any, **named: Any) -> Any:
            begun = perf_counter()
            result = encode(*inputs, **named)  # type: ignore[misc]
            self._wait()
            marks["encode"] = perf_counter() - begun
            if counter:
                marks["encode_operations"] = counter()
            return result

        self.pipe.scheduler.step = marked_step
        if encode is not None:
            self.pipe.encode_prompt = marked_encode
        try:
            yield marks
        finally:
            del self.pipe.scheduler.step
            if encode is not None:
                del self.pipe.encode_prompt


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one process measures; see `runner` for the request."""
    case = request["case"]
    begun = perf_counter()
    built = _build_engines(request) if request["mode"] == "warm-up" else None
    loading = perf_counter()
    engine: Engine = Torch(request) if case["engine"] == "torch" else Latentc(request)
    loaded = perf_counter()
    prompt, guidance = request["prompt"], request["guidance_scale"]
    first = engine.call(prompt, case["steps"], request["seed"], guidance)
    done = perf_counter()
    started = float(os.environ.get(STARTED, _BEGUN))
    answer: dict[str, Any] = {
        "cold_start": [done - started - (built or 0.0)],
        "load": [loaded - loading],
        "first_call": [first.total],
        **engine.describe(),
    }
    if request["mode"] == "warm-up":
        answer |= _warm_up(request, engine, first)
        if built:
            answer["compile"] = [loading - begun]
    else:
        answer |= _repeat(request, engine)
    if case["device"].lower() not in ("", "cpu"):
        answer["device_memory"] = _device_memory(case)
    return answer


def _repeat(request: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    """Measure the steady state: calls after the first, and the energy that they took."""
    from latentc.benchmarks.bench import energy

    case = request["case"]
    before = energy.read()
    calls = [
        engine.call(request["prompt"], case["steps"], request["seed"], request["guidance_scale"])
        for _ in range(request["repeats"])
    ]
    joules = energy.read().joules_since(before)
    images = max(1, len(calls) * case["batch"])
    encodes = [call.encode for call in calls if call.encode is not None]
    return {
        "end_to_end": [call.total for call in calls],
        "denoiser_step": [step for call in calls for step in call.steps],
        "vae_decode": [call.decode for call in calls],
        **({"text_encode": encodes} if encodes else {}),
        "energy": None if joules is None else joules / images,
    }


def _warm_up(request: Mapping[str, Any], engine: Engine, first: Call) -> dict[str, Any]:
    """Return images, the judge's score, counted operations; files are in the system's cache after
    it.
    """
    import numpy as np

    case, guidance = request["case"], request["guidance_scale"]
    images = np.stack([np.asarray(image.convert("RGB")) for image in first.images])
    np.savez(request["images"], images=images, latents=first.latents)
    figures: dict[str, Any] = {}
    if engine.compiles:
        again = engine.call(request["prompt"], case["steps"], request["seed"], guidance)
        figures["compile"] = [max(0.0, first.total - again.total)]
    if isinstance(engine, Torch) and request["count"]:
        figures["operations"] = engine.operations(request["prompt"], request["seed"], guidance)
    if request["score"]:
        figures["right"] = _score(request, engine)
    return figures


def _score(request: Mapping[str, Any], engine: Engine) -> int:
    """Return how many images of held-out prompts the judge finds right, half of two shapes."""
    from latentc.benchmarks.shapes.judge import ShapesJudge
    from latentc.runtimes.verification.judges import count_right

    def draw(prompts: list[str], seeds: list[int]) -> list[Any]:
        at_once = 1 if request["case"]["static"] else len(prompts)
        images: list[Any] = []
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            steps = request["case"]["steps"]
            images += engine.call(prompts[part], steps, seeds[part], _SCORE_GUIDANCE).images
        return images

    judge = ShapesJudge()
    return count_right(judge, judge.prompts(request["score"]), _SCORE_SEED, draw)


def _build_engines(request: Mapping[str, Any]) -> float | None:
    """Make the engines that a backend needs here; return the seconds it took, None for none."""
    case = request["case"]
    if case["engine"] != "latentc":
        return None
    from latentc.runtimes.backends import backend as engines

    if not engines.find(case["backend"]).builds:
        return None
    from latentc.runtimes.backends.backend import SessionOptions
    from latentc.runtimes.bundle.files import Bundle, graph_digest

    begun = perf_counter()
    opened = Bundle.open(request["bundle"])
    build = next(each for each in opened.manifest.builds if each.name == case["variant"])
    engine = engines.get(case["backend"])
    for component in opened.manifest.components:
        options = SessionOptions(key=graph_digest(build.artifacts[component.name]))
        entry = opened.entry(build, component.name, engine)
        engine.build(entry, component, case["device"] or None, options)
    return perf_counter() - begun


def _device_memory(case: Mapping[str, Any]) -> int | None:
    """Return the bytes on an NVIDIA GPU.

    They are PyTorch's own peak, else what the driver says that this process holds in the end
    (engines keep what they have taken).
    """
    if "torch" in (case["engine"], case["backend"]):
        with suppress(Exception):
            import torch

            return int(torch.cuda.max_memory_reserved())
    from latentc.benchmarks.bench.machine import process_gpu_memory

    return process_gpu_memory(os.getpid())


def _weights(module: Any) -> int:
    return sum(parameter.numel() * 4 for parameter in module.parameters())


def _quiet() -> None:
    """Turn progress bars off in a log that is read only after a failure."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for each in (diffusers_logging, transformers_logging):
        each.set_verbosity_error()
        each.disable_progress_bar()


if __name__ == "__main__":
    measured = measure(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    from latentc.benchmarks.measure import report

    report(measured)
