"""The search of `latentc tune`: which of a bundle's builds, loaded how and called with what, is
the fastest on this machine within the limits of each preset
(`latentc.runtimes.presets.preset.LIMITS`).

A denoiser step of a full-size model takes seconds, so the product of all settings is never tried:

1. **Setups.** Each precision that an engine here loads (of several targets the one that it likes
   best), computed as the build says and, where the engine has lower precisions, as the engine
   would by itself; for one size, which is never slower. What is expected to be fast comes first.
   An encode, a few steps and a decode are timed; a setup whose first step takes several times as
   long as the fastest one's is given up. Threads are tried on the first setup of each engine only.
2. **Fidelity**, from the fastest setup on until one is `faithful`: images of the same seeds and
   prompts as by the most exact setup (fp32), the bundle's loop probe, its judge. What is slower
   than that one can win nothing.
3. **Arguments of calls** on top of each preset's winner: the guidance window and, where the bundle
   has it, the interval of step caching. The time of an image follows from the times of the few
   kinds of step, so only fidelity needs images: of the combinations in order of time the middle
   one is tried; if it is good enough what is slower is of no interest, if not, neither is what
   cuts more. A window needs graphs for any number of rows, so it goes without fixed sizes; these
   are given up, too, where they gain nothing.

`seconds` bounds all of it: nothing is begun that is not expected to end in time (loading apart),
what was found is kept, and what was left out is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Unpack

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.backend import Backend, SessionOptions
from latentc.runtimes.backends.session import first_line
from latentc.runtimes.bundle.files import Bundle
from latentc.runtimes.bundle.precision import DENOISER, of_component
from latentc.runtimes.bundle.quantities import ranges
from latentc.runtimes.calls.choosing import Calls
from latentc.runtimes.errors import BackendError, InputError, PlanNotFound
from latentc.runtimes.interpreter.loop import guided, live_branches
from latentc.runtimes.options import complete, takes, tuple_of
from latentc.runtimes.pipeline.loading import Loading, requested
from latentc.runtimes.pipeline.pipeline import Pipeline, open_pipeline
from latentc.runtimes.presets.preset import LIMITS, Arguments, Limits, content, points_lost
from latentc.runtimes.presets.records import Choice, Record, machine
from latentc.runtimes.presets.setups import Setup, exactness, label, setups, thread_counts
from latentc.runtimes.presets.trials import (
    Budget,
    Fidelity,
    Key,
    Trial,
    Tuning,
    allowed,
    cuts_more,
    key_of,
    preference,
)
from latentc.runtimes.programs.statements import emit_of
from latentc.runtimes.sampling.step_cache import kinds
from latentc.runtimes.tuning.step_times import Times, measure
from latentc.runtimes.tuning.tune_arguments import Tell, TuneArguments
from latentc.runtimes.verification.verify import (
    MAX_PSNR,
    can_judge,
    compare_images,
    count_right,
    measure_loop,
    to_bytes,
)

TIE = 1.03  # two times within 3% are the same
STARTS = (0.0, 0.1)
STOPS = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2)
INTERVALS = (1, 2, 3, 5)
SEED = 0  # of the first prompt's image; each has the next one
_HOPELESS = 4.0  # a first step so many times as long as the best one's ends a try …
_QUICK = 0.25  # … unless it takes fewer seconds than this
_SETUPS_SHARE = 0.5  # of the time, for comparing setups: the rest is for images
_REFERENCE_SHARE = 0.2  # of the time, at most, for the images in fp32
_PROMPTS = 3
_NO_TIME = "no time left for its images"


@takes(TuneArguments)
def tune(
    bundle: Bundle,
    *,
    clock: Callable[[], float] = perf_counter,
    **arguments: Unpack[TuneArguments],
) -> Tuning:
    """Search this machine's best settings for a bundle; see the module's text for the plan.

    Args:
        {options}
        clock: what counts the seconds.

    Raises:
        InputError: an argument that cannot be used; no such backend, or no prompt to be had.
        PlanNotFound: a step count without a plan.
        DeviceUnavailable: no engine here has the device.
        BackendError: no build runs here.
    """
    options = complete(TuneArguments, arguments)
    search = Search(bundle, Budget(options["seconds"], clock), options)
    try:
        return search.run(setups(bundle, options["backend"], options["device"]))
    finally:
        search.close()


class Search:
    """One search; see the module's text. `options` are all of `TuneArguments`."""

    def __init__(self, bundle: Bundle, budget: Budget, options: Mapping[str, Any]) -> None:
        if emit_of(bundle.manifest.programs[0]).kind != "images":
            raise InputError("latentc tune compares images, and this bundle makes videos")
        self.bundle = bundle
        self.budget = budget
        prompts, steps = tuple_of(options["prompts"]), options["steps"]
        self.prompts = prompts or _prompts(bundle)
        self._own_prompts = not prompts
        self.trials: dict[Key, Trial] = {}
        self.notes: list[str] = []
        self._asked_steps = steps
        self._tell: Tell | None = options["tell"]
        defaults = bundle.manifest.defaults
        schedule = next(s for s in bundle.manifest.schedules if s.name == defaults.scheduler)
        if steps is not None and steps not in schedule.steps:
            raise PlanNotFound(
                f"no sampling plan of {schedule.name!r} for {steps} steps; "
                f"there are: {ranges(schedule.steps)}"
            )
        self._plans = schedule.steps
        self._calls = Calls.of(bundle.manifest)
        for index in range(len(self.prompts)):
            requested(self._calls, None, self._call(index))
        self._evaluations = 0  # of the denoiser, with the default steps
        self._engines: dict[str, Backend] = {}
        self._threads: dict[str, int] = {}
        self._times: dict[Setup, Times] = {}
        self._opened: tuple[Setup, Pipeline] | None = None
        self._references: list[Array] = []
        self._reference: Setup
        self._steps = 0

    def run(self, candidates: Sequence[tuple[Setup, Backend]]) -> Tuning:
        """Do all of the plan."""
        self._engines = {setup.backend: engine for setup, engine in candidates}
        self._measure_setups([setup for setup, _ in candidates])
        self._draw_references()
        self._compare_setups()
        for name, limits in LIMITS.items():
            self._search_arguments(name, limits)
        return self._tuning()

    def close(self) -> None:
        """Free what is loaded."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    # --- 1. setups -----------------------------------------------------------------------

    def _measure_setups(self, candidates: list[Setup]) -> None:
        """Time all setups that the budget allows; the most exact ones first, until one works."""
        builds = {build.name: build for build in self.bundle.manifest.builds}
        exact = sorted(candidates, key=lambda each: exactness(builds[each.build], each))
        reference = next((each for each in exact if self._try(each)), None)
        if reference is None:
            first = next(iter(self.trials.values()))
            raise BackendError(f"no build runs here; {first.setup.build}: {first.note}")
        self._reference = self._measured(reference)
        if of_component(builds[reference.build].precision, DENOISER) != "fp32":
            self.notes.append(
                f"the bundle has no fp32 build that runs here: images are compared with those of "
                f"{reference.build}"
            )
        cost = self._cost_of_trying(self._reference)
        for setup in candidates:
            if self._known(setup):
                continue
            if not self.budget.affords(cost, _SETUPS_SHARE):
                left = sum(not self._known(candidate) for candidate in candidates)
                self.notes.append(f"time: {left} of {len(candidates)} setups were not measured")
                return
            self._try(setup)

    def _known(self, setup: Setup) -> bool:
        """Return whether a setup was tried."""
        return any(key_of(each, {}) in self.trials for each in (setup, self._measured(setup)))

    def _measured(self, setup: Setup) -> Setup:
        """Return the setup with the number of threads that its engine is best with."""
        return replace(setup, threads=self._threads.get(setup.backend, 0))

    def _try(self, setup: Setup) -> bool:
        """Measure a setup; on the first of its engine, also the number of threads."""
        if setup.backend in self._threads:
            return self._time(self._measured(setup))
        if not self._time(setup):
            return False
        tried = [setup, *(replace(setup, threads=count) for count in thread_counts())]
        for each in tried[1:]:
            if self.budget.affords(self._cost_of_trying(setup), _SETUPS_SHARE):
                self._time(each)
        done = [each for each in tried if each in self._times]
        best = min(done, key=self._seconds)
        better = self._seconds(best) * TIE < self._seconds(setup)
        self._threads[setup.backend] = best.threads if better else 0
        return True

    def _time(self, setup: Setup) -> bool:
        """Measure an image's parts; whether that worked."""
        self._say(f"timing {label(setup)}")
        fastest = min((min(t.steps.values()) for t in self._times.values()), default=None)
        try:
            pipe = self._pipeline(setup)
            if not self._evaluations:
                self._evaluations = pipe.stream(**self._call(0)).num_timesteps
            patience = max(_HOPELESS * fastest, _QUICK) if fastest else None
            times = measure(pipe, self._call(0), patience)
        except (BackendError, InputError) as error:
            self._add(Trial(setup, {}, None, note=first_line(error)))
            return False
        if times is None:
            self._add(Trial(setup, {}, None, note=f"a step over {_HOPELESS:g} × the fastest"))
            return False
        self._times[setup] = times
        self._add(Trial(setup, {}, self._seconds(setup)))
        return True

    def _cost_of_trying(self, setup: Setup) -> float:
        """Return about how many seconds loading and timing a setup takes."""
        times = self._times[setup]
        return 2 * (times.encode + times.decode) + 4 * max(times.steps.values())

    def _seconds(self, setup: Setup) -> float:
        found = self._predict(setup, {})
        assert found is not None  # no arguments need only the kind that is always measured
        return found

    # --- 2. fidelity ---------------------------------------------------------------------

    def _draw_references(self) -> None:
        """Draw images of the most exact setup; in fewer steps where they would take too long."""
        usual = self.bundle.manifest.defaults.num_inference_steps
        per_step = self._seconds(self._reference) / usual
        allowed = self.budget.seconds * _REFERENCE_SHARE
        steps = self._asked_steps or usual
        while self._own_prompts and len(self.prompts) > 1:
            if per_step * steps * len(self.prompts) <= allowed:
                break
            self.prompts = self.prompts[:-1]
        most = min(usual, allowed / per_step / len(self.prompts))
        fewer = max((count for count in self._plans if count <= most), default=min(self._plans))
        self._steps = self._asked_steps or fewer
        if self._steps != usual:
            self.notes.append(f"images are compared at {self._steps} steps, times hold for {usual}")
        pipe = self._pipeline(self._reference)
        for index in range(len(self.prompts)):
            self._say(f"image {index + 1} of {len(self.prompts)} by {label(self._reference)}")
            self._references.append(self._draw(pipe, index, {}))
        try:
            exact = Fidelity(MAX_PSNR, *self._probed(self._reference, {}))
        except BackendError as error:  # by definition it is good enough
            self.notes.append(f"{label(self._reference)}: {first_line(error)}")
            exact = Fidelity(MAX_PSNR)
        self._add(replace(self._trial(self._reference, {}), fidelity=exact))

    def _compare_setups(self) -> None:
        """Compare setups with the reference from the fastest on, until one is faithful."""
        faithful = next(iter(LIMITS.values()))
        for setup in sorted(self._times, key=self._seconds):
            if self._seconds(setup) > self._seconds(self._reference):
                return
            if setup.threads != self._threads[setup.backend]:
                continue
            fidelity = self._fidelity(setup, {})
            if fidelity and allowed(faithful, fidelity):
                return
            if self._out_of_time(setup, {}):
                self.notes.append("time: not all setups were compared with the reference")
                return

    def _fidelity(self, setup: Setup, arguments: Arguments) -> Fidelity | None:
        """Return the fidelity, measured once; None where time is up or it failed."""
        trial = self._trial(setup, arguments)
        if trial.fidelity or trial.seconds is None:
            return trial.fidelity
        share = self._steps / self.bundle.manifest.defaults.num_inference_steps
        if not self.budget.affords(trial.seconds * share * len(self.prompts)):
            self._add(replace(trial, note=_NO_TIME))
            return None
        self._say(f"images by {label(setup, arguments)}")
        try:
            fidelity = self._compare(setup, arguments)
        except (BackendError, InputError) as error:
            self._add(replace(trial, note=first_line(error)))
            return None
        self._add(replace(trial, fidelity=fidelity))
        return fidelity

    def _compare(self, setup: Setup, arguments: Arguments) -> Fidelity:
        pipe, lowest = self._pipeline(setup), MAX_PSNR
        least = min(limits.image_psnr for limits in LIMITS.values())
        for index, expected in enumerate(self._references):
            found = self._draw(pipe, index, arguments)
            lowest = min(lowest, compare_images(found, expected)[1])
            if lowest < least:
                return Fidelity(lowest)  # no preset takes it, whatever the judge says
        return Fidelity(lowest, *self._probed(setup, arguments))

    def _out_of_time(self, setup: Setup, arguments: Arguments) -> bool:
        return self._trial(setup, arguments).note == _NO_TIME

    def _draw(self, pipe: Pipeline, index: int, arguments: Arguments) -> Array:
        call = {**self._call(index), "num_inference_steps": self._steps, **arguments}
        return to_bytes(pipe(**call, output_type="np").images)

    def _probed(
        self, setup: Setup, arguments: Arguments
    ) -> tuple[float | None, int | None, int | None, float | None]:
        """Return what the bundle's own probes say: latents' error, right, images, points lost.

        They have sizes of their own, so the setup is loaded for any; a device that cannot load it
        so is not asked.
        """
        manifest, error = self.bundle.manifest, None
        probes = manifest.probes
        if probes is None:
            return None, None, None, None
        try:
            pipe = self._pipeline(replace(setup, static=False))
        except InputError:
            return None, None, None, None
        per_step = self._seconds(setup) / manifest.defaults.num_inference_steps
        if probes.loop and self.budget.affords(per_step * probes.loop.num_inference_steps):
            error = measure_loop(self.bundle, pipe, **arguments)[0]
        if probes.judged is None or not can_judge(pipe.backend, probes.judged):
            return error, None, None, None
        count = len(probes.judged.prompts)
        if not self.budget.affords(per_step * probes.judged.num_inference_steps * count):
            raise BackendError(_NO_TIME)  # where there is a judge, its word is needed
        right = count_right(pipe, probes.judged, **arguments)
        return error, right, count, points_lost(manifest, right)

    # --- 3. arguments of calls -----------------------------------------------------------

    def _search_arguments(self, name: str, limits: Limits) -> None:
        """Find the fastest arguments on top of a preset's winner that are still within it."""
        self._prefer_any_size(self._winner(limits, plain=True))
        base = self._winner(limits, plain=True)
        candidates = [
            (seconds, setup, arguments)
            for setup, arguments in self._combinations(base.setup, self._calls.signature.names)
            if (seconds := self._predict(setup, arguments)) is not None
        ]
        candidates.sort(key=lambda each: each[0])
        while True:
            best = self._winner(limits).seconds or 0.0
            candidates = [each for each in candidates if each[0] * TIE < best]
            if not candidates:
                return
            seconds, setup, arguments = candidates.pop(len(candidates) // 2)
            self._add(Trial(setup, arguments, seconds), keep=True)
            fidelity = self._fidelity(setup, arguments)
            if self._out_of_time(setup, arguments):
                self.notes.append(f"time: not all arguments for {name!r} were looked at")
                return
            if fidelity and not allowed(limits, fidelity):
                candidates = [
                    candidate for candidate in candidates if not cuts_more(candidate[2], arguments)
                ]

    def _prefer_any_size(self, fixed: Trial) -> None:
        """Look at the images of the same setup for any size, where it is as fast."""
        setup = replace(fixed.setup, static=False)
        self._complete_kinds(setup, window=False, caching=False)
        seconds = self._predict(setup, {})
        if fixed.setup.static and seconds and fixed.seconds and seconds <= fixed.seconds * TIE:
            self._add(Trial(setup, {}, seconds), keep=True)
            self._fidelity(setup, {})

    def _combinations(self, base: Setup, names: Sequence[str]) -> Iterator[tuple[Setup, Arguments]]:
        """Yield each setup with arguments that could be faster, their kinds of step measured."""
        caching = "cache_interval" in names
        call = self._calls.request(self._call(0))
        several = len(live_branches(call, call.facts.loop)) > 1
        windowed = "guidance_stop" in names and several
        windows = [(a, b) for a in STARTS for b in STOPS] if windowed else []
        setups_of = {False: base, True: replace(base, static=False)}
        for fixed in (False, True) if windows else (False,):
            self._complete_kinds(setups_of[fixed], window=fixed, caching=caching)
        for start, stop in windows or [(0.0, 1.0)]:
            for interval in INTERVALS if caching else (1,):
                arguments: Arguments = {}
                arguments |= {"guidance_start": start} if start > 0 else {}
                arguments |= {"guidance_stop": stop} if stop < 1 else {}
                windowed = bool(arguments)
                arguments |= {"cache_interval": interval} if interval > 1 else {}
                if arguments:
                    yield setups_of[windowed], arguments

    def _complete_kinds(self, setup: Setup, window: bool, caching: bool) -> None:
        """Measure the kinds of step that are not known yet; nothing if it fails or takes too
        long."""
        known = self._times.get(setup)
        wanted = {(guided, whole) for guided in (True, not window) for whole in (True, not caching)}
        if known and wanted <= known.steps.keys():
            return
        near = known or self._times[replace(setup, static=True)]
        if not self.budget.affords(12 * max(near.steps.values()) + near.decode):
            self.notes.append("time: not all arguments of calls were looked at")
            return
        self._say(f"timing kinds of step of {label(setup)}")
        try:
            found = measure(self._pipeline(setup), self._call(0), None, window, caching)
        except (BackendError, InputError) as error:
            self._add(Trial(setup, {}, None, note=first_line(error)))
            return
        assert found is not None
        self._times[setup] = found

    def _predict(self, setup: Setup, arguments: Arguments) -> float | None:
        """Return the seconds of an image with the default steps; None where a kind was not
        measured.
        """
        if setup not in self._times:
            return None
        request = self._calls.request({**self._call(0), **arguments})
        interval = int(arguments.get("cache_interval", 1))
        all_run = guided(request, request.facts.loop, self._evaluations)
        return self._times[setup].image(kinds(all_run, interval))

    # --- what all of it needs ------------------------------------------------------------

    def _winner(self, limits: Limits, plain: bool = False) -> Trial:
        """Return the fastest trial within the limits so far; the reference where there is none.

        Of those that are as fast, one for any size is taken, then the one with the better images.
        """
        good = [
            trial
            for trial in self.trials.values()
            if trial.fidelity
            and trial.seconds is not None
            and allowed(limits, trial.fidelity)
            and not (plain and trial.arguments)
        ]
        good = good or [self._trial(self._reference, {})]
        fastest = min(trial.seconds or 0.0 for trial in good)
        tied = [trial for trial in good if (trial.seconds or 0.0) <= fastest * TIE]
        return max(tied, key=preference)

    def _pipeline(self, setup: Setup) -> Pipeline:
        """Return the setup's pipeline, loaded; only one is loaded at a time."""
        if self._opened is None or self._opened[0] != setup:
            self.close()
            build = next(b for b in self.bundle.manifest.builds if b.name == setup.build)
            options = SessionOptions(threads=setup.threads, compute=setup.compute)
            engine = self._engines[setup.backend]
            static: dict[str, float] | None = {} if setup.static else None
            loading = Loading.of(self.bundle, build, engine, setup.device, options, static)
            self._opened = setup, open_pipeline(loading)
        return self._opened[1]

    def _call(self, index: int) -> dict[str, Any]:
        """Return the arguments of one image with the bundle's defaults."""
        text = {"prompt": self.prompts[index]} if self.prompts[index] else {}
        return {**text, **self._calls.signature.needed_rows, "seed": SEED + index}

    def _trial(self, setup: Setup, arguments: Arguments) -> Trial:
        return self.trials[key_of(setup, arguments)]

    def _add(self, trial: Trial, keep: bool = False) -> None:
        key = key_of(trial.setup, trial.arguments)
        if not keep or key not in self.trials:
            self.trials[key] = trial

    def _say(self, what: str) -> None:
        if self._tell:
            self._tell(what, self.budget.spent)

    def _tuning(self) -> Tuning:
        manifest = self.bundle.manifest
        winners = {name: self._winner(limits) for name, limits in LIMITS.items()}
        record = Record(
            bundle=content(manifest),
            place=str(self.bundle.root),
            machine=machine(),
            tuned=datetime.now(UTC).isoformat(timespec="seconds"),
            steps=self._steps,
            presets={name: self._choice(trial) for name, trial in winners.items()},
        )
        done = sorted(self.trials.values(), key=lambda t: (t.seconds is None, t.seconds or 0.0))
        reference = self._trial(self._reference, {})
        texts = tuple(prompt for prompt in self.prompts if prompt)
        notes = tuple(dict.fromkeys(self.notes))
        return Tuning(tuple(done), winners, reference, self._steps, texts, notes, record)

    def _choice(self, trial: Trial) -> Choice:
        setup, fidelity = trial.setup, trial.fidelity
        assert fidelity is not None
        assert trial.seconds is not None
        return Choice(
            build=setup.build,
            backend=setup.backend,
            version=self._engines[setup.backend].version(),
            device=setup.device,
            compute=setup.compute,
            threads=setup.threads,
            static=setup.static,
            arguments=trial.arguments,
            seconds=trial.seconds,
            image_psnr=fidelity.image_psnr,
            points=fidelity.points,
        )


def _prompts(bundle: Bundle) -> tuple[str, ...]:
    """Return the prompts of the bundle's probes; one empty text where it takes none.

    Raises:
        InputError: it takes texts and has no probes with any.
    """
    manifest = bundle.manifest
    if not manifest.tokenizers:
        return ("",)
    prompts: list[str] = []
    if manifest.probes and manifest.probes.loop:
        prompts.append(str(manifest.probes.loop.arguments.get("prompt", "")))
    if manifest.probes and manifest.probes.judged:
        prompts += manifest.probes.judged.prompts[:_PROMPTS]
    texts = tuple(dict.fromkeys(text for text in prompts if text))[:_PROMPTS]
    if not texts:
        raise InputError(f"{bundle.root} holds no probes with a prompt: give some with --prompt")
    return texts
