"""Options of commands that call a bundle: what a call takes, and how the bundle is loaded.

Only click and declarations are imported here; what reads an option's value imports what it needs
when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from latentc.runtimes.calls.call_arguments import CallArguments
from latentc.runtimes.commands.declared_options import options_of
from latentc.runtimes.errors import InputError
from latentc.runtimes.options import Declared, declared
from latentc.runtimes.presets.load_arguments import AUTO, LoadArguments
from latentc.runtimes.unknown_names import suggestion

if TYPE_CHECKING:
    from latentc.runtimes.arrays import Array
    from latentc.runtimes.calls.signature import Signature
    from latentc.runtimes.pipeline.loading import Loading

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Read = TypeVar("_Read")
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
_FILE: Mapping[str, Any] = {"type": click.Path(path_type=Path)}
_IMAGES = ("image", "mask_image", "control_image", "ip_adapter_image")
_ENCODED = "prompt_embeds"
_CALL = (
    options_of(CallArguments, settings=dict.fromkeys((*_IMAGES, _ENCODED), _FILE)),
    click.option(
        "--value",
        "values",
        multiple=True,
        metavar="NAME=FILE",
        help="A value of latentc compute in the place of what it is made of: a .npz or .npy file "
        "with one array, or with one of that name.  May be repeated.",
    ),
    click.option(
        "--arg",
        "extra",
        multiple=True,
        metavar="NAME=VALUE",
        help="Another argument of this bundle: a text, or numbers joined by commas.  May be "
        "repeated.",
    ),
)
_LOADING = (
    options_of(
        LoadArguments,
        settings={
            "preset": {"default": AUTO, "show_default": True},
            "static": {"is_flag": True, "type": bool},
            "options": {"multiple": True, "default": ()},
        },
    ),
    click.option("--no-cache", is_flag=True, help="Keep no compiled graphs, and use none."),
)


def of_call(command: _Command) -> _Command:
    """Give a command the options that say what a call is given."""
    return _with_options(command, _CALL)


def of_loading(command: _Command) -> _Command:
    """Give a command the options that say how a bundle is loaded."""
    return _with_options(command, _LOADING)


def _with_options(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for decorate in reversed(options):
        command = decorate(command)
    return command


def chosen(bundle: Path, options: Mapping[str, Any], images: int) -> Loading:
    """Return how a bundle will be loaded for calls of so many images; nothing is loaded.

    Raises:
        InputError: an option that cannot be used.
        BackendError: an engine or device that is not here.
    """
    from latentc.runtimes.pipeline import loading

    if options["cache"] and options["no_cache"]:
        raise InputError("--cache names a folder to use, and --no-cache says to use none")
    plan = loading.chosen(bundle, *_how(options, images))
    counted = _counted(plan.signature, options, images)
    return plan if counted == images else loading.chosen(bundle, *_how(options, counted))


def _counted(signature: Signature, options: Mapping[str, Any], images: int) -> int:
    """Return how many images a call makes that is given a number for each: `images` in others."""
    pairs = (assignment.partition("=") for assignment in options["extra"])
    lengths = [len(value.split(",")) for name, _, value in pairs if name in signature.rows]
    return max(lengths) * images_per_prompt(options) if lengths else images


def images_per_prompt(options: Mapping[str, Any]) -> int:
    """Return how many images a command line asks for of each prompt."""
    return options["num_images_per_prompt"] or 1


def _how(options: Mapping[str, Any], images: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the arguments of `latentc.load` that a command line gives, and the sizes of its
    call."""
    from latentc.runtimes.bundle.sizes import BINNING

    pairs = [assignment.partition("=") for assignment in options["options"]]
    for name, equals, value in pairs:
        if not equals or not name:
            raise InputError(f"--option {name + equals + value!r}: expected KEY=VALUE")
    sized = ("height", "width", "num_frames", "guidance_scale", BINNING)
    given = {name: options[name] for name in sized}
    sizes = {"images": images} | {n: value for n, value in given.items() if value is not None}
    how = {name: options[name] for name in declared(LoadArguments) if name in options}
    how["cache"] = not options["no_cache"] and (options["cache"] or True)
    how["static"] = sizes if options["static"] else None
    how["options"] = {name: value for name, _, value in pairs}
    return how, sizes


def arguments_of(
    signature: Signature, prompts: tuple[str, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Command-line options → the arguments of a call; None ones are left out."""
    arguments = {
        name: _value(option, options[name])
        for name, option in declared(CallArguments).items()
        if name in options and name != _ENCODED
    }
    arguments["prompt"] = prompts[0] if len(prompts) == 1 else list(prompts) or None
    arguments[signature.several] = arguments.pop("num_images_per_prompt")
    for name, array in options["given_texts"].items():
        if name not in signature.embeddings:
            hint = suggestion(name, signature.embeddings, "this bundle has")
            raise InputError(f"--prompt-embeds: no argument {name!r}; {hint}")
        arguments[name] = array
    for name, array in options["given_values"].items():
        if name not in signature.values:
            hint = suggestion(name, signature.values, "this bundle has")
            raise InputError(f"--value: no value {name!r}; {hint}")
        arguments[name] = array
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


def _value(option: Declared, value: Any) -> Any:
    """Return the value of an argument: images are read, and what is given once is no list."""
    from latentc.runtimes.calls import given_images

    if not option.several:
        return given_images.read(value) if option.name in _IMAGES and value is not None else value
    values = [*map(given_images.read, value)] if option.name in _IMAGES else [*value]
    return values[0] if len(values) == 1 else values or None


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
