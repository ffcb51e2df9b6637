"""What a call asks for: its arguments, checked against what the bundle takes.

The names that a bundle takes beyond the common ones (second prompts, sizes, scales) stand in
its manifest; this file knows none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtimes import argument_values as checked
from runtimes import embeddings, task_arguments, task_pictures, tasks
from runtimes.call_sizes import CallSize, of_call
from runtimes.errors import InputError
from runtimes.manifest import Branch, Manifest, Tokenizer
from runtimes.plan import PlanTable, SamplingPlan
from runtimes.sampler import Rescale
from runtimes.session import Array
from runtimes.sizes import BINNING
from runtimes.task_pictures import MASK_OPTIONS, MaskOptions, Pictures
from runtimes.tasks import STEPS, Task

OUTPUT_TYPES = ("pil", "np", "latent")
_COMMON = (
    *("num_inference_steps", "scheduler", "seed", "height", "width"),
    *("num_images_per_prompt", "latents", "output_type", "denoising_end"),
)
_WINDOW = ("guidance_start", "guidance_stop")  # of a bundle that has guidance
_CACHING = ("cache_interval",)  # of a bundle that has a shallow part of its denoiser
_STRENGTH = ("strength",)  # of a bundle with tasks that start from a picture
READING = ("prompt_weighting", "max_embeddings_multiples")  # of a bundle that takes texts
_MOST_STEPS = 10_000  # plans have fewer, and what is counted beforehand stays short


@dataclass(frozen=True)
class Signature:
    """The call arguments that one bundle takes beyond the common ones.

    `texts`: names of texts of the call itself; `branch_texts`: those of guidance branches with
    a prefix; `numbers`: how many numbers each takes; `scales`: guidance scales and defaults;
    `main_texts`: those that other texts fall back to, with each prefix, and which say whether a
    branch has texts; `caching`: whether steps can be cached; `pictures`: names of pictures,
    `strength` whether a call may start from one, `masks` whether any is a mask; `prefixes` of the
    branches; `embeddings`: names of encoded texts, those of guidance branches included; `binning`:
    whether images can be made in another size than they get.
    """

    texts: tuple[str, ...]
    branch_texts: tuple[str, ...]
    numbers: Mapping[str, int]
    scales: Mapping[str, float]
    main_texts: tuple[str, ...] = ()
    caching: bool = False
    pictures: tuple[str, ...] = ()
    strength: bool = False
    masks: bool = False
    prefixes: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    binning: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> Signature:
        branches = manifest.guidance.branches
        prefixes = list(dict.fromkeys(branch.prefix for branch in branches if branch.prefix))
        # The last text of a tokenizer is what the others fall back to: it comes first here.
        names = [name for each in manifest.tokenizers for name in reversed(each.texts)]
        texts = tuple(dict.fromkeys(names))
        main = dict.fromkeys(each.texts[-1] for each in manifest.tokenizers)
        return cls(
            texts=texts,
            branch_texts=tuple(prefix + name for prefix in prefixes for name in texts),
            numbers=_numbers_of(manifest, prefixes),
            scales=dict(manifest.guidance.defaults),
            main_texts=tuple(prefix + name for prefix in ("", *prefixes) for name in main),
            caching=manifest.shallow() is not None,
            pictures=tasks.pictures(manifest.tasks),
            strength=any(task.strength is not None for task in manifest.tasks),
            masks=any(task.masks() for task in manifest.tasks),
            prefixes=tuple(prefixes),
            embeddings=embeddings.names(manifest),
            binning=manifest.latents.bins is not None,
        )

    @property
    def branch_numbers(self) -> list[str]:
        """The numbers of guidance branches alone."""
        every = [(prefix, name) for prefix in self.prefixes for name in self.numbers]
        return [prefix + name for prefix, name in every if prefix + name in self.numbers]

    def prefixed(self, argument: str) -> list[str]:
        """The names of an argument: of the call, and of guidance branches."""
        return [prefix + argument for prefix in ("", *self.prefixes)]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a call may use."""
        batch = (*READING, *self.embeddings) if self.texts else ("batch_size",)
        window = _WINDOW if self.scales else ()
        caching = _CACHING if self.caching else ()
        strength = (*_STRENGTH, task_arguments.ENSEMBLE[0]) if self.strength else ()
        masks = MASK_OPTIONS if self.masks else ()
        binning = (BINNING,) if self.binning else ()
        own = (*self.texts, *self.branch_texts, *self.scales, *window, *caching, *self.numbers)
        return (*own, *self.pictures, *strength, *masks, *binning, *batch, *_COMMON)


@dataclass(frozen=True)
class Request:
    """A checked call. Texts hold one entry per prompt; `height` and `width` are those that the
    image is made in, in pixels (see `runtimes.call_sizes`).

    `guidance_start`, `guidance_stop`: the part of the steps that is guided, as fractions.
    `cache_interval`: every how many evaluations the whole denoiser runs.

    `seeds` has one entry where one generator serves the whole batch, else one per image.
    `latents` is float32 [images, channels, height, width] (unscaled noise), or None.
    `task` is what the call's pictures make it, `strength` how much of the steps is run where it
    starts from one; `masking` is what becomes of masks. `start_latents`: float32 [n, channels,
    height, width], clean ones that were given in the place of a picture; with `denoising_start`
    they are as noisy as that fraction of the schedule leaves them. `denoising_end`: a fraction of
    the schedule to stop at.

    `main_texts`: see `Signature`.
    `embeddings`: encoded texts by argument, a row per prompt, in the place of texts.
    `prompt_weighting`: whether the texts have marks for weights, `max_embeddings_multiples`: how
    many chunks of a text are read at most (`runtimes.prompts`).
    """

    texts: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[float, ...]]
    scales: Mapping[str, float]
    prompts: int
    images_per_prompt: int
    num_inference_steps: int
    scheduler: str
    size: CallSize
    seeds: tuple[int, ...]
    latents: Array | None
    output_type: str
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cache_interval: int = 1
    task: Task = field(default_factory=lambda: Task(""))
    pictures: Pictures = field(default_factory=Pictures)
    strength: float = 1.0
    masking: MaskOptions = field(default_factory=MaskOptions)
    start_latents: Array | None = None
    denoising_start: float = 0.0
    denoising_end: float = 1.0
    main_texts: tuple[str, ...] = ()
    embeddings: Mapping[str, Array] = field(default_factory=dict)
    prompt_weighting: bool = False
    max_embeddings_multiples: int = 1

    @property
    def height(self) -> int:
        """The height in pixels that the image is made in."""
        return self.size.height

    @property
    def width(self) -> int:
        """The width in pixels that the image is made in."""
        return self.size.width

    @property
    def images(self) -> int:
        """How many pictures are made."""
        return self.prompts * self.images_per_prompt

    def sizes(self) -> set[tuple[int, int]]:
        """Width and height of the images that are made: where they are put into others, theirs."""
        overlay = self.pictures.overlay
        if overlay is not None:
            return {image.size for image in overlay.pictures}
        height, width = self.size.image
        return {(width, height)}

    def branches(self, manifest: Manifest) -> tuple[tuple[Branch, float], ...]:
        """The guidance branches to run, in batch order, and their weights."""
        guidance = manifest.guidance
        if guidance.is_on(self.scales) and all(map(self.has_what_it_needs, guidance.branches)):
            return tuple(
                (b, b.constant + sum(f * self.scales[n] for n, f in b.scales.items()))
                for b in guidance.branches
            )
        return tuple((b, 1.0) for b in guidance.branches if b.name == guidance.single)

    def has_what_it_needs(self, branch: Branch) -> bool:
        """Whether a branch has texts, encoded or not, where guidance is off without them."""
        if branch.missing != "off":
            return True
        encoded = any(name.startswith(branch.prefix) for name in self.embeddings)
        return encoded or self.has_text(branch)

    def has_text(self, branch: Branch) -> bool:
        """Whether a branch was given a text that its other texts fall back to."""
        return any(name in self.texts for name in self.main_texts if name.startswith(branch.prefix))

    def plan(
        self, table: PlanTable, num_train_timesteps: int, shift: float | None = None
    ) -> SamplingPlan:
        """What of a schedule is run, counted as diffusers' ensembles count it.

        Raises:
            PlanNotFound: no plan for the step count.
            InputError: nothing would be run.
        """
        if self.denoising_start > 0:
            cutoff = round(num_train_timesteps * (1 - self.denoising_start))
            plan = table.plan_from_timestep(self.num_inference_steps, cutoff, shift)
        else:
            plan = table.plan_from_step(self.num_inference_steps, self.first_step(), shift)
        if self.denoising_end == 1:
            return plan
        cutoff = round(num_train_timesteps * (1 - self.denoising_end))
        kept = int(np.count_nonzero(plan.timesteps >= cutoff))
        if kept < 1:
            raise InputError(f"denoising_end {self.denoising_end:g} leaves no step")
        return plan.until(kept)

    def rescale(self, manifest: Manifest) -> Rescale | None:
        """What is done to the guided prediction, None for nothing."""
        guidance, branches = manifest.guidance, self.branches(manifest)
        amount = 0.0 if guidance.rescale is None else self.scales[guidance.rescale]
        if amount == 0.0 or len(branches) < 2:
            return None
        return Rescale(amount, [branch.name for branch, _ in branches].index(guidance.single))

    def first_step(self) -> int:
        """The step to start with, as diffusers' image-to-image pipelines choose it.

        Raises:
            InputError: the strength leaves no step.
        """
        steps = self.num_inference_steps
        if self.task.strength is None:
            return 0
        kept = self.task.kept(steps, self.strength)
        if kept < 1:
            raise InputError(
                f"strength {self.strength:g} of {steps} steps leaves none: give more steps, or a "
                f"strength of at least {1 / steps:g}"
            )
        return steps - kept

    def guided(self, evaluations: int) -> list[bool]:
        """Whether each evaluation of the denoiser is guided. The fractions count as those of
        diffusers' guiders do (`ClassifierFreeGuidance`, `start` and `stop`)."""
        first, end = (int(each * evaluations) for each in (self.guidance_start, self.guidance_stop))
        return [first <= index < end for index in range(evaluations)]

    def text(self, tokenizer: Tokenizer, prefix: str) -> tuple[str, ...] | None:
        """The texts for a tokenizer: the first of its arguments that is given, one per prompt.

        None where none of them is given.
        """
        given = (self.texts[prefix + n] for n in tokenizer.texts if prefix + n in self.texts)
        return next(given, None)

    def settings(self) -> dict[str, Any]:
        """What made the pictures, as JSON-compatible values with the call's argument names."""
        return {
            **{name: self._setting(name, each) for name, each in self.texts.items()},
            **self.scales,
            **self._shortcuts(),
            **({} if self.task.strength is None else {"strength": self.strength}),
            **self._masking(),
            **{n: v[0] if len(v) == 1 else [*v] for n, v in self.numbers.items()},
            "num_inference_steps": self.num_inference_steps,
            "scheduler": self.scheduler,
            **self.size.settings(),
            "num_images_per_prompt": self.images_per_prompt,
            "seed": self.seeds[0] if len(self.seeds) == 1 else [*self.seeds],
        }

    def _setting(self, name: str, texts: tuple[str, ...]) -> str | list[str]:
        """One text alone, unless it is an empty one that counts as given in a list only."""
        alone = len(texts) == 1 and (texts[0] or name in self.main_texts)
        return texts[0] if alone else [*texts]

    def _masking(self) -> dict[str, float]:
        """What of it was asked for."""
        made: dict[str, float] = {"mask_blur": self.masking.blur} if self.masking.blur else {}
        if self.masking.padding is not None:
            made["padding_mask_crop"] = self.masking.padding
        return made

    def _shortcuts(self) -> dict[str, float]:
        """What of it was asked for."""
        reading = {
            "prompt_weighting": (self.prompt_weighting, False),
            "max_embeddings_multiples": (self.max_embeddings_multiples, 1),
        }
        asked = {name: value for name, (value, usual) in reading.items() if value != usual}
        found = {"guidance_start": self.guidance_start, "guidance_stop": self.guidance_stop}
        made: dict[str, float] = {} if tuple(found.values()) == (0.0, 1.0) else found
        if self.denoising_start > 0:
            made["denoising_start"] = self.denoising_start
        if self.denoising_end < 1:
            made["denoising_end"] = self.denoising_end
        if self.cache_interval > 1:
            made["cache_interval"] = self.cache_interval
        return asked | made


def parse(manifest: Manifest, signature: Signature, arguments: Mapping[str, Any]) -> Request:
    """Check a call's arguments; those that are None count as not given.

    Raises:
        InputError: an unknown name (lists the known ones) or a value that cannot be used.
    """
    given: Mapping[str, Any] = {n: value for n, value in arguments.items() if value is not None}
    unknown = [name for name in given if name not in signature.names]
    if unknown == [*_CACHING]:
        raise InputError(
            "this bundle has no shallow part of its denoiser to cache steps with; export it with "
            "--pass step-cache, or leave cache_interval out"
        )
    task_arguments.refuse_pictures(unknown)
    if unknown:
        raise InputError(
            f"unknown argument {', '.join(map(repr, unknown))}; "
            f"this bundle takes: {', '.join(signature.names)}"
        )
    encoded, rows = embeddings.parse(manifest, given, signature.texts)
    texts, prompts = _texts(manifest, signature, given, rows)
    images_per_prompt = checked.count(given, "num_images_per_prompt", 1, checked.MOST_IMAGES)
    images = prompts * images_per_prompt
    if images > checked.MOST_IMAGES:
        raise InputError(f"{images} pictures in one call: at most {checked.MOST_IMAGES}")
    latents = checked.latents(given.get("latents"), images, manifest)
    task = tasks.choose(manifest.tasks, given)
    strength = task_arguments.strength(task, given)
    masking = task_arguments.masking(task, given)
    task_arguments.refuse_unused(task, [n for n in signature.branch_numbers if n in given])
    task_arguments.refuse_side(task, given)
    start, given = task_arguments.start_latents(manifest, task, given, images)
    found = task_pictures.listed(task, given, images, start is not None)
    whole = task_arguments.sized_by(task, found) if start is None else None
    size = of_call(manifest, given, latents, start, whole)
    ensemble = task_arguments.ensemble(task, given, start)
    output_type = given.get("output_type", "pil")
    check_output_type(output_type)
    return Request(
        texts=texts,
        numbers=_all_numbers(manifest, signature, given),
        scales=_scales(manifest, signature, task, given),
        prompts=prompts,
        images_per_prompt=images_per_prompt,
        num_inference_steps=checked.count(
            given, "num_inference_steps", _steps_of(manifest, task), _MOST_STEPS
        ),
        scheduler=scheduler_name(manifest, given.get("scheduler")),
        size=size,
        seeds=checked.seeds(given.get("seed"), images),
        latents=latents,
        output_type=output_type,
        **_guidance_window(given),
        cache_interval=checked.count(given, "cache_interval", 1),
        task=task,
        pictures=task_pictures.prepare(manifest, task, found, size, masking),
        strength=strength,
        masking=masking,
        start_latents=start,
        **ensemble,
        main_texts=signature.main_texts,
        embeddings=embeddings.spread(encoded, prompts),
        prompt_weighting=checked.boolean(given, "prompt_weighting"),
        max_embeddings_multiples=checked.count(given, "max_embeddings_multiples", 1),
    )


def check_output_type(asked: Any) -> None:
    """Raise InputError for what is none of `OUTPUT_TYPES`."""
    if not isinstance(asked, str) or asked not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {OUTPUT_TYPES}, not {checked.shown(asked)}")


def usual_steps(manifest: Manifest, arguments: Mapping[str, Any]) -> int:
    """Return the step count of a call that asks for none.

    Raises:
        InputError: the call fits no task.
    """
    given = {name for name, value in arguments.items() if value is not None}
    return _steps_of(manifest, tasks.choose(manifest.tasks, given))


def _steps_of(manifest: Manifest, task: Task) -> int:
    return int(task.defaults.get(STEPS, (manifest.defaults.num_inference_steps,))[0])


def _numbers_of(manifest: Manifest, prefixes: Sequence[str]) -> dict[str, int]:
    """How many numbers each argument takes, those of guidance branches alone included."""
    used = {name for vector in manifest.vectors for name in vector.arguments}
    by_task = [task.branch_arguments for task in manifest.tasks]
    taken = {name for each in by_task if each is not None for name in each}
    found = {each.name: len(each.default) for each in manifest.arguments}
    for argument in manifest.arguments:
        for prefix in prefixes if argument.name in used else ():
            name = prefix + argument.name
            if name in taken or (None in by_task and not argument.name.startswith(prefix)):
                found.setdefault(name, len(argument.default))
            elif None not in by_task:
                found.pop(name, None)  # it has a default of its own, and no task looks at it
    return found


def _scales(
    manifest: Manifest, signature: Signature, task: Task, given: Mapping[str, Any]
) -> dict[str, float]:
    usual = {n: task.defaults.get(n, (default,))[0] for n, default in signature.scales.items()}
    found = {n: checked.number(n, given.get(n, default)) for n, default in usual.items()}
    name = manifest.guidance.rescale
    if name is not None and not 0 <= found[name] <= 1:
        raise InputError(f"{name!r} must be from 0 (off) to 1, not {found[name]:g}")
    return found


def _guidance_window(given: Mapping[str, Any]) -> dict[str, float]:
    found = {name: checked.number(name, given[name]) for name in _WINDOW if name in given}
    start, stop = (found.get(name, default) for name, default in zip(_WINDOW, (0, 1), strict=True))
    if not 0 <= start < stop <= 1:
        raise InputError(
            f"'guidance_start' {start:g} and 'guidance_stop' {stop:g}: expected fractions of the "
            "steps, 0 <= guidance_start < guidance_stop <= 1"
        )
    return found


def _refuse_texts(manifest: Manifest, signature: Signature, given: Mapping[str, Any]) -> None:
    """Refuse texts of a branch that has none, or is off, for want of the text that counts."""
    for branch in manifest.guidance.branches:
        own = [name for name in signature.branch_texts if name.startswith(branch.prefix)]
        main = [name for name in own if name in signature.main_texts]
        others = [name for name in own if given.get(name) and name not in main]
        if branch.missing != "empty" and others and not any(name in given for name in main):
            raise InputError(
                f"{others[0]!r} changes nothing without {main[0]!r}, which alone says in diffusers "
                f"whether there is such a text: give {main[0]!r} too, which may be empty"
            )


def _texts(
    manifest: Manifest,
    signature: Signature,
    given: Mapping[str, Any],
    encoded: int,
) -> tuple[dict[str, tuple[str, ...]], int]:
    """The given texts, one entry per prompt, and how many prompts there are; `encoded` of them
    were given as encoded texts."""
    if not signature.texts:
        return {}, checked.count(given, "batch_size", 1, checked.MOST_IMAGES)
    own = {name: checked.strings(name, given[name]) for name in signature.texts if name in given}
    if not encoded and not any(name in own for name in signature.main_texts):
        raise InputError(f"no text given: this bundle needs {signature.texts[0]!r}")
    names = [name for name in signature.branch_texts if name in given]
    texts = own | {name: checked.strings(name, given[name]) for name in names}
    _refuse_texts(manifest, signature, given)
    prompts = max((len(values) for values in own.values()), default=encoded)
    texts = {n: values for n, values in texts.items() if given[n] or n in signature.main_texts}
    for name, values in texts.items():
        if len(values) != prompts and not isinstance(given[name], str):
            raise InputError(f"{name!r} has {len(values)} texts for {prompts} prompts")
    return {n: values * (prompts // len(values)) for n, values in texts.items()}, prompts


def _all_numbers(
    manifest: Manifest, signature: Signature, given: Mapping[str, Any]
) -> dict[str, tuple[float, ...]]:
    found = {}
    for argument in manifest.arguments:
        low, high = argument.limits or (-math.inf, math.inf)
        for name in signature.prefixed(argument.name):
            if name not in given:
                continue
            values = checked.numbers(name, given[name], len(argument.default), argument.spread)
            if not all(low <= each <= high for each in values):
                raise InputError(f"{name!r} must be from {low:g} to {high:g}")
            found[name] = values
    return found


def scheduler_name(manifest: Manifest, asked: Any) -> str:
    """Return the name of the scheduler that is asked for by its name or its diffusers class; the
    default one for None.

    Raises:
        InputError: the bundle has none of that name, or it is no name.
    """
    names = [schedule.name for schedule in manifest.schedules]
    if asked is None:
        return manifest.defaults.scheduler
    if not isinstance(asked, str):
        raise InputError(_not_a_name(manifest, asked))
    if asked in names:
        return str(asked)
    by_class = [schedule.name for schedule in manifest.schedules if schedule.class_name == asked]
    if len(by_class) == 1:
        return by_class[0]
    raise InputError(
        f"no scheduler {asked!r} in this bundle; it has: {', '.join(by_class or names)}"
    )


def _not_a_name(manifest: Manifest, asked: Any) -> str:
    """Return what to say to somebody who gives something else than a scheduler's name."""
    class_name = type(asked).__name__
    if not hasattr(asked, "config"):
        return f"'scheduler' must be a name, not {checked.shown(asked)}"
    fitting = [each.name for each in manifest.schedules if each.class_name == class_name]
    instead = fitting or [each.name for each in manifest.schedules]
    return (
        f"'scheduler' must be a name, not an object of the class {class_name}: a bundle holds "
        f"tables of what its schedulers do; take {' or '.join(map(repr, instead))}"
    )
