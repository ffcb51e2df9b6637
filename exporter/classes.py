"""The diffusers classes that can be exported: one record for each. A package may bring more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.plugins import Registry

# Names of tasks, as diffusers calls its pipelines.
TEXT_TO_IMAGE = "text-to-image"
IMAGE_TO_IMAGE = "image-to-image"
INPAINTING = "inpainting"
# What a safety checker is left out with.
_CHECKED: Mapping[str, tuple[str, ...]] = {
    "safety_checker": ("safety_checker", "feature_extractor"),
}
# diffusers' tables of the classes that do a task, by the model.
_TABLES: Mapping[str, str] = {
    TEXT_TO_IMAGE: "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    IMAGE_TO_IMAGE: "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    INPAINTING: "AUTO_INPAINT_PIPELINES_MAPPING",
}
_IMAGE_TASKS = (IMAGE_TO_IMAGE, INPAINTING)


@dataclass(frozen=True)
class PipelineClass:
    """This record says what is known of a diffusers class before a pipeline is loaded.

    Attributes:
        family: the module that describes its pipelines: a file of `latentc.exporter.families`, or
            the whole name of another package's module.
        tasks: what it is for, which its bundles have without being asked.
        offers: what its bundles can have because diffusers has classes for it with the same parts.
        needs: of the parts that graphs are usually made without, those that it cannot do without.
        may_lack: what can be left out of it, and the parts of the source that go with each.
        even_sigmas: it hands its scheduler evenly spaced noise levels from 1 to 1/steps.
        labelled: it gives its UNet class labels.
    """

    family: str
    tasks: tuple[str, ...] = ()
    offers: tuple[str, ...] = _IMAGE_TASKS
    needs: tuple[str, ...] = ()
    may_lack: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    even_sigmas: bool = False
    labelled: bool = False


def _sd(*tasks: str, **more: Any) -> PipelineClass:
    return PipelineClass("stable_diffusion", tasks, **{"may_lack": _CHECKED, **more})


def _sdxl(*tasks: str, **more: Any) -> PipelineClass:
    return PipelineClass("stable_diffusion_xl", tasks, **more)


def _sd3(*tasks: str) -> PipelineClass:
    without = {"text_encoder_3": ("text_encoder_3", "tokenizer_3")}
    return PipelineClass("stable_diffusion_3", tasks, may_lack=without)


def _flux(*tasks: str) -> PipelineClass:
    return PipelineClass("flux", tasks, even_sigmas=True)


OWN: Mapping[str, PipelineClass] = {
    "StableDiffusionPipeline": _sd(),
    "StableDiffusionImg2ImgPipeline": _sd(IMAGE_TO_IMAGE),
    "StableDiffusionInpaintPipeline": _sd(INPAINTING),
    "StableDiffusionInstructPix2PixPipeline": _sd("instruct-pix2pix"),
    "StableDiffusionUpscalePipeline": _sd("upscaling", labelled=True, may_lack={}),
    "StableDiffusionDepth2ImgPipeline": _sd(
        "depth-to-image", needs=("feature_extractor",), may_lack={}
    ),
    "StableDiffusionControlNetPipeline": _sd(),
    "StableDiffusionControlNetImg2ImgPipeline": _sd(IMAGE_TO_IMAGE),
    "StableDiffusionControlNetInpaintPipeline": _sd(INPAINTING),
    # There are no classes that T2I-Adapters could be compared with on other tasks.
    "StableDiffusionAdapterPipeline": _sd(offers=()),
    # There is no class for inpainting, and the one for image-to-image spreads all steps over the
    # last part of the schedule, by the strength: a table of plans has the whole schedule only.
    "LatentConsistencyModelPipeline": _sd(offers=()),
    "StableDiffusionPanoramaPipeline": PipelineClass("panorama", offers=(), may_lack=_CHECKED),
    "StableDiffusionXLPipeline": _sdxl(),
    "StableDiffusionXLImg2ImgPipeline": _sdxl(IMAGE_TO_IMAGE),
    "StableDiffusionXLInpaintPipeline": _sdxl(INPAINTING),
    "StableDiffusionXLInstructPix2PixPipeline": _sdxl("instruct-pix2pix"),
    "StableDiffusionXLControlNetPipeline": _sdxl(),
    "StableDiffusionXLControlNetImg2ImgPipeline": _sdxl(IMAGE_TO_IMAGE),
    "StableDiffusionXLControlNetInpaintPipeline": _sdxl(INPAINTING),
    "StableDiffusionXLAdapterPipeline": _sdxl(offers=()),
    "StableDiffusion3Pipeline": _sd3(),
    "StableDiffusion3Img2ImgPipeline": _sd3(IMAGE_TO_IMAGE),
    "StableDiffusion3InpaintPipeline": _sd3(INPAINTING),
    "PixArtAlphaPipeline": PipelineClass("pixart", offers=()),
    "PixArtSigmaPipeline": PipelineClass("pixart", offers=()),
    "FluxPipeline": _flux(),
    "FluxImg2ImgPipeline": _flux(IMAGE_TO_IMAGE),
    "FluxInpaintPipeline": _flux(INPAINTING),
    "FluxFillPipeline": _flux(INPAINTING),
    "QwenImagePipeline": PipelineClass("qwen_image", offers=(), even_sigmas=True),
    "DiTPipeline": PipelineClass("dit", offers=()),
    # Bundles are guided by scales above 1; its class is by those below too, which are refused.
    "LDMTextToImagePipeline": PipelineClass("latent_diffusion", offers=()),
    "WanPipeline": PipelineClass("wan", offers=()),
    "KandinskyV22CombinedPipeline": PipelineClass("kandinsky", offers=(IMAGE_TO_IMAGE,)),
    "KandinskyV22Img2ImgCombinedPipeline": PipelineClass("kandinsky", (IMAGE_TO_IMAGE,), offers=()),
    "DDPMPipeline": PipelineClass("unconditional", offers=()),
    "DDIMPipeline": PipelineClass("unconditional", offers=()),
}

CLASSES = Registry("pipeline class", PipelineClass, "latentc.pipelines", OWN)


def record_of(class_name: str) -> PipelineClass:
    """Return the record of a diffusers class.

    Raises:
        UnsupportedPipeline: listing the supported classes.
    """
    if class_name not in CLASSES:
        raise UnsupportedPipeline(not_supported(f"pipeline class {class_name!r}"))
    return CLASSES[class_name]


def not_supported(what: str) -> str:
    """Return the message about a pipeline that no family handles."""
    return (
        f"{what} is not supported; supported: {', '.join(CLASSES)}. "
        "How a class is added: docs/extending.md"
    )


def class_of(pipe: Any, task: str) -> type:
    """Return the diffusers class that does `task` with the parts of `pipe`: its own class where
    that is for the task, else the one that ``AutoPipelineFor…`` would take."""
    from diffusers.pipelines import auto_pipeline

    own = type(pipe)
    record = CLASSES.get(own.__name__)
    if (record is not None and task in record.tasks) or task not in _TABLES:
        return own
    tables = {name: getattr(auto_pipeline, table) for name, table in _TABLES.items()}
    models = [model for table in tables.values() for model, cls in table.items() if cls is own]
    classes = [tables[task][model] for model in models if model in tables[task]]
    return classes[0] if classes else own


def of_class(pipe: Any, task: str) -> Any:
    """Return the pipeline of diffusers' class for a task with the same parts."""
    cls: Any = class_of(pipe, task)
    if cls is type(pipe):
        return pipe
    other = cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    if hasattr(other, "watermark"):  # no part of a pipeline, and so not taken over with the parts
        other.watermark = pipe.watermark
    return other
