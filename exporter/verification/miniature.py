"""Miniatures of pipelines: the same classes with fewer and narrower layers, made from a pipeline's
own configurations, with random weights.

What a program does with numbers of prompts, images and seeds, and with the flags of a
configuration, shows on a miniature as well, where the pipeline itself is too large to be run again
and again. What is tied together stays so: the widths of texts and of what attends to them, pooled
texts, features of adapters; and so do channels of latents, factors of sizes, vocabularies and
whatever a pipeline or a family looks at.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from msgspec import structs

from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.errors import ExportError, first_line
from latentc.runtimes.programs.statements import Cut, Program, Zeros

AFFORDABLE = 500_000_000  # numbers of a part that is taken as it is
_SEED = 48
_CHANNELS = 32  # of every block of convolutions; some have 32 groups, whatever is configured
_GROUPS = 4  # of the normalizations of others, and heads of their attention
_HEADS = 3  # of a transformer; times their width a multiple of 3 and of 4, as embeddings want
_HEAD_WIDTH = 8
_AXIS_WIDTH = 4  # of rotary positions, for each axis
_TIME_WIDTH = 8  # of each number that SDXL's UNet is told
_LANGUAGE_HEADS = 2  # of a language model
_LANGUAGE_HEAD_WIDTH = 12  # of half of which each of three rotary axes has a third
_TEXT_LAYERS = 2  # pipelines take the states before the last layer
_JOINED_MORE = 8  # of a joint width above that of the texts in it
_ZERO_SCALE = 0.1  # standard deviation of weights that begin as zeros, which would hide inputs


class NoMiniature(ExportError):
    """A pipeline has parts of which no smaller ones can be made."""


@dataclass(frozen=True)
class _Width:
    """A width of the pipeline, and that of its miniature."""

    old: int = 0
    new: int = 0

    def __add__(self, other: _Width) -> _Width:
        return _Width(self.old + other.old, self.new + other.new)

    def of(self, value: Any, what: str) -> Any:
        """Return the new width in the form of `value`, a width or several equal ones.

        Raises:
            NoMiniature: `value` is not the old width.
        """
        if isinstance(value, list | tuple):
            return type(value)(self.of(each, what) for each in value)
        if value != self.old:
            raise NoMiniature(f"{what} is {value}, and {self.old} are given")
        return self.new


@dataclass(frozen=True)
class _Widths:
    """These are the widths that parts of a pipeline have in common.

    Attributes:
        texts: of the states of each text encoder, by its name in the pipeline.
        pooled: of the projection of each CLIP, likewise.
        image: of the image encoder's states.
        embedded: of its projection.
    """

    texts: Mapping[str, _Width]
    pooled: Mapping[str, _Width]
    image: _Width = _Width()
    embedded: _Width = _Width()

    @property
    def joined(self) -> _Width:
        """Return the width of all texts' states side by side."""
        return sum(self.texts.values(), _Width())


Changes = dict[str, Any]


def numbers_of(modules: Iterator[torch.nn.Module]) -> int:
    """Return how many numbers the weights of modules are."""
    return sum(weights.numel() for module in modules for weights in module.parameters())


def miniature_of(pipe: Any) -> Any:
    """Return a diffusers pipeline of the same class and flags with fewer and narrower layers of
    fixed random weights, on the CPU in float32; schedulers, tokenizers and processors are copies.

    Raises:
        NoMiniature: a part is of a kind that nothing is known about, and has more than
            `AFFORDABLE` numbers; or the parts do not fit as diffusers' own do.
    """
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        try:
            return _rebuilt(pipe)
        except NoMiniature:
            raise
        except Exception as error:  # of a configuration that diffusers' constructors refuse
            raise NoMiniature(first_line(error)) from error


def same_but_for_widths(one: Program, other: Program) -> bool:
    """Return whether two programs are the same, but for the widths of what they cut and of zeros,
    which follow from those of the components."""
    return _without_widths(one) == _without_widths(other)


def _without_widths(program: Program) -> Program:
    steps = [
        structs.replace(step, sizes=(1,) * len(step.sizes))
        if isinstance(step, Cut)
        else structs.replace(step, shape=(1,) * len(step.shape))
        if isinstance(step, Zeros)
        else step
        for step in program.steps
    ]
    return structs.replace(program, steps=tuple(steps))


def _rebuilt(pipe: Any) -> Any:
    parts = pipe.components
    widths = _widths_of(parts)
    made: Changes = {
        name: _part(part, name, widths)
        if isinstance(part, torch.nn.Module)
        else copy.deepcopy(part)
        for name, part in parts.items()
    }
    accepted = inspect.signature(type(pipe).__init__).parameters
    flags = {name: value for name, value in pipe.config.items() if name not in made}
    given = {name: value for name, value in {**flags, **made}.items() if name in accepted}
    if "add_watermarker" in accepted:
        given["add_watermarker"] = False  # which needs another package, and is no part of bundles
    small = type(pipe)(**given)
    small.set_progress_bar_config(disable=True)
    return small


def _widths_of(parts: Mapping[str, Any]) -> _Widths:
    """Return the widths of a pipeline's encoders. No two text encoders of a miniature have the same
    ones, so that one in the other's place does not go unnoticed."""
    texts: dict[str, _Width] = {}
    pooled: dict[str, _Width] = {}
    for name, part in parts.items():
        kind, place = type(part).__name__, len(texts)
        if kind in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            texts[name] = _Width(part.config.hidden_size, 16 + 8 * place)
            pooled[name] = _Width(part.config.projection_dim, 8 + 4 * place)
        elif kind in ("T5EncoderModel", "UMT5EncoderModel"):
            texts[name] = _Width(part.config.d_model, _t5_width(parts, texts))
        elif kind == "Qwen2_5_VLForConditionalGeneration":
            old = part.config.get_text_config().hidden_size
            texts[name] = _Width(old, _LANGUAGE_HEADS * _LANGUAGE_HEAD_WIDTH)
    eye: Any = parts.get("image_encoder")
    if type(eye).__name__ != "CLIPVisionModelWithProjection":
        return _Widths(texts, pooled)
    seen = _Width(eye.config.hidden_size, 16), _Width(eye.config.projection_dim, 8)
    return _Widths(texts, pooled, *seen)


def _t5_width(parts: Mapping[str, Any], texts: Mapping[str, _Width]) -> int:
    """Return the width of a T5's states: that of what attends to all texts, which stands above the
    joined CLIPs where it does so in the pipeline. Where nothing does, no others are beside it."""
    joint = getattr(parts["transformer"].config, "joint_attention_dim", None)
    return 16 if joint is None else _joint(joint, sum(texts.values(), _Width()))


def _joint(old: int, joined: _Width) -> int:
    """Return a joint width that is to the joined texts as `old` is: larger, the same or smaller."""
    return joined.new + (old > joined.old) * _JOINED_MORE - (old < joined.old) * _JOINED_MORE


def _part(part: Any, name: str, widths: _Widths) -> Any:
    """Return a smaller part, or the part itself where nothing is known about its kind."""
    kind = type(part).__name__
    if kind in _TRANSFORMERS:
        changes = _TRANSFORMERS[kind](name, widths)
        small = type(part)(_changed(copy.deepcopy(part.config), changes))
    elif kind in _DIFFUSERS:
        changes = {**_narrower(part), **_DIFFUSERS[kind](part, widths)}
        # Names with an underscore say where entries come from: which of them are defaults.
        entries = {name: value for name, value in part.config.items() if name[0] != "_"}
        small = type(part).from_config({**entries, **changes})
    elif kind in ("MultiControlNetModel", "MultiAdapter"):
        inner = part.nets if kind == "MultiControlNetModel" else part.adapters
        return type(part)([_part(each, name, widths) for each in inner]).eval()
    elif numbers_of(iter([part])) <= AFFORDABLE:
        return part
    else:
        raise NoMiniature(f"{name}: nothing is known about how to make a {kind} smaller")
    if hasattr(getattr(part, "encoder_hid_proj", None), "image_projection_layers"):
        _adapt(small, part, widths)
    return _awake(small).eval().requires_grad_(False)


def _awake(module: torch.nn.Module) -> torch.nn.Module:
    """Give weights that begin as zeros, such as those of a ControlNet's last convolutions, others:
    whatever is given to such a layer does not matter."""
    with torch.no_grad():
        for weights in module.parameters():
            if weights.ndim > 1 and not weights.any():
                weights.normal_(std=_ZERO_SCALE)
    return module


# Parts of transformers


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return a configuration, or a table in one, with changes; they may be of what it holds."""
    for name, value in changes.items():
        table = isinstance(config, dict)
        if isinstance(value, dict):
            value = _changed(config[name] if table else getattr(config, name), value)
        if table:
            config[name] = value
        else:
            setattr(config, name, value)
    return config


def _clip(name: str, widths: _Widths) -> Changes:
    width = widths.texts[name].new
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 2,
        "projection_dim": widths.pooled[name].new,
    }


def _t5(name: str, widths: _Widths) -> Changes:
    width = widths.texts[name].new
    layers = {"num_layers": _TEXT_LAYERS, "num_decoder_layers": _TEXT_LAYERS}
    return {"d_model": width, "d_ff": 2 * width, "d_kv": 8, "num_heads": 2, **layers}


def _image(_: str, widths: _Widths) -> Changes:
    return {
        "hidden_size": widths.image.new,
        "intermediate_size": 2 * widths.image.new,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 2,
        "projection_dim": widths.embedded.new,
    }


def _language(name: str, widths: _Widths) -> Changes:
    """Return the changes of a language model that sees: its eyes have no use in pipelines."""
    width = widths.texts[name].new
    layers = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": _LANGUAGE_HEADS,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention"] * _TEXT_LAYERS,
        "rope_parameters": {"mrope_section": [_LANGUAGE_HEAD_WIDTH // 2 // 3] * 3},
    }
    eyes = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    return {"text_config": layers, "vision_config": eyes}


_TRANSFORMERS: Mapping[str, Callable[[str, _Widths], Changes]] = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "UMT5EncoderModel": _t5,
    "CLIPVisionModelWithProjection": _image,
    "Qwen2_5_VLForConditionalGeneration": _language,
}


# Parts of diffusers


def _each(new: int) -> Callable[[Any], Any]:
    """Return what puts a number in the place of one, or of each of several."""

    def change(value: Any) -> Any:
        several = isinstance(value, list | tuple)
        return type(value)(map(change, value)) if several else new

    return change


# Entries of diffusers' configurations → the miniature's. How many blocks there are, and of which
# kind, stays: sizes of images and features are made of that.
_ENTRIES: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("block_out_channels", "channels"), _each(_CHANNELS)),
    "conditioning_embedding_out_channels": _each(_CHANNELS),
    **dict.fromkeys(("norm_num_groups", "attn_norm_num_groups"), _each(_GROUPS)),
    **dict.fromkeys(("attention_head_dim", "num_attention_heads"), _each(_GROUPS)),
    "addition_embed_type_num_heads": _each(_GROUPS),
    **dict.fromkeys(("layers_per_block", "num_res_blocks"), _each(1)),
    **dict.fromkeys(("transformer_layers_per_block",), _each(1)),
    **dict.fromkeys(("reverse_transformer_layers_per_block",), _each(1)),
}


def _narrower(part: Any) -> Changes:
    """Return the entries of a configuration that make layers narrower or fewer."""
    return {
        name: change(part.config[name])
        for name, change in _ENTRIES.items()
        if part.config.get(name) is not None
    }


def _alone(_: Any, __: _Widths) -> Changes:
    """Return no changes, of a part that no other is tied to."""
    return {}


def _unet(part: Any, widths: _Widths) -> Changes:
    """Return the widths of texts, and of what SDXL's UNet and ControlNets are told besides."""
    config, changes = part.config, Changes()
    if config.encoder_hid_dim is not None:
        changes["encoder_hid_dim"] = widths.joined.of(config.encoder_hid_dim, "encoder_hid_dim")
        changes["cross_attention_dim"] = _each(_CHANNELS)(config.cross_attention_dim)
    else:
        name = "cross_attention_dim"
        changes[name] = widths.joined.of(config.cross_attention_dim, name)
    if config.addition_embed_type == "text_time":
        *_, pooled = widths.pooled.values()
        told = config.projection_class_embeddings_input_dim - pooled.old
        count, rest = divmod(told, config.addition_time_embed_dim)
        if rest or count < 1:
            raise NoMiniature(f"pooled texts of {pooled.old} do not fit the UNet")
        changes["addition_time_embed_dim"] = _TIME_WIDTH
        changes["projection_class_embeddings_input_dim"] = pooled.new + count * _TIME_WIDTH
    return changes


def _heads() -> Changes:
    return {"num_attention_heads": _HEADS, "attention_head_dim": _HEAD_WIDTH}


def _sd3(part: Any, widths: _Widths) -> Changes:
    config, layers = part.config, 2
    clips = sum((widths.texts[name] for name in widths.pooled), _Width())
    duals = tuple(layer for layer in config.dual_attention_layers if layer < layers)
    pooled = sum(widths.pooled.values(), _Width())
    return {
        **_heads(),
        "num_layers": layers,
        "caption_projection_dim": _HEADS * _HEAD_WIDTH,
        "joint_attention_dim": _joint(config.joint_attention_dim, clips),
        "pooled_projection_dim": pooled.of(config.pooled_projection_dim, "pooled_projection_dim"),
        "dual_attention_layers": duals,
    }


def _flux(part: Any, widths: _Widths) -> Changes:
    config = part.config
    clip, t5 = (widths.texts[name] for name in ("text_encoder", "text_encoder_2"))
    axes = tuple(_AXIS_WIDTH for _ in config.axes_dims_rope)
    return {
        "num_attention_heads": _HEADS,
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": t5.of(config.joint_attention_dim, "joint_attention_dim"),
        "pooled_projection_dim": clip.of(config.pooled_projection_dim, "pooled_projection_dim"),
    }


def _qwen_image(part: Any, widths: _Widths) -> Changes:
    config = part.config
    axes = tuple(_AXIS_WIDTH for _ in config.axes_dims_rope)
    width = widths.joined.of(config.joint_attention_dim, "joint_attention_dim")
    return {
        "num_attention_heads": _HEADS,
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "num_layers": 2,
        "joint_attention_dim": width,
    }


def _video_vae(_: Any, __: _Widths) -> Changes:
    return {"base_dim": _GROUPS}


def _pixart(part: Any, widths: _Widths) -> Changes:
    return {
        **_heads(),
        "num_layers": 2,
        "cross_attention_dim": _HEADS * _HEAD_WIDTH,
        "caption_channels": widths.joined.of(part.config.caption_channels, "caption_channels"),
    }


def _wan(part: Any, widths: _Widths) -> Changes:
    return {
        **_heads(),
        "num_layers": 2,
        "ffn_dim": 2 * _HEADS * _HEAD_WIDTH,
        "text_dim": widths.joined.of(part.config.text_dim, "text_dim"),
    }


_DIFFUSERS: Mapping[str, Callable[[Any, _Widths], Changes]] = {
    "AutoencoderKL": _alone,
    "AutoencoderKLWan": _video_vae,
    "UNet2DModel": _alone,
    "T2IAdapter": _alone,
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwen_image,
    "AutoencoderKLQwenImage": _video_vae,
    "WanTransformer3DModel": _wan,
}


# IP-Adapters, which are in a UNet's layers


def _adapt(small: Any, unet: Any, widths: _Widths) -> None:
    """Put adapters of the kinds that a UNet has into its miniature."""
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    layers = [_projection(each, widths) for each in unet.encoder_hid_proj.image_projection_layers]
    adapted = [
        processor for processor in unet.attn_processors.values() if hasattr(processor, "to_k_ip")
    ]
    processors = {
        name: own if name.endswith("attn1.processor") else _looking(small, name, adapted[0])
        for name, own in small.attn_processors.items()
    }
    small.set_attn_processor(processors)
    small.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
    small.config.encoder_hid_dim_type = "ip_image_proj"


def _looking(small: Any, name: str, processor: Any) -> Any:
    """Return a processor as `processor` for the attention of a miniature's layer."""
    layer = small.get_submodule(name.removesuffix(".processor"))
    widths = layer.to_k.out_features, layer.to_k.in_features
    return type(processor)(*widths, num_tokens=processor.num_tokens, scale=[*processor.scale])


def _projection(layer: Any, widths: _Widths) -> Any:
    """Return a smaller layer that projects what the image encoder gives.

    Raises:
        NoMiniature: a kind that nothing is known about.
    """
    from diffusers.models import embeddings

    kind, cross = type(layer).__name__, widths.joined.new
    if kind == "ImageProjection":
        return embeddings.ImageProjection(
            widths.embedded.new, cross, num_image_text_embeds=layer.num_image_text_embeds
        )
    if kind == "IPAdapterFullImageProjection":
        return embeddings.IPAdapterFullImageProjection(widths.image.new, cross)
    if kind == "IPAdapterPlusImageProjection":
        return embeddings.IPAdapterPlusImageProjection(
            embed_dims=widths.image.new,
            output_dims=cross,
            hidden_dims=_CHANNELS,
            depth=1,
            dim_head=_HEAD_WIDTH,
            heads=2,
            num_queries=layer.latents.shape[1],
        )
    raise NoMiniature(f"an IP-Adapter of the kind {kind}")
