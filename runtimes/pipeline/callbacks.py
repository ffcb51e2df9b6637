"""This module declares what a caller may have called after each step of a call, as in diffusers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypedDict

from latentc.runtimes.calls.call_arguments import CallArguments, CallKeywords
from latentc.runtimes.errors import InputError, shown
from latentc.runtimes.options import Option, complete, declared
from latentc.runtimes.pipeline.run import Progress, Run

# (run, step index, timestep, {"latents": …}) -> None or {"latents": …}
Callback: TypeAlias = Callable[[Run, int, float, dict[str, Any]], Any]
_IN_PYTHON = "for programs"


class CallbackArguments(TypedDict, total=False):
    """The arguments of a call that watch it."""

    callback_on_step_end: Annotated[
        Callback | None,
        Option(
            'Called as `callback(run, index, timestep, {"latents": …})` after each step.',
            details='It may return `{"latents": …}` to replace them, and stop the run by '
            "`run.interrupt()`.",
            see="python-api.md#run-and-progress",
            hidden=_IN_PYTHON,
        ),
    ]
    callback_on_step_end_tensor_inputs: Annotated[
        Sequence[str],
        Option(
            "For diffusers' sake; nothing else is offered.",
            default=("latents",),
            hidden=_IN_PYTHON,
        ),
    ]


class ReturnArgument(TypedDict, total=False):
    """This argument says in which form a call returns what it made."""

    return_dict: Annotated[
        bool,
        Option(
            "`False` returns a tuple: the images, then what the bundle says of "
            "them, such as `nsfw_content_detected`.",
            default=True,
            hidden=_IN_PYTHON,
        ),
    ]


class WatchedKeywords(CallKeywords, CallbackArguments, total=False):
    """Calls that may be watched take these arguments by name, whatever comes of them."""


class WatchedCallArguments(CallArguments, CallbackArguments, ReturnArgument, total=False):
    """All arguments of a call."""


def checked_callback(arguments: Mapping[str, Any]) -> Callback | None:
    """Return what is to be called after each step.

    Raises:
        InputError: it cannot be called, or is to be given something else than latents.
    """
    watching = complete(
        CallbackArguments,
        {name: arguments[name] for name in declared(CallbackArguments) if name in arguments},
    )
    callback: Callback | None = watching["callback_on_step_end"]
    tensors = list(watching["callback_on_step_end_tensor_inputs"])
    if tensors not in ([], ["latents"]):
        raise InputError(
            f"callback_on_step_end_tensor_inputs may only hold 'latents', not {shown(tensors)}"
        )
    return callback


def report_step(run: Run, step: Progress, callback: Callback) -> None:
    """Call a diffusers-style callback and take over the latents that it returns.

    Raises:
        InputError: it returned something else than None or a mapping with latents.
    """
    returned = callback(run, step.index, step.timestep, {"latents": step.latents})
    if returned is None:
        return
    if not isinstance(returned, Mapping) or set(returned) - {"latents"}:
        raise InputError(
            "callback_on_step_end must return None or a dictionary with 'latents' only, "
            f"not {returned!r:.80}"
        )
    if "latents" in returned:
        run.latents = returned["latents"]
