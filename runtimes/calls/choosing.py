"""The calls that a bundle takes: which of its programs one is, and its arguments checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.calls.call_arguments import CallArguments
from latentc.runtimes.calls.choices import scheduler_name
from latentc.runtimes.calls.facts import Facts
from latentc.runtimes.calls.parse import parse
from latentc.runtimes.calls.request import Request
from latentc.runtimes.calls.signature import Signature
from latentc.runtimes.calls.values import shown
from latentc.runtimes.errors import InputError
from latentc.runtimes.options import declared, unknown_argument
from latentc.runtimes.programs.demand import of_call
from latentc.runtimes.unknown_names import suggestion

_CACHING = "cache_interval"
_WAYS = {
    "image": "--task image-to-image",
    "strength": "--task image-to-image",
    "mask_image": "--task inpainting",
    "control_image": "--controlnet",
    "ip_adapter_image": "--ip-adapter",
}


@dataclass(frozen=True)
class Calls:
    """The programs of a bundle, checked. Make them with `of`."""

    manifest: Manifest
    facts: tuple[Facts, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Calls:
        """Return those of a bundle.

        Raises:
            BundleError: a program does not keep to the rules.
        """
        graphs = {component.name: component for component in manifest.components}
        positions = {component.name: component.positions for component in manifest.components}
        every = (Facts.of(program, graphs, positions) for program in manifest.programs)
        return cls(manifest, tuple(every))

    @cached_property
    def signature(self) -> Signature:
        """The arguments that calls take."""
        return Signature(self.facts)

    @cached_property
    def usual_components(self) -> frozenset[str]:
        """The components that may run in calls of a text or an image and nothing besides."""
        return frozenset(name for facts in self.facts for name in facts.usual_components)

    def request(self, arguments: Mapping[str, Any], wanted: Sequence[str] = ()) -> Request:
        """Check the arguments of a call; those that are None count as not given.

        Args:
            wanted: names of values that are asked for in the place of images.

        Raises:
            InputError: one that cannot be used, has no effect or is missing; a value that there is
                not.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        self._refuse_unknown([name for name in given if name not in self.signature.names])
        self.check_values(wanted)
        scheduler = scheduler_name(self.manifest, given.get("scheduler"))
        return parse(self.choose(given, wanted), given, scheduler, wanted)

    def check_values(self, wanted: Sequence[Any]) -> None:
        """Refuse to be asked for what is no value of a program.

        Raises:
            InputError: lists those that there are.
        """
        for name in wanted:
            if not isinstance(name, str) or name not in self.signature.values:
                hint = suggestion(shown(name), self.signature.values, "this bundle has")
                raise InputError(f"no value {shown(name)} can be asked for; {hint}")

    def choose(self, arguments: Mapping[str, Any], wanted: Sequence[str] = ()) -> Facts:
        """Return the program whose images a call gives: the one that takes just these, or where
        values are given or asked for one that needs no others.

        Raises:
            InputError: there is none.
        """
        given = {name for name, value in arguments.items() if value is not None}
        images = given & {name for facts in self.facts for name in facts.images}
        values = {*wanted, *(given & {*self.signature.values})}
        having = [facts for facts in self.facts if facts.public >= values]
        for facts in having:
            if facts.images.keys() == images:
                return facts
        others = [facts for facts in having if values and facts.images.keys() >= images]
        for facts in others:
            demand = of_call(facts.program, given, None, wanted)
            if not demand.arguments & (facts.images.keys() - images):
                return facts
        if others:
            return others[0]
        known = " or ".join(_spoken(facts) for facts in self.facts)
        own = {name for name in values if any(name not in facts.public for facts in self.facts)}
        named = _joined([*sorted(images), *sorted(own)])
        raise InputError(f"this call gives {named or 'no image'}; this bundle takes {known}")

    def usual_steps(self, arguments: Mapping[str, Any], wanted: Sequence[str] = ()) -> int:
        """Return the step count of a call that asks for none.

        Raises:
            InputError: the call fits no program.
        """
        facts = self.choose(arguments, wanted)
        return int(facts.numbers[facts.loop.plan.steps].default[0])

    def _refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Refuse names that no program knows, and say how a bundle comes to take them."""
        if not unknown:
            return
        if unknown == [_CACHING]:
            raise InputError(
                "this bundle has no shallow part of its denoiser to cache steps with; export it "
                f"with --pass step-cache, or leave {_CACHING} out"
            )
        way = next((_WAYS[name] for name in reversed(_WAYS) if name in unknown), None)
        if way is not None:
            raise InputError(
                f"this bundle has no use for {' and '.join(unknown)}; export it with {way}, or "
                "leave it out"
            )
        name, names, options = unknown[0], self.signature.names, declared(CallArguments)
        if name in options:
            raise InputError(f"unknown argument {name!r}; this bundle takes: {', '.join(names)}")
        raise InputError(unknown_argument(name, options, names, "this bundle takes"))


def _spoken(facts: Facts) -> str:
    return f"{_joined(facts.images) or 'no image'} ({facts.program.name})"


def _joined(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))
