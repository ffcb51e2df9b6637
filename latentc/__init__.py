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

from runtimes.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    DeviceUnavailable,
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
from runtimes.version import __version__

if TYPE_CHECKING:
    from exporter.compiler.export import export
    from latentc import wandb as wandb
    from runtimes.pipeline.pipeline import Pipeline, load
    from runtimes.pipeline.run import Progress, Result, Run
    from runtimes.texts.tokenizer import PromptTruncatedWarning

_LAZY = {
    "export": "exporter.compiler.export",
    "load": "runtimes.pipeline.pipeline",
    "Pipeline": "runtimes.pipeline.pipeline",
    "Progress": "runtimes.pipeline.run",
    "Result": "runtimes.pipeline.run",
    "Run": "runtimes.pipeline.run",
    "PromptTruncatedWarning": "runtimes.texts.tokenizer",
}
_MODULES = ("wandb",)  # of this package, for `latentc.wandb.autolog()` after `import latentc`

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "BundleError",
    "DeviceUnavailable",
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
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__]
