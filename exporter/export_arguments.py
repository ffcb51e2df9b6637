"""The options of an export, declared once: what `latentc.export` takes, the flags of
``latentc export`` and the tables of docs/ are made of them (`latentc.runtimes.options`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from latentc.exporter.calibration_prompts import SAMPLES
from latentc.exporter.passes import PASSES
from latentc.exporter.progress import Event
from latentc.exporter.targets import options as options_of_targets
from latentc.exporter.targets.coreml.options import CoreMLArguments
from latentc.runtimes.options import Declared, Option, complete, declared

# A sequence of it is prompts, and one alone is their file.
FILE_OR_PROMPTS = "calibration_prompts"

Texts = str | Sequence[str]
Place = str | Path
Places = Place | Sequence[Place]


class _Common(TypedDict, total=False):
    """Options of an export to whichever target."""

    targets: Annotated[
        Texts,
        Option(
            "What to make: `onnx`, `openvino`, `torch`, `coreml` or `tensorrt`; or `all`.",
            default=("onnx",),
            flags=("-t", "--target"),
            metavar="NAME",
            see="support.md",
        ),
    ]
    precision: Annotated[
        Texts,
        Option(
            "`fp32`, `fp16`, `bf16`, `int8` or `int4` (weights), `w8a8` (weights and activations "
            "of 8 bits); for `coreml` `palette8`, `palette6`, `palette4`; or by component, as "
            "`denoiser=int8,vae_decoder=fp16`; `all`: each target in every precision that it has.",
            default="fp32",
            flags=("-p", "--precision"),
            metavar="NAME",
            see="precisions.md",
        ),
    ]
    passes: Annotated[
        Texts,
        Option(
            "Faster, and another image: "
            + "; ".join(f"`{name}`: {pass_.does}" for name, pass_ in PASSES.items())
            + ".",
            default=(),
            flags=("--pass",),
            metavar="NAME",
            see="passes.md",
        ),
    ]
    tasks: Annotated[
        Texts,
        Option(
            "What the bundle is for besides what the pipeline does: `image-to-image` and "
            "`inpainting` add the VAE's encoder, for calls with an image and with a mask.",
            default=(),
            flags=("--task",),
            metavar="NAME",
            see="cli.md#from-an-image",
        ),
    ]
    calibration_prompts: Annotated[
        str | Path | Sequence[str] | None,
        Option(
            "For `w8a8`: prompts to calibrate with, a text file with one a line (in Python also "
            "the prompts themselves).",
            usual="a varied list",
            metavar="FILE",
            see="precisions.md#calibration",
        ),
    ]
    calibration_samples: Annotated[
        int,
        Option(
            "For `w8a8`: denoiser calls to calibrate with.",
            default=SAMPLES,
            least=1,
            most=4096,
            metavar="N",
        ),
    ]
    fidelity_floor: Annotated[
        float | None,
        Option(
            "PSNR in dB that the image of the whole loop must reach against PyTorch in fp32: the "
            "most sensitive layers of quantised builds stay in half precision.",
            above=0,
            below=99,  # that of equal images
            metavar="DB",
            see="precisions.md#fidelity-floor",
        ),
    ]
    schedulers: Annotated[
        Texts | None,
        Option(
            "Short name or diffusers class, in the place of the usual set; the pipeline's own "
            "scheduler is always there.",
            usual="a set of common ones",
            flags=("--scheduler",),
            metavar="NAME",
        ),
    ]
    steps: Annotated[
        int | Sequence[int] | None,
        Option(
            "Step count to make plans for.",
            usual="1-60, 1-100 of the pipeline's own scheduler",
            least=1,
            most=1000,
            metavar="N",
        ),
    ]
    height: Annotated[
        int | None,
        Option(
            "Fix the image's height; both sides or neither.",
            usual="dynamic",
            least=1,
            metavar="PIXELS",
        ),
    ]
    width: Annotated[
        int | None,
        Option("Fix the image's width.", usual="dynamic", least=1, metavar="PIXELS"),
    ]
    verify: Annotated[
        bool,
        Option(
            "Compare every task with its class in diffusers, and every build with PyTorch; write "
            "nothing if one differs.",
            default=True,
        ),
    ]
    preflight: Annotated[
        bool,
        Option(
            "Refuse what does not fit into the memory or the disk that there are.",
            default=True,
            see="exporting-large-models.md",
        ),
    ]
    overwrite: Annotated[
        bool, Option("Replace a bundle that was made from another source.", default=False)
    ]
    lora: Annotated[
        Places,
        Option(
            "Fuse a LoRA into the weights: a file or Hub id, with its scale if it is not 1, as "
            "`style.safetensors:0.8`.",
            default=(),
            metavar="FILE_OR_ID[:SCALE]",
            see="cli.md#lora-new-words-other-vaes",
        ),
    ]
    textual_inversion: Annotated[
        Places,
        Option(
            "Add a word with learnt vectors, for prompts: a file or Hub id, with the word if it is "
            "not the file's own, as `cat.safetensors:<cat>`.",
            default=(),
            metavar="FILE_OR_ID[:WORD]",
            see="cli.md#lora-new-words-other-vaes",
        ),
    ]
    vae: Annotated[
        Place | None,
        Option(
            "A VAE in the place of the pipeline's own, such as a tiny autoencoder.",
            usual="the pipeline's own",
            metavar="FOLDER_OR_ID",
            see="cli.md#lora-new-words-other-vaes",
        ),
    ]
    controlnet: Annotated[
        Places,
        Option(
            "A ControlNet to fuse with the denoiser; calls take its `control_image`.",
            default=(),
            metavar="FOLDER_OR_ID",
            see="cli.md#controlnets",
        ),
    ]
    t2i_adapter: Annotated[
        Places,
        Option(
            "A T2I-Adapter, whose features the denoiser adds to its own; calls take its image as "
            "`image`.",
            default=(),
            metavar="FOLDER_OR_ID",
            see="cli.md#t2i-adapters",
        ),
    ]
    ip_adapter: Annotated[
        Places,
        Option(
            "An IP-Adapter's file, its image encoder beside it, or `OWNER/NAME/PATH` on the Hub; "
            "calls take its `ip_adapter_image`.",
            default=(),
            metavar="FILE_OR_ID",
            see="cli.md#ip-adapters",
        ),
    ]
    image_encoder: Annotated[
        Place | None,
        Option(
            "The image encoder of the IP-Adapters.",
            usual="image_encoder beside their file",
            metavar="FOLDER_OR_ID",
            see="cli.md#ip-adapters",
        ),
    ]
    config: Annotated[
        Place | None,
        Option(
            "For a checkpoint of one file: the pipeline whose configuration it has.",
            usual="what diffusers takes the file for",
            metavar="FOLDER_OR_ID",
            see="cli.md#single-files",
        ),
    ]
    allow_pickle: Annotated[
        bool,
        Option(
            "Read a checkpoint that is a pickle, which may run code, or an adapter's file that is "
            "one, which is read as data alone.",
            default=False,
        ),
    ]
    without: Annotated[
        Texts,
        Option(
            "Leave out a part that the pipeline works without, such as `text_encoder_3` or "
            "`safety_checker`; or say that what the bundle has not is meant to be left out: "
            "`watermark`, `watermarker` (of the upscaler), `feature_extractor`, `image_encoder`.",
            default=(),
            metavar="PART",
            see="cli.md#the-safety-checker",
        ),
    ]
    watermark: Annotated[
        bool,
        Option(
            "Put the invisible watermark into images that diffusers puts into those of SDXL where "
            "the package invisible-watermark is installed.",
            default=False,
            see="cli.md#the-invisible-watermark",
        ),
    ]
    share_with: Annotated[
        Places,
        Option(
            "Take over what this other bundle has already, as hard links: stored once.",
            default=(),
            metavar="BUNDLE",
            see="cli.md#bundles-that-share-files",
        ),
    ]
    revision: Annotated[
        str | None, Option("Branch, tag or commit of the source on the Hub.", metavar="NAME")
    ]
    variant: Annotated[
        str | None, Option("Variant of the source's weights, such as `fp16`.", metavar="NAME")
    ]
    report: Annotated[
        Callable[[Event], None] | None,
        Option(
            "Called at the begin and the end of each stage, with `subject`, `stage`, `seconds` "
            "(`None` at the begin) and `size` in bytes.",
            hidden="the command draws the stages",
        ),
    ]


class ExportArguments(_Common, CoreMLArguments, total=False):
    """Options of an export, those of latentc's own targets included."""


def available_options() -> Mapping[str, Declared]:
    """Return the options that an export takes here by name, those of the targets of other packages
    included."""
    own = declared(ExportArguments)
    of_targets = [declared(kind.ARGUMENTS) for kind in options_of_targets().values()]
    others = {name: option for each in of_targets for name, option in each.items()}
    return {**own, **{name: others[name] for name in others if name not in own}}


def whole(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every option; of those that may be given several times, as a tuple.

    Raises:
        InputError: an unknown name, a value of another type, or beyond its limits.
    """
    known = available_options()
    return {
        name: _tuple(value) if known[name].several and name != FILE_OR_PROMPTS else value
        for name, value in complete(known, given).items()
    }


def _tuple(value: Any) -> Any:
    if value is None:
        return None
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
