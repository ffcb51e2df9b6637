"""openvino-genai: OpenVINO's own pipelines in C++, on what optimum-intel exports.

Default: ``Text2ImagePipeline(folder, "CPU")``. Best: reshaped to the call's size before it is
compiled, and OpenVINO's cache of compiled models. Caching of steps (TaylorSeer) is off, as it is
unless asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _common import (
    Peer,
    Request,
    Stages,
    finite,
    main,
    scheduler_name,
    stage_model,
    transformers_keys,
)

# It reads the scheduler's class from the model, and has no other than these.
SCHEDULERS = (
    *("DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("PNDMScheduler", "LMSDiscreteScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"),
)
_INSTEAD = "DDIMScheduler"
_MICRO = 1e-6


class OpenVinoGenai(Peer):
    """OpenVINO on the CPU. Its random numbers are C++'s: a seed gives another image."""

    packages = ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "diffusers")

    def convert(self, request: Request, folder: Path) -> None:
        from openvino import save_model
        from openvino_tokenizers import convert_tokenizer
        from optimum.exporters.openvino import main_export
        from transformers import AutoTokenizer

        model, out = stage_model(request, folder, transformers_keys), folder / "openvino"
        main_export(str(model), output=out, task="text-to-image", library_name="diffusers")
        for place in sorted(out.glob("tokenizer*")):
            tokenizer = AutoTokenizer.from_pretrained(place)
            save_model(
                convert_tokenizer(tokenizer, with_detokenizer=False),
                place / "openvino_tokenizer.xml",
            )
        name = scheduler_name(out)
        # Its JSON reader does not take diffusers' -Infinity either.
        finite(
            out / "scheduler" / "scheduler_config.json",
            _class_name=name if name in SCHEDULERS else _INSTEAD,
        )

    def load(self, request: Request, folder: Path) -> Any:
        import openvino_genai

        config: dict[str, Any] = {}
        if request.threads:
            config["INFERENCE_NUM_THREADS"] = request.threads
        model = str(folder / "openvino")
        if not request.best:
            return openvino_genai.Text2ImagePipeline(model, "CPU", **config)
        pipe = openvino_genai.Text2ImagePipeline(model)
        pipe.reshape(request.batch, request.height, request.width, request.guidance_scale)
        config |= {"CACHE_DIR": str(folder / "cache"), "PERFORMANCE_HINT": "LATENCY"}
        pipe.compile("CPU", **config)
        return pipe

    def draw(self, loaded: Any, request: Request, stages: Stages) -> list[Any]:
        from PIL import Image

        negative = {"negative_prompt": request.negative_prompt} if request.negative_prompt else {}
        made = loaded.generate(
            request.prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            height=request.height,
            width=request.width,
            num_images_per_prompt=request.batch,
            rng_seed=request.seed,
            **negative,
        )
        metrics = loaded.get_performance_metrics()
        for seconds in metrics.raw_metrics.unet_inference_durations:
            stages.add("denoiser_call", seconds * _MICRO)
        return [Image.fromarray(pixels) for pixels in made.data]

    def describe(self, request: Request, folder: Path) -> dict[str, Any]:
        used = scheduler_name(folder / "openvino")
        wanted = request.scheduler or scheduler_name(Path(request.model))
        return {
            "scheduler": used,
            "scheduler_instead_of": None if used == wanted else wanted,
            "precision": "OpenVINO's choice",
            "static": request.best,
            "generator": "C++",
            "compiled_model_cache": request.best,
            "cache": None,
        }


if __name__ == "__main__":
    main(OpenVinoGenai())
