"""Depth-to-image: a UNet that takes the depth of an image besides its noisy latents. The estimator
of that depth (Ranftl, Bochkovskiy and Koltun 2021, https://arxiv.org/abs/2103.13413) is a component
that runs once for a call."""

from __future__ import annotations

from typing import Any, Literal

import torch

from latentc.exporter.components.description import Graph
from latentc.exporter.components.processors import Normalised
from latentc.exporter.components.tasks.task import IMAGE, Task, encode_image, size_by
from latentc.exporter.components.text_to_image import vae_factor
from latentc.exporter.programs.draft import IMAGE_LATENTS, Draft, Phase, Start
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline

_NAME, _INPUT = "depth_estimator", "depth"
_CANVAS = "canvas"
_RESAMPLING: dict[int, Literal["lanczos", "bilinear", "bicubic"]] = {
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}  # Pillow's numbers
_EIGHT_BITS = 1 / 255


def depth_to_image(pipe: Any, encoder: Graph) -> Task:
    """Return the task that starts from the noisy latents of an image, with its depth as another
    channel.

    Raises:
        UnsupportedPipeline: a depth estimator or a processor that nothing is known about.
    """
    estimator = _estimator(pipe)
    inputs = estimator.component.inputs
    resample = _RESAMPLING[int(pipe.feature_extractor.resample)]

    def write(draft: Draft) -> None:
        draft.image(IMAGE)
        clean = encode_image(
            *(draft, encoder.component, f"_{IMAGE_LATENTS}", Phase.BEFORE_NOISE), each_made=True
        )
        draft.start = Start(clean)
        shapes = {name: spec.shape[1:] for name, spec in inputs.items()}
        phase, name = Phase.BEFORE_NOISE, f"_{_NAME}"
        looked = draft.pixels(f"{name}_image", IMAGE, shapes["image"], phase, resample=resample)
        canvas = draft.pixels(f"{name}_{_CANVAS}", IMAGE, shapes[_CANVAS], phase)
        feeds = {"image": looked, _CANVAS: canvas}
        draft.feed(_INPUT, draft.run(_NAME, feeds, {_INPUT: f"_{_INPUT}"}, phase)[_INPUT])
        size_by(draft, IMAGE)

    channels = {_INPUT: estimator.component.outputs[_INPUT]}
    return Task("depth-to-image", write, (encoder, estimator), channels)


class DepthEstimator(torch.nn.Module):
    """image [batch, 3, size, size] in [0, 1] and canvas [batch, 3, f*height, f*width], of which
    nothing but the size is looked at → depth [batch, 1, height, width] from -1 to 1."""

    def __init__(self, estimator: Any, processor: Any, factor: int) -> None:
        super().__init__()
        self.estimator = estimator
        self.normalised = Normalised(processor)
        self.factor = factor

    def forward(self, image: torch.Tensor, canvas: torch.Tensor) -> tuple[torch.Tensor]:
        found = self.estimator(self.normalised(image)).predicted_depth
        sides = canvas.shape[2] // self.factor, canvas.shape[3] // self.factor
        depth = torch.nn.functional.interpolate(
            found.unsqueeze(1), size=sides, mode="bicubic", align_corners=False
        )
        least = torch.amin(depth, dim=[1, 2, 3], keepdim=True)
        most = torch.amax(depth, dim=[1, 2, 3], keepdim=True)
        return (2.0 * (depth - least) / (most - least) - 1.0,)


def _estimator(pipe: Any) -> Graph:
    kind = type(pipe.depth_estimator).__name__
    if kind != "DPTForDepthEstimation":
        raise UnsupportedPipeline(
            f"a depth estimator of the class {kind} is not supported, only DPTForDepthEstimation"
        )
    height, width = _size(pipe.feature_extractor)
    factor = vae_factor(pipe.vae)
    component = Component(
        _NAME,
        "image_encoder",
        {
            "image": TensorSpec("float32", ("batch", 3, height, width)),
            _CANVAS: TensorSpec("float32", ("batch", 3, f"{factor}*height", f"{factor}*width")),
        },
        {_INPUT: TensorSpec("float32", ("batch", 1, "height", "width"))},
    )
    return Graph(component, DepthEstimator(pipe.depth_estimator, pipe.feature_extractor, factor))


def _size(processor: Any) -> tuple[int, int]:
    """Return height and width of every image that the estimator is given, in pixels.

    Raises:
        UnsupportedPipeline: the processor does something else than stretch to one size and
            normalise.
    """
    wanted = {"do_resize": True, "keep_aspect_ratio": False, "do_pad": False}
    wanted |= {"do_rescale": True, "do_normalize": True}
    for name, value in wanted.items():
        setting = bool(getattr(processor, name, value))
        if setting != value:
            raise UnsupportedPipeline(
                f"a depth estimator's processor with {name} {setting} is not supported, "
                f"only {value}"
            )
    if abs(float(processor.rescale_factor) - _EIGHT_BITS) > 1e-9:
        raise UnsupportedPipeline(
            f"a depth estimator's processor with rescale_factor {processor.rescale_factor} is not "
            "supported, only 1/255"
        )
    if int(processor.resample) not in _RESAMPLING:
        raise UnsupportedPipeline(
            f"a depth estimator's processor with resample {processor.resample} is not supported; "
            "supported: " + ", ".join(f"{n} ({name})" for n, name in _RESAMPLING.items())
        )
    unit = int(getattr(processor, "ensure_multiple_of", 1) or 1)
    height, width = (round(processor.size[side] / unit) * unit for side in ("height", "width"))
    return height, width
