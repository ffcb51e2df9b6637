"""What ``--precision`` says: one precision for a whole build, or one for each component.

``fp16``; ``denoiser=int8,vae_decoder=fp16`` (the rest fp32); ``fp16,denoiser=int8``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runtimes.errors import InputError

DENOISER = "denoiser"
SHALLOW = "shallow_denoiser"  # a part of it, of the same precision
# Precisions of the denoiser, where nearly all of the work and most of the weights are, and what
# the other components then get: they are sensitive and run once a picture.
ELSEWHERE: Mapping[str, str] = {"w8a8": "int8", "int4": "int8"}


def canonical(text: str) -> str:
    """The one spelling of a precision: the base first, components in alphabetical order, and
    none that says what the base says already.

    Raises:
        InputError: not a precision or a list of ``component=precision``.
    """
    base, own = _parse(text)
    parts = [f"{name}={own[name]}" for name in sorted(own) if own[name] != _usual(base, name)]
    return ",".join([base, *parts])


def of_component(precision: str, component: str) -> str:
    """The precision of one component under what was asked for (in any spelling)."""
    base, own = _parse(precision)
    found = own.get(component)
    if found is None and component == SHALLOW:
        found = own.get(DENOISER)
    return found or _usual(base, component)


def check_components(precision: str, known: Iterable[str]) -> None:
    """Raise InputError for a component that the pipeline does not have."""
    known = list(known)
    for name in _parse(precision)[1]:
        if name not in known:
            raise InputError(
                f"--precision {precision}: the pipeline has no component {name!r}; "
                f"it has {', '.join(known)}"
            )


def build_name(target: str, precision: str) -> str:
    """The name of a build, and of its folder."""
    return f"{target}-{precision.replace('=', '.').replace(',', '+')}"


def _usual(base: str, component: str) -> str:
    return base if component in (DENOISER, SHALLOW) else ELSEWHERE.get(base, base)


def _parse(text: str) -> tuple[str, dict[str, str]]:
    base, own = "", dict[str, str]()
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not name or (equals and not value):
            raise InputError(_FORM.format(text))
        if equals:
            _once(text, name, own.setdefault(name, value) != value)
        else:
            _once(text, "all components", bool(base))
            base = name
    return base or "fp32", own


def _once(text: str, what: str, twice: bool) -> None:
    if twice:
        raise InputError(f"--precision {text}: two precisions for {what}")


_FORM = (
    "--precision {!r}: expected a precision such as fp16, or component=precision pairs such as "
    "denoiser=int8,vae_decoder=fp16"
)
