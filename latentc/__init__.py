"""Compile diffusers pipelines into bundles, and run bundles without PyTorch.

    import latentc
    latentc.export("stable-diffusion-v1-5/stable-diffusion-v1-5", "bundle", targets=["onnx"])
    pipe = latentc.load("bundle")
    pipe("a large red circle", seed=42).images[0].save("circle.png")

Importing this package imports neither numpy nor torch: each name is looked up when used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the exporter, the runtimes and the benchmarks stand beside this folder, and links
# in it lead to them. Where links cannot be (git on Windows writes small files), their parent is
# a place to look for them.
if not Path(__file__).with_name("runtimes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from latentc.runtimes.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    DeviceUnavailable,
    DiskFull,
    ExportError,
    InputError,
    LatentcError,
    NumericalError,
    PerformanceRegression,
    PlanNotFound,
    SourceError,
    UnsupportedPipeline,
    VerificationError,
)
from latentc.runtimes.version import __version__

if TYPE_CHECKING:
    from latentc import wandb as wandb
    from latentc.exporter.compiler.export import export
    from latentc.runtimes.pipeline.pipeline import Pipeline, load
    from latentc.runtimes.pipeline.run import Progress, Result, Run
    from latentc.runtimes.texts.tokenizer import PromptTruncatedWarning

_LAZY = {
    "export": "latentc.exporter.compiler.export",
    "load": "latentc.runtimes.pipeline.pipeline",
    "Pipeline": "latentc.runtimes.pipeline.pipeline",
    "Progress": "latentc.runtimes.pipeline.run",
    "Result": "latentc.runtimes.pipeline.run",
    "Run": "latentc.runtimes.pipeline.run",
    "PromptTruncatedWarning": "latentc.runtimes.texts.tokenizer",
}
_MODULES = ("wandb",)  # of this package, for `latentc.wandb.autolog()` after `import latentc`

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "BundleError",
    "DeviceUnavailable",
    "DiskFull",
    "ExportError",
    "InputError",
    "LatentcError",
    "NumericalError",
    "PerformanceRegression",
    "Pipeline",
    "PlanNotFound",
    "Progress",
    "PromptTruncatedWarning",
    "Result",
    "Run",
    "SourceError",
    "UnsupportedPipeline",
    "VerificationError",
    "__version__",
    "builtin_lora",
    "builtin_model",
    "export",
    "load",
]


def builtin_model() -> Path:
    """The folder of the diffusers pipeline that ships with the package."""
    return Path(__file__).parent / "models" / "shapes"


def builtin_lora() -> Path:
    """The folder of the LoRA that ships with the package: the built-in model draws hollow."""
    return Path(__file__).parent / "models" / "hollow"


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"latentc.{name}")
    if name not in _LAZY:
        hint = "" if name.startswith("__") else _hint(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    return getattr(import_module(_LAZY[name]), name)


def _hint(name: str) -> str:
    from latentc.runtimes.unknown_names import ADVICE_ON_ATTRIBUTES, suggestion

    hint = suggestion(name, __all__, has="", advice=ADVICE_ON_ATTRIBUTES)
    return f"; {hint}" if hint else ""


def __dir__() -> list[str]:
    return [*__all__]
