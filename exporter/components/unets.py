"""This module checks what a UNet's configuration asks of its pipeline, and which pipelines give it.

A UNet can be built to take class labels, images or text in ways that the pipeline which it is
saved in never passes. diffusers fails then in the middle of the first call; here it is refused
before anything is made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from latentc.exporter.classes import record_of
from latentc.exporter.components.description import size_multiple
from latentc.runtimes.errors import UnsupportedPipeline

_LONGEST = 4096  # ids of a text, where the encoder itself sets no limit
# Blocks of diffusers that hand the size of their skip connections to their upsampler.
_SIZED_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
_VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")


def check_parts(pipe: Any, *names: str) -> None:
    """Refuse a pipeline that was saved without one of these parts.

    Raises:
        UnsupportedPipeline: naming it.
    """
    for name in names:
        if getattr(pipe, name, None) is None:
            raise UnsupportedPipeline(
                f"the {type(pipe).__name__} was saved without its {name}: diffusers cannot run it "
                "on a prompt either"
            )


def check_unet(
    unet: Any, pipeline_class: str, additions: Collection[str | None] = (None, "text")
) -> None:
    """Refuse a UNet that takes what the pipeline does not give, or gives what it cannot use.

    Args:
        additions: the values of `addition_embed_type` that the pipeline has the inputs for.

    Raises:
        UnsupportedPipeline: naming the option and its value.
    """
    config = unet.config
    labelled = record_of(pipeline_class).labelled and config.class_embed_type is None
    if getattr(unet, "class_embedding", None) is not None and not labelled:
        kind, count = config.class_embed_type, config.num_class_embeds
        named = f"class_embed_type {kind!r}" if kind else f"num_class_embeds {count}"
        raise UnsupportedPipeline(
            f"a UNet with {named} takes class labels, and {pipeline_class} has none to give: "
            "diffusers cannot run it either"
        )
    adapted = ("ip_image_proj",) if _is_adapted(unet) else ()
    for option, known in (
        ("addition_embed_type", additions),
        ("encoder_hid_dim_type", (None, "text_proj", *adapted)),
    ):
        value = getattr(config, option, None)
        if value not in known:
            names = " or ".join("none" if each is None else repr(each) for each in known)
            raise UnsupportedPipeline(
                f"a UNet with {option} {value!r} does not fit {pipeline_class}, which has inputs "
                f"for {names}"
            )


def _is_adapted(unet: Any) -> bool:
    """Return whether an IP-Adapter was loaded into a UNet."""
    return hasattr(getattr(unet, "encoder_hid_proj", None), "image_projection_layers")


def check_vae(vae: Any) -> None:
    """Refuse a VAE that draws noise, or enlarges otherwise than diffusers' pipelines count on.

    Raises:
        UnsupportedPipeline: naming what was expected.
    """
    if type(vae).__name__ not in _VAES:
        raise UnsupportedPipeline(
            f"a VAE of the class {type(vae).__name__} is not supported; supported: "
            + ", ".join(_VAES)
        )
    factor = getattr(vae.config, "upsampling_scaling_factor", 2)
    if factor != 2:
        raise UnsupportedPipeline(
            f"a VAE with upsampling_scaling_factor {factor}: diffusers counts on 2 for each block, "
            "and makes images of another size than asked for"
        )


def text_length(tokenizer: Any, encoder: Any) -> int:
    """Return how many token ids a text becomes.

    Raises:
        UnsupportedPipeline: more than the encoder has positions for.
    """
    length = tokenizer.model_max_length
    positions = getattr(encoder.config, "max_position_embeddings", _LONGEST)
    if not 1 <= length <= positions:
        raise UnsupportedPipeline(
            f"the tokenizer makes {length} ids of each text and the text encoder has {positions} "
            "positions: diffusers cannot run it either. Set model_max_length in the tokenizer's "
            "tokenizer_config.json"
        )
    return int(length)


def sequence(unet: Any, length: int) -> int | str:
    """Return the second dimension of `encoder_hidden_states`.

    Pooling them by attention (as of DeepFloyd IF, `addition_embed_type` "text") cannot be captured
    for an open one.
    """
    return length if unet.config.addition_embed_type == "text" else "sequence"


class Unpadded(torch.nn.Module):
    """input_ids [batch, length] → int64 of the same shape, 0 where a text was padded: what the
    tokenizer calls its attention mask, for encoders with `use_attention_mask`.

    Texts end with one end token and are padded behind it. Where that is the padding token too, a
    text that itself ends with the end token written out counts as shorter than it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        if tokenizer.padding_side != "right":
            raise UnsupportedPipeline(
                f"a text encoder with use_attention_mask whose texts are padded on the "
                f"{tokenizer.padding_side} is not supported, only on the right"
            )
        self.end = tokenizer.eos_token_id
        self.same = tokenizer.pad_token_id == self.end

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        own: torch.Tensor = (input_ids != self.end) if self.same else (input_ids == self.end)
        last = (places * own).amax(dim=1, keepdim=True) + int(self.same)
        return (places <= last).to(torch.int64)


def multiple_of(unet: Any) -> int:
    """Return what latent height and width must be multiples of, for diffusers to run the UNet: 1
    where each block passes the size of its skip connections on to its upsampler."""
    blocks = [block for block in unet.up_blocks if getattr(block, "upsamplers", None)]
    passed_on = all(type(each).__name__ in _SIZED_BLOCKS for each in blocks)
    return 1 if passed_on else size_multiple(unet)


def for_any_size(unet: Any) -> Any:
    """Return the UNet as a module for all the latent sizes that diffusers takes."""
    return ForwardedSizes(unet) if multiple_of(unet) == 1 else unet


def least_side(unet: Any) -> int:
    """Return a latent side from which on the deepest block has more than one row, halves rounded up
    or down: those of one row are another case to PyTorch."""
    return 2 * size_multiple(unet) if multiple_of(unet) == 1 else 1


class ForwardedSizes(torch.nn.Module):
    """A `UNet2DConditionModel` for latents of any size.

    Where a side cannot be halved evenly at each block, diffusers tells each upsampling the size of
    the skip connection that its result will meet, by a branch on the size
    (`forward_upsample_size`). A captured program has one branch only; this module always takes
    that one, which gives the same at other sizes.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *inputs: Any, **named: Any) -> Any:
        unet, sizes, taken = self.unet, list[Any](), 0

        def note(_: torch.nn.Module, inputs: Any, made: Any) -> None:
            sizes.extend(
                each.shape[2:] for each in (made[1] if isinstance(made, tuple) else [made])
            )

        with ExitStack() as undo:
            for down in (unet.conv_in, *unet.down_blocks):
                undo.callback(down.register_forward_hook(note).remove)
            for up in unet.up_blocks:
                taken += len(up.resnets)
                for each in getattr(up, "upsamplers", None) or ():
                    if type(each).__name__ == "Upsample2D":
                        _resize(each, sizes, taken + 1, undo)
            undo.callback(setattr, unet, "num_upsamplers", unet.num_upsamplers)
            unet.num_upsamplers = 0  # no size is then a reason to take the branch
            return unet(*inputs, **named)


def _resize(upsampler: Any, sizes: Sequence[Any], place: int, undo: ExitStack) -> None:
    """Have `upsampler` enlarge to the size that is then the `place`-th last of `sizes`. It does so
    itself too, but compares the ratios of its sides, which a captured program keeps to."""

    def enlarge(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.nn.functional.interpolate(inputs[0], size=sizes[-place]),)

    undo.callback(upsampler.register_forward_pre_hook(enlarge).remove)
    undo.callback(setattr, upsampler, "interpolate", upsampler.interpolate)
    upsampler.interpolate = False


def check_scheduler(scheduler: Any, usable: Sequence[str], pipeline: str, unusual: str) -> None:
    """Refuse a scheduler of the pipeline's own that diffusers' class runs wrongly.

    Args:
        usable: the classes of those that it runs well.
        pipeline: what is said to be refused.
        unusual: what its class does, which others do not.

    Raises:
        UnsupportedPipeline: naming those that it runs well.
    """
    name = type(scheduler).__name__
    if name not in usable:
        raise UnsupportedPipeline(
            f"{pipeline} with a {name}: diffusers' class {unusual}, so that there are no images of "
            f"it to compare with; save it with a {' or '.join(usable)}. Bundles have others besides"
        )
