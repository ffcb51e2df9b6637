"""The programs of a bundle, interpreted on real engines, give what its runs give, to the bit.

That they do for every argument of every task is tested in test_every_argument.py, without engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.pipeline import load
from tests.interpreted import by_program, by_run

BACKENDS = ("onnxruntime", "openvino", "torch")
PROMPTS = ["a red circle", "a blue square"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_programs_on_real_engines(sd_bundle: Path, backend: str) -> None:
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPTS, "negative_prompt": "a green star", "seed": [3, 4]},
        {"prompt": "a red circle", "guidance_stop": 0.5, "scheduler": "euler_a", "seed": 1},
        {"prompt": "a red circle", "guidance_rescale": 0.7, "height": 40, "width": 24, "seed": 2},
    ]
    with load(sd_bundle, backend) as pipe:
        for call in calls:
            call["num_inference_steps"] = 4
            for ours, theirs in zip(by_program(pipe, call), by_run(pipe, call), strict=True):
                np.testing.assert_array_equal(ours, theirs)
