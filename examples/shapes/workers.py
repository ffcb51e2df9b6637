"""Training in several single-threaded processes that average their gradients each step.

On a CPU shared with other programs this is much faster than several threads: threads wait
for each other hundreds of times a step, processes once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Worker:
    """This process among ``count``: the whole of them by default."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this is the process that saves files and shows progress."""
        return self.rank == 0

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this worker's rows of a batch that every worker has drawn alike."""
        return batch[self.rank :: self.count]

    def wait(self) -> None:
        """Return once every worker has come here."""
        if self.count > 1:
            distributed.barrier()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the workers."""
        if self.count == 1:
            return
        gradients = [value.grad for value in parameters if value.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= self.count
        start = 0
        for gradient in gradients:
            part = together[start : start + gradient.numel()]
            gradient.copy_(part.view_as(gradient))
            start += gradient.numel()


def run_workers(count: int, work: Callable[[Worker], None]) -> None:
    """Run ``work`` in ``count`` processes on this machine; it must be picklable."""
    if count == 1:
        work(Worker())
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_start, args=(count, port, work), nprocs=count)  # type: ignore[no-untyped-call]


def _start(rank: int, count: int, port: int, work: Callable[[Worker], None]) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    work(Worker(rank, count))
    distributed.destroy_process_group()
