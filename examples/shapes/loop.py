"""A small training loop: exact resumption, averaged weights, atomic checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .workers import Worker


@dataclass(frozen=True)
class Plan:
    """A plan says how long and how fast to train.

    The learning rate warms up, stays level and falls to zero over the last ``decay`` of the
    steps, so a run can be lengthened or cut short without having lost anything.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.3
    average: float = 0.999
    save_every: int = 100
    seed: int = 0


class Trainer:
    """Networks in training, their running averages and the optimizer."""

    def __init__(
        self, networks: nn.ModuleDict, plan: Plan, checkpoint: Path, worker: Worker
    ) -> None:
        self.networks = networks
        self.worker = worker
        self.plan = plan
        self.checkpoint = checkpoint
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            networks.parameters(),
            lr=plan.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
            fused=True,
        )
        self.averages = {
            name: value.detach().clone() for name, value in networks.named_parameters()
        }

    def resume(self) -> bool:
        """Go on from the checkpoint where there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["averages"].items():
            self.averages[name].copy_(value)
        self.step = int(state["step"])
        return True

    def save(self) -> None:
        """Write the whole state; a reader finds the old file or the new one, never half."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.checkpoint.with_suffix(".partial")
        state = {
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
            "step": self.step,
        }
        torch.save(state, scratch)
        os.replace(scratch, self.checkpoint)

    def run(
        self,
        loss_at: Callable[[int, torch.Generator], torch.Tensor],
        name: str,
        on_save: Callable[[], None] | None = None,
    ) -> None:
        """Train to ``plan.steps``; ``loss_at(step, generator)`` gives each step's loss."""
        self.networks.train()
        shown = math.nan
        with tqdm(
            total=self.plan.steps,
            initial=self.step,
            desc=name,
            mininterval=5,
            disable=not self.worker.leads,
        ) as bar:
            while self.step < self.plan.steps:
                loss = self._one_step(loss_at)
                shown = loss if math.isnan(shown) else 0.98 * shown + 0.02 * loss
                bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
                bar.update()
                due = self.step % self.plan.save_every == 0 or self.step == self.plan.steps
                if due and self.worker.leads:
                    self.save()
                    if on_save is not None:
                        on_save()

    @torch.no_grad()
    def use_averages(self) -> None:
        """Replace the weights by their running averages."""
        for name, value in self.networks.named_parameters():
            value.copy_(self.averages[name])

    def _one_step(self, loss_at: Callable[[int, torch.Generator], torch.Tensor]) -> float:
        # Seeding by step makes a resumed run draw the very same noise.
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.plan, self.step)
        loss = loss_at(self.step, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.worker.average_gradients(self.networks.parameters())
        nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
        current = [value.detach() for value in self.networks.parameters()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - keep)


def learning_rate(plan: Plan, step: int) -> float:
    """Return the learning rate of ``step``: up, level, then a half cosine down to zero."""
    rising = min(1.0, (step + 1) / plan.warmup)
    start = plan.steps * (1 - plan.decay)
    done = max(0.0, (step - start) / max(plan.steps - start, 1.0))
    return plan.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
