"""What a call asks for: its arguments, checked against what the bundle takes.

The names that a bundle takes beyond the common ones (second prompts, sizes, scales) stand in
its manifest; this file knows none of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes import pictures
from runtimes.errors import InputError
from runtimes.manifest import Branch, Manifest, Tokenizer
from runtimes.noise import fresh_seed
from runtimes.session import Array

OUTPUT_TYPES = ("pil", "np", "latent")
_COMMON = (
    *("num_inference_steps", "scheduler", "seed", "height", "width"),
    *("num_images_per_prompt", "latents", "output_type"),
)
_WINDOW = ("guidance_start", "guidance_stop")  # of a bundle that has guidance
_CACHING = ("cache_interval",)  # of a bundle that has a shallow part of its denoiser
_PICTURES = ("image", "strength")  # of a bundle that has an image encoder
_MAX_SIDE = 1 << 16  # pixels


@dataclass(frozen=True)
class Signature:
    """The call arguments that one bundle takes beyond the common ones.

    `texts`: names of texts of the call itself; `branch_texts`: those of guidance branches with
    a prefix; `numbers`: how many numbers each takes; `scales`: guidance scales and defaults;
    `caching`: whether steps can be cached; `pictures`: whether a call may start from one.
    """

    texts: tuple[str, ...]
    branch_texts: tuple[str, ...]
    numbers: Mapping[str, int]
    scales: Mapping[str, float]
    caching: bool = False
    pictures: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> Signature:
        prefixes = [branch.prefix for branch in manifest.guidance.branches if branch.prefix]
        # The last text of a tokenizer is what the others fall back to: it comes first here.
        names = [name for each in manifest.tokenizers for name in reversed(each.texts)]
        texts = tuple(dict.fromkeys(names))
        return cls(
            texts=texts,
            branch_texts=tuple(prefix + name for prefix in prefixes for name in texts),
            numbers={
                prefix + argument.name: len(argument.default)
                for argument in manifest.arguments
                for prefix in ("", *prefixes)
            },
            scales=dict(manifest.guidance.defaults),
            caching=manifest.shallow() is not None,
            pictures=manifest.image_encoder() is not None,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a call may use."""
        batch = () if self.texts else ("batch_size",)
        window = _WINDOW if self.scales else ()
        caching = _CACHING if self.caching else ()
        image = _PICTURES if self.pictures else ()
        own = (*self.texts, *self.branch_texts, *self.scales, *window, *caching, *self.numbers)
        return (*own, *image, *batch, *_COMMON)


@dataclass(frozen=True)
class Request:
    """A checked call. Texts hold one entry per prompt; sizes are in pixels.

    `guidance_start`, `guidance_stop`: the part of the steps that is guided, as fractions.
    `cache_interval`: every how many evaluations the whole denoiser runs.

    `seeds` has one entry where one generator serves the whole batch, else one per image.
    `latents` is float32 [images, channels, height, width] (unscaled noise), or None.
    `image` is float32 [n, 3, height, width] in [0, 1], or None; `strength` is how much of the steps
    is run from it.
    """

    texts: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[float, ...]]
    scales: Mapping[str, float]
    prompts: int
    images_per_prompt: int
    num_inference_steps: int
    scheduler: str
    height: int
    width: int
    seeds: tuple[int, ...]
    latents: Array | None
    output_type: str
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cache_interval: int = 1
    image: Array | None = None
    strength: float = 1.0

    @property
    def images(self) -> int:
        """How many pictures are made."""
        return self.prompts * self.images_per_prompt

    def branches(self, manifest: Manifest) -> tuple[tuple[Branch, float], ...]:
        """The guidance branches to run, in batch order, and their weights."""
        guidance = manifest.guidance
        if guidance.scale is not None and self.scales[guidance.scale] > 1:
            return tuple(
                (b, b.constant + sum(f * self.scales[n] for n, f in b.scales.items()))
                for b in guidance.branches
            )
        return tuple((b, 1.0) for b in guidance.branches if b.name == guidance.single)

    def first_step(self) -> int:
        """The step to start with, as diffusers' image-to-image pipelines choose it.

        Raises:
            InputError: the strength leaves no step.
        """
        steps = self.num_inference_steps
        if self.image is None:
            return 0
        kept = min(int(steps * self.strength), steps)
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
        """The texts for a tokenizer: the first of its arguments that holds any, one per prompt.

        None where none of them is given.
        """
        given = [self.texts[prefix + n] for n in tokenizer.texts if prefix + n in self.texts]
        return next((texts for texts in given if any(texts)), given[0] if given else None)

    def settings(self) -> dict[str, Any]:
        """What made the pictures, as JSON-compatible values with the call's argument names."""
        texts = {name: each[0] if len(each) == 1 else [*each] for name, each in self.texts.items()}
        return {
            **texts,
            **self.scales,
            **self._shortcuts(),
            **({} if self.image is None else {"strength": self.strength}),
            **{n: v[0] if len(v) == 1 else [*v] for n, v in self.numbers.items()},
            "num_inference_steps": self.num_inference_steps,
            "scheduler": self.scheduler,
            "height": self.height,
            "width": self.width,
            "num_images_per_prompt": self.images_per_prompt,
            "seed": self.seeds[0] if len(self.seeds) == 1 else [*self.seeds],
        }

    def _shortcuts(self) -> dict[str, float]:
        """What of it was asked for."""
        found = {"guidance_start": self.guidance_start, "guidance_stop": self.guidance_stop}
        made: dict[str, float] = {} if tuple(found.values()) == (0.0, 1.0) else found
        if self.cache_interval > 1:
            made["cache_interval"] = self.cache_interval
        return made


def parse(manifest: Manifest, signature: Signature, arguments: Mapping[str, Any]) -> Request:
    """Check a call's arguments; those that are None count as not given.

    Raises:
        InputError: an unknown name (lists the known ones) or a value that cannot be used.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    unknown = [name for name in given if name not in signature.names]
    if unknown == [*_CACHING]:
        raise InputError(
            "this bundle has no shallow part of its denoiser to cache steps with; export it with "
            "--pass step-cache, or leave cache_interval out"
        )
    if set(unknown) & set(_PICTURES) and not signature.pictures:
        raise InputError(
            "this bundle has no image encoder to start from a picture; export it with --task "
            f"image-to-image, or leave {' and '.join(unknown)} out"
        )
    if unknown:
        raise InputError(
            f"unknown argument {', '.join(map(repr, unknown))}; "
            f"this bundle takes: {', '.join(signature.names)}"
        )
    texts, prompts = _texts(signature, given)
    images_per_prompt = _count(given, "num_images_per_prompt", 1)
    images = prompts * images_per_prompt
    latents = _latents(given.get("latents"), images, manifest)
    start = _pictures(given, images)
    height, width = _size(manifest, given, latents, start)
    output_type = given.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {OUTPUT_TYPES}, not {output_type!r}")
    return Request(
        texts=texts,
        numbers={n: _numbers(n, given[n], c) for n, c in signature.numbers.items() if n in given},
        scales={n: _number(n, given.get(n, default)) for n, default in signature.scales.items()},
        prompts=prompts,
        images_per_prompt=images_per_prompt,
        num_inference_steps=_count(
            given, "num_inference_steps", manifest.defaults.num_inference_steps
        ),
        scheduler=_scheduler(manifest, given.get("scheduler")),
        height=height,
        width=width,
        seeds=_seeds(given.get("seed"), images),
        latents=latents,
        output_type=output_type,
        **_guidance_window(given),
        cache_interval=_count(given, "cache_interval", 1),
        image=pictures.arrays("image", start, height, width) if start else None,
        strength=_strength(given, manifest.defaults.strength),
    )


def _pictures(given: Mapping[str, Any], images: int) -> list[Any]:
    """The pictures to start from; none is an ordinary call."""
    if "image" not in given:
        if "strength" in given:
            raise InputError("'strength' is how far to go from an 'image', and none was given")
        return []
    if "latents" in given:
        raise InputError("'latents' and 'image' are both what to start from: give one of them")
    found = pictures.listed("image", given["image"])
    if images % len(found):
        raise InputError(f"{len(found)} pictures in 'image' for {images} pictures to be made")
    return found


def _strength(given: Mapping[str, Any], default: float) -> float:
    value = _number("strength", given.get("strength", default))
    if not 0 < value <= 1:
        raise InputError(f"'strength' must be above 0 and at most 1, not {value:g}")
    return value


def _guidance_window(given: Mapping[str, Any]) -> dict[str, float]:
    found = {name: _number(name, given[name]) for name in _WINDOW if name in given}
    start, stop = (found.get(name, default) for name, default in zip(_WINDOW, (0, 1), strict=True))
    if not 0 <= start < stop <= 1:
        raise InputError(
            f"'guidance_start' {start:g} and 'guidance_stop' {stop:g}: expected fractions of the "
            "steps, 0 <= guidance_start < guidance_stop <= 1"
        )
    return found


def _texts(
    signature: Signature, given: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, ...]], int]:
    """The given texts, one entry per prompt, and how many prompts there are."""
    if not signature.texts:
        return {}, _count(given, "batch_size", 1)
    own = {name: _strings(name, given[name]) for name in signature.texts if name in given}
    if not own:
        raise InputError(f"no text given: this bundle needs {signature.texts[0]!r}")
    prompts = max(len(values) for values in own.values())
    names = [name for name in signature.branch_texts if name in given]
    texts = own | {name: _strings(name, given[name]) for name in names}
    for name, values in texts.items():
        if len(values) != prompts and not isinstance(given[name], str):
            raise InputError(f"{name!r} has {len(values)} texts for {prompts} prompts")
    return {n: values * (prompts // len(values)) for n, values in texts.items()}, prompts


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(each, str) for each in values):
        raise InputError(f"{name!r} must be a text or a list of texts, not {value!r:.80}")
    if not values:
        raise InputError(f"{name!r} is an empty list")
    return tuple(values)


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name!r} must be an integer, not {value!r:.80}") from None


def _count(given: Mapping[str, Any], name: str, default: int) -> int:
    value = _integer(name, given.get(name, default))
    if value < 1:
        raise InputError(f"{name!r} must be at least 1, not {value}")
    return value


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name!r} must be a number, not {value!r:.80}") from None
    if not math.isfinite(number):
        raise InputError(f"{name!r} must be finite, not {number}")
    return number


def _numbers(name: str, value: Any, count: int) -> tuple[float, ...]:
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    numbers = tuple(_number(name, each) for each in values)
    if len(numbers) != count:
        raise InputError(f"{name!r} takes {count} numbers, not {len(numbers)}")
    return numbers


def _seeds(seed: Any, images: int) -> tuple[int, ...]:
    if seed is None:
        return (fresh_seed(),)
    if not isinstance(seed, Sequence) or isinstance(seed, str | bytes):
        return (_integer("seed", seed),)
    if len(seed) != images:
        raise InputError(
            f"{len(seed)} seeds for {images} images: give one seed, or one for each image"
        )
    return tuple(_integer("seed", each) for each in seed)


def _scheduler(manifest: Manifest, asked: Any) -> str:
    names = [schedule.name for schedule in manifest.schedules]
    if asked is None:
        return manifest.defaults.scheduler
    if asked in names:
        return str(asked)
    by_class = [schedule.name for schedule in manifest.schedules if schedule.class_name == asked]
    if len(by_class) == 1:
        return by_class[0]
    raise InputError(
        f"no scheduler {asked!r} in this bundle; it has: {', '.join(by_class or names)}"
    )


def _latents(latents: Any, images: int, manifest: Manifest) -> Array | None:
    if latents is None:
        return None
    try:
        array = np.ascontiguousarray(latents, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"'latents' must be an array of numbers: {error}") from None
    channels = manifest.latents.channels
    if array.ndim != 4 or array.shape[:2] != (images, channels) or 0 in array.shape:
        raise InputError(
            f"'latents' must have the shape [{images}, {channels}, height, width], "
            f"not {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise InputError("'latents' holds NaN or infinity")
    return array


def _size(
    manifest: Manifest,
    given: Mapping[str, Any],
    latents: Array | None,
    start: Sequence[Any] = (),
) -> tuple[int, int]:
    """Height and width in pixels: as given, else that of `latents` or of the pictures to start
    from, made smaller to what the model can make, else the default."""
    spec, factor = manifest.latents, manifest.latents.factor
    defaults: tuple[int, ...] = (spec.default_height, spec.default_width)
    if start:
        unit = factor * spec.multiple
        whole = pictures.size("image", start)
        defaults = tuple(max(side // unit, 1) * unit for side in whole)
    from_latents = None if latents is None else [side * factor for side in latents.shape[2:]]
    fixed = manifest.component("denoiser").inputs["sample"].shape[2:]
    sizes = []
    for index, name in enumerate(("height", "width")):
        side = _integer(name, given.get(name, (from_latents or defaults)[index]))
        only = fixed[index]
        if isinstance(only, int) and side != only * factor:
            raise InputError(f"{name} {side}: this bundle was exported for {only * factor} only")
        _check_side(name, side, factor * spec.multiple, factor * (spec.maximum or _MAX_SIDE))
        if from_latents and side != from_latents[index]:
            raise InputError(
                f"{name} {side} does not fit 'latents', which are for {from_latents[index]}"
            )
        sizes.append(side)
    return sizes[0], sizes[1]


def _check_side(name: str, side: int, multiple: int, largest: int) -> None:
    largest = min(largest, _MAX_SIDE)
    if 0 < side <= largest and side % multiple == 0:
        return
    if side > largest:
        raise InputError(f"{name} {side}: this model makes pictures of up to {largest} pixels")
    lower = max(side, 0) // multiple * multiple
    nearest = [str(each) for each in (lower, lower + multiple) if 0 < each <= largest]
    raise InputError(
        f"{name} {side} is not a multiple of {multiple}; nearest: {' or '.join(nearest)}"
    )
