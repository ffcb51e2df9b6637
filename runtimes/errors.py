"""The error tree. Everything latentc raises on purpose is a `LatentcError`.

    LatentcError                 exit 1   anything below; the CLI prints one line, no traceback
    ├── InputError               exit 2   bad argument: size, step count, unknown name, scheduler
    │   └── PlanNotFound         exit 2   no sampling plan for that scheduler and step count
    ├── SourceError              exit 3   the source is missing, damaged or not a pipeline
    │   └── UnsupportedPipeline  exit 3   a pipeline class that no family handles
    ├── BundleError              exit 4   the bundle is missing, damaged, altered or too new
    ├── BackendError             exit 5   the engine failed
    │   ├── BackendUnavailable   exit 5   its package is not installed
    │   ├── DeviceUnavailable    exit 5   no such device on this machine
    │   └── NumericalError       exit 5   NaN or infinity came out of a session
    ├── VerificationError        exit 6   an export does not reproduce PyTorch
    ├── ExportError              exit 7   capture, lowering or writing failed
    │   └── DiskFull             exit 7   no room for what an export writes
    └── PerformanceRegression    exit 8   a benchmark is slower than an earlier one, or fails now

Ctrl-C exits with 130, as shells expect.
"""

from __future__ import annotations

from latentc.runtimes.terminal import visible
from latentc.runtimes.unknown_names import suggestion


class LatentcError(Exception):
    """Base class. `exit_code` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message for a terminal. Names in messages come from files: what a terminal
        would obey is written as escapes.
        """
        return visible(super().__str__())


class InputError(LatentcError, ValueError):
    """An argument that cannot be used; the message says what is accepted."""

    exit_code = 2


class PlanNotFound(InputError):
    """The bundle has no sampling plan for the asked scheduler or step count."""


class SourceError(LatentcError):
    """The thing to export is missing, damaged or not a diffusers pipeline."""

    exit_code = 3


class UnsupportedPipeline(SourceError):
    """A diffusers pipeline class that no family of the exporter handles."""


class BundleError(LatentcError):
    """The bundle is missing, damaged, altered or of an unknown version."""

    exit_code = 4


class BackendError(LatentcError):
    """An inference engine refused to load or to run a graph."""

    exit_code = 5


class BackendUnavailable(BackendError):
    """A backend's package is not installed. Carries the line that installs it."""

    def __init__(self, backend: str, install: str, reason: str = "") -> None:
        self.backend = backend
        self.install = install
        why = f" ({reason})" if reason else ""
        super().__init__(f"backend {backend!r} is not available{why}; install it with: {install}")


class DeviceUnavailable(BackendError):
    """The asked device does not exist here, or does not start, for the given reason."""

    def __init__(self, backend: str, device: str, available: list[str], reason: str = "") -> None:
        self.backend = backend
        self.device = device
        self.available = available
        hint = suggestion(device, available, "it has")
        super().__init__(
            reason or f"backend {backend!r} has no device {device!r} on this machine; {hint}"
        )


class NumericalError(BackendError):
    """NaN or infinity where finite numbers were expected."""


class VerificationError(LatentcError):
    """A build does not reproduce its PyTorch reference within its tolerance."""

    exit_code = 6


class ExportError(LatentcError):
    """Capturing, lowering or writing a bundle failed."""

    exit_code = 7


class DiskFull(ExportError):
    """There was no room on the disk for what an export writes; nothing that it wrote is kept."""

    def __init__(self, place: object) -> None:
        super().__init__(f"the disk is full: {place}")


class PerformanceRegression(LatentcError):
    """Compared with an earlier report, something became slower beyond the noise, or fails."""

    exit_code = 8


def shown(value: object) -> str:
    """Return a value as errors quote it, in at most 80 characters. Never raises."""
    try:
        return f"{value!r:.80}"
    except Exception:  # a __repr__ of the caller's, or an integer of thousands of digits
        return f"one of type {type(value).__name__}"


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first non-empty line of an exception's text, shortened, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]
