"""Memory that an export gives back between its stages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latentc.benchmarks.measure import run_child

SIZE = 128 << 20

# A reference is left behind on purpose, as the converters do.
RELEASE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from latentc.benchmarks.measure import current_memory, report
from latentc.exporter.memory import release_weights
folder, size = Path(sys.argv[1]), int(sys.argv[2])
save_file({"weight": torch.ones(2, size // 8)}, folder / "model.safetensors")
module = torch.nn.Linear(size // 8, 2, bias=False, device="meta")
module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
left = module.weight.detach().numpy().T
before = current_memory()
total = float(left.sum())
touched = current_memory()
release_weights([module], folder)
report([touched - before, touched - current_memory(), module.weight.numel()])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped where")
def test_weights_are_released_whoever_refers_to_them(tmp_path: Path) -> None:
    touched, released, left = run_child(["-c", RELEASE, str(tmp_path), str(SIZE)]).result
    assert touched > 0.9 * SIZE
    assert released > 0.9 * SIZE
    assert left == 0
