"""Versions of the packages that decide what an export writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from latentc.runtimes.version import __version__

# What every captured program depends on.
CAPTURE = ("torch", "diffusers", "transformers")


@cache
def package_version(package: str) -> str:
    """Return the installed version, or ``"absent"``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions by package name, latentc's own included."""
    return {"latentc": __version__} | {name: package_version(name) for name in packages}


def libraries() -> dict[str, str]:
    """Return the versions of every installed package that takes part in an export or its check."""
    names = (*CAPTURE, "onnx", "onnxscript", "onnxruntime", "openvino", "tokenizers", "numpy")
    version_by_name = {name: package_version(name) for name in names}
    return {name: text for name, text in version_by_name.items() if text != "absent"}


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
