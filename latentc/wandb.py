"""Weights & Biases: what pipelines make, and what benchmarks measure, in a run of yours.

    import latentc
    latentc.wandb.autolog(init={"project": "shapes"})
    with latentc.load("bundle") as pipe:
        pipe(["a red circle", "a blue square"], seed=42)
    latentc.wandb.autolog.disable()

Importing this module does not import wandb; `autolog` and `log_report` do. Keys and columns are
named as in `wandb.integration.diffusers`, which does the same for diffusers: a table
``Result-Table`` with the columns ``Prompt``, ``Negative-Prompt`` and ``Generated-Image``, and the
``workflow`` in the run's configuration.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from latentc.benchmarks.wandb_report import library, log_report
from latentc.runtimes.pipeline import observe
from latentc.runtimes.pipeline.run import Result, Run
from latentc.runtimes.version import __version__

__all__ = ["COLUMNS", "Autolog", "autolog", "chain", "log_report"]

TABLE, IMAGES, WORKFLOW = "Result-Table", "Generated-Image", "workflow"
COLUMNS = (
    *("Prompt", "Negative-Prompt", "Seed", "Scheduler", "Steps", "Guidance-Scale"),
    *("Height", "Width", "Backend", "Device", "Build", "Seconds", "Arguments"),
    *("Pipeline-Call", "Image", "Chain", "Stage", "Generated-Image"),
)
_REMEMBERED = 4096  # images and latents whose digests are kept to find chains
_WORKFLOW_CALLS = 100  # later calls stand in the table only: a configuration is no log
_STAGES = ("tokenize", "encode", "denoise", "decode", "total")

_chain: ContextVar[list[Link] | None] = ContextVar("latentc_wandb_chain", default=None)


@contextmanager
def chain() -> Iterator[None]:
    """Calls inside of the block are stages of one chain, whatever they hand to each other.

    Without it a chain is recognised where a pipeline is given the latents or the images of
    another as they are. A copy of them counts; one that was scaled or resized does not.
    """
    token = _chain.set([])
    try:
        yield
    finally:
        _chain.reset(token)


@dataclass(frozen=True)
class Link:
    """A call's place: `chain` is the number of the chain's first call, `stage` counts from 1."""

    chain: int
    stage: int


class Chains:
    """Remembers by their content what calls have returned, to know it when it comes back.

    Digests hold no memory, and also know a copy that went through another library.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[bytes, Link] = OrderedDict()

    def link(self, call: int, run: Run, result: Result) -> Link:
        """The place of this call; its images and latents are remembered with it."""
        link = self._explicit(call) or self._found(run) or Link(call, 1)
        for digest in (*_digests(result.latents), *_digests(result.images)):
            self._made[digest] = link
            self._made.move_to_end(digest)
        while len(self._made) > _REMEMBERED:
            self._made.popitem(last=False)
        return link

    def _found(self, run: Run) -> Link | None:
        """After the stage whose output this call was given, if it was."""
        for value in _given(run):
            for digest in _digests(value):
                if digest in self._made:
                    before = self._made[digest]
                    return Link(before.chain, before.stage + 1)
        return None

    @staticmethod
    def _explicit(call: int) -> Link | None:
        links = _chain.get()
        if links is None:
            return None
        link = Link(links[0].chain, len(links) + 1) if links else Link(call, 1)
        links.append(link)
        return link


@dataclass
class _Active:
    """An `_Active` holds what `Autolog` has while it is on.

    `own`: whether it started the run itself.
    """

    wandb: Any
    run: Any
    own: bool
    decode: bool
    table: Any
    calls: int = 0
    chains: Chains = field(default_factory=Chains)
    workflow: list[dict[str, Any]] = field(default_factory=list)


class Autolog:
    """Logs every call of every pipeline of this process; `autolog` is the one to use.

    Call it to switch it on, also as ``with autolog(...):``, and `disable` to switch it off.
    """

    def __init__(self) -> None:
        self._active: _Active | None = None
        self._lock = threading.Lock()
        self._remove: Callable[[], None] = _nothing
        self._warned = False

    @property
    def enabled(self) -> bool:
        """Return whether calls are logged now."""
        return self._active is not None

    def __call__(
        self, init: Mapping[str, Any] | str | None = None, *, decode_latents: bool = True
    ) -> Self:
        """Start logging; where it is on already, end that first.

        Args:
            init: what `wandb.init` is called with, or the name of a project. None takes the run
                that there is, else starts one.
            decode_latents: draw an image also for calls with ``output_type="latent"``, which
                costs one run of the decoder after the call.

        Where wandb cannot start a run (nobody is logged in, no network), that is a warning, and
        pipelines run without being logged.

        Raises:
            LatentcError: wandb is not installed.
        """
        self.disable()
        wandb = library()
        settings = {"project": init} if isinstance(init, str) else dict(init or {})
        before = wandb.run
        self._warned = False
        try:
            run = before if before is not None and not settings else wandb.init(**settings)
            run.config.update({"latentc": __version__}, allow_val_change=True)
            table = wandb.Table(columns=[*COLUMNS], log_mode="INCREMENTAL", allow_mixed_types=True)
        except Exception as error:  # wandb raises errors of several libraries
            self._warn(error)
            return self
        self._active = _Active(wandb, run, run is not before, decode_latents, table)
        self._remove = observe.add(self._observe)
        return self

    def disable(self) -> None:
        """Stop logging, and finish the run if `autolog` has started it."""
        with self._lock:
            active, self._active = self._active, None
            self._remove()
        if active is not None and active.own:
            try:
                active.run.finish()
            except Exception as error:
                self._warn(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()

    def _observe(self, run: Run, result: Result) -> None:
        with self._lock:
            if self._active is None:
                return
            try:
                _log(self._active, run, result)
            except Exception as error:
                self._warn(error)

    def _warn(self, error: BaseException) -> None:
        """Say it once: a generation of a thousand images needs no thousand warnings."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"Weights & Biases does not log: {error!r:.300}; images are made all the same",
                stacklevel=3,
            )


def _nothing() -> None:
    pass


autolog = Autolog()


def _log(active: _Active, run: Run, result: Result) -> None:
    """One call: the configuration, a row per image, the images, and the times."""
    active.calls += 1
    link = active.chains.link(active.calls, run, result)
    _log_workflow(active, run, result, link)
    wandb, seconds = active.wandb, {}
    for stage in _STAGES:
        seconds[f"Seconds/{stage}"] = getattr(result.timings, stage)
    images = []
    for row, drawn in zip(
        _rows(active.calls, link, run, result), _images(active, run, result), strict=True
    ):
        image = drawn if drawn is None else wandb.Image(drawn, caption=row["Prompt"])
        active.table.add_data(*(row[name] for name in COLUMNS[:-1]), image)
        images += [] if image is None else [image]
    logged = {TABLE: active.table, "Pipeline-Call": active.calls, **seconds}
    active.run.log({**logged, **({IMAGES: images} if images else {})})
    for image in images:
        # The table keeps its rows; their pixels are on the disk and would fill the memory.
        getattr(image, "_free_ram", lambda: None)()


def _log_workflow(active: _Active, run: Run, result: Result, link: Link) -> None:
    if len(active.workflow) >= _WORKFLOW_CALLS:
        return
    loaded = run.pipeline.settings()
    params = {name: value for name, value in result.settings.items() if name not in loaded}
    active.workflow.append(
        {
            "pipeline": {**loaded, "pipeline-name": run.pipeline.manifest.source.pipeline_class},
            "params": {**params, "output_type": run.request.output_type},
            "stage": f"Pipeline-Call-{active.calls}",
            "chain": link.chain,
            "chain-stage": link.stage,
        }
    )
    active.run.config.update({WORKFLOW: [*active.workflow]}, allow_val_change=True)


def _rows(call: int, link: Link, run: Run, result: Result) -> Iterator[dict[str, Any]]:
    """One row per image, by the names of `COLUMNS`, the image itself left out."""
    request, pipeline = run.request, run.pipeline
    prompt, negative = _text_names(run)
    scale = pipeline.manifest.guidance.scale
    same = {
        "Scheduler": request.scheduler,
        "Steps": request.num_inference_steps,
        "Guidance-Scale": request.scales.get(scale) if scale else None,
        **dict(zip(("Height", "Width"), request.sizes.image, strict=True)),
        "Backend": f"{pipeline.backend.name} {pipeline.backend.version()}",
        "Device": pipeline.device,
        "Build": pipeline.build.name,
        "Seconds": result.timings.total,
        "Pipeline-Call": call,
        "Chain": link.chain,
        "Stage": link.stage,
    }
    for index in range(request.made):
        texts = {
            name: each[index // request.images_per_prompt]
            for name, each in request.given_texts().items()
        }
        yield {
            **same,
            "Prompt": texts.pop(prompt, ""),
            "Negative-Prompt": texts.pop(negative, ""),
            "Seed": result.seeds[index if len(result.seeds) > 1 else 0],
            "Image": index,
            "Arguments": json.dumps(texts | _arguments(run, result), sort_keys=True),
        }


def _text_names(run: Run) -> tuple[str, str]:
    """Return the bundle's names for its prompt, and for the text that guidance leads away from."""
    signature = run.pipeline.signature
    prompt = signature.texts[0] if signature.texts else ""
    negatives = [name for name in signature.branch_texts if prompt and name.endswith(prompt)]
    return prompt, negatives[0] if negatives else ""


def _arguments(run: Run, result: Result) -> dict[str, Any]:
    """Return what has no column of its own, such as a second scale or an original size."""
    request = run.request
    first = run.pipeline.manifest.guidance.scale
    found: dict[str, Any] = {name: [*values] for name, values in request.given_numbers().items()}
    found |= {name: value for name, value in request.scales.items() if name != first}
    return found | ({"interrupted": True} if result.interrupted else {})


def _images(active: _Active, run: Run, result: Result) -> Sequence[Any]:
    """Return Pillow images of a result, None for each where they are not decoded; of each video
    its first frame."""
    kind, of_videos = run.request.output_type, result.kind == "frames"
    if kind == "np":
        from latentc.runtimes.images.image import to_pil

        images = result.images[:, 0] if of_videos else result.images
        return to_pil(images.transpose(0, 3, 1, 2))
    if kind == "pil" or active.decode:
        images = result.images if kind == "pil" else run.pipeline.decode(result.latents)
        return [each[0] if of_videos else each for each in images]
    return [None] * run.request.made


def _given(run: Run) -> Iterator[Any]:
    """Yield the latents and images that a call was given."""
    request = run.request
    yield from request.values.values()
    for items in request.images.lists.values():
        yield from items


def _digests(value: Any) -> Iterator[bytes]:
    """One digest for each image or each sample of latents in a value of a call, if any."""
    import numpy as np

    if isinstance(value, np.ndarray):
        if value.ndim == 4 and value.dtype.kind == "f":
            channels_last = value.shape[-1] in (1, 3) and value.min() >= 0 and value.max() <= 1
            rows: Iterable[Any] = _bytes(value) if channels_last else value
            yield from (_digest(row) for row in rows)
    elif hasattr(value, "convert"):  # a Pillow image
        yield _digest(np.asarray(value.convert("RGB")))
    elif isinstance(value, list | tuple) and value and hasattr(value[0], "convert"):
        for each in value:
            yield from _digests(each)


def _digest(array: Any) -> bytes:
    import numpy as np

    head = f"{array.dtype} {array.shape}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(array).tobytes(), digest_size=16).digest()


def _bytes(images: Any) -> Any:
    """Images with values in [0, 1] as bytes, rounded as for ``output_type="pil"``."""
    import numpy as np

    return np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)
