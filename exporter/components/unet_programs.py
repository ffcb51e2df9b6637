"""The programs of pipelines with a UNet and a VAE: what they have in common with each other, and
what adapters add to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from latentc.exporter.classes import class_of, of_class
from latentc.exporter.components.adapters.controlnet import call_with_controlnets, with_controlnets
from latentc.exporter.components.adapters.ip_adapter import with_ip_adapter
from latentc.exporter.components.adapters.t2i_adapter import (
    call_with_t2i_adapters,
    with_t2i_adapters,
)
from latentc.exporter.components.description import (
    Description,
    Graph,
    Tokens,
    calling,
    latents_of_unet,
)
from latentc.exporter.components.safety_checker import with_safety_checker
from latentc.exporter.components.tasks.image_tasks import joined_graphs, tasks_of, with_inputs
from latentc.exporter.components.text_to_image import (
    Scaling,
    classifier_free_guidance,
    decoder_graph,
    distilled,
    feed_scale,
    vae_factor,
)
from latentc.exporter.components.unets import multiple_of
from latentc.exporter.programs.draft import Draft


def describe_unet(
    pipe: Any,
    encoders: Sequence[Graph],
    denoiser: Graph,
    tokens: Sequence[Tokens],
    scaling: Scaling,
    write: Callable[[Draft], None],
) -> Description:
    """Return the description of a pipeline with a UNet, and with the adapters that it has.

    Args:
        encoders: of the texts.
        denoiser: of latents, texts and numbers alone.
        scaling: between the VAE's latents and the denoiser's.
        write: adds the texts and numbers to a program whose guidance is there.
    """
    tasks = tasks_of(pipe, scaling)
    own = tasks[0]
    latents = latents_of_unet(pipe.unet, vae_factor(pipe.vae), multiple_of(pipe.unet))
    usual = _told if distilled(pipe.unet) else classifier_free_guidance
    drafts = [Draft(task.name, class_of(pipe, task.name), latents) for task in tasks]
    for draft, task in zip(drafts, tasks, strict=True):
        (own.guide or usual)(draft)
        write(draft)
        if distilled(pipe.unet):
            feed_scale(draft)
        task.write(draft)
    decoder = decoder_graph(pipe.vae, scaling)
    graphs = joined_graphs([*encoders, with_inputs(denoiser, own), decoder], tasks)
    for adapt in (with_ip_adapter, with_controlnets, with_t2i_adapters):
        graphs = adapt(pipe, graphs, drafts)
    graphs, programs = with_safety_checker(pipe, graphs, [draft.program() for draft in drafts])
    call = calling(of_class(pipe, own.name))
    call = call_with_t2i_adapters(pipe, call_with_controlnets(pipe, call, drafts[0]))
    return Description(
        programs=programs,
        graphs=graphs,
        tokens=tuple(tokens),
        denoiser=pipe.unet,
        call=call,
    )


def _told(draft: Draft) -> None:
    """Guide in one branch, which is told the scale."""
    draft.branch("positive")
