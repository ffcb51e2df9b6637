"""Bundles of tiny pipelines with every task that starts from a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from exporter.compile import export
from exporter.source import quiet_loading
from tests.conftest import KEPT, one_at_a_time
from tests.loaded import Ours, kept_open
from tests.pictures import STEPS

# What each tiny pipeline is exported for; others do what their class is for.
TASKS = {
    "sd": ("image-to-image", "inpainting"),
    "sdxl": ("image-to-image", "inpainting"),
}
# By pipeline, where not all default schedulers are tried.
SCHEDULERS = {"inpaint-xl": ["ddim"], "pix2pix": [], "pix2pix-xl": [], "upscaler": []}
SCHEDULERS["depth"] = ["ddim"]


@pytest.fixture(scope="session")
def bundles(
    pipeline_folder: Callable[[str], Path], exported: Callable[[str], Path]
) -> Callable[[str], Path]:
    """A function: name of a tiny pipeline → its bundle for ONNX Runtime and OpenVINO."""

    def get(name: str) -> Path:
        folder = KEPT / "bundles" / f"{name}-pictures"
        with one_at_a_time(f"bundle-{name}-pictures"):
            export(
                pipeline_folder(name),
                folder,
                targets=["onnx", "openvino"],
                tasks=TASKS.get(name, ()),
                steps=[4, STEPS],
                schedulers=SCHEDULERS.get(name),
                overwrite=True,
                share_with=[exported(name)] if name in TASKS else [],
            )
        return folder

    return get


@pytest.fixture(scope="module")
def ours(bundles: Callable[[str], Path]) -> Iterator[Ours]:
    """A function: name and backend → the loaded bundle."""
    with kept_open(bundles) as get:
        yield get


@pytest.fixture(scope="module")
def original(pipeline_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """A function: name of a tiny pipeline → the diffusers pipeline; `auto` of the same parts."""
    loaded: dict[tuple[str, Any], Any] = {}

    def get(name: str, auto: Any = None) -> Any:
        if (name, auto) not in loaded:
            with quiet_loading():
                made = pipe = DiffusionPipeline.from_pretrained(pipeline_folder(name))
                if auto is not None:
                    made = auto.from_pipe(pipe)
            made.set_progress_bar_config(disable=True)
            made.own_scheduler_config = dict(pipe.scheduler.config)
            loaded[name, auto] = made
        return loaded[name, auto]

    return get
