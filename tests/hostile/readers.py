"""Everything in the project that reads bundles, as a list that the corpus goes through.

A reader runs in the corpus's worker process (`tests.hostile.worker`). It returns what it printed,
or raises. To hold a reader in another language to the corpus, enter a function that runs it as a
program and raises `tests.docs.independent_loader.Refused` where it refuses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentc.runtimes.errors import LatentcError

_MANIFEST = frozenset({"manifest", "anything"})
_FILES = frozenset({"files"})
_WORDS = frozenset({"files", "tokenizer"})
_CONTENT = frozenset({"tokenizer", "plans"})
_OV = "openvino"
_PROMPT = "a large red circle " * 20  # longer than one piece of the encoder's length


class CommandFailed(Exception):
    """A command of latentc ended with this exit code and these lines on its standard error."""

    def __init__(self, code: int, lines: str) -> None:
        self.code = code
        super().__init__(lines)


@dataclass(frozen=True)
class Reader:
    """A reader of bundles.

    Attributes:
        parts: what it reads (`tests.hostile.bad_bundle.PARTS`), and must refuse if it is bad.
        read: reads the bundle at the first path; may write at the second one.
        writes: whether it is there to change the bundle.
        tolerant: whether it may use a bad bundle all the same, as an export that replaces it does.
        missed: whether it may say as well that a build does not reproduce its probes (exit code 6).
        needs: a package without which it is not there.
    """

    name: str
    parts: frozenset[str]
    read: Callable[[Path, Path], str]
    writes: bool = False
    tolerant: bool = False
    missed: bool = False
    needs: str = ""

    @property
    def is_there(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def command(*arguments: object) -> str:
    """Run latentc's command line in this process and return what it printed.

    Raises:
        CommandFailed: it ended with another exit code than 0.
    """
    from latentc import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(argument) for argument in arguments])
    if code:
        raise CommandFailed(code, err.getvalue())
    return out.getvalue() + err.getvalue()


def _inspect(bundle: Path, scratch: Path) -> str:
    return command("inspect", bundle)


def _inspect_json(bundle: Path, scratch: Path) -> str:
    return command("inspect", bundle, "--json")


def _verify_files(bundle: Path, scratch: Path) -> str:
    return command("verify", bundle, "--files-only")


def _verify(backend: str, target: str) -> Callable[[Path, Path], str]:
    def read(bundle: Path, scratch: Path) -> str:
        chosen = ("--backend", backend, "--build", f"{target}-fp32")
        return command("verify", bundle, *chosen)

    return read


def _plans(bundle: Path, scratch: Path) -> str:
    return command("plans", bundle, "-o", scratch / "plans")


def _schedule(bundle: Path, scratch: Path) -> str:
    return command("schedule", bundle, "--scheduler", "ddim", "--steps", 3, "--quiet")


def _export_over(bundle: Path, scratch: Path) -> str:
    source, plans = _source(), ("--scheduler", "ddim", "--steps", 1)
    return command("export", source, "-o", bundle, *plans, "--dry-run", "--quiet", "--overwrite")


def _share_with(bundle: Path, scratch: Path) -> str:
    source, output = _source(), scratch / "shared"
    plans = ("--scheduler", "ddim", "--steps", 1)
    shared = ("--share-with", bundle)
    return command("export", source, "-o", output, *plans, *shared, "--dry-run", "--quiet")


def _source() -> Path:
    from tests.conftest import KEPT

    return KEPT / "pipelines" / "smallest"


def _load(backend: str) -> Callable[[Path, Path], str]:
    def read(bundle: Path, scratch: Path) -> str:
        import latentc

        with latentc.load(bundle, backend=backend, cache=False):
            return ""

    return read


def _generate(backend: str) -> Callable[[Path, Path], str]:
    def read(bundle: Path, scratch: Path) -> str:
        how = ("--backend", backend, "--steps", 1, "--seed", 1, "--no-cache")
        said = command("generate", bundle, _PROMPT, *how, "-o", scratch / "image.png")
        if not (scratch / "image.png").is_file():
            raise AssertionError("no image was written")
        return said

    return read


def _independent(bundle: Path, scratch: Path) -> str:
    from tests.docs import independent_loader

    reader = independent_loader.Bundle(bundle)
    reader(prompt=[_PROMPT], num_inference_steps=1, seed=1)
    return ""


READERS: tuple[Reader, ...] = (
    Reader("inspect", _MANIFEST, _inspect),
    Reader("inspect --json", frozenset({"anything"}), _inspect_json),
    Reader("verify --files-only", _MANIFEST | _FILES, _verify_files),
    Reader(
        "verify, ONNX Runtime",
        _MANIFEST | {"onnx results", "probes"},
        _verify("onnxruntime", "onnx"),
        missed=True,
    ),
    Reader(
        "verify, OpenVINO",
        frozenset({"openvino results"}),
        _verify("openvino", "openvino"),
        missed=True,
        needs=_OV,
    ),
    Reader("plans", _MANIFEST | {"plans"}, _plans),
    Reader("load, ONNX Runtime", _MANIFEST | _WORDS | {"onnx"}, _load("onnxruntime")),
    Reader("load, OpenVINO", frozenset({"openvino"}), _load("openvino"), needs=_OV),
    Reader("load, PyTorch", frozenset({"torch"}), _load("torch"), needs="torch"),
    Reader(
        "generate, ONNX Runtime",
        _FILES | _CONTENT | {"onnx", "onnx results"},
        _generate("onnxruntime"),
    ),
    Reader("generate, OpenVINO", frozenset({"openvino results"}), _generate("openvino"), needs=_OV),
    Reader("schedule", _MANIFEST | {"plans"}, _schedule, writes=True, needs="diffusers"),
    Reader("export over", _MANIFEST, _export_over, tolerant=True, needs="diffusers"),
    Reader("export --share-with", _MANIFEST, _share_with, needs="diffusers"),
    Reader(
        "independent",
        _MANIFEST | _FILES | _CONTENT | {"onnx", "onnx results"},
        _independent,
    ),
)


def refusal(error: BaseException) -> tuple[str, int] | None:
    """Return the name of the kind of refusal that an exception is, and its exit code; None for an
    exception that no reader may let through."""
    from tests.docs.independent_loader import Refused

    if isinstance(error, CommandFailed):
        return "command", error.code
    if isinstance(error, Refused):
        return "Refused", 0
    if isinstance(error, LatentcError):
        return type(error).__name__, error.exit_code
    return None
