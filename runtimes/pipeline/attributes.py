"""Attributes of pipelines and runs: what can be set, and what those who know diffusers look for."""

from __future__ import annotations

from typing import Any, ClassVar

from latentc.runtimes.errors import InputError

_FIXED = "the parts of a bundle are fixed when it is exported"
# What diffusers' pipelines have, by the beginning of its name, and what stands for it here.
_INSTEAD: tuple[tuple[str, str], ...] = (
    ("to", "a pipeline is loaded for a device: latentc.load(bundle, backend=…, device=…)"),
    ("cuda", "a pipeline is loaded for a device: latentc.load(bundle, backend=…, device=…)"),
    ("enable_", "for less memory: latentc.load(bundle, low_memory=True), enable_vae_tiling()"),
    ("load_lora", f"{_FIXED}: latentc export --lora FILE"),
    ("load_ip_adapter", f"{_FIXED}: latentc export --ip-adapter FILE"),
    ("load_textual_inversion", f"{_FIXED}: latentc export --textual-inversion FILE"),
    ("fuse_", f"{_FIXED}: latentc export --lora FILE"),
    ("set_adapters", f"{_FIXED}: latentc export --lora FILE"),
    ("vae", f"{_FIXED}: latentc export --vae FOLDER"),
    ("unet", _FIXED),
    ("transformer", _FIXED),
    ("controlnet", f"{_FIXED}: latentc export --controlnet FOLDER"),
    ("text_encoder", _FIXED),
    ("tokenizer", _FIXED),
)


class UnknownAttribute(InputError, AttributeError):
    """An attribute that is not there, or that cannot be set."""


class Sealed:
    """An object on which only those attributes can be set that change something.

    `_settable` names them. A class sets `_sealed` when it is made; its private attributes that
    are there by then can still be set.
    """

    _settable: ClassVar[tuple[str, ...]] = ()
    _sealed = False

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self._settable or (name.startswith("_") and name in self.__dict__)
        if self._sealed and not own:
            raise UnknownAttribute(
                f"{type(self).__name__}.{name} cannot be set, as it would change nothing; what can "
                f"be set: {', '.join(self._settable)}{_instead(name)}"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        public = [each for each in dir(type(self)) if not each.startswith("_")]
        raise UnknownAttribute(
            f"{type(self).__name__} has no attribute {name!r}; it has: {', '.join(public)}"
            f"{_instead(name)}"
        )


class SchedulerName(str):
    """A scheduler's name, which says so where a diffusers scheduler is expected."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownAttribute(
            f"pipe.scheduler is the name {str(self)!r}, not a scheduler object with {name!r}: "
            "assign another name of pipe.schedulers"
        )


def _instead(name: str) -> str:
    return next((f". {hint}" for start, hint in _INSTEAD if name.startswith(start)), "")
