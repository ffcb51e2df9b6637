"""Presets: how much fidelity may be given for speed, and what that means on this machine.

`latentc tune` (`latentc.runtimes.tuning.tune`) measures a bundle's builds and settings and keeps
the winner of each preset in a record outside of the bundle, in latentc's cache folder. The file is
named after the bundle's content; the record says which machine it is for. One that does not fit any
more, or cannot be read, is not used, and the user is told why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from latentc.runtimes.backends import backend as engines
from latentc.runtimes.backends.backend import LAST_PLACE, Backend
from latentc.runtimes.bundle.precision import DENOISER, of_component, split_passes
from latentc.runtimes.presets.load_arguments import LoadArguments
from latentc.runtimes.storage.folders import cache_folder

if TYPE_CHECKING:
    from latentc.runtimes.bundle.manifest import Manifest


@dataclass(frozen=True)
class Limits:
    """The limits say what a preset may cost.

    An image has at least `image_psnr` dB against fp32 (same seed, every prompt), and the judge's
    score of the original pipeline loses at most `points` of 100.
    """

    image_psnr: float
    points: float

    def allow(self, image_psnr: float, points: float | None) -> bool:
        """Return whether it is within; `points` is None where there is no judge."""
        return image_psnr >= self.image_psnr and (points is None or points <= self.points)


# At 30 dB nobody tells two images apart side by side. At 20 dB details have moved, at 12 dB
# parts of the image: it then takes a judge to say whether it still shows what was asked for.
LIMITS: Mapping[str, Limits] = {
    "faithful": Limits(30.0, 0.0),
    "balanced": Limits(20.0, 2.0),
    "fast": Limits(12.0, 4.0),
}

Arguments: TypeAlias = dict[str, int | float]
_WITH_ANY_PRESET = ("static", "cache", "verify", "low_memory", "preset")  # static if it is a size
_WINDOW = ("guidance_start", "guidance_stop")  # one setting: whoever gives one of them gives both


@dataclass(frozen=True)
class Preset:
    """A preset is what a loaded pipeline knows of the preset that it was loaded with.

    `arguments` are defaults of its calls. Calls of fewer steps than `steps` do without them: the
    fewer there are, the more each counts. `loaded` says how the build was loaded.
    """

    name: str
    arguments: Mapping[str, int | float]
    steps: int
    loaded: Mapping[str, Any]

    def complete(self, given: Mapping[str, Any], usual_steps: int) -> dict[str, Any]:
        """The arguments of a call (None: not given) with those of the preset added."""
        asked = {name: value for name, value in given.items() if value is not None}
        steps = asked.get("num_inference_steps", usual_steps)
        if hasattr(steps, "__index__") and steps < self.steps:
            return asked
        window = any(name in asked for name in _WINDOW)
        own = {n: v for n, v in self.arguments.items() if not (window and n in _WINDOW)}
        return own | asked

    def settings(self, static: bool) -> dict[str, Any]:
        """Return the settings that made an image, as JSON-compatible values.

        `static`: by graphs for one size.
        """
        return {"preset": self.name, **self.loaded, "static": static}


@dataclass(frozen=True)
class Asked:
    """An `Asked` says how a caller wants a bundle loaded, as in
    `latentc.runtimes.pipeline.pipeline.load`.

    `sizes` is what `static` may hold: those of the calls to come, where it is the preset that wants
    one size.
    """

    how: LoadArguments
    sizes: Mapping[str, float] | None = None

    @property
    def engine(self) -> str | None:
        """The backend's name."""
        backend = self.how["backend"]
        return backend.name if isinstance(backend, Backend) else backend

    @property
    def static(self) -> Mapping[str, float] | None:
        """The sizes to load for; None is calls of any."""
        static = self.how["static"]
        return ({} if static else None) if isinstance(static, bool) else static

    def instance(self, name: str) -> Backend:
        """The backend of that name: the caller's own if it is one."""
        own = self.how["backend"]
        return own if isinstance(own, Backend) and own.name == name else engines.get(name)

    def anything(self) -> bool:
        """Return whether anything was asked for: an empty `static` is."""
        decided = (value for name, value in self.how.items() if name not in _WITH_ANY_PRESET)
        return self.static is not None or any(decided)

    def changed(self, changes: LoadArguments) -> Asked:
        """Return the same with other arguments."""
        return replace(self, how={**self.how, **changes})


def content(manifest: Manifest) -> str:
    """SHA-256 over what a bundle's speed and images depend on: its builds and defaults."""
    whole = [
        msgspec.to_builtins(manifest.defaults),
        msgspec.to_builtins(manifest.latents),
        [
            [build.name, name, artifact.key, artifact.compute, *(f.sha256 for f in artifact.files)]
            for build in manifest.builds
            for name, artifact in sorted(build.artifacts.items())
        ],
    ]
    return hashlib.sha256(msgspec.json.encode(whole)).hexdigest()


def points_lost(manifest: Manifest, right: int | None) -> float | None:
    """Points of 100 by which `right` images are fewer than PyTorch's; None without a judge."""
    probe = manifest.probes.judged if manifest.probes else None
    if probe is None or right is None:
        return None
    return 100 * (probe.right - right) / len(probe.prompts)


def expected_rank(engine: type[Backend], precision: str) -> tuple[int, int]:
    """Sorts what is expected to be faster first, where nothing was measured: see `Backend.places`.
    Passes that leave out work (``w8a8+downsampled-attention``) come before the precision alone."""
    base, passes = split_passes(of_component(precision, DENOISER))
    return engine.places.get(base, LAST_PLACE), -len(passes)


def records_folder() -> Path:
    """Where the records are."""
    return cache_folder() / "tuned"


def record_path(digest: str, backend: str | None = None, device: str | None = None) -> Path:
    """Where the record of a bundle's `content` is, for a search that was limited to these."""
    scope = [each.lower() for each in (backend or "", device or "")]
    key = hashlib.sha256("\n".join([digest, *scope]).encode()).hexdigest()
    return records_folder() / f"{key[:24]}.json"
