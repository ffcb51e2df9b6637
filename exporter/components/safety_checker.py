"""The safety checker of Stable Diffusion's pipelines, which makes images black that resemble what
it was told of: a component that is given what the decoder made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from latentc.exporter.components.description import Graph
from latentc.exporter.components.names import SAFETY_CHECKER, USUAL
from latentc.exporter.components.processors import Prepared
from latentc.exporter.components.text_to_image import image_spec
from latentc.exporter.programs.changes import with_postprocessor
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.statements import Program

FLAGS = "nsfw_content_detected"  # diffusers' name, in the output of its pipelines
_KIND = "StableDiffusionSafetyChecker"
_IMAGE, _CHECKED, _FLAG = "image", "checked", "flag"
_THOUSANDTHS = 1000.0  # scores are rounded to three digits
_SHORTEST = 1e-12  # of a row that is made one of length 1
_STRICTER = 0.01  # what is added to the other scores of images that need special care


class SafetyChecker(torch.nn.Module):
    """image [batch, 3, f*height, f*width] in [0, 1] → checked, which is black where the image is
    flagged and else the same; and flag [batch], 1 where it is, else 0.

    As ``StableDiffusionSafetyChecker.forward`` of diffusers, and ``run_safety_checker`` of its
    pipelines. A score is how much the cosine between the image and a concept is above the concept's
    threshold; it counts from 0.0005 on, since it is rounded to thousandths.
    """

    def __init__(self, checker: Any, processor: Any) -> None:
        super().__init__()
        self.prepared = Prepared(processor)
        self.checker = checker

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        checker = self.checker
        pooled = checker.vision_model(self.prepared(image))[1]
        embedded = _normalised(checker.visual_projection(pooled))
        care = _cosines(embedded, checker.special_care_embeds) - checker.special_care_embeds_weights
        stricter = _above(care).amax(dim=1, keepdim=True) * _STRICTER
        scores = _cosines(embedded, checker.concept_embeds) - checker.concept_embeds_weights
        flag = _above(scores + stricter).amax(dim=1)
        shown = torch.where(flag.view(-1, 1, 1, 1) > 0.5, torch.zeros_like(image), image)
        return shown, flag


def _cosines(embedded: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    return embedded @ _normalised(concepts).transpose(0, 1)


def _normalised(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1, as ``torch.nn.functional.normalize`` without its operator."""
    lengths = torch.sqrt((rows * rows).sum(dim=1, keepdim=True))
    return rows / torch.clamp(lengths, min=_SHORTEST)


def _above(scores: torch.Tensor) -> torch.Tensor:
    """Return 1 where a score rounds to more than 0, else 0."""
    return (torch.round(scores * _THOUSANDTHS) > 0.0).to(torch.float32)


def with_safety_checker(
    pipe: Any, graphs: Sequence[Graph], programs: Sequence[Program]
) -> tuple[tuple[Graph, ...], tuple[Program, ...]]:
    """Return graphs and programs with the pipeline's safety checker, where it has one.

    Raises:
        UnsupportedPipeline: a checker or an image processor that nothing is known about.
    """
    checker = getattr(pipe, SAFETY_CHECKER, None)
    if checker is None:
        return tuple(graphs), tuple(programs)
    graph = _graph(pipe, checker)
    checked = (with_postprocessor(program, graph.component, {_FLAG: FLAGS}) for program in programs)
    return (*graphs, graph), tuple(checked)


def _graph(pipe: Any, checker: Any) -> Graph:
    without = f"; leave it out with --without {SAFETY_CHECKER}"
    kind = type(checker).__name__
    if kind != _KIND:
        raise UnsupportedPipeline(
            f"a safety checker of the class {kind} is not supported, only {_KIND}{without}"
        )
    spec = image_spec(pipe.vae)
    if spec.shape[1] != 3:
        raise UnsupportedPipeline(
            f"a safety checker for images of {spec.shape[1]} channels: expected 3{without}"
        )
    try:
        module = SafetyChecker(checker, pipe.feature_extractor)
    except UnsupportedPipeline as error:
        raise UnsupportedPipeline(f"the safety checker: {error}{without}") from error
    side = int(checker.config.vision_config.image_size)
    if module.prepared.cropped.sides != (side, side):
        raise UnsupportedPipeline(
            f"the safety checker takes images of {side} pixels, and the feature_extractor makes "
            f"some of {list(module.prepared.cropped.sides)}: diffusers cannot run it either"
            f"{without}"
        )
    component = Component(
        SAFETY_CHECKER,
        "postprocessor",
        {_IMAGE: spec},
        {_CHECKED: spec, _FLAG: TensorSpec("float32", ("batch",))},
        precision=USUAL[SAFETY_CHECKER],
    )
    return Graph(component, module)
