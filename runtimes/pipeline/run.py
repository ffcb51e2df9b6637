"""One run of a pipeline: an iterator over its steps, and what comes out in the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeAlias

import numpy as np

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend
from latentc.runtimes.backends.calls_in_flight import Cancellation
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Build
from latentc.runtimes.calls.signature import Signature
from latentc.runtimes.errors import BackendError, InputError, LatentcError, NumericalError
from latentc.runtimes.interpreter.execution import Execution
from latentc.runtimes.interpreter.loop import guided
from latentc.runtimes.interpreter.timings import Timings
from latentc.runtimes.pipeline.attributes import Sealed

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import TypeVar  # part of what type checkers bring; Python's own of 3.13

    ImagesT = TypeVar("ImagesT", default=Any)
    FramesT = TypeVar("FramesT", default=Any)
else:
    from typing import TypeVar

    ImagesT, FramesT = TypeVar("ImagesT"), TypeVar("FramesT")

# Pillow images for "pil", float32 [batch, height, width, channels] for "np"; of videos a list of
# those for each, and [batch, frames, height, width, channels]; the latents for "latent".
Images: TypeAlias = Any
PillowImages: TypeAlias = "list[Image]"
PillowFrames: TypeAlias = "list[list[Image]]"


@dataclass(frozen=True)
class Result(Generic[ImagesT, FramesT]):
    """A result is what a run made.

    `images`: Pillow images, or float32 [batch, height, width, channels] in [0, 1] for "np", or
    the latents for "latent". Of a bundle that makes videos they are the same as `frames`: a list of
    Pillow images for each video, or float32 [batch, frames, height, width, channels], and `rate` is
    how many are shown in a second, None where nothing says it. `latents`: float32
    [batch, channels, height, width] after the last step, of videos
    [batch, channels, frames, height, width]. `seeds`: one for the whole batch, or one per image;
    of generators that were given those that they began with.
    `settings` makes the same again; it has no seed where noise was drawn from a generator that had
    drawn some before.
    `left_out`: what the diffusers pipeline has and was not run, such as ``"watermark"``.
    `values`: what the bundle gives besides images, by name, such as ``"nsfw_content_detected"``;
    nothing for "latent".
    """

    images: ImagesT
    latents: Array
    seeds: tuple[int, ...]
    timings: Timings
    interrupted: bool
    settings: Mapping[str, Any]
    left_out: tuple[str, ...] = ()
    values: Mapping[str, Array] = field(default_factory=dict)
    kind: str = "images"
    rate: float | None = None

    def as_tuple(self) -> tuple[Any, ...]:
        """Return the images, then the arrays of `values`: what ``return_dict=False`` returns."""
        return (self.images, *self.values.values())

    @property
    def frames(self) -> FramesT:
        """The frames of videos, as diffusers' pipelines call them.

        Raises:
            InputError: the bundle makes images.
        """
        if self.kind != "frames":
            raise InputError("this bundle makes images, which are in 'images', and no frames")
        frames: Any = self.images
        return frames  # type: ignore[no-any-return]  # of this kind images are frames


@dataclass(frozen=True)
class Progress:
    """The state after one evaluation of the denoiser.

    `index` counts from 0 to `total` - 1; `latents` is a copy, float32 [batch, C, H, W], of videos
    [batch, C, frames, H, W].
    """

    index: int
    total: int
    timestep: float
    latents: Array
    _run: Run = field(repr=False, compare=False)

    def preview(self, output_type: str = "pil") -> Images:
        """The latents of this step as images: one run of the decoder, and of what
        the bundle does with images after it."""
        run = self._run
        return run.pipeline.decode(self.latents, output_type, run.request.sizes.resized)


class Loaded(Protocol):
    """A `Loaded` has what a run needs of the pipeline that it belongs to.

    See `latentc.runtimes.pipeline.pipeline.Pipeline`.
    """

    @property
    def manifest(self) -> Manifest: ...

    @property
    def build(self) -> Build: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def device(self) -> str: ...

    @property
    def signature(self) -> Signature: ...

    @property
    def closed(self) -> bool: ...

    def settings(self) -> dict[str, Any]: ...

    def decode(
        self, latents: Array, output_type: str = ..., size: tuple[int, int] | None = ...
    ) -> Images: ...


# Is called with a run and its result when there is one.
Done: TypeAlias = Callable[["Run", Result], None]


class Run(Sealed, Generic[ImagesT, FramesT]):
    """Iterate over it for the steps, then ask `finish` for the result.

    Work happens in ``next()``, in the calling thread. A run belongs to one call: stopping it
    stops no other run of the same pipeline. Leaving it unfinished costs nothing. `interrupt` and
    `close` may be called from any thread, from callbacks and from signal handlers.
    """

    _settable = ("latents",)

    def __init__(self, pipeline: Loaded, execution: Execution, done: Done) -> None:
        self.pipeline = pipeline
        self._done = done
        self.request = execution.call
        self.timings = execution.timings
        self.num_timesteps = execution.evaluations()
        self._execution = execution
        self._interrupt = False  # diffusers' name: callbacks set it
        self._latents: Array | None = None
        self._edited: Array | None = None
        self._result: Result[ImagesT, FramesT] | None = None
        self._steps = self._execute()
        self._turn = threading.Lock()  # held while a step runs, which one thread does at a time
        self._closing = Cancellation()
        self._sealed = True

    def __iter__(self) -> Self:
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

    def guided(self) -> list[bool]:
        """Return for each evaluation whether all branches run, or the base alone."""
        return guided(self.request, self.request.facts.loop, self.num_timesteps)

    def interrupt(self) -> None:
        """Stop after the current step; the latents are decoded as they are."""
        self._interrupt = True

    @property
    def latents(self) -> Array | None:
        """The current latents, float32 [batch, C, H, W], of videos [batch, C, frames, H, W];
        assigning replaces them."""
        return self._latents

    @latents.setter
    def latents(self, value: Array) -> None:
        if self._latents is None:
            raise InputError("latents can be replaced after the first step")
        try:
            array = np.ascontiguousarray(value, np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"latents: expected an array of numbers, not {value!r:.80}") from error
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

    def finish(self) -> Result[ImagesT, FramesT]:
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
        steps = self._execution.steps()
        with closing(steps):
            while True:
                self._execution.interrupted = self._interrupt
                try:
                    step = steps.send(self._take_edit())
                except StopIteration:
                    break
                if step is None:  # of a loop before the main one
                    continue
                self._latents = step.latents
                # What goes on is not what the caller is given, who may change that.
                yield Progress(step.index, step.total, step.timestep, step.latents.copy(), self)
        self._finish(start)

    def _take_edit(self) -> Array | None:
        edited, self._edited = self._edited, None
        return edited

    def _finish(self, start: float) -> None:
        request, execution = self.request, self._execution
        self._latents = execution.values[request.facts.loop.state.name].array
        images: Images = self._latents
        with self.timings.stage("decode"):
            for array in execution.emitted.values():
                images = converted(array, request.output_type)
            overlay = request.images.overlay
            images = images if overlay is None else overlay.put(images)
        self.timings.total = perf_counter() - start
        self._result = Result(
            images=images,
            latents=self._latents,
            seeds=request.seeds,
            timings=self.timings,
            interrupted=execution.interrupted,
            settings={**request.settings(), **self.pipeline.settings()},
            left_out=tuple(each.name for each in self.pipeline.manifest.left_out),
            values={name: array.copy() for name, array in execution.arrays.items()},
            kind=request.facts.emit.kind,
            rate=request.facts.emit.rate,
        )
        self._done(self, self._result)


def converted(array: Array, output_type: str) -> Images:
    """Return images float32 [batch, channels, height, width], or frames
    [batch, frames, channels, height, width], as a call wants them: of frames the same for each
    video."""
    from latentc.runtimes.images import image

    videos = array[None] if array.ndim == 4 else array
    if output_type == "pil":
        lists = [image.to_pil(frames) for frames in videos]
        return lists[0] if array.ndim == 4 else lists
    arrays = [image.to_numpy(frames) for frames in videos]
    return arrays[0] if array.ndim == 4 else np.stack(arrays)
