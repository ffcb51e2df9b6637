"""This module reads ``--precision``: one precision for a whole build, or one for each component.

``fp16``; ``denoiser=int8,vae_decoder=fp16`` (the rest fp32); ``fp16,denoiser=int8``.

The denoiser may besides have been changed by passes that are asked for by name, which stand behind
its precision, ``w8a8+downsampled-attention``, or ``fp32,denoiser=w8a8+downsampled-attention`` where
it has one of its own. A build that has such passes is only taken where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from latentc.runtimes.bundle.precisions import PRECISIONS
from latentc.runtimes.bundle.structures import Component
from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.unknown_names import suggestion

DENOISER = "denoiser"
SHALLOW = "shallow_denoiser"  # a part of it, of the same precision
Usual = Mapping[str, str]  # by component the precision that it has unless it is named
_NONE: Usual = MappingProxyType({})
_PLUS = "+"


def usual_precisions(components: Iterable[Component]) -> Usual:
    """Return what the components of a bundle have unless they are named, where that is not the
    build's precision."""
    return {component.name: component.precision for component in components if component.precision}


@parser(InputError, "text", "a precision")
def canonical(text: str, usual: Usual = _NONE) -> str:
    """Return the one spelling of a precision.

    The base comes first, then components in alphabetical order, none that says what the base says
    already; passes are in alphabetical order.

    Raises:
        InputError: not a precision or a list of ``component=precision``.
    """
    return with_passes(text, (), usual)


def with_passes(precision: str, names: Iterable[str], usual: Usual = _NONE) -> str:
    """Return the canonical precision with the named passes besides those that it has.

    Raises:
        InputError: as `canonical`.
    """
    base, by_component, passes = _parse(precision)
    named = "".join(f"{_PLUS}{name}" for name in sorted(passes | set(names)))
    rest = {
        name: value for name, value in by_component.items() if value != _unnamed(base, name, usual)
    }
    if DENOISER in rest:
        rest[DENOISER] += named
    else:
        base += named
    return ",".join([base, *(f"{name}={rest[name]}" for name in sorted(rest))])


def of_component(precision: str, component: str, usual: Usual = _NONE) -> str:
    """Return the precision of one component under what was asked for (in any spelling).

    The denoiser's has its passes, that of its shallow part has none.
    """
    base, own, passes = _parse(precision)
    if component not in (DENOISER, SHALLOW):
        return own.get(component, _unnamed(base, component, usual))
    found = own.get(component) or own.get(DENOISER) or base
    return _PLUS.join([found, *(sorted(passes) if component == DENOISER else ())])


def split_passes(precision: str) -> tuple[str, tuple[str, ...]]:
    """Return one component's precision without its passes, and the passes.

    ``w8a8+a`` gives ``w8a8`` and ``(a,)``.
    """
    base, *passes = precision.split(_PLUS)
    return base, tuple(passes)


def has_passes(precision: str) -> bool:
    """Return whether a build of this precision was changed by passes asked for by name."""
    return _PLUS in precision


def check_components(precision: str, known: Iterable[str]) -> None:
    """Raise InputError for a component that the pipeline does not have."""
    known = list(known)
    for name in _parse(precision)[1]:
        if name not in known:
            raise InputError(
                f"--precision {precision}: the pipeline has no component {name!r}; "
                f"{suggestion(name, known, 'it has')}"
            )


def build_name(target: str, precision: str) -> str:
    """Return the name of a build, and of its folder."""
    plain = precision.replace(_PLUS, "-").replace("=", ".").replace(",", "+")
    return f"{target}-{plain}"


def _unnamed(base: str, component: str, usual: Usual) -> str:
    """Return the precision of a component that is not named."""
    if component in usual:
        return usual[component]
    if component in (DENOISER, SHALLOW) or base not in PRECISIONS:
        return base
    return PRECISIONS[base].elsewhere or base


def _parse(text: str) -> tuple[str, dict[str, str], frozenset[str]]:
    """Return the base, the components' own precisions, and the passes of the denoiser."""
    base, by_component, passes = "", dict[str, str](), set[str]()
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        said, *named = (each.strip() for each in (value if equals else name).split(_PLUS))
        if not name or not said or not all(named):
            raise InputError(_FORM.format(text))
        if named and equals and name != DENOISER:
            raise InputError(
                f"--precision {text}: {named[0]!r} of {name!r}: only the {DENOISER} has passes"
            )
        passes.update(named)
        if equals:
            _once(text, name, by_component.setdefault(name, said) != said)
        else:
            _once(text, "all components", bool(base))
            base = said
    return base or "fp32", by_component, frozenset(passes)


def _once(text: str, what: str, twice: bool) -> None:
    if twice:
        raise InputError(f"--precision {text}: two precisions for {what}")


_FORM = (
    "--precision {!r}: expected a precision such as fp16, or component=precision pairs such as "
    "denoiser=int8,vae_decoder=fp16"
)
