"""What image processors of transformers do, as parts of graphs."""

from __future__ import annotations

from typing import Any

import torch


class Normalised(torch.nn.Module):
    """Pictures [batch, 3, height, width] in [0, 1] → less the processor's mean, by its standard
    deviation."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, processor: Any) -> None:
        super().__init__()
        for name, values in (("mean", processor.image_mean), ("deviation", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.deviation
