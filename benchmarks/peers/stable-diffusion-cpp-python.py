"""stable-diffusion-cpp-python: stable-diffusion.cpp (ggml), compiled when it is installed.

Default: the constructor's and the call's own settings. Best: flash attention, and a thread for
each core, where its default took one of two here. Caching of steps is "disabled" in both, which is
its default.

It knows the sizes of Stable Diffusion 1.x, 2.x and XL by heart, not from a configuration, and so
is their vocabulary: other models end its process. `check` says so before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from _common import Peer, PeerError, Request, Stages, main, read_json, rename, scheduler_name

_VOCABULARY = 49_408
_CHANNELS = ([320, 640, 1280, 1280], [320, 640, 1280])
# diffusers' classes by the names that it has for them; others get its default, Euler ancestral.
SAMPLERS = {
    "DPMSolverMultistepScheduler": "dpm++2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "DDIMScheduler": "ddim_trailing",
}


class StableDiffusionCpp(Peer):
    """ggml on the CPU. Its random numbers are its own: a seed gives another image."""

    packages = ("stable-diffusion-cpp-python",)

    def check(self, request: Request) -> None:
        model = Path(request.model)
        channels = read_json(model / "unet" / "config.json")["block_out_channels"]
        words = read_json(model / "text_encoder" / "config.json")["vocab_size"]
        if channels not in _CHANNELS or words != _VOCABULARY:
            raise PeerError(
                "stable-diffusion.cpp runs models with the sizes of Stable Diffusion 1.x, 2.x "
                f"and XL only; this one has a UNet of {channels} channels and a vocabulary of "
                f"{words:,} tokens (it takes {_VOCABULARY:,})"
            )

    def convert(self, request: Request, folder: Path) -> None:
        source, staged = Path(request.model).resolve(), folder / "model"
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            for path in sorted((source / part).glob("*.safetensors")):
                (staged / part).mkdir(parents=True, exist_ok=True)
                os.symlink(path, staged / part / path.name)
                if part.startswith("text_encoder"):
                    rename(staged / part / path.name, _prefixed(path))

    def load(self, request: Request, folder: Path) -> Any:
        from stable_diffusion_cpp import StableDiffusion

        return StableDiffusion(
            model_path=str(folder / "model"),
            n_threads=request.threads or (os.cpu_count() or -1 if request.best else -1),
            verbose=False,
            diffusion_flash_attn=request.best,
        )

    def draw(self, loaded: Any, request: Request, stages: Stages) -> list[Any]:
        made = loaded.generate_image(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            cfg_scale=request.guidance_scale,
            sample_steps=request.steps,
            sample_method=_sampler(request),
            seed=request.seed,
            batch_count=request.batch,
            cache_mode="disabled",
        )
        return [image.convert("RGB") for image in made]

    def describe(self, request: Request, folder: Path) -> dict[str, Any]:
        return {
            "scheduler": _sampler(request),
            "precision": "as stored",
            "flash_attention": request.best,
            "generator": "its own",
            "cache": "disabled",
        }


def _sampler(request: Request) -> str:
    name = request.scheduler or scheduler_name(Path(request.model))
    return SAMPLERS.get(name, "default")


def _prefixed(path: Path) -> set[str]:
    """Return the names of a text encoder's weights as in Stable Diffusion's own checkpoints."""
    import json
    import struct

    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        names = [name for name in json.loads(file.read(size)) if name != "__metadata__"]
    heads = ("text_model.", "text_projection.")
    return {name if name.startswith(heads) else f"text_model.{name}" for name in names}


if __name__ == "__main__":
    main(StableDiffusionCpp())
