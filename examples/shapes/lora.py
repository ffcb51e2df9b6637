"""Train a LoRA for the built-in model: it draws every shape hollow.

    python -m examples.shapes.lora --out latentc/models/hollow

The built-in pipeline is frozen; small matrices beside its denoiser's linear layers and
convolutions learn from images of the new style, with the captions of the old one. What comes out
is a LoRA in diffusers' own format, of some hundred kilobytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from tqdm import tqdm

from latentc import builtin_model
from latentc.benchmarks.shapes.captions import caption
from latentc.benchmarks.shapes.hollow import HollowJudge, render
from latentc.benchmarks.shapes.scenes import place_scene

from .data import CAPTION_DROPOUT, spec_at, to_tensor, tokenize
from .loop import Plan, learning_rate
from .stages import loss_weight

PLAN = Plan(600, 2e-3, warmup=30, seed=11)
RANK = 8
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out")
BATCH = 32
IMAGES = 2048


@torch.no_grad()
def latents_of(pipe: Any, count: int) -> tuple[torch.Tensor, list[Any]]:
    """Return scaled latents [count, 4, 16, 16] of hollow training images, and what they show."""
    specs, chunks = [], []
    for start in tqdm(range(0, count, 64), desc="encode", unit="batch"):
        images = []
        for index in range(start, min(start + 64, count)):
            spec, rng = spec_at(PLAN.seed, index)
            specs.append(spec)
            images.append(np.asarray(render(place_scene(spec, rng))))
        means = pipe.vae.encode(to_tensor(np.stack(images))).latent_dist.mode()
        chunks.append(means * pipe.vae.config.scaling_factor)
    return torch.cat(chunks), specs


def train(pipe: Any, steps: int, images: int = IMAGES, batch: int = BATCH) -> dict[str, Any]:
    """Return the trained matrices, by diffusers' names of them."""
    torch.manual_seed(PLAN.seed)
    latents, specs = latents_of(pipe, images)
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)))
    learnt = [value for value in pipe.unet.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=PLAN.learning_rate, weight_decay=1e-3)
    kept = pipe.scheduler.alphas_cumprod
    signal, sigma = kept.sqrt(), (1 - kept).sqrt()
    plan = Plan(steps, PLAN.learning_rate, warmup=PLAN.warmup)
    rng = np.random.default_rng(PLAN.seed)
    with tqdm(range(steps), desc="LoRA") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step)
            loss = _loss(pipe, latents, specs, signal, sigma, rng, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
    # Without diffusers' conversion, which renames the attentions' layers alone: of two kinds of
    # names in one file it reads one.
    found: dict[str, Any] = get_peft_model_state_dict(pipe.unet)
    return found


def _loss(
    pipe: Any,
    latents: torch.Tensor,
    specs: list[Any],
    signal: torch.Tensor,
    sigma: torch.Tensor,
    rng: np.random.Generator,
    batch: int,
) -> torch.Tensor:
    """Return the loss of the denoiser's own training, see `stages.train_denoiser`."""
    chosen = rng.integers(len(specs), size=batch)
    texts = [
        "" if rng.random() < CAPTION_DROPOUT else caption(specs[int(i)], rng).text for i in chosen
    ]
    clean = latents[torch.from_numpy(chosen)]
    noise = torch.randn(clean.shape)
    times = ((torch.arange(batch) + torch.rand(batch)) / batch * len(signal)).long()
    a, s = signal[times].view(-1, 1, 1, 1), sigma[times].view(-1, 1, 1, 1)
    with torch.no_grad():
        states = pipe.text_encoder(tokenize(pipe.tokenizer, texts)).last_hidden_state
    guess = pipe.unet(a * clean + s * noise, times, states).sample
    error = (guess - (a * noise - s * clean)).square()
    loss: torch.Tensor = (error * loss_weight(a)).mean()
    return loss


def score(pipe: Any, images: int, steps: int = 25, guidance_scale: float = 2.0) -> int:
    """Return how many images of held-out prompts the judge finds hollow and right."""
    judge = HollowJudge()
    right = 0
    for index, prompt in enumerate(tqdm(judge.prompts(images), desc="judge")):
        generator = torch.Generator().manual_seed(100 + index)
        with torch.no_grad():
            made = pipe(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generator,
            )
        right += judge.agrees(made.images[0], prompt)
    return right


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the LoRA.")
@click.option("--steps", default=PLAN.steps, show_default=True)
@click.option("--images", default=50, show_default=True, help="To judge; 0 is none.")
def main(out: Path, steps: int, images: int) -> None:
    """Train the LoRA, save it to OUT, and judge images made with it."""
    pipe = StableDiffusionPipeline.from_pretrained(builtin_model())
    pipe.set_progress_bar_config(disable=True)
    layers = train(pipe, steps)
    halves = {name: value.half() for name, value in layers.items()}
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=halves)
    if images:
        click.echo(f"{score(pipe, images)} of {images} images are hollow and right")


if __name__ == "__main__":
    main()
