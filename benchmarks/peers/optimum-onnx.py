"""optimum-onnx: exports to ONNX, and runs ONNX Runtime behind diffusers' pipelines.

Default: ``ORTDiffusionPipeline.from_pretrained``. Best: sizes fixed when the graphs are loaded,
all graph optimisations; it has no graph optimiser of its own for diffusion models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _common import Peer, Request, Stages, main, scheduler_name, stage_model, transformers_keys


class OptimumOnnx(Peer):
    """ONNX Runtime on the CPU. The noise is that of a PyTorch generator, as in diffusers."""

    packages = ("optimum-onnx", "optimum", "onnxruntime", "diffusers", "transformers", "torch")

    def convert(self, request: Request, folder: Path) -> None:
        from optimum.exporters.onnx import main_export

        model = stage_model(request, folder, transformers_keys)
        main_export(
            str(model), output=folder / "onnx", task="text-to-image", library_name="diffusers"
        )

    def load(self, request: Request, folder: Path) -> Any:
        import onnxruntime
        from optimum.onnxruntime import ORTDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = request.threads
        if request.best:
            factor = 2 ** (len(_vae(folder)["block_out_channels"]) - 1)
            rows = {"height": request.height // factor, "width": request.width // factor}
            for name, value in rows.items():
                options.add_free_dimension_override_by_name(name, value)
                options.add_free_dimension_override_by_name(f"latent_{name}", value)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        pipe = ORTDiffusionPipeline.from_pretrained(
            folder / "onnx", provider="CPUExecutionProvider", session_options=options
        )
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
            "scheduler": scheduler_name(folder / "onnx"),
            "precision": "fp32",
            "static": request.best,
            "generator": "torch",
            "cache": None,
        }


def _vae(folder: Path) -> dict[str, Any]:
    from _common import read_json

    return read_json(folder / "onnx" / "vae_decoder" / "config.json")


if __name__ == "__main__":
    main(OptimumOnnx())
