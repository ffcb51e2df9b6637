"""This module defines what an inference engine must offer, and lists the engines that latentc has.

A backend is one file under `runtimes/backends/` (or in another package, found through the
entry-point group ``latentc.backends``) and one line in `BACKENDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from latentc.runtimes import plugins
from latentc.runtimes.backends.session import Session, first_line
from latentc.runtimes.bundle.precision import split_passes
from latentc.runtimes.bundle.sizes import fix
from latentc.runtimes.bundle.structures import Build, Component
from latentc.runtimes.errors import (
    BackendError,
    BackendUnavailable,
    DeviceUnavailable,
    InputError,
    LatentcError,
)
from latentc.runtimes.unknown_names import suggestion

ENTRY_POINTS = "latentc.backends"
LAST_PLACE = 100  # of a precision that a backend says nothing of

BACKENDS: Mapping[str, str] = {
    "onnxruntime": "latentc.runtimes.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "latentc.runtimes.backends.openvino:OpenVinoBackend",
    "tensorrt": "latentc.runtimes.backends.tensorrt.engine:TensorRtBackend",
    "torch": "latentc.runtimes.backends.torch:TorchBackend",
    "coreml": "latentc.runtimes.backends.coreml.device:CoreMLBackend",
    "coreml-reference": "latentc.runtimes.backends.coreml.reference:CoreMLReferenceBackend",
}


@dataclass(frozen=True)
class SessionOptions:
    """The options say how a backend loads a graph.

    Attributes:
        threads: 0 leaves the choice to the engine.
        cache: folder for compiled graphs, for engines that can store them.
        compute: precision to calculate in, one of the backend's `computes`; None is what the
            graph says, ``"auto"`` what the engine would take by itself.
        compile: let the engine spend time on the graph first, to be faster afterwards.
        sizes: values of the graph's symbols that all calls have in common; none is dynamic.
        key: digest of the graph's files, for caches of what is made from them; "" is unknown.
        extra: passed to the engine.
        lean: hold as little in memory as the engine can do with, which may be slower; engines
            that cannot do with less ignore it.
    """

    threads: int = 0
    cache: Path | None = None
    compute: str | None = None
    compile: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    key: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    lean: bool = False


@dataclass(frozen=True)
class BuildRequest:
    """A request says how a build on this machine departs from the recipe in the bundle.

    `profile`: ranges (smallest, usual, largest) of symbolic dimensions. `workspace`: bytes.
    `force`: build also what is there already.
    """

    profile: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    workspace: int | None = None
    tf32: bool | None = None
    force: bool = False


@dataclass(frozen=True)
class Built:
    """A `Built` says what was built, and how long that took.

    Attributes:
        path: the file that was built.
        seconds: how long it took; 0 means that the file was there already.
        reason: why the file that was there before could not be used; "" where there was none.
    """

    path: Path
    seconds: float
    reason: str = ""


class Backend(ABC):
    """One inference engine. Making an instance imports the engine's package.

    Class attributes: `name`; `package`, the distribution to install; `install`, the line
    that installs it; `targets`, the build targets that it can load, the best first; `lacks`,
    precisions of builds that it has no arithmetic for; `computes`, what `SessionOptions.compute`
    may be; `compiles`, whether it heeds `SessionOptions.compile`; `builds`, whether a graph must
    be built into an engine on the machine that runs it (see `build`); `slow`, whether it is for
    checking and not for making images, so that nothing asks it for many; `memory_per_weight`,
    bytes of memory for each weight of a component that it verifies at export, roughly;
    `loads_in_parallel`, whether `open` may be called from several threads at once, and gains by
    it; `places`, by the precision of the denoiser, where the engine is expected to stand among all
    engines and precisions from fast to slow, where nothing was measured; `lean`, whether it heeds
    `SessionOptions.lean`, and then leaves weights in their files; `one_length`, whether its graphs
    take texts of one length, the longest; `entries`, the suffixes of the files that it opens, where
    an engine would take others for something else.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    install: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    lacks: ClassVar[tuple[str, ...]] = ()
    computes: ClassVar[tuple[str, ...]] = ()
    compiles: ClassVar[bool] = False
    builds: ClassVar[bool] = False
    slow: ClassVar[bool] = False
    memory_per_weight: ClassVar[float] = 5.0
    loads_in_parallel: ClassVar[bool] = True
    places: ClassVar[Mapping[str, int]] = {}
    lean: ClassVar[bool] = False
    one_length: ClassVar[bool] = False
    entries: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def references(cls, entry: Path) -> Iterable[Path]:
        """Return the files that the engine opens because of a graph's file, besides that file.

        All of them must be in the manifest. The base class knows those of ONNX graphs and of
        OpenVINO's IR; a backend whose engine opens other files says which.

        Raises:
            BundleError: the file is damaged.
        """
        from latentc.runtimes.bundle import references

        return references.references(entry)

    @classmethod
    def loads(cls, build: Build) -> bool:
        """Return whether this backend can load a build: its target, and each graph's precision."""
        precisions = {split_passes(artifact.precision)[0] for artifact in build.artifacts.values()}
        return build.target in cls.targets and not precisions & set(cls.lacks)

    @abstractmethod
    def version(self) -> str:
        """Return the engine's version."""

    @abstractmethod
    def devices(self) -> list[str]:
        """Return the devices of this machine, the default first."""

    @abstractmethod
    def _open(
        self, entry: Path, component: Component, device: str, options: SessionOptions
    ) -> Session:
        """Load the graph in `entry`; any exception is reported as a BackendError."""

    def device(self, asked: str | None) -> str:
        """Return the device to use, by the engine's own name for it; case does not matter.

        Raises:
            DeviceUnavailable: listing the devices that there are.
        """
        try:
            with plugins.started(f"listing the devices of {self.name}"):
                devices = self.devices()
        except plugins.BrokenPlugin as error:
            raise BackendError(str(error)) from error
        if asked is None and devices:
            return devices[0]
        asked = asked or "of any kind"
        for device in devices:
            if device.lower() == asked.lower():
                return device
        raise DeviceUnavailable(self.name, asked, devices)

    def open(
        self,
        entry: Path,
        component: Component,
        device: str | None = None,
        options: SessionOptions | None = None,
    ) -> Session:
        """Load one graph.

        Raises:
            InputError: an option that this backend does not have.
            DeviceUnavailable: no such device here.
            BackendError: the engine refused the graph.
        """
        chosen = self.device(device)
        options = options or SessionOptions()
        self.check(options, chosen)
        try:
            session = self._open(entry, fix(component, options.sizes), chosen, options)
            session.component = component.name
            return session
        except (LatentcError, KeyboardInterrupt):
            raise
        except BaseException as error:  # an exit of the process, and panics of Rust code, too
            kind = "" if isinstance(error, Exception) else f"{type(error).__name__}: "
            raise BackendError(
                f"{self.name} could not load {entry.name} of {component.name!r} on {chosen}: "
                f"{kind}{first_line(error)}"
            ) from error

    def build(
        self,
        entry: Path,
        component: Component,
        device: str | None = None,
        options: SessionOptions | None = None,
        request: BuildRequest | None = None,
    ) -> Built:
        """Make what `open` needs on this machine, for backends that set `builds`.

        Raises:
            InputError: nothing has to be built, or the request cannot be met.
            DeviceUnavailable: no such device here.
            BackendError: the engine refused the graph.
        """
        raise InputError(f"backend {self.name!r} builds nothing: it loads the graphs as they are")

    def option_names(self, device: str) -> Collection[str] | None:
        """Return the names that `SessionOptions.extra` may have on a device.

        None, the default, says that the engine does not tell them and may get any.
        """
        return None

    def check(self, options: SessionOptions, device: str) -> None:
        """Refuse what no graph could be loaded with on a device, before any is looked at.

        Raises:
            InputError: an option that this backend does not have.
        """
        if options.compute is not None and options.compute not in self.computes:
            known = ", ".join(self.computes) or "none: it computes as the build says"
            raise InputError(
                f"backend {self.name!r} cannot be asked to compute in {options.compute!r}; "
                f"it can in: {known}"
            )
        if options.compile and not self.compiles:
            raise InputError(f"backend {self.name!r} has nothing to compile; leave --compile out")
        offered = self.option_names(device) if options.extra else None
        for option in options.extra:
            if offered is not None and option not in offered:
                hint = suggestion(option, sorted(offered), "it has")
                raise InputError(f"backend {self.name!r} has no option {option!r}; {hint}")


_REQUIRED = ("name", "package", "install", "targets")  # of a backend's class attributes


def names() -> Iterator[str]:
    """Yield the names of the table's backends, then those of installed packages' entry points.

    Lazy, because looking for entry points costs more than the rest of a start together.
    """
    yield from BACKENDS
    yield from (point for point in plugins.entry_points(ENTRY_POINTS) if point not in BACKENDS)


def find(name: str) -> type[Backend]:
    """Return a backend's class, to look at its attributes; its engine is not imported.

    Raises:
        InputError: no backend of that name.
        BackendError: the package that offers it is broken.
    """
    reference = BACKENDS.get(name) or plugins.entry_points(ENTRY_POINTS).get(name)
    if reference is None:
        raise InputError(f"no backend named {name!r}; {suggestion(name, names())}")
    try:
        backend = plugins.resolve(reference)
    except plugins.BrokenPlugin as error:
        raise BackendError(f"backend {name!r}: {error}") from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendError(f"backend {name!r}: {reference} is no subclass of Backend")
    lacking = [each for each in _REQUIRED if not hasattr(backend, each)]
    if lacking:
        raise BackendError(f"backend {name!r}: {reference} lacks {', '.join(lacking)}")
    return backend


def get(name: str) -> Backend:
    """Import and make a backend.

    Raises:
        InputError: no backend of that name.
        BackendUnavailable: its engine is not installed; says how to install it.
        BackendError: its engine does not start.
    """
    backend = find(name)
    try:
        with plugins.started(f"backend {name!r}"):
            return backend()
    except ImportError as error:
        raise BackendUnavailable(name, backend.install, first_line(error)) from error
    except plugins.BrokenPlugin as error:
        raise BackendError(str(error)) from error


def for_build(build: Build) -> list[str]:
    """Return the names of the backends here, their engines installed, that load a build."""
    loading = []
    for name in names():
        try:
            with plugins.started(f"backend {name!r}"):
                if not find(name).loads(build):
                    continue
            get(name)
            loading.append(name)
        except (BackendError, plugins.BrokenPlugin, ImportError):
            continue
    return loading
