"""Weights that take memory only while they are read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from latentc.benchmarks.measure import run_child
from latentc.runtimes.storage.mapped import MappedFile

SIZE = 128 << 20

READ = """
import sys
from pathlib import Path
from latentc.benchmarks.measure import current_memory, report
from latentc.runtimes.storage.mapped import MappedFile
mapped = MappedFile(Path(sys.argv[1]))
before = current_memory()
first = int(mapped.array.sum())
read = current_memory()
mapped.release()
after = current_memory()
with mapped.releasing():
    same = int(mapped.array.sum()) == first
report([read - before, after - before, current_memory() - before, same])
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    np.tile(np.arange(251, dtype=np.uint8), SIZE // 251).tofile(path)
    return path


def test_the_content_is_that_of_the_file(weights: Path) -> None:
    mapped = MappedFile(weights)
    expected = np.fromfile(weights, np.uint8)
    np.testing.assert_array_equal(mapped.array, expected)
    mapped.release()
    np.testing.assert_array_equal(mapped.array, expected)
    with mapped.releasing():
        np.testing.assert_array_equal(mapped.array, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_pages_are_no_longer_resident(weights: Path) -> None:
    read, released, again, same = run_child(["-c", READ, str(weights)]).result
    assert read > 0.9 * SIZE
    assert released < 0.1 * SIZE
    assert again < 0.1 * SIZE
    assert same


def test_openvino_computes_the_same_from_mapped_weights(
    sd_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import latentc
    from latentc.runtimes.backends import openvino

    arguments = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
    with latentc.load(sd_bundle, backend="openvino") as pipe:
        expected = pipe("a red cube", **arguments)
    monkeypatch.setattr(openvino, "_LARGE", 0)
    with latentc.load(sd_bundle, backend="openvino") as pipe:
        for _ in range(2):
            found = pipe("a red cube", **arguments)
            np.testing.assert_array_equal(found.images, expected.images)
        assert pipe("a red cube", **arguments, height=32, width=64).images.shape[1:3] == (32, 64)
