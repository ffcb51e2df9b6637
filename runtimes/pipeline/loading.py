"""This module settles how a bundle will be loaded, and what will be asked of it, before anything is
loaded: whatever can be refused is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.choosing import choose_build
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.sizes import fix, fixed, of_longest_texts
from latentc.runtimes.bundle.structures import Build, Component
from latentc.runtimes.calls.choosing import Calls
from latentc.runtimes.calls.request import Request
from latentc.runtimes.calls.signature import Signature
from latentc.runtimes.errors import InputError
from latentc.runtimes.interpreter.loop import batches, first_step
from latentc.runtimes.pipeline import load_checks
from latentc.runtimes.pipeline.plans import Plans, Tell
from latentc.runtimes.presets.choice import prepare
from latentc.runtimes.presets.preset import Asked, Preset
from latentc.runtimes.programs.statements import Loop, value_of
from latentc.runtimes.storage.folders import cache_folder, expanded


@dataclass(frozen=True)
class Loading:
    """One build of an opened bundle, and how it will be loaded. Make one with `chosen` or `of`.

    Attributes:
        components: by name, with the sizes fixed that all calls have in common.
        sizes: by component the values of its symbols that all calls have in common.
        calls: those that the bundle takes.
        plans: the sampling plans of the bundle.
        fixed_by_preset: whether it is a preset that fixed the sizes, and not the caller.
    """

    bundle: Bundle
    build: Build
    backend: Backend
    device: str
    options: SessionOptions
    components: Mapping[str, Component]
    sizes: Mapping[str, Mapping[str, int]]
    calls: Calls
    low_memory: bool
    preset: Preset | None
    fixed_by_preset: bool
    plans: Plans

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        build: Build,
        backend: Backend,
        device: str | None = None,
        options: SessionOptions | None = None,
        static: Mapping[str, float] | None = None,
        low_memory: bool = False,
        preset: Preset | None = None,
    ) -> Loading:
        """Check the choices that `latentc.runtimes.pipeline.pipeline.load` takes.

        Raises:
            BundleError: a program of the bundle does not keep to the rules.
            InputError: a size that the model cannot make, or an option that the backend lacks.
            DeviceUnavailable: no such device here.
        """
        where = backend.device(device)
        options = options or SessionOptions()
        backend.check(options, where)
        sizes = _sizes(bundle, backend, static)
        components = _fixed(bundle, sizes)
        by_preset = preset is not None and static is not None
        return cls(
            *(bundle, build, backend, where, options, components, sizes),
            *(Calls.of(bundle.manifest), low_memory, preset, by_preset, Plans(bundle)),
        )

    @property
    def signature(self) -> Signature:
        """The arguments that calls take."""
        return self.calls.signature

    def of_any_size(self) -> Loading:
        """Return the same for calls of any size."""
        sizes = _sizes(self.bundle, self.backend, None)
        components = _fixed(self.bundle, sizes)
        return replace(self, components=components, sizes=sizes, fixed_by_preset=False)

    def request(
        self,
        arguments: Mapping[str, Any],
        wanted: Sequence[str] = (),
        tell: Tell | None = None,
    ) -> Request:
        """Check the arguments of a call; sampling plans that are missing are traced.

        Args:
            wanted: names of values that are asked for in the place of images.
            tell: told in a line where plans have to be traced, which takes seconds.

        Raises:
            InputError: one that cannot be used, or a size that will not be loaded.
            PlanNotFound: no sampling plan for the step count.
        """
        request = requested(self.calls, self.preset, arguments, wanted)
        for loop in request.facts.loops:
            if request.runs(loop):
                self._check_steps(request, loop, tell)
        unfit = misfit(self.components, request)
        if unfit and not self.fixed_by_preset:
            raise InputError(unfit)
        return request

    def _check_steps(self, request: Request, loop: Loop, tell: Tell | None) -> None:
        """Refuse a call whose steps a loop has no plan for, or that would run none of them. Raises
        InputError, PlanNotFound."""
        steps, name = request.steps_of(loop), loop.plan.fixed or request.scheduler
        self.plans.require(name, steps, tell)
        first_step(request, loop, steps)


def chosen(
    bundle: str | os.PathLike[str],
    arguments: Mapping[str, Any],
    sizes: Mapping[str, float] | None = None,
) -> Loading:
    """Open a bundle and choose the build, the engine and how it is loaded.

    Args:
        arguments: those of `latentc.runtimes.pipeline.pipeline.load`; its errors are these.
        sizes: those of the calls to come, where it is the preset that wants one size.
    """
    asked = Asked(load_checks.checked(arguments), sizes)
    bundle = load_checks.path("bundle", bundle)
    opened = Bundle.open(bundle, hashing="always" if asked.how["verify"] else "once")
    asked, preset = prepare(opened, asked)
    how = asked.how
    build, engine = choose_build(opened.manifest, how["backend"], how["build"], how["precision"])
    cache = how["cache"]
    options = SessionOptions(
        threads=how["threads"],
        cache=cache_folder() if cache is True else _folder(cache) if cache else None,
        compute=how["compute"],
        compile=how["compile"],
        extra=dict(how["options"] or {}),
    )
    return Loading.of(
        *(opened, build, engine, how["device"], options),
        static=asked.static,
        low_memory=how["low_memory"],
        preset=preset,
    )


def requested(
    calls: Calls,
    preset: Preset | None,
    arguments: Mapping[str, Any],
    wanted: Sequence[str] = (),
) -> Request:
    """Check the arguments of a call, those of a preset added where it denoises.

    Args:
        wanted: names of values that are asked for in the place of images.

    Raises:
        InputError: one that cannot be used.
    """
    given = dict(arguments)
    denoised = {facts.loop.state.name for facts in calls.facts}
    if preset is not None and all(given.get(name) is None for name in denoised):
        calls.check_values(wanted)
        given = preset.complete(given, calls.usual_steps(given, wanted))
    return calls.request(given, wanted)


def _sizes(
    bundle: Bundle, backend: Backend, static: Mapping[str, float] | None
) -> dict[str, dict[str, int]]:
    """Return by component the values of its symbols that all calls have in common."""
    if static is not None:
        return fixed(bundle.manifest, static)
    return of_longest_texts(bundle.manifest) if backend.one_length else {}


def _fixed(bundle: Bundle, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Component]:
    """Return the components by name, with these sizes filled in."""
    return {each.name: fix(each, sizes.get(each.name, {})) for each in bundle.manifest.components}


def misfit(components: Mapping[str, Component], request: Request) -> str:
    """Return why a call does not fit a denoiser that is loaded for one size only; "" if it does."""
    loop, facts = request.facts.loop, request.facts
    if not request.sized:
        return ""
    own, free = components[loop.denoiser].inputs, facts.graphs[loop.denoiser].inputs
    for name, spec in own.items():
        fixed_length = len(spec.shape) > 2 and spec.shape[1] != free[name].shape[1]
        if request.denoises and fixed_length and _stretches(request, name, spec.shape[1]):
            return (
                "this call may give the denoiser encoded texts of another length than "
                f"{spec.shape[1]}, which it was loaded for: load it without static"
            )
    wanted = own[loop.state.input].shape
    counts = batches(request, request.num_inference_steps) if request.denoises else [wanted[0]]
    for rows in counts:
        found = (rows, *request.sample_shape())
        if any(isinstance(w, int) and w != f for w, f in zip(wanted, found, strict=True)):
            return (
                f"this call gives the denoiser {list(found)} (rows of guidance and images, "
                f"channels, then sizes in latents), and it was loaded for {list(wanted)} only: "
                "load it for this size, or without static"
            )
    return ""


def _stretches(request: Request, input: str, length: int | str) -> bool:
    """Return whether what feeds a denoiser input may be longer than it was loaded for."""
    facts = request.facts
    fed = {value_of(b.feeds[input]) for b in facts.loop.branches if input in b.feeds}
    if not fed & facts.stretchable:
        return False
    given = facts.stretchable & request.values.keys()
    lengths = {request.values[name].shape[1] for name in given}
    return request.max_embeddings_multiples > 1 or any(each != length for each in lengths)


def _folder(cache: str | os.PathLike[str]) -> Path:
    """Return the folder for compiled graphs; one that cannot be written may still be read.

    Raises:
        InputError: it is a file.
    """
    folder = expanded(cache)
    if os.path.isfile(folder):
        raise InputError(f"'cache' {folder}: is a file; give a folder")
    return folder
