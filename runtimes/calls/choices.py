"""Options of a call that no program declares: the scheduler, the kind of images, how texts are
read and how masks are used."""

from __future__ import annotations

from typing import Any

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.calls import values as checked
from latentc.runtimes.calls.call_arguments import OUTPUT_TYPES
from latentc.runtimes.errors import InputError
from latentc.runtimes.unknown_names import suggestion

# Options that no program declares: how texts are read, and what becomes of masks.
READING = ("prompt_weighting", "max_embeddings_multiples")
MASK_OPTIONS = ("mask_blur", "padding_mask_crop")


def check_output_type(asked: Any) -> None:
    """Raise InputError for what is none of `OUTPUT_TYPES`."""
    if not isinstance(asked, str) or asked not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {OUTPUT_TYPES}, not {checked.shown(asked)}")


def scheduler_name(manifest: Manifest, asked: Any) -> str:
    """Return the name of the scheduler that is asked for by its name or its diffusers class; the
    default one for None.

    Raises:
        InputError: the bundle has none of that name, or it is no name.
    """
    names = [schedule.name for schedule in manifest.offered]
    if asked is None:
        return manifest.defaults.scheduler
    if not isinstance(asked, str):
        raise InputError(_not_a_name(manifest, asked))
    if asked in names:
        return str(asked)
    by_class = [schedule.name for schedule in manifest.offered if schedule.class_name == asked]
    if len(by_class) == 1:
        return by_class[0]
    hint = suggestion(asked, by_class or names, "it has")
    raise InputError(f"no scheduler {asked!r} in this bundle; {hint}")


def _not_a_name(manifest: Manifest, asked: Any) -> str:
    """Return what to say to somebody who gives something else than a scheduler's name."""
    class_name = type(asked).__name__
    if not hasattr(asked, "config"):
        return f"'scheduler' must be a name, not {checked.shown(asked)}"
    fitting = [each.name for each in manifest.offered if each.class_name == class_name]
    instead = fitting or [each.name for each in manifest.offered]
    return (
        f"'scheduler' must be a name, not an object of the class {class_name}: a bundle holds "
        f"tables of what its schedulers do; take {' or '.join(map(repr, instead))}"
    )
