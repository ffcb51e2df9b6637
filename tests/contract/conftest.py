"""Bundles of tiny pipelines with every task that starts from an image, loaded, and the pipelines
themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import latentc
from latentc.exporter.quiet import quiet_loading
from tests.conftest import SCHEDULERS_WITH_IMAGES, STEPS_WITH_IMAGES, TASKS_WITH_IMAGES
from tests.support.loaded import Ours, kept_open
from tests.support.uncaptured import uncaptured


@pytest.fixture(scope="module")
def ours(
    bundles: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ours]:
    """A function: name and backend → the loaded bundle; without a backend the same over PyTorch's
    modules."""

    def modules(name: str) -> latentc.Pipeline:
        return uncaptured(
            pipeline_folder(name),
            tmp_path_factory.mktemp("uncaptured") / name,
            tasks=TASKS_WITH_IMAGES.get(name, ()),
            steps=STEPS_WITH_IMAGES,
            schedulers=SCHEDULERS_WITH_IMAGES.get(name),
        )

    with kept_open(bundles, modules) as get:
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
