"""The arguments of a call, each declared once: its type, its default, its limits and what it means.

Which of them a bundle takes, its programs say. They may have arguments of other names; those are
taken as well, and type checkers do not know them.

Only `latentc.runtimes.options` is imported here: a command line reads this before it does anything.
Annotations are evaluated once, here, and not by each that asks for them: they are no texts.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypedDict

from latentc.runtimes.options import Option

MOST_IMAGES = 10_000  # of one call; none that large fits into any memory
LONGEST_SIDE = 1 << 16  # pixels of an image
OUTPUT_TYPES = ("pil", "np", "latent")

Texts: TypeAlias = str | Sequence[str] | None
Numbers: TypeAlias = float | Sequence[float] | None
OutputType: TypeAlias = Literal["pil", "np", "latent"]

_THE_BUNDLES = "the bundle's"
_BY_NAME = "given by --arg"
_BY_FILE = "given by --value"
_COUNTED = "counted by --num-images"
_CONTROLNETS = "cli.md#controlnets"
_T2I_ADAPTERS = "cli.md#t2i-adapters"
_IP_ADAPTERS = "cli.md#ip-adapters"
_LATENTS = "float32 `[images, channels, height, width]`"


class PromptArgument(TypedDict, total=False):
    """The argument that may also be given by its place."""

    prompt: Annotated[
        Texts,
        Option(
            "What the image shows: a text, or a list of texts.",
            details="Needed where the bundle takes text.",
            hidden="PROMPT",
        ),
    ]


class TextArguments(TypedDict, total=False):
    """Other texts, and how texts are read."""

    negative_prompt: Annotated[
        Texts,
        Option(
            "What to lead away from.",
            details="A text, or one for each prompt.",
            metavar="TEXT",
        ),
    ]
    prompt_2: Annotated[
        Texts,
        Option(
            "The prompt for the second text encoder.", usual="the same as `prompt`", hidden=_BY_NAME
        ),
    ]
    prompt_3: Annotated[
        Texts,
        Option("Likewise for the third one.", usual="the same as `prompt`", hidden=_BY_NAME),
    ]
    negative_prompt_2: Annotated[
        Texts,
        Option(
            "What to lead away from, for the second text encoder.",
            usual="the same as `negative_prompt`",
            hidden=_BY_NAME,
        ),
    ]
    negative_prompt_3: Annotated[
        Texts,
        Option(
            "Likewise for the third one.", usual="the same as `negative_prompt`", hidden=_BY_NAME
        ),
    ]
    prompt_weighting: Annotated[
        bool | None,
        Option(
            "Read weights in the texts: `(word:1.3)`, `word++`, `word--`.",
            see="prompts.md#weights",
        ),
    ]
    max_embeddings_multiples: Annotated[
        int | None,
        Option(
            "How many times the text encoder's own length texts may have.",
            usual="1",
            least=1,
            metavar="N",
            see="prompts.md#long-texts",
            details="What is beyond is cut.",
        ),
    ]


class CountArguments(TypedDict, total=False):
    """These arguments say how many images are made, and of which draw."""

    num_images_per_prompt: Annotated[
        int | None,
        Option(
            "Images, or videos, per prompt.",
            usual="1",
            least=1,
            most=MOST_IMAGES,
            flags=("-n", "--num-images"),
            aliases=("-b", "--batch-count"),
            metavar="N",
            details="The images of one prompt are next to each other.",
        ),
    ]
    num_videos_per_prompt: Annotated[
        int | None,
        Option(
            "Its name in calls of bundles that make videos.",
            usual="1",
            least=1,
            most=MOST_IMAGES,
            see="cli.md#videos",
            hidden=_COUNTED,
        ),
    ]
    batch_size: Annotated[
        int | None,
        Option(
            "How many images, where the bundle takes no text.",
            usual="1",
            least=1,
            most=MOST_IMAGES,
            hidden=_COUNTED,
        ),
    ]
    seed: Annotated[
        int | Sequence[int] | None,
        Option(
            "For the same image again; one for the whole batch, or one for each image.",
            usual="drawn, and told",
            aliases=("-s",),
            metavar="N",
            details="The image is that of diffusers with a CPU generator of this seed.",
        ),
    ]
    generator: Annotated[
        Any | Sequence[Any],
        Option(
            "A `torch.Generator` on the CPU in the place of a seed, or one for each image.",
            usual="none",
            hidden="for programs that have PyTorch; its seed is --seed",
            see="python-api.md#generators",
            details="Noise is drawn from the state that it is in, and it goes on by as much as in "
            "diffusers.",
        ),
    ]


class ScheduleArguments(TypedDict, total=False):
    """These arguments say how the schedule is run."""

    num_inference_steps: Annotated[
        int | None,
        Option(
            "Inference steps.",
            usual=_THE_BUNDLES,
            flags=("--steps",),
            aliases=("--num-steps", "--sample-steps"),
            metavar="N",
            details="A count that the bundle has no plan for is traced where the exporter is "
            "installed, and kept.",
        ),
    ]
    scheduler: Annotated[
        str | None,
        Option(
            "One of the bundle's schedulers, by its name (see: latentc inspect).",
            usual=_THE_BUNDLES,
            aliases=("--sampler", "--sampling-method"),
            metavar="NAME",
            details="It may be the name of diffusers' class.",
        ),
    ]
    strength: Annotated[
        float | None,
        Option(
            "How far to go from the image: the share of the steps that is run.",
            usual="diffusers' for the model and the task",
            metavar="X",
            details="Above 0, at most 1.",
        ),
    ]
    denoising_start: Annotated[
        float | None,
        Option(
            "Go on from latents that another run left at this fraction of the schedule, given as "
            "`image`.",
            hidden="set by --refiner",
        ),
    ]
    denoising_end: Annotated[
        float | None,
        Option(
            "Stop at this fraction of the schedule; a refiner goes on from there.",
            usual="1",
            metavar="X",
            see="cli.md#refiners",
        ),
    ]
    cache_interval: Annotated[
        int | None,
        Option(
            "Run the whole denoiser in one of N steps only (needs: export --pass step-cache).",
            usual="1",
            metavar="N",
            see="passes.md#step-cache",
            details="The others run its shallow part (DeepCache).",
        ),
    ]
    prior_num_inference_steps: Annotated[
        int | None,
        Option(
            "Inference steps of the prior.",
            usual=_THE_BUNDLES,
            hidden=_BY_NAME,
        ),
    ]


class GuidanceArguments(TypedDict, total=False):
    """These arguments say how far the prompt leads."""

    guidance_scale: Annotated[
        float | None,
        Option(
            "Strength of the guidance; at 1 or below it is off.",
            usual=_THE_BUNDLES,
            aliases=("--cfg-scale", "--cfg"),
            metavar="X",
        ),
    ]
    guidance_rescale: Annotated[
        float | None,
        Option(
            "0 to 1: give predictions the contrast back that they have without guidance.",
            usual="0",
            metavar="X",
            see="cli.md#zero-terminal-snr",
            details="So much of the guided prediction gets the standard deviation of the unguided "
            "one, for models with zero terminal SNR.",
        ),
    ]
    guidance_start: Annotated[
        float | None,
        Option(
            "Fraction of the steps before guidance begins.",
            usual="0",
            metavar="X",
            details="It counts as `start` of diffusers' guiders does.",
        ),
    ]
    guidance_stop: Annotated[
        float | None,
        Option(
            "Fraction of the steps after which it ends: less is faster.",
            usual="1",
            metavar="X",
            details="A step without guidance costs half.",
        ),
    ]
    true_cfg_scale: Annotated[
        float | None,
        Option(
            "Strength of guidance by the negative prompt, of models that were taught another one.",
            usual=_THE_BUNDLES,
            hidden=_BY_NAME,
        ),
    ]
    guidance_scale_2: Annotated[
        float | None,
        Option(
            "Strength of the guidance in the second denoiser.",
            usual="the same as `guidance_scale`",
            see="cli.md#videos",
            hidden=_BY_NAME,
        ),
    ]
    image_guidance_scale: Annotated[
        float | None,
        Option(
            "How far the image leads, of models that edit it by instructions.",
            usual=_THE_BUNDLES,
            see="cli.md#models-for-images",
            hidden=_BY_NAME,
        ),
    ]
    prior_guidance_scale: Annotated[
        float | None,
        Option(
            "Strength of the guidance in the prior.",
            usual=_THE_BUNDLES,
            hidden=_BY_NAME,
        ),
    ]


class SizeArguments(TypedDict, total=False):
    """These arguments say what size the image has."""

    height: Annotated[
        int | None,
        Option(
            "Height of the image, in pixels.",
            usual=_THE_BUNDLES,
            aliases=("-H",),
            metavar="PIXELS",
            details="Of a call with an image, that image's.",
        ),
    ]
    width: Annotated[
        int | None,
        Option(
            "Width of the image, in pixels.",
            usual=_THE_BUNDLES,
            aliases=("-W",),
            metavar="PIXELS",
        ),
    ]
    num_frames: Annotated[
        int | None,
        Option("Frames of a video.", usual=_THE_BUNDLES, metavar="N", see="cli.md#videos"),
    ]
    use_resolution_binning: Annotated[
        bool | None,
        Option(
            "Make the image in this very size, not in the nearest of the model's list.",
            usual="`True`, where the model has such a list",
            flags=("--no-resolution-binning",),
            see="cli.md#transformers",
            details="`False` says so. Else the image is made in the size whose proportions are "
            "nearest, and resized.",
        ),
    ]
    resolution: Annotated[
        Sequence[float] | None,
        Option(
            "Height and width that the model is told, of models that are told them.",
            usual="the call's",
            hidden=_BY_NAME,
        ),
    ]
    original_size: Annotated[
        Sequence[float] | None,
        Option(
            "Height and width that the model is told the image had.",
            usual="the call's",
            hidden=_BY_NAME,
        ),
    ]
    crops_coords_top_left: Annotated[
        Sequence[float] | None,
        Option(
            "Where the model is told the image was cut out: from the top, from the left.",
            usual="0, 0",
            hidden=_BY_NAME,
        ),
    ]
    target_size: Annotated[
        Sequence[float] | None,
        Option(
            "Height and width that the model is told to make.", usual="the call's", hidden=_BY_NAME
        ),
    ]
    negative_original_size: Annotated[
        Sequence[float] | None,
        Option("`original_size` of what guidance leads away from.", hidden=_BY_NAME),
    ]
    negative_crops_coords_top_left: Annotated[
        Sequence[float] | None,
        Option("`crops_coords_top_left` of what guidance leads away from.", hidden=_BY_NAME),
    ]
    negative_target_size: Annotated[
        Sequence[float] | None,
        Option("`target_size` of what guidance leads away from.", hidden=_BY_NAME),
    ]


class ImageArguments(TypedDict, total=False):
    """Images that a call is given, and what is done with them."""

    image: Annotated[
        Any | Sequence[Any],
        Option(
            "An image to start from (bundles exported with --task image-to-image), or for a "
            "T2I-Adapter (--t2i-adapter), one for each.",
            aliases=("-i", "--init-img", "--init-image"),
            metavar="FILE",
            see="cli.md#from-an-image",
            details="Pillow images (greys of 16 bits are scaled), arrays `[height, width, 3]` of "
            "bytes, of uint16, or of numbers from 0 to 1, or PyTorch tensors "
            f"`[3, height, width]`; all else is refused. Or latents, {_LATENTS}.",
        ),
    ]
    mask_image: Annotated[
        Any,
        Option(
            "What of it is made anew, white, and what stays, black (--task inpainting).",
            flags=("--mask",),
            metavar="FILE",
            see="cli.md#a-part-of-an-image",
            details="Pillow images, or arrays `[height, width]`: one, or one for each image.",
        ),
    ]
    mask_blur: Annotated[
        float | None,
        Option(
            "Soften the mask's edges by so many pixels.",
            usual="0",
            least=0,
            most=LONGEST_SIDE,
            metavar="PIXELS",
        ),
    ]
    padding_mask_crop: Annotated[
        int | None,
        Option(
            "Look at no more than so much around the mask, and put the result back.",
            least=0,
            metavar="PIXELS",
            details="What is cut out is made anew in the call's size.",
        ),
    ]
    noise_level: Annotated[
        float | None,
        Option(
            "How much noise an upscaler adds to the image.",
            usual=_THE_BUNDLES,
            see="cli.md#models-for-images",
            hidden=_BY_NAME,
        ),
    ]
    aesthetic_score: Annotated[
        float | None,
        Option(
            "How beautiful a refiner is told the image is.",
            usual="6",
            see="cli.md#refiners",
            hidden=_BY_NAME,
        ),
    ]
    negative_aesthetic_score: Annotated[
        float | None,
        Option("Likewise of what guidance leads away from.", usual="2.5", hidden=_BY_NAME),
    ]
    control_image: Annotated[
        Any | Sequence[Any],
        Option(
            "For a ControlNet (bundles exported with --controlnet); one for each, in their order.",
            metavar="FILE",
            see=_CONTROLNETS,
        ),
    ]
    controlnet_conditioning_scale: Annotated[
        Numbers,
        Option("Strength of each ControlNet.", usual="1", see=_CONTROLNETS, hidden=_BY_NAME),
    ]
    control_guidance_start: Annotated[
        Numbers,
        Option("Fraction of the steps before each ControlNet counts.", usual="0", hidden=_BY_NAME),
    ]
    control_guidance_end: Annotated[
        Numbers,
        Option("Fraction of the steps after which each ends to count.", usual="1", hidden=_BY_NAME),
    ]
    adapter_conditioning_scale: Annotated[
        Numbers,
        Option("Strength of each T2I-Adapter.", usual="1", see=_T2I_ADAPTERS, hidden=_BY_NAME),
    ]
    adapter_conditioning_factor: Annotated[
        float | None,
        Option(
            "Fraction of the steps in which T2I-Adapters count.",
            usual="1",
            see=_T2I_ADAPTERS,
            hidden=_BY_NAME,
        ),
    ]
    ip_adapter_image: Annotated[
        Any | Sequence[Any],
        Option(
            "For an IP-Adapter (bundles exported with --ip-adapter); one for each, in their order.",
            metavar="FILE",
            see=_IP_ADAPTERS,
        ),
    ]
    ip_adapter_scale: Annotated[
        Numbers,
        Option("Strength of each IP-Adapter.", usual="1", see=_IP_ADAPTERS, hidden=_BY_NAME),
    ]
    class_labels: Annotated[
        int | Sequence[int] | None,
        Option(
            "The number of the class of each image, of models that take no text but know classes.",
            hidden=_BY_NAME,
        ),
    ]


class ValueArguments(TypedDict, total=False):
    """Arrays in the place of what a call would make: those that `compute` gives."""

    prompt_embeds: Annotated[
        Any,
        Option(
            "Encoded texts in the place of texts, as `encode_prompt` gives them; on the command "
            "line a .npz file of them.",
            metavar="FILE",
            see="prompts.md#encoded-texts",
            details="float32 `[prompts, positions, width]`.",
        ),
    ]
    negative_prompt_embeds: Annotated[Any, Option("Likewise.", hidden=_BY_FILE)]
    pooled_prompt_embeds: Annotated[
        Any, Option("Likewise, float32 `[prompts, width]`.", hidden=_BY_FILE)
    ]
    negative_pooled_prompt_embeds: Annotated[Any, Option("Likewise.", hidden=_BY_FILE)]
    prompt_embeds_mask: Annotated[
        Any,
        Option("Which positions of `prompt_embeds` count.", hidden=_BY_FILE),
    ]
    negative_prompt_embeds_mask: Annotated[Any, Option("Likewise.", hidden=_BY_FILE)]
    prompt_attention_mask: Annotated[
        Any, Option("Which positions of `prompt_embeds` count.", hidden=_BY_FILE)
    ]
    negative_prompt_attention_mask: Annotated[Any, Option("Likewise.", hidden=_BY_FILE)]
    text_encoder_hidden_states: Annotated[
        Any,
        Option("Encoded texts that a prior is given beside `prompt_embeds`.", hidden=_BY_FILE),
    ]
    negative_text_encoder_hidden_states: Annotated[Any, Option("Likewise.", hidden=_BY_FILE)]
    text_mask: Annotated[Any, Option("Which positions of these count.", hidden=_BY_FILE)]
    negative_text_mask: Annotated[Any, Option("Likewise.", hidden=_BY_FILE)]
    image_embeds: Annotated[
        Any,
        Option(
            "What the prior makes of a text.",
            hidden=_BY_FILE,
        ),
    ]
    negative_image_embeds: Annotated[
        Any,
        Option("What it makes of a negative prompt; of no image without one.", hidden=_BY_FILE),
    ]
    latents: Annotated[
        Any,
        Option(
            f"Noise of unit variance to start from: {_LATENTS}.",
            see="python-api.md#values",
            details="Of videos `[videos, channels, frames, height, width]`.",
            hidden=_BY_FILE,
        ),
    ]
    prior_latents: Annotated[Any, Option("Noise that the prior starts from.", hidden=_BY_FILE)]
    negative_prior_latents: Annotated[
        Any, Option("Likewise, for a negative prompt.", hidden=_BY_FILE)
    ]
    image_latents: Annotated[
        Any,
        Option("The latents of an image to start from.", hidden=_BY_FILE),
    ]
    denoised: Annotated[
        Any,
        Option("The latents after the last step, to be decoded.", hidden=_BY_FILE),
    ]


class CallKeywords(
    CountArguments,
    ScheduleArguments,
    GuidanceArguments,
    SizeArguments,
    ImageArguments,
    TextArguments,
    ValueArguments,
    total=False,
):
    """Calls take these arguments by name, whatever comes of them."""


class OutputArgument(TypedDict, total=False):
    """This argument says what becomes of the images."""

    output_type: Annotated[
        OutputType,
        Option(
            '"pil", "np" (float32 `[images, height, width, channels]` in 0 … 1), or "latent".',
            default="pil",
            choices=OUTPUT_TYPES,
            details="Of videos `[videos, frames, height, width, channels]`.",
            hidden="images are written into files",
        ),
    ]


class CallArguments(PromptArgument, CallKeywords, OutputArgument, total=False):
    """The arguments of a call, less the callback's."""
