"""Arguments of a call's task: pictures, where to start from, what of the schedule to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtimes import argument_values as checked
from runtimes import pictures
from runtimes.errors import InputError
from runtimes.manifest import Manifest
from runtimes.session import Array
from runtimes.task_pictures import MASK_OPTIONS, MaskOptions
from runtimes.tasks import Task

_MOST_BLUR = 1 << 16  # pixels, as long as the longest side
ENSEMBLE = ("denoising_start", "denoising_end")


def refuse_pictures(unknown: Sequence[str]) -> None:
    """Say how a bundle comes to take them."""
    redrawn = "--task image-to-image"
    ways = {"image": redrawn, "strength": redrawn, "mask_image": "--task inpainting"}
    ways |= {"control_image": "--controlnet", "ip_adapter_image": "--ip-adapter"}
    way = next((ways[name] for name in reversed(ways) if name in unknown), None)
    if way is not None:
        raise InputError(
            f"this bundle has no use for {' and '.join(unknown)}; export it with {way}, or leave "
            "it out"
        )


def refuse_unused(task: Task, given: Sequence[str]) -> None:
    """Refuse arguments of guidance branches alone that would change nothing, as far as `given`.

    Raises:
        InputError: the task does not take one of them, or not without others.
    """
    if task.branch_arguments is None:
        return
    for name in given:
        if name not in task.branch_arguments:
            raise InputError(f"{name!r} changes nothing in {task.name}: leave it out")
        missing = [other for other in task.branch_arguments[name] if other not in given]
        if missing:
            raise InputError(
                f"{name!r} counts only with {' and '.join(map(repr, missing))}: it would change "
                "nothing; give them too, or leave it out"
            )


def refuse_side(task: Task, given: Mapping[str, Any]) -> None:
    """Refuse one side of a size, where diffusers takes both sides or its default size.

    Raises:
        InputError: one of them is given alone.
    """
    sides = [name for name in ("height", "width") if name in given]
    if task.sides_together and len(sides) == 1:
        raise InputError(
            f"{sides[0]!r} alone: diffusers ignores it then, and makes an image of the default "
            "size; give height and width, or neither"
        )


def sized_by(task: Task, found: Mapping[str, list[Any]]) -> tuple[int, int] | None:
    """Height and width of a call that asks for none; None leaves it to the model."""
    if task.size_of is None:
        return None
    height, width = pictures.size(task.size_of, found[task.size_of])
    return height * task.enlarges, width * task.enlarges


def start_latents(
    manifest: Manifest, task: Task, given: Mapping[str, Any], images: int
) -> tuple[Array | None, Mapping[str, Any]]:
    """Latents in the place of the picture to start from, as diffusers tells them apart, and the
    arguments without them."""
    name = task.start_picture()
    shape = () if name is None else tuple(getattr(given[name], "shape", ()))
    if name is None or len(shape) != 4 or shape[1] != manifest.latents.channels:
        return None, given
    rows, value = shape[0], given[name]
    if images % max(rows, 1):
        raise InputError(f"{rows} latents in {name!r} for {images} pictures to be made")
    others = {n: v for n, v in given.items() if n != name}
    return checked.latents(value, rows, manifest, name), others


def ensemble(task: Task, given: Mapping[str, Any], start: Array | None) -> dict[str, float]:
    """Where in the schedule to begin and to stop, as far as given."""
    found = {name: checked.number(name, given[name]) for name in ENSEMBLE if name in given}
    for name, value in found.items():
        whole = name == ENSEMBLE[1] and value == 1  # the whole schedule, as in diffusers
        if not (0 < value < 1 or whole):
            raise InputError(f"{name!r} must be a fraction between 0 and 1, not {value:g}")
    if "denoising_start" in found and start is None:
        raise InputError(
            "'denoising_start' goes on from another run's latents: give them as 'image', float32 "
            "[pictures, channels, height, width] of a call with output_type='latent'"
        )
    if found.get("denoising_start", 0) >= found.get("denoising_end", 1):
        raise InputError("'denoising_start' must be below 'denoising_end'")
    return found


def strength(task: Task, given: Mapping[str, Any]) -> float:
    """How far to go from the start; 1 where there is none."""
    if task.strength is None:
        if "strength" in given:
            raise InputError(
                "'strength' is how far to go from an 'image', and none to start from was given"
            )
        return 1.0
    value = checked.number("strength", given.get("strength", task.strength))
    if not 0 < value <= 1:
        raise InputError(f"'strength' must be above 0 and at most 1, not {value:g}")
    if task.starts(value) and "latents" in given:
        raise InputError("'latents' and 'image' are both what to start from: give one of them")
    return value


def masking(task: Task, given: Mapping[str, Any]) -> MaskOptions:
    """What to make of the mask."""
    asked = [name for name in MASK_OPTIONS if name in given]
    if asked and not task.masks():
        raise InputError(f"{' and '.join(map(repr, asked))}: no mask was given")
    blur = checked.number("mask_blur", given.get("mask_blur", 0))
    if not 0 <= blur <= _MOST_BLUR:
        raise InputError(f"'mask_blur' must be at least 0 pixels, and at most {_MOST_BLUR}")
    if "padding_mask_crop" not in given:
        return MaskOptions(blur)
    padding = checked.integer("padding_mask_crop", given["padding_mask_crop"])
    if padding < 0:
        raise InputError(f"'padding_mask_crop' must be at least 0 pixels, not {padding}")
    if given.get("output_type", "pil") != "pil":
        raise InputError("'padding_mask_crop' puts pictures into others: output_type must be 'pil'")
    return MaskOptions(blur, padding)
