"""ONNX graph and recipe → TensorRT engine, on the machine that will run it. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentc.runtimes.backends.session import first_line
from latentc.runtimes.bundle.recipe import Recipe, Shapes
from latentc.runtimes.errors import BackendError
from latentc.runtimes.storage import files

_LARGEST_TIMING = 256 << 20  # bytes; those of many graphs are a few MiB
_ALWAYS_TYPED = 11  # from here on there is no other kind of network, and the flag is deprecated


def build(
    trt: Any, graph: Path, recipe: Recipe, shapes: Mapping[str, Shapes], timing: Path
) -> bytes:
    """Build a serialised engine.

    Args:
        trt: the module `tensorrt`.
        graph: an ONNX file; its weights lie beside it.
        shapes: of every input with open dimensions: smallest, usual, largest.
        timing: a file with measured times of kernels, read if it fits and written afterwards.

    Raises:
        BackendError: TensorRT's first complaint.
    """
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):  # by path, for the weights beside it
        problems = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise BackendError(f"TensorRT {trt.__version__} cannot read {graph}: {_first(problems)}")
    config = builder.create_builder_config()
    _configure(trt, config, recipe)
    _add_profile(builder, config, shapes)
    cache = _timing_cache(config, timing)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"TensorRT {trt.__version__} cannot build {graph}: {_first(log.errors)}")
    with suppress(OSError):  # without it the next build takes longer, that is all
        timing.parent.mkdir(parents=True, exist_ok=True)
        files.write(timing, bytes(cache.serialize()))
    return bytes(plan)


def _flags(trt: Any) -> int:
    if int(str(trt.__version__).split(".")[0]) >= _ALWAYS_TYPED:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _configure(trt: Any, config: Any, recipe: Recipe) -> None:
    if recipe.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace)
    if recipe.level is not None:
        config.builder_optimization_level = recipe.level
    if recipe.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:  # on by default, and no float32: its products have 10 bits
        config.clear_flag(trt.BuilderFlag.TF32)


def _add_profile(builder: Any, config: Any, shapes: Mapping[str, Shapes]) -> None:
    if not shapes:
        return
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(f"TensorRT refuses the profile {dict(shapes)}")


def _timing_cache(config: Any, path: Path) -> Any:
    known = b""
    with suppress(OSError):
        known = files.read_regular(path, _LARGEST_TIMING)
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, False) and known:
        cache = config.create_timing_cache(b"")  # of another GPU or version
        config.set_timing_cache(cache, False)
    return cache


def _logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps the errors, for one line about them."""
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(message)

    return Log()


def _first(problems: list[str]) -> str:
    return first_line(Exception(problems[0])) if problems else "it gives no reason"
