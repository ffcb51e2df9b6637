"""This module tells how often a denoiser looks at each image, and which arguments decide that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from latentc.runtimes.programs.demand import compares
from latentc.runtimes.programs.statements import Branch, Loop, Numbers, Program, Test, loop_of


@dataclass(frozen=True)
class Guidance:
    """The branches of a loop.

    Attributes:
        scale: the argument that must be above a number for another branch than the base to run;
            None where all of them always run.
        defaults: the arguments of one number that branches are tested, pushed or rescaled by, and
            what they are in a call that gives none.
    """

    branches: tuple[Branch, ...]
    scale: str | None
    defaults: Mapping[str, float]

    @property
    def most(self) -> int:
        """Return the evaluations of an image in a step, where all branches run."""
        return len(self.branches)

    def evaluations(self, scale: float | None = None) -> int:
        """Return the evaluations of an image in a step of a call that has its texts; `scale` None
        is the default."""
        numbers = dict(self.defaults)
        if scale is not None and self.scale is not None:
            numbers[self.scale] = scale
        return sum(
            all(test.given or compares(test, numbers[test.argument or ""]) for test in branch.when)
            for branch in self.branches
        )


def guidance_of(program: Program) -> Guidance:
    """Return the guidance of a checked program's main loop."""
    return guidance_of_loop(program, loop_of(program))


def guidance_of_loop(program: Program, loop: Loop) -> Guidance:
    """Return the guidance of one of a checked program's loops."""
    used = {*scale_arguments(loop)}
    defaults = {
        argument.name: float(argument.default[0])
        for argument in program.arguments
        if isinstance(argument, Numbers) and argument.name in used and argument.default
    }
    scales = (test.argument for test in _tests(loop) if test.above is not None)
    return Guidance(loop.branches, next(scales, None), defaults)


def _tests(loop: Loop) -> Iterator[Test]:
    for branch in loop.branches:
        yield from branch.when


def scale_arguments(loop: Loop) -> Iterator[str]:
    """Yield the arguments that branches are tested and pushed by, and the one that rescales what
    comes of it; one may come several times."""
    yield from (test.argument for test in _tests(loop) if test.argument is not None)
    yield from (push.by for branch in loop.branches for push in branch.push)
    if loop.rescale is not None:
        yield loop.rescale
