"""The stages of training: the autoencoder, the text encoder, then the denoiser."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel

from . import data, networks, reading
from .loop import Plan, Trainer
from .tokenizer import build_tokenizer
from .workers import Worker

AUTOENCODER_PLAN = Plan(1500, 2e-3, average=0.99, seed=1)
TEXT_PLAN = Plan(900, 2e-3, average=0.99, seed=3)
DENOISER_PLAN = Plan(7000, 8e-4, warmup=300, average=0.998, save_every=250, seed=2)

# The standard deviation of scaled latents.  A shape of one flat colour shows through more noise
# than a photograph does; at one, nearly all would be settled in the first sampling steps (Chen,
# "On the Importance of Noise Scheduling for Diffusion Models", 2023).
LATENT_SPREAD = 0.5

_LAYOUT = torch.channels_last  # convolutions on CPUs and recent GPUs are faster this way
_ALONE = Worker()


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the device."""

    out: Path
    autoencoder: Plan = AUTOENCODER_PLAN
    text: Plan = TEXT_PLAN
    denoiser: Plan = DENOISER_PLAN
    sizes: networks.Sizes = field(default_factory=networks.Sizes)
    autoencoder_batch: int = 16
    text_batch: int = 64
    denoiser_batch: int = 64
    images: int = 40_000
    kl_weight: float = 1e-3
    layout_weight: float = 0.1
    compile: bool = False
    export: Path | None = None  # where to put a pipeline at each checkpoint


def train_autoencoder(
    settings: Settings, device: torch.device, resume: bool, worker: Worker = _ALONE
) -> AutoencoderKL:
    """Train the autoencoder, measure its scaling factor and save it to ``out/vae``."""
    torch.manual_seed(settings.autoencoder.seed)
    model = networks.build_autoencoder(settings.sizes).to(device, memory_format=_LAYOUT)
    trainer = Trainer(
        nn.ModuleDict({"vae": model}),
        settings.autoencoder,
        settings.out / "autoencoder.pt",
        worker,
    )
    if resume:
        trainer.resume()

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        images, layout = data.autoencoder_batch(
            settings.autoencoder.seed, step, settings.autoencoder_batch
        )
        noise = torch.randn(layout.shape, generator=generator)
        images, layout, noise = (worker.part(each).to(device) for each in (images, layout, noise))
        return autoencoder_loss(model, images, layout, noise, settings)

    trainer.run(loss_at, "autoencoder")
    trainer.use_averages()
    model.eval()
    model.register_to_config(scaling_factor=_scaling_factor(model, settings, device))
    if worker.leads:
        model.save_pretrained(settings.out / "vae")
    worker.wait()
    return model


def autoencoder_loss(
    model: AutoencoderKL,
    images: torch.Tensor,
    layout: torch.Tensor,
    noise: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """Return the error of pixels and of their differences, and light pulls on the latents.

    One pull is towards a unit normal, as usual; the other towards ``layout`` [n, 4, 16, 16], so
    that colours lie apart.  ``images`` [n, 3, 64, 64] from -1 to 1, ``noise`` like ``layout``
    to sample latents with.
    """
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = model.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        drawn = model.decode(latents).sample
    error = drawn.float() - images
    # Errors of neighbouring pixels that differ are what blurs an edge.
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    astray = (mean - layout).square().mean()
    loss: torch.Tensor = (
        error.abs().mean()
        + 0.5 * edges
        + settings.kl_weight * divergence
        + settings.layout_weight * astray
    )
    return loss


def train_text_encoder(
    settings: Settings, device: torch.device, resume: bool, worker: Worker = _ALONE
) -> None:
    """Teach the text encoder to read captions; save it to ``out/text_encoder``."""
    if worker.leads:
        build_tokenizer(settings.out / "tokenizer")
    worker.wait()
    tokenizer = build_tokenizer(settings.out / "tokenizer")
    torch.manual_seed(settings.text.seed)
    model = networks.build_text_encoder(settings.sizes, tokenizer).to(device)
    head = reading.reading_head(settings.sizes.text_width).to(device)
    trainer = Trainer(
        nn.ModuleDict({"text_encoder": model, "head": head}),
        settings.text,
        settings.out / "text.pt",
        worker,
    )
    if resume:
        trainer.resume()

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        batch = reading.reading_batch(tokenizer, settings.text.seed, step, settings.text_batch)
        ids, right = (worker.part(each).to(device) for each in batch)
        return reading.reading_loss(model, head, ids, right)[0]

    trainer.run(loss_at, "text encoder")
    trainer.use_averages()
    if worker.leads:
        model.eval().save_pretrained(settings.out / "text_encoder")
    worker.wait()


def train_denoiser(
    settings: Settings, device: torch.device, resume: bool, worker: Worker = _ALONE
) -> None:
    """Train the denoiser on cached latents, all else frozen; save to ``out/pipeline``."""
    autoencoder = AutoencoderKL.from_pretrained(settings.out / "vae").to(device)
    if not worker.leads:
        worker.wait()  # for the cache and the tokenizer
    latents = data.encode_all(
        autoencoder,
        settings.autoencoder.seed,
        settings.images,
        settings.out / "latents.pt",
        device,
    )
    tokenizer = build_tokenizer(settings.out / "tokenizer")
    if worker.leads:
        worker.wait()
    torch.manual_seed(settings.denoiser.seed)
    unet = networks.build_denoiser(settings.sizes).to(device, memory_format=_LAYOUT)
    text_encoder = CLIPTextModel.from_pretrained(settings.out / "text_encoder").to(device).eval()
    trainer = Trainer(
        nn.ModuleDict({"unet": unet}),
        settings.denoiser,
        settings.out / "denoiser.pt",
        worker,
    )
    if resume:
        trainer.resume()
    signal, sigma = _noise_levels(device)
    forward = torch.compile(unet) if settings.compile else unet

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        clean, ids = data.denoiser_batch(
            latents, tokenizer, settings.denoiser.seed, step, settings.denoiser_batch
        )
        noise = torch.randn(clean.shape, generator=generator)
        # One time per equal slice of the schedule: less noise in the loss than free draws.
        count = clean.shape[0]
        spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        times = (spread * len(signal)).long().clamp(max=len(signal) - 1)
        clean, ids, noise, times = (
            worker.part(each).to(device) for each in (clean, ids, noise, times)
        )
        a, s = signal[times].view(-1, 1, 1, 1), sigma[times].view(-1, 1, 1, 1)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            states = text_encoder(ids).last_hidden_state
        with torch.autocast(device.type, torch.bfloat16):
            noisy = (a * clean + s * noise).contiguous(memory_format=_LAYOUT)
            guess = forward(noisy, times, states).sample
        error = (guess.float() - (a * noise - s * clean)).square()
        loss: torch.Tensor = (error * loss_weight(a)).mean()
        return loss

    def export(folder: Path) -> None:
        averaged = copy.deepcopy(trainer.networks)
        for name, value in averaged.named_parameters():
            value.data.copy_(trainer.averages[name])
        pipeline = networks.build_pipeline(
            copy.deepcopy(autoencoder).cpu(),
            averaged["unet"].cpu(),
            copy.deepcopy(text_encoder).cpu(),
            tokenizer,
        )
        networks.save_pipeline(pipeline, folder)

    early = settings.export
    trainer.run(loss_at, "denoiser", None if early is None else lambda: export(early))
    if worker.leads:
        export(settings.out / "pipeline")


def loss_weight(signal: torch.Tensor) -> torch.Tensor:
    """Return the weight of a squared error where the clean latents are scaled by ``signal``.

    Divided by the variance of what the denoiser predicts, and by about what remains of it after
    training: all times then count alike, from those at which there is little but noise to see,
    where the caption alone says what to draw, to those that settle the outlines (uncertainty
    weighting: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
    Models", 2024).
    """
    noise = 1 - signal.square()
    variance = signal.square() + noise * LATENT_SPREAD**2
    remains = 0.5 + noise.square()
    return 1 / (variance * remains)


def _noise_levels(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    kept = networks.build_scheduler().alphas_cumprod.to(device)
    return kept.sqrt(), (1 - kept).sqrt()


@torch.no_grad()
def _scaling_factor(model: AutoencoderKL, settings: Settings, device: torch.device) -> float:
    images = data.autoencoder_batch(settings.autoencoder.seed, 10**6, 64)[0][::2]
    latents = model.encode(images.to(device)).latent_dist.mode()
    return round(LATENT_SPREAD / float(latents.float().std()), 4)
