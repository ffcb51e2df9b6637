"""A loaded bundle that makes images: prompt → ids → conditioning → loop → images."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import Session, cast
from latentc.runtimes.backends.sessions import Sessions
from latentc.runtimes.bundle.files import Bundle, graph_digest
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Build, Component
from latentc.runtimes.calls import values as checked
from latentc.runtimes.calls.call_arguments import (
    CallArguments,
    CallKeywords,
    OutputType,
    TextArguments,
    Texts,
)
from latentc.runtimes.calls.choices import check_output_type, scheduler_name
from latentc.runtimes.calls.choosing import Calls
from latentc.runtimes.calls.request import Request
from latentc.runtimes.calls.signature import Signature
from latentc.runtimes.errors import InputError
from latentc.runtimes.images import tiling
from latentc.runtimes.interpreter.execution import Execution
from latentc.runtimes.interpreter.loop import Schedule
from latentc.runtimes.options import check, declared, takes
from latentc.runtimes.pipeline import observe
from latentc.runtimes.pipeline.attributes import SchedulerName, Sealed
from latentc.runtimes.pipeline.callbacks import (
    CallbackArguments,
    ReturnArgument,
    WatchedCallArguments,
    WatchedKeywords,
    checked_callback,
    report_step,
)
from latentc.runtimes.pipeline.encoding import encode_prompt
from latentc.runtimes.pipeline.loading import Loading, chosen, misfit, requested
from latentc.runtimes.pipeline.plans import Plans
from latentc.runtimes.pipeline.run import (
    Images,
    PillowFrames,
    PillowImages,
    Result,
    Run,
    converted,
)
from latentc.runtimes.presets.load_arguments import LoadArguments, LoadKeywords
from latentc.runtimes.presets.preset import Preset
from latentc.runtimes.programs import statements
from latentc.runtimes.texts.encoded import Encoded, check_finite
from latentc.runtimes.texts.tokenizer import Frame, TextTokenizer
from latentc.runtimes.version import __version__

# Bytes of graphs from which on they are loaded at once. The built-in model's 24 MB load no faster
# in three threads than in turn on OpenVINO, and a tenth slower on ONNX Runtime (on two busy cores).
_PARALLEL = 64 << 20
LEAN = 4 << 30  # bytes of a component, from which on less memory is worth its price in speed
_ON_DEMAND = ("image_encoder", "shallow", "combiner")  # most calls have no use for them
_Begun = TypeVar("_Begun")


class Pipeline(Sealed):
    """One build of a bundle, loaded. Make one with `load`.

    Calls may come from several threads at once: nothing of a call is kept here but its encoded
    texts (`encoded`), which a later call with the same texts takes. `close` frees the engines'
    memory, from any thread; calls that are under way then end with a BackendError.
    """

    _settable = ("scheduler",)

    def __init__(
        self,
        bundle: Bundle,
        build: Build,
        backend: Backend,
        device: str,
        sessions: Sessions,
        tokenizers: Mapping[str, TextTokenizer],
        calls: Calls,
        preset: Preset | None = None,
        other_sizes: Callable[[], Pipeline] | None = None,
        plans: Plans | None = None,
    ) -> None:
        self.bundle = bundle
        self.build = build
        self.backend = backend
        self.device = device
        self.tokenizers = tokenizers
        self.calls = calls
        self._decoding = bundle.manifest.decoding
        self._images = statements.emit_of(bundle.manifest.programs[0]).of
        self.sessions = sessions
        self.encoded = Encoded()
        self._plans = plans or Plans(bundle)
        self._lock = threading.Lock()
        self._closed = False
        self._tiling = tiling.Tiling()
        self._preset = preset
        self._open_other_sizes = other_sizes
        self._other_sizes: Pipeline | None = None
        self._scheduler: str | None = None
        self._sealed = True

    @property
    def manifest(self) -> Manifest:
        """Return what the bundle says about itself."""
        return self.bundle.manifest

    @property
    def signature(self) -> Signature:
        """The arguments that calls take."""
        return self.calls.signature

    @property
    def schedulers(self) -> tuple[str, ...]:
        """The names that `scheduler` accepts."""
        return tuple(schedule.name for schedule in self.manifest.offered)

    @property
    def scheduler(self) -> SchedulerName:
        """The name of the scheduler that calls use which name none; assigning another one of
        `schedulers`, or the name of its diffusers class, changes it, and None takes it back.

        Raises:
            InputError: no such name, or a scheduler object of diffusers.
        """
        own = self._preset.arguments if self._preset is not None else {}
        usual = own.get("scheduler", self.manifest.defaults.scheduler)
        return SchedulerName(self._scheduler or usual)

    @scheduler.setter
    def scheduler(self, name: str | None) -> None:
        self._scheduler = None if name is None else scheduler_name(self.manifest, name)

    @overload
    def __call__(
        self,
        prompt: Texts = None,
        *,
        output_type: Literal["pil"] = "pil",
        return_dict: Literal[True] = True,
        **arguments: Unpack[WatchedKeywords],
    ) -> Result[PillowImages, PillowFrames]: ...

    @overload
    def __call__(
        self,
        prompt: Texts = None,
        *,
        output_type: Literal["np", "latent"],
        return_dict: Literal[True] = True,
        **arguments: Unpack[WatchedKeywords],
    ) -> Result[Array, Array]: ...

    @overload
    def __call__(
        self,
        prompt: Texts = None,
        *,
        output_type: OutputType = "pil",
        return_dict: Literal[False],
        **arguments: Unpack[WatchedKeywords],
    ) -> tuple[Any, ...]: ...

    @takes(WatchedCallArguments, others=True)
    def __call__(
        self,
        prompt: Texts = None,
        *,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        **arguments: Unpack[WatchedKeywords],
    ) -> Result[Any, Any] | tuple[Any, ...]:
        """Make images; names and meanings are diffusers'.

        Args:
            {options}
            arguments: what else this bundle takes; a wrong name gets the list.

        Raises:
            InputError: an argument that cannot be used.
            PlanNotFound: no sampling plan for the step count.
            NumericalError: NaN or infinity came out of a component.
            BackendError: the engine failed.
        """
        callback = checked_callback(arguments)
        check(declared(ReturnArgument)["return_dict"], return_dict)
        watching = declared(CallbackArguments)
        others = {name: value for name, value in arguments.items() if name not in watching}
        run = self._started({"prompt": prompt, "output_type": output_type, **others})
        try:
            for step in run:
                if callback is not None:
                    report_step(run, step, callback)
            result = run.finish()
            return result if return_dict else result.as_tuple()
        finally:
            run.close()

    @overload
    def stream(
        self,
        prompt: Texts = None,
        *,
        output_type: Literal["pil"] = "pil",
        **arguments: Unpack[CallKeywords],
    ) -> Run[PillowImages, PillowFrames]: ...

    @overload
    def stream(
        self,
        prompt: Texts = None,
        *,
        output_type: Literal["np", "latent"],
        **arguments: Unpack[CallKeywords],
    ) -> Run[Array, Array]: ...

    @takes(CallArguments, others=True)
    def stream(
        self,
        prompt: Texts = None,
        *,
        output_type: OutputType = "pil",
        **arguments: Unpack[CallKeywords],
    ) -> Run[Any, Any]:
        """Start a run to iterate over: it yields a `Progress` after each step.

        Takes the arguments of a call, less the callback's. They are checked at once, the work
        begins with the first ``next()``. ``finish()`` runs the rest and returns the result.
        """
        return self._started({"prompt": prompt, "output_type": output_type, **arguments})

    def _started(self, arguments: Mapping[str, Any]) -> Run[Any, Any]:
        """Check the arguments of a call and start its run."""
        return self.start(self._request(arguments))

    def start(self, request: Request) -> Run[Any, Any]:
        """Start the run of a call of this bundle that was checked already, as by
        `latentc.runtimes.pipeline.loading.Loading.request` before anything was loaded."""
        return self._begun(request, lambda pipe, execution: Run(pipe, execution, observe.notify))

    @overload
    def compute(self, name: str, /, **arguments: Unpack[CallArguments]) -> Array: ...

    @overload
    def compute(
        self, name: str, another: str, /, *others: str, **arguments: Unpack[CallArguments]
    ) -> dict[str, Any]: ...

    @takes(CallArguments, others=True)
    def compute(
        self, name: str, /, *others: str, **arguments: Unpack[CallArguments]
    ) -> Array | dict[str, Any]:
        """Values that a call makes on its way to images, such as ``"image_latents"``: only what
        they need is run, and what is drawn at random is what the whole call draws.

        Args:
            name, others: one value or several; those of `manifest.programs` without an underscore
                before their names, which a call takes as arguments, too.
            arguments: those of a call, less the callback's. What the values do not need may be left
                out.

        Returns:
            the array that is asked for, or several by name: a row for each prompt, for each image
            that is given, or for each that is made, and the shape that the program says.

        Raises:
            InputError: a name that is none of a public value, or an argument that cannot be used.
            PlanNotFound, NumericalError, BackendError: as in a call.
        """
        names = (name, *others)
        found = self.computed(self._request(arguments, names), names)
        return found if others else found[name]

    def computed(self, request: Request, names: Sequence[str]) -> dict[str, Array]:
        """Return values that a call asks for which was checked already, as by
        `latentc.runtimes.pipeline.loading.Loading.request`; see `compute`."""
        return self._begun(request, lambda pipe, execution: execution.values_of(names))

    def _request(self, arguments: Mapping[str, Any], wanted: Sequence[str] = ()) -> Request:
        """Check the arguments of a call, the pipeline's scheduler added."""
        given = dict(arguments)
        if given.get("scheduler") is None and self._scheduler is not None:
            given["scheduler"] = self._scheduler
        return requested(self.calls, self._preset, given, wanted)

    def _begun(self, request: Request, begin: Callable[[Pipeline, Execution], _Begun]) -> _Begun:
        """Return what `begin` makes of the execution of a call that was checked, and of the
        pipeline that runs it: this one, or the one for other sizes.

        Raises:
            InputError: it is closed, or was loaded for other calls.
            PlanNotFound: there is no plan for the step count.
        """
        if self._closed:
            raise InputError("this pipeline is closed")
        unfit = misfit(self.sessions.components, request)
        if unfit:
            return self._of_other_sizes(unfit)._begun(request, begin)
        return begin(self, self.execution(request))

    def execution(self, request: Request) -> Execution:
        """Return the execution of a call that was checked; nothing of it has run yet."""

        def schedule_of(loop: statements.Loop) -> Schedule:
            name = loop.plan.fixed or request.scheduler
            trained = self.manifest.schedule(name).num_train_timesteps
            table = self._plans.table(name, request.steps_of(loop))
            shift = self._plans.shift(name, table, *[*request.symbols.values()][:2])
            return Schedule(table, trained, shift)

        sessions, known = self.sessions, self.encoded
        return Execution(request, sessions, self.tokenizers, schedule_of, known, self._tiling)

    @takes(TextArguments, others=True)
    def encode_prompt(
        self,
        prompt: Texts = None,
        *,
        do_classifier_free_guidance: bool = True,
        **texts: Unpack[TextArguments],
    ) -> dict[str, Any]:
        """Encoded texts, to be kept, changed and given to a call in the place of the texts.

        Args:
            prompt: as in a call.
            do_classifier_free_guidance: False leaves out what guidance leads away from.
            {options}
            texts: other texts that this bundle takes.

        Returns:
            by the call's argument that takes them (``prompt_embeds`` …), arrays with a row per
            prompt: ``pipe(**pipe.encode_prompt("a cat"))`` is ``pipe("a cat")``.

        Raises:
            InputError: an argument that cannot be used, or a bundle that names no such arguments.
            NumericalError, BackendError: as in a call.
        """
        return encode_prompt(self, {**texts, "prompt": prompt}, do_classifier_free_guidance)

    def decode(
        self, latents: Array, output_type: str = "pil", size: tuple[int, int] | None = None
    ) -> Images:
        """Latents float32 [batch, channels, height, width] → images, as a call makes them: by the
        decoder, and by what comes after it, such as a safety checker; of videos
        [batch, channels, frames, height, width] → lists of frames.

        Args:
            size: height and width in pixels to resize and crop them to; None leaves them as the
                decoder gives them.

        Raises:
            InputError: another shape, no numbers, or a size that is none.
            NumericalError: the latents hold NaN or infinity, or the decoder returned some.
        """
        check_output_type(output_type)
        latents = checked.decodable(latents, self.manifest)
        if size is not None and latents.ndim != 4:
            raise InputError("'size' is for images: frames of videos are not resized")
        size = None if size is None else checked.image_size("size", size)
        if output_type == "latent":
            return latents
        from latentc.runtimes.images import image

        decoded = self._decoded(latents)
        if size is not None:
            decoded = image.resized(decoded, *size)
        return converted(decoded, output_type)

    def _decoded(self, latents: Array) -> Array:
        """Return the images that the first program makes of what its loop gives."""
        (first,) = self._decoding[0].feeds.values()
        values = {first: latents}
        for run in self._decoding:
            ((input, name),) = run.feeds.items()
            check_finite(run.component, input, values[name], "input")
            made = self._run(run, input, values[name])
            for output, value in run.gives.items():
                check_finite(run.component, output, made[output])
                values[value] = made[output]
        return values[self._images]

    def _run(self, run: statements.Run, input: str, array: Array) -> dict[str, Array]:
        """Run a component of one input, in the pipeline's tiles where it may run in tiles."""
        with self.sessions.using(run.component) as session:
            if not run.tiles:
                return session.run(cast(session, {input: array}))
            (output,) = run.gives
            made = tiling.decode(
                lambda part: session.run(cast(session, {input: part}))[output], array, self._tiling
            )
            return {output: made}

    def enable_vae_slicing(self) -> None:
        """Decode one image at a time: less memory for batches, the same images."""
        self._tiling = replace(self._tiling, slicing=True)

    def disable_vae_slicing(self) -> None:
        """Decode all images of a call at once, as by default."""
        self._tiling = replace(self._tiling, slicing=False)

    def enable_vae_tiling(self, tile_size: int | None = None) -> None:
        """Decode images larger than a tile in overlapping tiles: memory does not grow with the
        size. The images are those of diffusers with the same tiles.

        Args:
            tile_size: a tile's side in pixels; None is the model's default size.

        Raises:
            InputError: not a multiple of what tiles of this model must be.
        """
        side = tiling.tile_of(self.manifest.latents, tile_size)
        self._tiling = replace(self._tiling, tile=side)

    def disable_vae_tiling(self) -> None:
        """Decode images in one go, as by default."""
        self._tiling = replace(self._tiling, tile=0)

    def settings(self) -> dict[str, Any]:
        """Return what is loaded, and where, as JSON-compatible values."""
        return {
            "source": self.manifest.source.id,
            "build": self.build.name,
            "backend": f"{self.backend.name} {self.backend.version()}",
            "device": self.device,
            "latentc": __version__,
            **(self._preset.settings(self._open_other_sizes is not None) if self._preset else {}),
        }

    @property
    def closed(self) -> bool:
        """Return whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Free the engines' memory. Closing twice is harmless.

        Calls that are under way in other threads end with a BackendError, at once where the engine
        can end a graph half-way; this waits for them. Within a call, as in a signal handler, it
        returns at once, and the memory is freed when the call has ended.
        """
        self._closed = True
        self.encoded.clear()
        self.sessions.close()
        if self._other_sizes is not None:
            self._other_sizes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _of_other_sizes(self, misfit: str) -> Pipeline:
        """Return the same build for calls of any size, where it was a preset that fixed the size.

        Raises:
            InputError: it was the caller.
        """
        if self._open_other_sizes is None:
            raise InputError(misfit)
        with self._lock:
            if self._other_sizes is None:
                self._other_sizes = self._open_other_sizes()
            if self._closed:  # while it was opened
                self._other_sizes.close()
        self._other_sizes._tiling = self._tiling
        return self._other_sizes


@takes(LoadArguments)
def load(
    bundle: str | os.PathLike[str],
    backend: str | Backend | None = None,
    device: str | None = None,
    **arguments: Unpack[LoadKeywords],
) -> Pipeline:
    """Load a bundle.

    Args:
        bundle: its folder.
        {options}

    Raises:
        BundleError: missing, damaged or altered.
        InputError: no such build, backend or preset; a preset that is something else than what the
            other arguments say.
        BackendUnavailable: the engine is not installed.
        DeviceUnavailable: no such device here.
        BackendError: the engine refused a graph.
    """
    return open_pipeline(chosen(bundle, {"backend": backend, "device": device, **arguments}))


def open_pipeline(loading: Loading) -> Pipeline:
    """Load what was chosen.

    Where the one size is a preset's, calls of other sizes load the build a second time, for all.
    """
    bundle, build, backend = loading.bundle, loading.build, loading.backend
    components, sizes = loading.components, loading.sizes

    def open_one(name: str) -> Session:
        weighs = sum(file.size for file in build.artifacts[name].files)
        own = replace(loading.options, lean=loading.low_memory and weighs >= LEAN)
        return open_component(
            bundle, build, components[name], backend, loading.device, own, sizes.get(name)
        )

    files = {file.path: file.size for a in build.artifacts.values() for file in a.files}
    parallel = backend.loads_in_parallel and sum(files.values()) >= _PARALLEL
    usual = loading.calls.usual_components
    later = [n for n, each in components.items() if each.role in _ON_DEMAND or n not in usual]
    sessions = Sessions(components, open_one, not loading.low_memory, parallel, later)
    try:
        tokenizers = tokenizers_of(bundle)
    except BaseException:
        sessions.close()
        raise
    bundle.cache.save()
    general = None
    if loading.fixed_by_preset:

        def general() -> Pipeline:
            return open_pipeline(loading.of_any_size())

    return Pipeline(
        *(bundle, build, backend, loading.device, sessions, tokenizers),
        *(loading.calls, loading.preset, general, loading.plans),
    )


def open_component(
    bundle: Bundle,
    build: Build,
    component: Component,
    backend: Backend,
    device: str,
    options: SessionOptions | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Session:
    """Check the files of one component and load it, for the values of `sizes` only if given."""
    options, artifact = options or SessionOptions(), build.artifacts[component.name]
    compute = options.compute or (
        artifact.compute if artifact.compute in backend.computes else None
    )
    chosen = replace(options, sizes=sizes or {}, key=graph_digest(artifact), compute=compute)
    entry = bundle.entry(build, component.name, backend)
    return backend.open(entry, component, device, chosen)


def tokenizers_of(bundle: Bundle) -> dict[str, TextTokenizer]:
    """Return the tokenizers of a bundle, by name.

    Raises:
        BundleError: one is missing or damaged, or is another one than the manifest says.
    """
    return {
        each.name: TextTokenizer.load(
            bundle.path(each.file),
            each.max_length,
            each.expansions,
            each.vocabulary,
            Frame(each.before, each.after, each.pad),
            each.unescape,
        )
        for each in bundle.manifest.tokenizers
    }
