"""This module says what a search tries, what it finds, and which of two finds is the better one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeAlias

from latentc.runtimes.presets.preset import Arguments, Limits
from latentc.runtimes.presets.records import Record
from latentc.runtimes.presets.setups import Setup

Key: TypeAlias = tuple[Setup, tuple[tuple[str, float], ...]]


@dataclass(frozen=True)
class Fidelity:
    """`image_psnr`: dB, the lowest of all prompts. `latents`: relative L2 error of the loop probe.
    `right` of `images` for the judge, `points` lost of 100; None what was not asked."""

    image_psnr: float
    latents: float | None = None
    right: int | None = None
    images: int | None = None
    points: float | None = None


@dataclass(frozen=True)
class Trial:
    """A trial says what was tried.

    `seconds` are those of an image with the default steps, None if it failed, and then `note` says
    why. `fidelity` is None where nobody needed it.
    """

    setup: Setup
    arguments: Arguments
    seconds: float | None
    fidelity: Fidelity | None = None
    note: str = ""


@dataclass(frozen=True)
class Tuning:
    """A tuning holds what a search found.

    `winners` are by preset, one of the `trials` each; `reference` is the trial that images were
    compared with, in `steps` steps of these `prompts`.
    """

    trials: tuple[Trial, ...]
    winners: Mapping[str, Trial]
    reference: Trial
    steps: int
    prompts: tuple[str, ...]
    notes: tuple[str, ...]
    record: Record


@dataclass
class Budget:
    """Seconds to spend, by a clock that tests can turn."""

    seconds: float
    clock: Callable[[], float] = perf_counter
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.began

    def affords(self, seconds: float, share: float = 1.0) -> bool:
        """Return whether something of so many seconds would end within this share of the time."""
        return self.spent + seconds <= self.seconds * share


def preference(trial: Trial) -> tuple[bool, float]:
    """Return a key that is less for the better of two that are as fast.

    One for any size comes first, then the one with the better images.
    """
    return not trial.setup.static, trial.fidelity.image_psnr if trial.fidelity else 0.0


def allowed(limits: Limits, fidelity: Fidelity) -> bool:
    """Return whether a preset takes it."""
    return limits.allow(fidelity.image_psnr, fidelity.points)


def cuts_more(arguments: Arguments, than: Arguments) -> bool:
    """Return whether arguments leave out at least as much in every respect."""
    return (
        arguments.get("guidance_start", 0) >= than.get("guidance_start", 0)
        and arguments.get("guidance_stop", 1) <= than.get("guidance_stop", 1)
        and arguments.get("cache_interval", 1) >= than.get("cache_interval", 1)
    )


def key_of(setup: Setup, arguments: Arguments) -> Key:
    """Return what tells one trial from another."""
    return setup, tuple(sorted(arguments.items()))
