"""optimum-intel: exports to OpenVINO, and runs it behind diffusers' pipelines.

Default: ``OVDiffusionPipeline.from_pretrained``. Best: reshaped to the call's size before it is
compiled, and OpenVINO's cache of compiled models. Both leave OpenVINO's choice of arithmetic
alone, which is bf16 on CPUs that have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _common import Peer, Request, Stages, main, scheduler_name, stage_model, transformers_keys


class OptimumIntel(Peer):
    """OpenVINO on the CPU. The noise is that of a PyTorch generator, as in diffusers."""

    packages = ("optimum-intel", "optimum", "openvino", "diffusers", "transformers", "torch")

    def convert(self, request: Request, folder: Path) -> None:
        from optimum.exporters.openvino import main_export

        model = stage_model(request, folder, transformers_keys)
        main_export(
            str(model), output=folder / "openvino", task="text-to-image", library_name="diffusers"
        )

    def load(self, request: Request, folder: Path) -> Any:
        from optimum.intel import OVDiffusionPipeline

        config: dict[str, Any] = {}
        if request.threads:
            config["INFERENCE_NUM_THREADS"] = request.threads
        if request.best:
            config |= {"CACHE_DIR": str(folder / "cache"), "PERFORMANCE_HINT": "LATENCY"}
        pipe = OVDiffusionPipeline.from_pretrained(
            folder / "openvino", device="CPU", ov_config=config, compile=not request.best
        )
        if request.best:
            pipe.reshape(1, request.height, request.width, request.batch)
            pipe.compile()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, loaded: Any, request: Request, stages: Stages) -> list[Any]:
        import torch

        made = loaded(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            height=request.height,
            width=request.width,
            num_images_per_prompt=request.batch,
            generator=torch.Generator().manual_seed(request.seed),
        )
        return [*made.images]

    def watch(self, loaded: Any, stages: Stages) -> None:
        stages.wrap(loaded.unet, "forward", "denoiser_call")
        stages.wrap(loaded.vae_decoder, "forward", "vae_decode")
        stages.wrap(loaded.text_encoder, "forward", "text_encode")

    def describe(self, request: Request, folder: Path) -> dict[str, Any]:
        return {
            "scheduler": scheduler_name(folder / "openvino"),
            "precision": "OpenVINO's choice",
            "static": request.best,
            "generator": "torch",
            "compiled_model_cache": request.best,
            "cache": None,
        }


if __name__ == "__main__":
    main(OptimumIntel())
