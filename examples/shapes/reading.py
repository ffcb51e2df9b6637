"""Teaching the text encoder to read captions before it conditions the denoiser.

A linear head must tell, from the state of the end token and of each padding token, what the
image shows: what comes first (left or upper), what second, and where.  The denoiser attends
to mostly padding, so afterwards even its untrained, even attention sees the whole caption;
learning from the images alone, it takes many times longer to notice the text at all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from latentc.benchmarks.shapes.captions import caption
from latentc.benchmarks.shapes.scenes import COLOURS, PLACES, SHAPES, SIZES, Spec, training_spec

from .data import tokenize

_LAYOUTS = (*PLACES, "left of", "above")
# One group of answers each; index 0 means that there is nothing to tell.
_GROUPS = tuple(1 + len(options) for options in (COLOURS, SHAPES, SIZES) * 2 + (_LAYOUTS,))
_EMPTY_SHARE = 0.05


def answers(spec: Spec | None) -> list[int]:
    """Return the right answer in each group; all zero for an empty caption."""
    if spec is None:
        return [0] * len(_GROUPS)
    found = []
    for thing in spec.things:
        found.append(1 + COLOURS.index(thing.colour))
        found.append(1 + SHAPES.index(thing.shape))
        found.append(1 + SIZES.index(thing.size or "medium"))
    found += [0] * (6 - len(found))
    return [*found, 1 + _LAYOUTS.index(spec.relation or spec.things[0].place or "centre")]


def reading_head(width: int) -> nn.Linear:
    """Return a head: states [..., width] to the scores of all groups side by side."""
    return nn.Linear(width, sum(_GROUPS))


def reading_batch(
    tokenizer: CLIPTokenizer, seed: int, step: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids [size, 77] and answers [size, 7] for captions of training images."""
    rng = np.random.default_rng([seed, 4, step])
    texts, right = [], []
    for _ in range(size):
        spec = training_spec(rng)
        if rng.random() < _EMPTY_SHARE:
            texts.append("")
            right.append(answers(None))
        else:
            texts.append(caption(spec, rng).text)
            right.append(answers(spec))
    return tokenize(tokenizer, texts), torch.tensor(right)


def reading_loss(
    encoder: CLIPTextModel, head: nn.Module, ids: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cross-entropy, and the share of captions read without fault at the end."""
    scores = head(encoder(ids).last_hidden_state)
    told = ids == encoder.config.eos_token_id  # the end token and all padding
    rows = right.repeat_interleave(told.sum(dim=1), dim=0)
    groups = scores[told].split(_GROUPS, dim=-1)
    losses = [functional.cross_entropy(group, rows[:, i]) for i, group in enumerate(groups)]
    ends = scores[torch.arange(len(ids)), told.int().argmax(dim=1)].split(_GROUPS, dim=-1)
    guesses = torch.stack([group.argmax(dim=-1) for group in ends], dim=1)
    return torch.stack(losses).mean(), (guesses == right).all(dim=1).float().mean()
