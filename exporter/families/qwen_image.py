"""Qwen-Image: texts read by Qwen2.5-VL in a template, a transformer over patches of latents with
rotary positions, guidance that keeps the length of each patch, and a VAE of videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from latentc.exporter.classes import TEXT_TO_IMAGE
from latentc.exporter.components.description import Description, Graph, Shifted, Tokens, calling
from latentc.exporter.components.qwen_image_graphs import (
    PATCH,
    Combiner,
    Denoiser,
    FrameDecoder,
    TextEncoder,
)
from latentc.exporter.components.text_to_image import Decoder, Scaling, sample_spec, timestep_spec
from latentc.exporter.components.transformers import latents_of_transformer, longest_text, unpacked
from latentc.exporter.components.unets import check_parts
from latentc.exporter.programs.draft import Draft
from latentc.exporter.programs.sides import NEGATIVE, sides_of
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.statements import GUIDED, Combine, Push, Test

_COMBINER = "combiner"
COMPONENTS = {
    "text_encoder": ("text_encoder",),
    "denoiser": ("transformer",),
    _COMBINER: (),
    "vae_decoder": ("vae",),
}
_SCALE = "true_cfg_scale"
_STATES, _MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
_PUBLIC = {_STATES: "prompt_embeds", _MASK: "prompt_embeds_mask"}
_MAX_SHIFT = 1.15  # of the pipeline, where its scheduler says none
# Entries of the transformer's configuration that other pipelines of Qwen-Image have.
_OF_OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    check_parts(pipe, "text_encoder", "tokenizer", "transformer", "vae")
    _check_transformer(pipe.transformer)
    _check_vae(pipe)
    channels = pipe.vae.config.z_dim
    latents = latents_of_transformer(
        channels, pipe.default_sample_size, pipe.vae_scale_factor, PATCH, rounds=True
    )
    draft = Draft(TEXT_TO_IMAGE, type(pipe), latents)
    _guide(draft)
    for side in sides_of(draft, "off"):
        how = {"template": pipe.prompt_template_encode, "up_to": _ids(pipe)}
        ids = side.tokens("input_ids", "tokenizer", "prompt", **how)
        for name, value in side.run("text_encoder", {"input_ids": ids}, _PUBLIC).items():
            side.feed(name, value)
    encoder = _text_encoder(pipe)
    return Description(
        programs=(draft.program(),),
        graphs=(encoder, _denoiser(pipe, encoder), _combiner(pipe), _decoder(pipe)),
        tokens=(Tokens("tokenizer", _ids(pipe)),),
        denoiser=pipe.transformer,
        call=_call(pipe),
        view=_latents,
        shifted=Shifted(PATCH, _MAX_SHIFT),
    )


def _check_transformer(transformer: Any) -> None:
    """Refuse a transformer that was made for another pipeline.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    config = transformer.config
    asked = [name for name in _OF_OTHERS if config.get(name)]
    if asked:
        raise UnsupportedPipeline(
            f"a QwenImageTransformer2DModel with {' and '.join(asked)}: such models are of other "
            "pipelines than QwenImagePipeline, and are not supported yet"
        )
    packed = PATCH * PATCH * transformer.out_channels
    if config.patch_size != PATCH or config.in_channels != packed:
        raise UnsupportedPipeline(
            f"a QwenImageTransformer2DModel of patches of {config.patch_size} with "
            f"{config.in_channels} input and {transformer.out_channels} output channels: "
            f"QwenImagePipeline has patches of {PATCH}, and {packed} input channels for such an "
            "output"
        )


def _check_vae(pipe: Any) -> None:
    """Refuse a VAE whose latents are not the transformer's, or that makes other images of them than
    the pipeline counts on.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    config, channels = pipe.vae.config, pipe.transformer.out_channels
    if config.z_dim != channels:
        raise UnsupportedPipeline(
            f"a VAE for latents of {config.z_dim} channels does not fit the transformer, which "
            f"has {channels}: diffusers cannot run them either"
        )
    enlarged = 2 ** (len(config.dim_mult) - 1)
    if enlarged != pipe.vae_scale_factor:
        raise UnsupportedPipeline(
            f"a VAE that makes {enlarged} pixels of a latent along a side: QwenImagePipeline "
            f"counts on {pipe.vae_scale_factor}, and makes images of another size than asked for"
        )


def _guide(draft: Draft) -> None:
    """Guide by a negative text; off without one."""
    scale = draft.scale(_SCALE, 4.0)
    texts = tuple(NEGATIVE + name for name in ("prompt", *_PUBLIC.values()))
    when = (Test(argument=scale, above=1.0), Test(given=texts))
    draft.branch("positive")
    draft.branch("negative", NEGATIVE, when, Push(branch="positive", by=scale, less=1.0))
    draft.combine = Combine(component=_COMBINER, feeds={"positive": "positive", GUIDED: GUIDED})


def _ids(pipe: Any) -> int:
    """Return how many ids a text becomes: those of the template's beginning, which the transformer
    is not given, and what it takes at most."""
    return int(pipe.prompt_template_encode_start_idx) + longest_text(pipe)


def _text_encoder(pipe: Any) -> Graph:
    encoder, skipped = pipe.text_encoder, int(pipe.prompt_template_encode_start_idx)
    width, length = encoder.config.get_text_config().hidden_size, f"tokens-{skipped}"
    component = Component(
        name="text_encoder",
        role="encoder",
        inputs={"input_ids": TensorSpec("int64", ("batch", "tokens"))},
        outputs={
            _STATES: TensorSpec("float32", ("batch", length, width)),
            _MASK: TensorSpec("float32", ("batch", length)),
        },
    )
    module = TextEncoder(encoder, pipe.tokenizer.pad_token_id, skipped)
    return Graph(component, module, encoder.get_input_embeddings().num_embeddings)


def _denoiser(pipe: Any, encoder: Graph) -> Graph:
    sample = sample_spec(pipe.vae.config.z_dim)
    *_, width = encoder.component.outputs[_STATES].shape
    inputs = {
        "sample": sample,
        "timestep": timestep_spec(),
        _STATES: TensorSpec("float32", ("batch", "sequence", width)),
        _MASK: TensorSpec("float32", ("batch", "sequence")),
    }
    component = Component("denoiser", "denoiser", inputs, {"prediction": sample})
    return Graph(component, Denoiser(pipe.transformer))


def _combiner(pipe: Any) -> Graph:
    sample = sample_spec(pipe.vae.config.z_dim)
    inputs = {"positive": sample, GUIDED: sample}
    component = Component(_COMBINER, "combiner", inputs, {"prediction": sample})
    return Graph(component, Combiner())


def _decoder(pipe: Any) -> Graph:
    config, factor = pipe.vae.config, pipe.vae_scale_factor
    size = (f"{factor}*height", f"{factor}*width")
    component = Component(
        name="vae_decoder",
        role="decoder",
        inputs={"latents": sample_spec(config.z_dim)},
        outputs={"image": TensorSpec("float32", ("batch", config.input_channels, *size))},
    )
    mean, deviation = (
        torch.tensor(each).float().view(1, -1, 1, 1)
        for each in (config.latents_mean, config.latents_std)
    )
    return Graph(component, Decoder(FrameDecoder(pipe.vae), Scaling(1.0, mean, deviation)))


def _call(pipe: Any) -> Callable[..., Any]:
    """Return what runs the pipeline (see `latentc.exporter.components.description.calling`), with
    so many prompts next to each other in the place of `num_images_per_prompt`: for several prompts
    of different lengths, the class puts the masks of its texts in another order than the texts."""
    run = calling(pipe)

    def call(
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        **arguments: Any,
    ) -> Any:
        texts = {"prompt": [prompt] if isinstance(prompt, str) else [*prompt]}
        if isinstance(negative_prompt, str):
            texts["negative_prompt"] = [negative_prompt] * len(texts["prompt"])
        elif negative_prompt is not None:
            texts["negative_prompt"] = [*negative_prompt]
        repeated = {
            name: [text for text in own for _ in range(num_images_per_prompt)]
            for name, own in texts.items()
        }
        return run(**repeated, **arguments)

    return call


def _latents(held: torch.Tensor, named: Mapping[str, Any]) -> torch.Tensor:
    """Return what the pipeline's loop holds as latents; the transformer was told the size."""
    _, rows, columns = named["img_shapes"][0][0]
    return unpacked(held, torch.empty(rows * PATCH, columns * PATCH, device="meta"), PATCH)
