"""Options of commands that call a bundle: what a call takes, and how the bundle is loaded.

Only click is imported here; what reads an option's value imports what it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from latentc.runtimes.errors import InputError

if TYPE_CHECKING:
    from latentc.runtimes.backends.session import Array
    from latentc.runtimes.calls.signature import Signature
    from latentc.runtimes.pipeline.loading import Loading
    from latentc.runtimes.presets.preset import Asked

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Read = TypeVar("_Read")
_Option = Callable[[Callable[..., Any]], Callable[..., Any]]

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
ARGUMENTS: tuple[_Option, ...] = (
    click.option(
        "-n",
        "--num-images",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Images, or videos, per prompt.",
    ),
    click.option("--steps", type=int, metavar="N", help="Inference steps."),
    click.option("--scheduler", metavar="NAME", help="One of the bundle's (see: latentc inspect)."),
    click.option(
        "--guidance-scale", type=float, metavar="X", help="At 1 or below, guidance is off."
    ),
    click.option(
        "--image",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        help="An image to start from (bundles exported with --task image-to-image), or for a "
        "T2I-Adapter (--t2i-adapter), one for each.",
    ),
    click.option(
        "--mask",
        "mask_image",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="What of it is made anew, white, and what stays, black (--task inpainting).",
    ),
    click.option("--mask-blur", type=float, metavar="PIXELS", help="Soften the mask's edges."),
    click.option(
        "--padding-mask-crop",
        type=int,
        metavar="PIXELS",
        help="Look at no more than so much around the mask, and put the result back.",
    ),
    click.option(
        "--control-image",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        help="For a ControlNet (bundles exported with --controlnet); one for each, in their order.",
    ),
    click.option(
        "--ip-adapter-image",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        help="For an IP-Adapter (bundles exported with --ip-adapter); one for each, in their "
        "order.",
    ),
    click.option(
        "--strength",
        type=float,
        metavar="X",
        help="How far to go from it: the share of the steps that is run.",
    ),
    click.option(
        "--denoising-end",
        type=float,
        metavar="X",
        help="Stop at this fraction of the schedule; the refiner goes on from there.",
    ),
    click.option(
        "--guidance-rescale",
        type=float,
        metavar="X",
        help="0 to 1: give predictions the contrast back that they have without guidance.",
    ),
    click.option("--guidance-start", type=float, metavar="X", help="Fraction of steps before it."),
    click.option(
        "--guidance-stop", type=float, metavar="X", help="And where it ends: less is faster."
    ),
    click.option(
        "--cache-interval",
        type=int,
        metavar="N",
        help="Run the whole denoiser in one of N steps only (needs: export --pass step-cache).",
    ),
    click.option("--negative-prompt", metavar="TEXT", help="What to lead away from."),
    click.option(
        "--prompt-weighting", is_flag=True, help="Read weights: (word:1.3), word++, word--."
    ),
    click.option(
        "--max-embeddings-multiples",
        type=int,
        metavar="N",
        help="How many times the text encoder's own length texts may have.  [default: 1]",
    ),
    click.option(
        "--prompt-embeds",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Encoded texts (.npz, arrays named as in Python's encode_prompt) instead of a PROMPT.",
    ),
    click.option(
        "--value",
        "values",
        multiple=True,
        metavar="NAME=FILE",
        help="A value of latentc compute in the place of what it is made of: a .npz or .npy file "
        "with one array, or with one of that name.",
    ),
    click.option(
        "--seed",
        "seeds",
        type=int,
        multiple=True,
        metavar="N",
        help="For the same image again; repeat it for one seed per image.",
    ),
    click.option("--height", type=int, metavar="PIXELS"),
    click.option("--width", type=int, metavar="PIXELS"),
    click.option("--num-frames", type=int, metavar="N", help="Of a video."),
    click.option(
        "--no-resolution-binning",
        is_flag=True,
        help="Make the image in this very size, not in the nearest of the model's list.",
    ),
    click.option(
        "--arg",
        "extra",
        multiple=True,
        metavar="NAME=VALUE",
        help="Another argument of this bundle: a text, or numbers joined by commas.",
    ),
)
LOADING: tuple[_Option, ...] = (
    click.option(
        "--preset",
        default="auto",
        metavar="NAME",
        help="faithful, balanced or fast: what latentc tune found.  [default: faithful, where it "
        "did]",
    ),
    click.option(
        "--backend",
        metavar="NAME",
        help="onnxruntime, openvino, torch … [default: the first installed one that fits]",
    ),
    click.option("--device", metavar="NAME", help="See: latentc backends."),
    click.option("--build", metavar="NAME", help="Of several builds, this one."),
    click.option("--precision", metavar="NAME", help="Of several builds, one of this precision."),
    click.option(
        "--threads", type=click.IntRange(0), default=0, help="For the engine; 0: its choice."
    ),
    click.option(
        "--cache", metavar="FOLDER", help="For compiled graphs.  [default: latentc's own]"
    ),
    click.option("--no-cache", is_flag=True, help="Keep no compiled graphs, and use none."),
    click.option("--compute", metavar="NAME", help="fp32, fp16, bf16 or auto, if the engine can."),
    click.option("--compile", is_flag=True, help="Let the engine compile first: slow, then fast."),
    click.option(
        "--static", is_flag=True, help="Load for this size only; some engines gain by it."
    ),
    click.option("--low-memory", is_flag=True, help="Hold one component at a time in memory."),
    click.option("--option", multiple=True, metavar="KEY=VALUE", help="For the engine, as it is."),
)


def declared(options: Sequence[_Option]) -> Callable[[_Command], _Command]:
    """Return a decorator that gives a command these options, in their order."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            option(command)
        return command

    return decorate


def chosen(bundle: Path, options: Mapping[str, Any], images: int) -> Loading:
    """Return how a bundle will be loaded for calls of so many images; nothing is loaded.

    Raises:
        InputError: an option that cannot be used.
        BackendError: an engine or device that is not here.
    """
    from latentc.runtimes.pipeline import loading

    if options["cache"] and options["no_cache"]:
        raise InputError("--cache names a folder to use, and --no-cache says to use none")
    how = {name: options[name] for name in ("preset", "low_memory")}
    how["cache"] = not options["no_cache"] and (options["cache"] or True)
    plan = loading.chosen(bundle, _asked(options, images), **how)
    counted = _counted(plan.signature, options, images)
    return plan if counted == images else loading.chosen(bundle, _asked(options, counted), **how)


def _counted(signature: Signature, options: Mapping[str, Any], images: int) -> int:
    """Return how many images a call makes that is given a number for each: `images` in others."""
    pairs = (assignment.partition("=") for assignment in options["extra"])
    lengths = [len(value.split(",")) for name, _, value in pairs if name in signature.rows]
    return max(lengths) * max(1, options["num_images"]) if lengths else images


def _asked(options: Mapping[str, Any], images: int) -> Asked:
    """Command-line options → how to load."""
    from latentc.runtimes.bundle.sizes import BINNING
    from latentc.runtimes.presets.preset import Asked

    pairs = [assignment.partition("=") for assignment in options["option"]]
    for name, equals, value in pairs:
        if not equals or not name:
            raise InputError(f"--option {name + equals + value!r}: expected KEY=VALUE")
    sized = ("height", "width", "num_frames", "guidance_scale")
    given = {name: options[name] for name in sized}
    sizes = {"images": images} | {n: value for n, value in given.items() if value is not None}
    if options["no_resolution_binning"]:
        sizes[BINNING] = False
    same = ("backend", "device", "build", "precision", "threads", "compute", "compile")
    return Asked(
        **{name: options[name] for name in same},
        static=sizes if options["static"] else None,
        options={name: value for name, _, value in pairs},
        sizes=sizes,
    )


def arguments_of(
    signature: Signature, prompts: tuple[str, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Command-line options → the arguments of a call; None ones are left out."""
    from latentc.runtimes.bundle.sizes import BINNING
    from latentc.runtimes.calls import given_images

    seeds = list(options["seeds"])
    arguments: dict[str, Any] = {
        "prompt": prompts[0] if len(prompts) == 1 else list(prompts) or None,
        signature.several: options["num_images"],
        "num_inference_steps": options["steps"],
        "seed": seeds[0] if len(seeds) == 1 else seeds or None,
    }
    window = ("guidance_start", "guidance_stop")
    sizes = ("height", "width", "num_frames")
    scales = ("guidance_scale", "guidance_rescale")
    same = ("scheduler", *scales, *window, "cache_interval", "negative_prompt", *sizes)
    masking = ("strength", "mask_blur", "padding_mask_crop", "denoising_end")
    arguments |= {name: options[name] for name in (*same, *masking, "max_embeddings_multiples")}
    if options["mask_image"] is not None:
        arguments["mask_image"] = given_images.read(options["mask_image"])
    for name in ("image", "control_image", "ip_adapter_image"):
        several = [given_images.read(path) for path in options[name]]
        if several:
            arguments[name] = several[0] if len(several) == 1 else several
    for name, array in options["given_texts"].items():
        if name not in signature.embeddings:
            known = ", ".join(signature.embeddings) or "none"
            raise InputError(f"--prompt-embeds: no argument {name!r}; this bundle has: {known}")
        arguments[name] = array
    for name, array in options["given_values"].items():
        if name not in signature.values:
            known = ", ".join(signature.values)
            raise InputError(f"--value: no value {name!r}; this bundle has: {known}")
        arguments[name] = array
    arguments["prompt_weighting"] = options["prompt_weighting"] or None
    arguments[BINNING] = False if options["no_resolution_binning"] else None
    extra: set[str] = set()
    for assignment in options["extra"]:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise InputError(f"--arg {assignment!r}: expected NAME=VALUE")
        if name in extra:
            raise InputError(f"--arg {name} is given twice")
        extra.add(name)
        numeric = {*signature.number_names, *signature.sizes}
        arguments[name] = _numbers(name, value) if name in numeric else value
    return {name: value for name, value in arguments.items() if value is not None}


def arrays_of(options: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the arrays that the command line names, by argument: encoded texts, and values.

    Raises:
        InputError: a file that is missing, holds something else, or gives a name twice.
    """
    from latentc.runtimes.storage.npz import read_arrays

    path = options["prompt_embeds"]
    encoded = {} if path is None else _read("--prompt-embeds", read_arrays, path)
    if any(array.ndim < 2 for array in encoded.values()):
        raise InputError(f"--prompt-embeds {path}: expected arrays with a row for each prompt")
    values: dict[str, Array] = {}
    for assignment in options["values"]:
        name, equals, file = assignment.partition("=")
        if not equals or not name or not file:
            raise InputError(f"--value {assignment!r}: expected NAME=FILE")
        if name in values or name in encoded:
            raise InputError(f"--value {name}: it is given twice")
        values[name] = _read_value(name, Path(file))
    return encoded, values


def _read_value(name: str, path: Path) -> Array:
    """Return the array of a .npy file; of a .npz file the one of this name, or the only one. Raises
    InputError."""
    from latentc.runtimes.storage import npz

    label = f"--value {name}:"
    if path.suffix.lower() == ".npy":
        return _read(label, npz.read_array, path)
    found = _read(label, npz.read_arrays, path)
    if name not in found and len(found) != 1:
        known = ", ".join(found) or "nothing"
        raise InputError(f"{label} {path} holds {known}: expected one array, or one called {name}")
    return found[name] if name in found else next(iter(found.values()))


def _read(label: str, read: Callable[..., _Read], path: Path) -> _Read:
    """Return what a file of arrays holds. Raises InputError, which begins with the option."""
    from latentc.runtimes.errors import BundleError
    from latentc.runtimes.storage.npz import LARGEST_GIVEN

    try:
        return read(path, max_bytes=LARGEST_GIVEN)
    except BundleError as error:
        raise InputError(f"{label} {error}") from None


def _numbers(name: str, text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(int(part) if _is_whole(part) else float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--arg {name}: {text!r} are no numbers joined by commas") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _is_whole(text: str) -> bool:
    """Return whether a number is written as an integer."""
    return text.strip().lstrip("+-").isdecimal()
