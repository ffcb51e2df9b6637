"""PyTorch's generators, drawn from without PyTorch.

A ``torch.Generator`` tells its state as bytes, and takes them back. They are those of the struct
``CPUGeneratorImplState`` (ATen's ``CPUGeneratorImpl.cpp``): the words of the Mersenne Twister, how
many of them are used up, and the second value of the last small draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from latentc.runtimes.errors import InputError, shown
from latentc.runtimes.sampling.noise import FloatArray, Generator

_WORDS = 624  # of the Mersenne Twister
_STATE = np.dtype(
    [
        ("seed", "<u8"),
        ("left", "<i4"),  # words until new ones are made, and one
        ("seeded", "<i4"),
        ("next", "<u8"),  # the place of the next word
        ("words", "<u8", _WORDS),
        ("normal_x", "<f8"),
        ("normal_y", "<f8"),  # the second value of a small draw in double precision
        ("normal_rho", "<f8"),
        ("normal_is_valid", "<i4"),
        ("padding", "<i4"),
        ("float_normal", "<f4"),
        ("float_normal_is_valid", "<i4"),
    ]
)


class TorchGenerator(Generator):
    """Draws what a ``torch.Generator`` on the CPU would draw next, and has it go on by that.

    Nothing of PyTorch is imported: the generator is asked for its state before each draw, and given
    the new one after it.

    Args:
        generator: has `device`, `initial_seed`, `get_state` and `set_state` as PyTorch's have.

    Raises:
        InputError: it is no such generator, or one of another device.
    """

    __slots__ = ("_generator", "fresh")

    def __init__(self, generator: Any) -> None:
        methods = ("initial_seed", "get_state", "set_state")
        if not all(callable(getattr(generator, name, None)) for name in methods):
            raise InputError(
                "'generator' must be a torch.Generator on the CPU, or a list of them, not "
                f"{shown(generator)}; without PyTorch give 'seed'"
            )
        device = str(getattr(generator, "device", "cpu"))
        if device != "cpu":
            raise InputError(
                f"'generator' draws on {device}, by an algorithm of that device's own: give one on "
                "the CPU, torch.Generator('cpu').manual_seed(…), or 'seed'"
            )
        super().__init__(generator.initial_seed())
        self._generator = generator
        self.fresh = self._is_fresh()

    def __repr__(self) -> str:
        return f"TorchGenerator({self._generator!r})"

    def randn(self, shape: Any) -> FloatArray:
        """Return the next standard normal values; see `Generator.randn`."""
        tensor = self._generator.get_state()
        state = _fields_of(tensor)
        self._take(state)
        values = super().randn(shape)
        self._leave(state)
        self._generator.set_state(tensor)
        return values

    def _is_fresh(self) -> bool:
        """Return whether it has drawn nothing since it got its seed."""
        state, (words, _) = _fields_of(self._generator.get_state()), self._position()
        drawn = state["left"] != 1 or state["next"] or state["normal_is_valid"]
        return not drawn and bool((state["words"] == words).all())

    def _take(self, state: Any) -> None:
        place = _WORDS if state["left"] == 1 else int(state["next"])
        self._words.set_state(("MT19937", state["words"].astype(np.uint32), place, 0, 0.0))
        self._cached = float(state["normal_y"]) if state["normal_is_valid"] else None

    def _leave(self, state: Any) -> None:
        words, place = self._position()
        state["words"], state["next"], state["left"] = words, place, _WORDS + 1 - place
        state["normal_is_valid"] = self._cached is not None
        state["normal_y"] = self._cached or 0.0

    def _position(self) -> tuple[npt.NDArray[np.uint32], int]:
        """Return the words of the Mersenne Twister, and the place of the next one."""
        state: Any = self._words.get_state(legacy=False)["state"]
        return state["key"], int(state["pos"])


def _fields_of(tensor: Any) -> Any:
    """Return the fields of a state, in the memory of its tensor.

    Raises:
        InputError: it is none that this latentc can read.
    """
    raw: npt.NDArray[np.uint8] = tensor.numpy()
    if raw.dtype != np.uint8 or raw.shape != (_STATE.itemsize,):
        raise InputError(
            "'generator': its state is none that this latentc can read, as another version of "
            "PyTorch made it: give 'seed'"
        )
    return raw.view(_STATE)[0]
