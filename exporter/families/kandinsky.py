"""Kandinsky 2.2 (Razzhigaev et al. 2023, https://arxiv.org/abs/2310.03502): a prior makes an
embedding of an image from a text, as unCLIP's does (Ramesh et al. 2022), and a UNet with MoVQ's
decoder an image from that. Two loops, with a scheduler each.

Calls may give the embedding in the place of a text (`image_embeds`, `negative_image_embeds`), or
ask for it. diffusers' `latents`, the noise of the prior, is `prior_latents` here: `latents` is the
noise of the image, as in `KandinskyV22Pipeline`.

A call with a negative prompt has another loop for its prior: the embeddings of the prompt and of
the negative prompt are denoised side by side, as two states, since diffusers draws the noise of
both together. Neither is guided away from no text, and no image is guided away from no image then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from latentc.exporter.classes import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, class_of, record_of
from latentc.exporter.components.description import (
    Description,
    FixedScheduler,
    Graph,
    Tokens,
    calling,
    size_multiple,
)
from latentc.exporter.components.tasks.task import IMAGE
from latentc.exporter.components.text_to_image import (
    SCALE,
    guided_branches,
    ids_spec,
    sample_spec,
    timestep_spec,
    vae_factor,
)
from latentc.exporter.components.unets import Unpadded, check_parts, check_scheduler, text_length
from latentc.exporter.programs.defaults import defaults_of
from latentc.exporter.programs.draft import IMAGE_LATENTS, Draft, Phase, Start
from latentc.exporter.programs.sides import NEGATIVE, Side
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import UnsupportedPipeline
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.programs.statements import (
    Branch,
    Choose,
    Feed,
    Loop,
    Plan,
    Program,
    Push,
    State,
    Test,
    Zeros,
)

COMPONENTS = {
    "text_encoder": ("prior_text_encoder", "prior_tokenizer"),
    "no_text": ("prior_text_encoder", "prior_tokenizer"),
    "prior": ("prior_prior",),
    "prior_pair": ("prior_prior",),
    "prior_output": ("prior_prior", "prior_image_encoder"),
    "denoiser": ("unet",),
    "vae_decoder": ("movq",),
}
_TOKENIZER = "prior_tokenizer"
# Of the pipelines' own names for what the prior takes.
_EMBEDS, _STATES, _MASK = "prompt_embeds", "text_encoder_hidden_states", "text_mask"
_PRIOR_INPUTS = {
    "proj_embedding": _EMBEDS,
    "encoder_hidden_states": _STATES,
    "attention_mask": _MASK,
}
_IMAGE_EMBEDS = "image_embeds"
_PRIOR_SCALE, _PRIOR_STEPS = "prior_guidance_scale", "prior_num_inference_steps"
_PRIOR_SCHEDULER, _PRIOR_LATENTS = "prior_scheduler", "prior_latents"
# PyTorch makes normal values in blocks of so many: two draws of whole blocks are as one of both.
_BLOCK = 16
# The pipelines hand their samples to the UNet as they are, and a generator to every step.
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
# What diffusers' class does with them.
_UNUSUAL = "scales no samples for its scheduler, and hands a generator to each of its steps"


class TextEncoder(torch.nn.Module):
    """input_ids int64 [batch, length] → the projected text [batch, width], the last hidden state
    [batch, length, states], and 1 where the text is and 0 where it was filled [batch, length]. The
    encoder itself looks at all of it, as in the pipeline."""

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.unpadded = Unpadded(tokenizer)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = self.encoder(input_ids)
        return made.text_embeds, made.last_hidden_state, self.unpadded(input_ids).float()


class NoText(torch.nn.Module):
    """Gives what the text encoder makes of no text: constants, for each row of `rows` [batch,
    1]."""

    def __init__(self, encoder: TextEncoder, ids: torch.Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            values = encoder(ids)
        for name, value in zip((_EMBEDS, _STATES, _MASK), values, strict=True):
            self.register_buffer(name, value.clone(), persistent=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ones = torch.ones_like(rows)
        values = [getattr(self, name) for name in (_EMBEDS, _STATES, _MASK)]
        return tuple(
            value * ones.reshape(-1, *[1] * (value.ndim - 1)).to(value.dtype) for value in values
        )


class Prior(torch.nn.Module):
    """An embedding that is denoised [batch, width], what encoders made of a text → the embedding
    of an image that the prior predicts, in the form of the sample."""

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.prior = prior

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        proj_embedding: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        made = self.prior(
            *(sample, timestep, proj_embedding, encoder_hidden_states, attention_mask),
            return_dict=False,
        )
        return (made[0],)


class PriorPair(torch.nn.Module):
    """Takes two embeddings that are denoised [batch, width] and what encoders made of the text of
    each → what the prior predicts of each, in the form of the samples."""

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.prior = Prior(prior)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        proj_embedding: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        negative_sample: torch.Tensor,
        negative_proj_embedding: torch.Tensor,
        negative_encoder_hidden_states: torch.Tensor,
        negative_attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        (made,) = self.prior(
            torch.cat([sample, negative_sample]),
            torch.cat([timestep, timestep]),
            torch.cat([proj_embedding, negative_proj_embedding]),
            torch.cat([encoder_hidden_states, negative_encoder_hidden_states]),
            torch.cat([attention_mask, negative_attention_mask]),
        )
        rows = sample.shape[0]
        return made[:rows], made[rows:]


class PriorOutput(torch.nn.Module):
    """Takes what the prior denoised [batch, width] → the embedding of an image, scaled back, and
    that of no image, a constant, both in the same form."""

    deviation: torch.Tensor
    mean: torch.Tensor
    nothing: torch.Tensor

    def __init__(self, prior: Any, image_encoder: Any) -> None:
        super().__init__()
        self.register_buffer("deviation", prior.clip_std.detach().float())
        self.register_buffer("mean", prior.clip_mean.detach().float())
        side = image_encoder.config.image_size
        with torch.no_grad():
            nothing = image_encoder(torch.zeros(1, 3, side, side)).image_embeds
        self.register_buffer("nothing", nothing.float(), persistent=False)

    def forward(self, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return embeds * self.deviation + self.mean, self.nothing + torch.zeros_like(embeds)


class Denoiser(torch.nn.Module):
    """Noisy latents [batch, channels, height, width] and the embedding of an image → the predicted
    noise, and what the UNet says of the variance, each in the form of the latents."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.channels = unet.config.in_channels

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, image_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.unet(
            *(sample, timestep, None),
            added_cond_kwargs={_IMAGE_EMBEDS: image_embeds},
            return_dict=False,
        )[0]
        return both[:, : self.channels], both[:, self.channels :]


class Decoder(torch.nn.Module):
    """latents [batch, channels, height, width] → image [batch, 3, f*height, f*width], 0 to 1. They
    are not rounded to the codebook, and have no scale."""

    def __init__(self, movq: Any) -> None:
        super().__init__()
        self.movq = movq

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        image = self.movq.decode(latents, force_not_quantize=True, return_dict=False)[0]
        return (image * 0.5 + 0.5,)


class Encoder(torch.nn.Module):
    """image [batch, 3, f*height, f*width], 0 to 1 → latents. `Decoder` backwards."""

    def __init__(self, movq: Any) -> None:
        super().__init__()
        self.movq = movq

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.movq.encode(image * 2.0 - 1.0, return_dict=False)[0],)


def describe(pipe: Any) -> Description:
    """See `latentc.exporter.components.description.Description`."""
    parts = ("unet", "movq", "prior_prior", "prior_image_encoder", "prior_text_encoder")
    check_parts(pipe, *parts, _TOKENIZER, _PRIOR_SCHEDULER)
    _check_unet(pipe)
    _check_movq(pipe)
    _check_prior(pipe.prior_prior)
    check_scheduler(pipe.scheduler, _SCHEDULERS, "Kandinsky 2.2", _UNUSUAL)
    record, encoder = record_of(type(pipe).__name__), _encoder(pipe)
    fixed = FixedScheduler(pipe.prior_scheduler, int(defaults_of(type(pipe))[_PRIOR_STEPS][0]))
    return Description(
        programs=tuple(
            _program(pipe, task, encoder.component)
            for task in (*(record.tasks or (TEXT_TO_IMAGE,)), *record.offers)
        ),
        graphs=(
            *(_text_encoder(pipe), _no_text(pipe), _denoiser(pipe), _prior(pipe)),
            *(_prior_pair(pipe), _prior_output(pipe), encoder, _decoder(pipe)),
        ),
        tokens=(Tokens(_TOKENIZER),),
        denoiser=pipe.unet,
        call=_calling(pipe),
        calling=_calling,
        fixed_schedulers={_PRIOR_SCHEDULER: fixed},
    )


def _calling(pipe: Any) -> Callable[..., Any]:
    """Return what runs a pipeline (see `latentc.exporter.components.description.calling`). The
    class that makes images from others takes height and width for one another."""
    run = calling(pipe, callback_steps=None)  # which diffusers warns of otherwise
    if IMAGE_TO_IMAGE not in record_of(type(pipe).__name__).tasks:
        return run

    def swapped(height: int | None = None, width: int | None = None, **arguments: Any) -> Any:
        sides = {"height": width, "width": height}
        return run(**arguments, **{name: side for name, side in sides.items() if side is not None})

    return swapped


# Programs.


def _program(pipe: Any, task: str, encoder: Component) -> Program:
    draft = Draft(task, class_of(pipe, task), _latents(pipe))
    _write_guidance(draft)
    _write_prior(draft, pipe.prior_prior.config.embedding_dim)
    if task == IMAGE_TO_IMAGE:
        _write_image(draft, encoder)
    return draft.program()


def _write_guidance(draft: Draft) -> None:
    """Guide images by Ho and Salimans 2022, away from the embedding of no image, in diffusers'
    order of a batch."""
    guided_branches(draft, draft.scale(SCALE, 1.0))
    draft.variance = "variance"


def _write_prior(draft: Draft, width: int) -> None:
    """Make the embedding of an image from the prompt, `width` numbers, and that of what the image
    is guided away from: of no image, or in a call with a negative prompt of that. Feed both to the
    denoiser."""
    text = _write_text(draft, "")
    negative = _write_text(draft, NEGATIVE)
    phase = Phase.EMBEDDINGS
    noise = draft.noise(_PRIOR_LATENTS, (width,), phase)
    negative_noise = draft.noise(NEGATIVE + _PRIOR_LATENTS, (width,), phase)
    draft.scale(_PRIOR_SCALE, 1.0)
    steps = draft.steps(_PRIOR_STEPS)
    away_from_nothing = _write_loop(draft, text, noise, steps)
    away_from_text = _write_pair_loop(draft, (text, negative), (noise, negative_noise), steps)
    when = (Test(given=(NEGATIVE + "prompt", negative[_EMBEDS])),)
    for prefix in ("", NEGATIVE):
        name = prefix + _IMAGE_EMBEDS
        gives = draft.named(name)
        choose = Choose(
            gives=gives,
            when=when,
            then=away_from_text[name],
            otherwise=away_from_nothing[name],
            group=_IMAGE_EMBEDS,
        )
        draft.add(choose, phase)
        Side(draft, prefix).feed(_IMAGE_EMBEDS, gives)


def _write_text(draft: Draft, prefix: str) -> dict[str, str]:
    """Encode the text of a side; return its values by the pipelines' names."""
    side = Side(draft, prefix, missing="off")
    ids = side.tokens("input_ids", _TOKENIZER, "prompt")
    return side.run("text_encoder", {"input_ids": ids}, {n: n for n in (_EMBEDS, _STATES, _MASK)})


def _write_loop(draft: Draft, text: Mapping[str, str], noise: str, steps: str) -> dict[str, str]:
    """Denoise the embedding of an image, guided away from no text. Return it and that of no image,
    by public name."""
    phase = Phase.EMBEDDINGS
    rows = draft.named("_rows")
    draft.add(Zeros(gives=rows, shape=(1,)), phase)
    nothing = draft.run("no_text", {"rows": rows}, {name: f"_no_{name}" for name in text}, phase)
    loop = Loop(
        denoiser="prior",
        plan=Plan(fixed=_PRIOR_SCHEDULER, steps=steps),
        state=State(name=draft.named("_prior"), noise=noise),
        branches=_prior_branches("no_text", _prior_feeds(nothing), _prior_feeds(text)),
    )
    draft.add(loop, phase)
    gives = {name: f"_prior_{name}" for name in (_IMAGE_EMBEDS, NEGATIVE + _IMAGE_EMBEDS)}
    return draft.run("prior_output", {"embeds": loop.state.name}, gives, phase)


def _write_pair_loop(
    draft: Draft, texts: Sequence[Mapping[str, str]], noises: Sequence[str], steps: str
) -> dict[str, str]:
    """Denoise the embeddings of two texts side by side, both guided away from the second text.
    Return them by public name.

    Args:
        texts: the values of the prompt and of the negative prompt.
        noises: what the two begin with.
    """
    text, negative = texts
    states = [
        State(
            name=draft.named(f"_{prefix}pair"),
            noise=noise,
            input=prefix + "sample",
            prediction=prefix + "prediction",
        )
        for prefix, noise in zip(("", NEGATIVE), noises, strict=True)
    ]
    loop = Loop(
        denoiser="prior_pair",
        plan=Plan(fixed=_PRIOR_SCHEDULER, steps=steps),
        state=states[0],
        other_states=(states[1],),
        branches=_prior_branches("negative", _prior_feeds(negative), _prior_feeds(text)),
        feeds=_prior_feeds(negative, NEGATIVE),
    )
    draft.add(loop, Phase.EMBEDDINGS)
    embeds: dict[str, str] = {}
    for prefix, state in zip(("", NEGATIVE), states, strict=True):
        gives = {_IMAGE_EMBEDS: f"_{prefix}pair_{_IMAGE_EMBEDS}"}
        output = draft.run("prior_output", {"embeds": state.name}, gives, Phase.EMBEDDINGS)
        embeds[prefix + _IMAGE_EMBEDS] = output[_IMAGE_EMBEDS]
    return embeds


def _prior_feeds(text: Mapping[str, str], prefix: str = "") -> dict[str, Feed]:
    """Return what feeds a prior with the values of a text, its inputs with a prefix."""
    return {prefix + input: text[name] for input, name in _PRIOR_INPUTS.items()}


def _prior_branches(
    name: str, away_from: dict[str, Feed], feeds: dict[str, Feed]
) -> tuple[Branch, ...]:
    """Return the branches of a prior's guidance, the one that leads away first, by its name."""
    push = Push(branch="text", by=_PRIOR_SCALE, less=1.0)
    when = (Test(argument=_PRIOR_SCALE, above=1.0),)
    return (
        Branch(name=name, feeds=away_from, when=when, push=(push,)),
        Branch(name="text", feeds=feeds),
    )


def _write_image(draft: Draft, encoder: Component) -> None:
    """Begin with the noisy latents of an image (Meng et al. 2021, SDEdit)."""
    phase, shape = Phase.BEFORE_NOISE, encoder.inputs[IMAGE].shape[1:]
    draft.image(IMAGE)
    # As the image processor of the pipeline is made.
    how = {"resample": "bicubic", "reducing_gap": 1.0}
    pixels = draft.pixels(f"_{encoder.name}_image", IMAGE, shape, phase, **how)
    made = draft.run(encoder.name, {IMAGE: pixels}, {"latents": IMAGE_LATENTS}, phase)
    draft.start = Start(made["latents"], rounds="down")


# Graphs.


def _latents(pipe: Any) -> Latents:
    """Return the sizes of the latents. The class without an image makes images of other sizes
    larger, to a multiple of the square of a latent's pixels; bundles refuse them."""
    factor, defaults = vae_factor(pipe.movq), defaults_of(type(pipe))
    return Latents(
        channels=pipe.unet.config.in_channels,
        factor=factor,
        multiple=math.lcm(factor, size_multiple(pipe.unet)),
        default_height=int(defaults["height"][0]),
        default_width=int(defaults["width"][0]),
    )


def _text_specs(pipe: Any) -> dict[str, TensorSpec]:
    config = pipe.prior_text_encoder.config
    length = text_length(pipe.prior_tokenizer, pipe.prior_text_encoder)
    return {
        _EMBEDS: TensorSpec("float32", ("batch", config.projection_dim)),
        _STATES: TensorSpec("float32", ("batch", length, config.hidden_size)),
        _MASK: TensorSpec("float32", ("batch", length)),
    }


def _text_encoder(pipe: Any) -> Graph:
    encoder, tokenizer = pipe.prior_text_encoder, pipe.prior_tokenizer
    inputs = {"input_ids": ids_spec(text_length(tokenizer, encoder))}
    component = Component("text_encoder", "encoder", inputs, _text_specs(pipe))
    return Graph(component, TextEncoder(encoder, tokenizer), encoder.config.vocab_size)


def _no_text(pipe: Any) -> Graph:
    encoder, tokenizer = pipe.prior_text_encoder, pipe.prior_tokenizer
    length = text_length(tokenizer, encoder)
    ids = tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids
    inputs = {"rows": TensorSpec("float32", ("batch", 1))}
    component = Component("no_text", "encoder", inputs, _text_specs(pipe))
    return Graph(component, NoText(TextEncoder(encoder, tokenizer).eval(), ids))


def _prior(pipe: Any) -> Graph:
    sample = TensorSpec("float32", ("batch", pipe.prior_prior.config.embedding_dim))
    specs = _text_specs(pipe)
    inputs = {
        "sample": sample,
        "timestep": timestep_spec(),
        **{input: specs[name] for input, name in _PRIOR_INPUTS.items()},
    }
    bounds = {"attention_mask": (0.0, 1.0)}
    component = Component("prior", "denoiser", inputs, {"prediction": sample})
    return Graph(component, Prior(pipe.prior_prior), bounds=bounds)


def _prior_pair(pipe: Any) -> Graph:
    single = _prior(pipe).component
    second = {NEGATIVE + name: spec for name, spec in single.inputs.items() if name != "timestep"}
    inputs = {**single.inputs, **second}
    outputs = {prefix + "prediction": single.outputs["prediction"] for prefix in ("", NEGATIVE)}
    bounds = {prefix + "attention_mask": (0.0, 1.0) for prefix in ("", NEGATIVE)}
    component = Component("prior_pair", "denoiser", inputs, outputs)
    return Graph(component, PriorPair(pipe.prior_prior), bounds=bounds)


def _prior_output(pipe: Any) -> Graph:
    embeds = TensorSpec("float32", ("batch", pipe.prior_prior.config.embedding_dim))
    outputs = {_IMAGE_EMBEDS: embeds, NEGATIVE + _IMAGE_EMBEDS: embeds}
    component = Component("prior_output", "encoder", {"embeds": embeds}, outputs)
    return Graph(component, PriorOutput(pipe.prior_prior, pipe.prior_image_encoder))


def _denoiser(pipe: Any) -> Graph:
    sample = sample_spec(pipe.unet.config.in_channels)
    embeds = TensorSpec("float32", ("batch", pipe.prior_prior.config.embedding_dim))
    inputs = {"sample": sample, "timestep": timestep_spec(), _IMAGE_EMBEDS: embeds}
    outputs = {"prediction": sample, "variance": sample}
    return Graph(Component("denoiser", "denoiser", inputs, outputs), Denoiser(pipe.unet))


def _image(pipe: Any) -> TensorSpec:
    factor = vae_factor(pipe.movq)
    return TensorSpec("float32", ("batch", 3, f"{factor}*height", f"{factor}*width"))


def _decoder(pipe: Any) -> Graph:
    inputs = {"latents": sample_spec(pipe.unet.config.in_channels)}
    component = Component("vae_decoder", "decoder", inputs, {"image": _image(pipe)})
    return Graph(component, Decoder(pipe.movq))


def _encoder(pipe: Any) -> Graph:
    outputs = {"latents": sample_spec(pipe.unet.config.in_channels)}
    component = Component("vae_encoder", "image_encoder", {IMAGE: _image(pipe)}, outputs)
    return Graph(component, Encoder(pipe.movq))


# What is refused.


def _check_unet(pipe: Any) -> None:
    """Refuse a UNet that takes something else than the embedding of an image, or says no variance.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    config, name = pipe.unet.config, type(pipe).__name__
    for option, wanted in (
        ("encoder_hid_dim_type", "image_proj"),
        ("addition_embed_type", "image"),
    ):
        if getattr(config, option, None) != wanted:
            raise UnsupportedPipeline(
                f"a UNet with {option} {getattr(config, option, None)!r} does not fit {name}, "
                f"which gives it the embedding of an image alone: expected {wanted!r}"
            )
    if config.out_channels != 2 * config.in_channels:
        raise UnsupportedPipeline(
            f"a UNet with {config.in_channels} input and {config.out_channels} output channels "
            f"does not fit {name}, which cuts what it predicts in two: diffusers cannot run it "
            "either"
        )
    if getattr(pipe.unet, "class_embedding", None) is not None:
        raise UnsupportedPipeline(
            f"a UNet that takes class labels does not fit {name}, which has none to give: "
            "diffusers cannot run it either"
        )


def _check_movq(pipe: Any) -> None:
    """Refuse an autoencoder for other latents than the UNet's, or whose latents are numbers of a
    codebook.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    name, config = type(pipe.movq).__name__, pipe.movq.config
    if name != "VQModel":
        raise UnsupportedPipeline(f"a movq of the class {name} is not supported: expected VQModel")
    if config.lookup_from_codebook:
        raise UnsupportedPipeline(
            "a movq with lookup_from_codebook takes numbers of its codebook, and the UNet makes "
            "latents: diffusers cannot run it either"
        )
    channels, wanted = config.vq_embed_dim or config.latent_channels, pipe.unet.config.in_channels
    if channels != wanted:
        raise UnsupportedPipeline(
            f"a movq for latents of {channels} channels does not fit the UNet, which has {wanted}: "
            "diffusers cannot run them either"
        )
    if (config.in_channels, config.out_channels) != (3, 3):
        raise UnsupportedPipeline(
            f"a movq for images of {config.in_channels} and {config.out_channels} channels: "
            "expected 3"
        )


def _check_prior(prior: Any) -> None:
    """Refuse a prior that gives more than one embedding, or another than it takes, or one whose
    noise for two embeddings is not that of one after the other.

    Raises:
        UnsupportedPipeline: naming what it has and what it would need.
    """
    config = prior.config
    kind = getattr(config, "added_emb_type", "prd")
    if kind != "prd":
        raise UnsupportedPipeline(f"a prior with added_emb_type {kind!r}: expected 'prd'")
    made = config.clip_embed_dim or config.embedding_dim
    if made != config.embedding_dim:
        raise UnsupportedPipeline(
            f"a prior that takes embeddings of {config.embedding_dim} numbers and gives {made}: "
            "diffusers cannot run it either"
        )
    if config.embedding_dim % _BLOCK:
        raise UnsupportedPipeline(
            f"a prior of embeddings of {config.embedding_dim} numbers: expected a multiple of "
            f"{_BLOCK}, since the noise of several embeddings would be other than that of each"
        )
