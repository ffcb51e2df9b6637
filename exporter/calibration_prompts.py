"""The prompts whose denoising trajectories say which values activations take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentc.runtimes.errors import InputError
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser

# Varied subjects and styles. Whoever knows what a model is for gives prompts of that kind.
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a large red circle",
    "a watercolor painting of a harbour at dawn, soft light",
    "portrait of an old fisherman, detailed face, studio lighting",
    "a blue square above a yellow star",
    "a busy street in Tokyo at night, neon signs, rain",
    "a bowl of fruit on a wooden table, still life, oil on canvas",
    "a small green triangle on the left",
    "an isometric drawing of a tiny living room",
    "a macro photograph of a dew drop on a leaf",
    "an orange circle to the left of a purple square",
    "snowy mountains under a clear sky, aerial view",
)
SAMPLES = 32


@dataclass(frozen=True)
class Calibration:
    """The prompts of the trajectories and how many denoiser calls are taken from them."""

    prompts: tuple[str, ...]
    samples: int

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("calibration needs at least one prompt")


def calibration(prompts: str | Path | Sequence[str] | None, samples: int) -> Calibration:
    """Return what to calibrate with: by the prompts of a file, by those that are given, or, where
    `prompts` is None, by `PROMPTS`.

    Raises:
        InputError: a file that cannot be read; no prompt.
    """
    if isinstance(prompts, str | Path):
        return Calibration(read_prompts(Path(prompts)), samples)
    return Calibration(PROMPTS if prompts is None else tuple(prompts), samples)


@parser(InputError, "path", "a text file of prompts")
def read_prompts(path: Path) -> tuple[str, ...]:
    """Return a file's prompts, one a line; empty lines are skipped.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text, or holds no prompt.
    """
    try:
        text = read_regular(path, LARGEST_DOCUMENT).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"calibration prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"calibration prompts {path}: not a text file in UTF-8 (byte {error.start})"
        ) from error
    if "\0" in text:
        raise InputError(f"calibration prompts {path}: not a text file (it has zero bytes)")
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise InputError(f"calibration prompts {path}: empty; expected one prompt a line")
    return prompts
