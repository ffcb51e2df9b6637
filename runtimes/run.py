"""One run of a pipeline: an iterator over its steps, and what comes out in the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from runtimes import conditioning, noise, observe, preparation, prompt_tokens, prompts
from runtimes.attributes import Sealed
from runtimes.blending import blended
from runtimes.calls import Cancellation
from runtimes.errors import BackendError, InputError, LatentcError, NumericalError
from runtimes.manifest import Branch
from runtimes.plan import SamplingPlan
from runtimes.preparation import Prepared
from runtimes.request import Request
from runtimes.sampler import Predict, Step, denoise
from runtimes.session import Array, Feeds, Session, cast
from runtimes.step_cache import StepCache, kinds
from runtimes.tasks import START

if TYPE_CHECKING:
    from runtimes.pipeline import Pipeline

# Pillow images for "pil", float32 [batch, height, width, channels] for "np", float32
# [batch, channels, height, width] for "latent".
Images: TypeAlias = Any


@dataclass
class Timings:
    """Seconds per stage. `encode` is next to nothing where the texts were encoded before, in an
    earlier call. `steps` has one entry per evaluation of the denoiser; time that the
    caller spends between steps counts nowhere but in `total`."""

    tokenize: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    steps: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to the stage."""
        start = perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + perf_counter() - start)


@dataclass(frozen=True)
class Result:
    """What a run made.

    `images`: Pillow images, or float32 [batch, height, width, channels] in [0, 1] for "np", or
    the latents for "latent". `latents`: float32 [batch, channels, height, width] after the last
    step. `seeds`: one for the whole batch, or one per image. `settings` makes the same again.
    `left_out`: what the diffusers pipeline has and was not run, such as ``"safety_checker"``.
    """

    images: Images
    latents: Array
    seeds: tuple[int, ...]
    timings: Timings
    interrupted: bool
    settings: Mapping[str, Any]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """The state after one evaluation of the denoiser.

    `index` counts from 0 to `total` - 1; `latents` is a copy, float32 [batch, C, H, W].
    """

    index: int
    total: int
    timestep: float
    latents: Array
    _run: Run = field(repr=False, compare=False)

    def preview(self, output_type: str = "pil") -> Images:
        """The latents of this step as pictures: one run of the decoder."""
        run = self._run
        return run.pipeline.decode(self.latents, output_type, run.request.size.resized)


# (run, step index, timestep, {"latents": …}) -> None or {"latents": …}
Callback: TypeAlias = Callable[["Run", int, float, dict[str, Any]], Any]


class Run(Sealed):
    """Iterate over it for the steps, then ask `finish` for the result.

    Work happens in ``next()``, in the calling thread. A run belongs to one call: stopping it
    stops no other run of the same pipeline. Leaving it unfinished costs nothing. `interrupt` and
    `close` may be called from any thread, from callbacks and from signal handlers.
    """

    _settable = ("latents",)

    def __init__(self, pipeline: Pipeline, request: Request, plan: SamplingPlan) -> None:
        self.pipeline = pipeline
        self.request = request
        self.timings = Timings()
        self.num_timesteps = plan.num_evaluations
        self._plan = plan
        self._interrupt = False  # diffusers' name: callbacks set it
        self._latents: Array | None = None
        self._edited: Array | None = None
        self._result: Result | None = None
        self._held = ExitStack()  # the denoiser, and what is bound to it
        self._steps = self._execute()
        self._turn = threading.Lock()  # held while a step runs, which one thread does at a time
        self._closing = Cancellation()
        self._sealed = True

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> Progress:
        if not self._turn.acquire(blocking=False):
            raise InputError("this run is at work already, in another thread or further out")
        try:
            with self._closing.in_force():
                progress = next(self._steps)
        except LatentcError as error:
            if self._closing.requested:
                raise StopIteration from error
            if self.pipeline.closed:
                raise BackendError("this pipeline was closed before the call had ended") from error
            raise
        finally:
            self._turn.release()
            self._end_if_closed()
        if self._closing.requested:
            raise StopIteration
        return progress

    def interrupt(self) -> None:
        """Stop after the current step; the latents are decoded as they are."""
        self._interrupt = True

    @property
    def latents(self) -> Array | None:
        """The current latents, float32 [batch, C, H, W]; assigning replaces them."""
        return self._latents

    @latents.setter
    def latents(self, value: Array) -> None:
        if self._latents is None:
            raise InputError("latents can be replaced after the first step")
        array = np.ascontiguousarray(value, np.float32)
        if array.shape != self._latents.shape:
            raise InputError(
                f"latents of shape {list(array.shape)} cannot replace those of shape "
                f"{list(self._latents.shape)}"
            )
        if not np.isfinite(array).all():
            raise NumericalError(
                "the latents that were given in the place of a step's hold NaN or infinity"
            )
        self._latents = self._edited = array

    def finish(self) -> Result:
        """Run what is left and return the result.

        Raises:
            InputError: the run failed before or was closed.
            BackendError: the engine failed, or the pipeline was closed.
        """
        for _ in self:
            pass
        if self._result is None:
            raise InputError("this run was closed or failed: it has no result")
        return self._result

    def close(self) -> None:
        """Give up the run, at once.

        A step that is under way in another thread ends early where the engine can end a graph
        half-way, else as usual; nothing comes after it, and nobody gets it. This does not wait.
        """
        self._closing.request()
        self._end_if_closed()

    def _end_if_closed(self) -> None:
        """Free what a closed run holds, unless a step is under way: then that does it at its end,
        as the flag is set before the lock is tried, and looked at after the lock is free."""
        if self._closing.requested and self._turn.acquire(blocking=False):
            try:
                self._steps.close()
            finally:
                self._turn.release()

    def _execute(self) -> Generator[Progress, None, None]:
        start = perf_counter()
        try:
            loop = self._start()
            while not self._interrupt:
                begin = perf_counter()
                try:
                    step = loop.send(self._take_edit())
                except StopIteration:
                    break
                except NumericalError as error:
                    raise NumericalError(f"{self.pipeline.denoiser_name}: {error}") from error
                finally:
                    spent = perf_counter() - begin
                    self.timings.denoise += spent
                self.timings.steps.append(spent)
                self._latents = step.latents
                yield Progress(step.index, step.total, step.timestep, step.latents, self)
        finally:
            self._held.close()
        self._finish(start)

    def _start(self) -> Generator[Step, Array | None, None]:
        request, pipeline = self.request, self.pipeline
        branches = request.branches(pipeline.manifest)
        guided = request.guided(self._plan.num_evaluations)
        seeds, shape = request.seeds, pipeline.latents_shape(request)
        generators = noise.seeded(seeds if len(seeds) > 1 else seeds[0])
        prepared = preparation.direct(request)
        if request.start_latents is not None:
            prepared.start = preparation.repeated(request.start_latents, request.images)
        self._prepare(prepared, generators, late=False)
        # The initial latents come before what the scheduler draws, as in diffusers.
        drawn = request.latents
        if drawn is None and not request.denoising_start:
            drawn = noise.draw(generators, shape)
        self._prepare(prepared, generators, late=True)
        predict = self._condition([branch for branch, _ in branches], guided, prepared)
        with self.timings.stage("denoise"):
            clean = prepared.start if request.task.starts(request.strength) else None
            if drawn is None:  # goes on from latents that are as noisy as they should be
                assert clean is not None
                first = clean
            else:
                first = self._plan.initial_sample(drawn, clean)
            self._latents = first.astype(np.float32, copy=False)
            steps = denoise(
                self._plan,
                self._latents,
                predict,
                lambda: noise.draw(generators, shape),
                weights=[weight for _, weight in branches],
                guided=guided,
                rescale=request.rescale(pipeline.manifest),
            )
        mask = request.pictures.blend
        if mask is None or prepared.start is None or drawn is None:
            return steps
        mask = preparation.repeated(mask, request.images)
        return blended(steps, self._plan, mask, prepared.start, drawn)

    def _prepare(self, prepared: Prepared, generators: noise.Generators, late: bool) -> None:
        """What is made of pictures before or after the initial noise is drawn."""
        request, pipeline = self.request, self.pipeline
        sides = dict(zip(("height", "width"), pipeline.latents_shape(request)[2:], strict=True))
        own = [Branch("", "", "empty", 1.0)]
        numbers = {
            name: rows[:1]
            for name, rows in conditioning.vectors(pipeline.manifest, request, own).items()
        }
        for each in request.task.runs(request.strength, late):
            if START in each.gives.values() and request.start_latents is not None:
                continue
            with self.timings.stage("encode"):
                preparation.run(
                    pipeline.sessions, each, request, generators, sides, prepared, numbers
                )

    def _condition(self, branches: list[Branch], guided: list[bool], prepared: Prepared) -> Predict:
        """Encode the texts and bind all conditioning to the denoiser, and that of the single
        branch besides where some steps are not guided."""
        request, pipeline = self.request, self.pipeline
        constants = conditioning.vectors(pipeline.manifest, request, branches)
        if pipeline.tokenizers:
            with self.timings.stage("tokenize"):
                texts = prompt_tokens.tokenize(
                    pipeline.manifest, pipeline.tokenizers, request, branches
                )
            with self.timings.stage("encode"):
                constants |= prompts.encode(
                    pipeline.manifest,
                    pipeline.sessions,
                    texts,
                    request,
                    branches,
                    pipeline.encoded,
                )
        constants |= prepared.rows(branches)
        by_rows = {len(branches) * request.images: constants}
        if len(branches) > 1 and not all(guided):
            names = [branch.name for branch in branches]
            first = names.index(pipeline.manifest.guidance.single) * request.images
            by_rows[request.images] = {
                name: rows[first : first + request.images] for name, rows in constants.items()
            }
        varying = {
            rows: conditioning.windowed(pipeline.manifest, request, each, len(guided))
            for rows, each in by_rows.items()
        }
        changing = {name for steps in varying.values() for name in steps[0]}
        by_rows = {
            rows: {name: value for name, value in each.items() if name not in changing}
            for rows, each in by_rows.items()
        }
        shallow = pipeline.shallow_name if request.cache_interval > 1 else None
        return StepCache(
            self._bind(pipeline.denoiser_name, by_rows),
            self._bind(shallow, by_rows) if shallow else {},
            pipeline.manifest.cached(),
            kinds(guided, request.cache_interval),
            varying if changing else None,
        )

    def _bind(self, component: str, by_rows: Mapping[int, Feeds]) -> dict[int, Session]:
        """A component with its conditioning given, by number of rows; what it does not take is
        left out."""
        session = self._held.enter_context(self.pipeline.sessions.using(component))
        bound = {}
        for rows, constants in by_rows.items():
            used = {name: value for name, value in constants.items() if name in session.inputs}
            bound[rows] = session.bind(cast(session, used))
            self._held.callback(bound[rows].close)
        return bound

    def _take_edit(self) -> Array | None:
        edited, self._edited = self._edited, None
        return edited

    def _finish(self, start: float) -> None:
        assert self._latents is not None
        with self.timings.stage("decode"):
            size = self.request.size.resized
            images = self.pipeline.decode(self._latents, self.request.output_type, size)
            overlay = self.request.pictures.overlay
            images = images if overlay is None else overlay.put(images)
        self.timings.total = perf_counter() - start
        self._result = Result(
            images=images,
            latents=self._latents,
            seeds=self.request.seeds,
            timings=self.timings,
            interrupted=self._interrupt,
            settings={**self.request.settings(), **self.pipeline.settings()},
            left_out=tuple(each.name for each in self.pipeline.manifest.left_out),
        )
        observe.notify(self, self._result)


def report_step(run: Run, step: Progress, callback: Callback) -> None:
    """Call a diffusers-style callback and take over the latents that it returns.

    Raises:
        InputError: it returned something else than None or a mapping with latents.
    """
    returned = callback(run, step.index, step.timestep, {"latents": step.latents})
    if returned is None:
        return
    if not isinstance(returned, Mapping) or set(returned) - {"latents"}:
        raise InputError(
            "callback_on_step_end must return None or a dictionary with 'latents' only, "
            f"not {returned!r:.80}"
        )
    if "latents" in returned:
        run.latents = returned["latents"]
