"""The compiler's entry: check what is asked, digest the source, stop if the bundle is up to date,
say what the export needs; then `latentc.exporter.compiler.run` runs it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from latentc.exporter.calibration_prompts import Calibration, read_prompts
from latentc.exporter.compiler import early_checks as early
from latentc.exporter.compiler.output import check_output
from latentc.exporter.compiler.preflight import Need, need, refuse, weights_of
from latentc.exporter.compiler.previous_builds import refuse_loss
from latentc.exporter.compiler.run import Compilation, Exported
from latentc.exporter.compiler.sharing import check as check_shared
from latentc.exporter.compiler.sharing import share
from latentc.exporter.components.names import USUAL
from latentc.exporter.memory import looking_at_what_is_new
from latentc.exporter.options import ALL, ExportOptions, artifact_keys, check, up_to_date
from latentc.exporter.progress import Event, Progress
from latentc.exporter.source import given_files, left_out
from latentc.exporter.source.model_card import Card
from latentc.exporter.source.resolving import PipelineSource, resolve
from latentc.exporter.store import (
    Store,
    full_disk_reported,
    missing_artifacts,
    previous_manifest,
    recover,
)
from latentc.exporter.targets import TARGETS
from latentc.exporter.targets import options as options_of_targets
from latentc.exporter.targets.options import gather
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.precision import canonical
from latentc.runtimes.storage import files
from latentc.runtimes.storage.locks import writing


def export(
    source: str | Path,
    output: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    precision: str | Sequence[str] = "fp32",
    passes: Sequence[str] = (),
    schedulers: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    calibration_prompts: str | Path | Sequence[str] | None = None,
    calibration_samples: int | None = None,
    fidelity_floor: float | None = None,
    tasks: Sequence[str] = (),
    lora: str | Path | Sequence[str | Path] = (),
    textual_inversion: str | Path | Sequence[str | Path] = (),
    vae: str | Path | None = None,
    controlnet: str | Path | Sequence[str | Path] = (),
    t2i_adapter: str | Path | Sequence[str | Path] = (),
    ip_adapter: str | Path | Sequence[str | Path] = (),
    image_encoder: str | Path | None = None,
    config: str | Path | None = None,
    allow_pickle: bool = False,
    without: str | Sequence[str] = (),
    watermark: bool = False,
    share_with: str | Path | Sequence[str | Path] = (),
    preflight: bool = True,
    report: Callable[[Event], None] | None = None,
    **target_options: Any,
) -> Exported:
    """Compile a diffusers pipeline into a bundle.

    Args:
        source: a Hub id, a diffusers folder, or a checkpoint of one file.
        output: the bundle's folder. Builds of the same source that stand there are kept.
        targets: ``"onnx"``, ``"openvino"``, ``"torch"``, ``"coreml"``, ``"tensorrt"``, or
            ``"all"``.
        precision: ``"fp32"``, ``"fp16"``, ``"denoiser=int8,vae_decoder=fp16"`` …, or several;
            `latentc.exporter.targets` says what each target has. ``"all"`` is all of them.
        passes: names of passes that make the denoiser faster and the image another one
            (`latentc.exporter.passes.PASSES`). These builds are named after them, and stand beside
            those without: ``precision="w8a8+downsampled-attention"`` asks for the same.
            ``"step-cache"`` adds the denoiser's shallow part to all builds, which the call argument
            `cache_interval` needs.
        schedulers: names instead of the default set; the pipeline's own is always there.
        steps: step counts to make plans for, instead of 1-30, 40, 50 and 100.
        height, width: fix the image's size, in pixels; both or neither.
        verify: compare every build with PyTorch, and fail if it differs.
        overwrite: replace a bundle that was made from another source.
        revision, variant: as in ``DiffusionPipeline.from_pretrained``.
        calibration_prompts: for precisions that quantise activations: a text file with a prompt
            a line, or prompts; None is a list of varied ones.
        calibration_samples: how many denoiser calls to calibrate with.
        fidelity_floor: PSNR in dB that the image of the whole loop must reach against PyTorch
            in fp32; quantised builds keep their most sensitive layers in half precision for it.
        tasks: what the bundle is for besides what the pipeline does: ``"image-to-image"`` and
            ``"inpainting"`` add the VAE's encoder, which the call arguments `image` and
            `mask_image` need.
        lora: files or Hub ids to fuse into the weights, each with its scale if it is not 1, as
            ``"style.safetensors:0.8"``.
        textual_inversion: files or Hub ids with vectors for new words, each with its word if it is
            not the file's own, as ``"cat.safetensors:<cat>"``.
        vae: a folder or Hub id of a VAE to have in the place of the pipeline's own.
        controlnet: folders or Hub ids of ControlNets, fused with the denoiser; calls take their
            `control_image`, a list of them if there are several.
        t2i_adapter: folders or Hub ids of T2I-Adapters; calls take their image as `image`, a list
            if there are several.
        ip_adapter: files of IP-Adapters, with their image encoder beside them, or
            ``OWNER/NAME/PATH`` on the Hub; calls take an `ip_adapter_image`, a list of them if
            there are several.
        config: for a checkpoint of one file, a folder or Hub id with the pipeline's configuration;
            None is the one that diffusers takes the file for, from the Hub.
        image_encoder: a folder or Hub id of the image encoder of the IP-Adapters, where it is not
            the one beside them.
        allow_pickle: read such a file, or that of an adapter, even if it is a pickle. A checkpoint
            may then run code.
        without: parts to leave out that the pipeline works without, such as ``"text_encoder_3"``.
        watermark: put the invisible watermark into images that SDXL's classes put into them where
            the package invisible-watermark is installed.
        share_with: other bundles; what one of them has of the same parts, options and versions is
            not made again, and what is the same in one of them is a hard link to its file, and
            stored once.
        preflight: refuse what does not fit into the memory and the disk that there are; see
            `latentc.exporter.compiler.preflight`.
        report: called with an `latentc.exporter.progress.Event` at the begin and end of each stage.
        target_options: own options of the targets, such as ``coreml_target="iOS17"``.

    Raises:
        InputError, SourceError, ExportError, VerificationError: see `latentc.runtimes.errors`.
            Nothing is left at `output` that was not there before.
    """
    asked = _read(dict(locals()))
    with writing(asked.destination, asked.progress):
        recover(asked.destination)
        job = _planned(asked)
        if job.done is not None:
            done = _with_card(job.done, asked.source.card)
            shared = share(done.bundle, done.manifest, asked.others)
            return dataclasses.replace(done, shared=shared)
        with asked.progress.stage("needs", job.need.line()):
            if preflight:
                refuse(job.need, asked.destination)
        store = Store(asked.destination, job.previous, asked.others)
        compilation = Compilation(asked.source, asked.options, job.keys, store, asked.progress)
        with looking_at_what_is_new():
            return compilation.run(job.previous, asked.others)


@dataclass(frozen=True)
class _Asked:
    """What an export is to make, of what and where. `others`: bundles to share files with."""

    source: PipelineSource
    options: ExportOptions
    destination: Path
    progress: Progress
    others: tuple[Path, ...]


@dataclass(frozen=True)
class _Job:
    """What is left to do, as the output stands; `done` if that is nothing."""

    keys: Mapping[tuple[str, str], Mapping[str, str]]
    previous: Manifest | None
    need: Need
    done: Exported | None


def preflight(source: str | Path, output: str | Path, **arguments: Any) -> Need:
    """What `export` with these arguments will need; nothing is written.

    Raises:
        InputError, SourceError, ExportError: as `export` does before it begins.
    """
    bound = inspect.signature(export).bind(source, output, **arguments)
    bound.apply_defaults()
    return _planned(_read(bound.arguments)).need


def _read(given: Mapping[str, Any]) -> _Asked:
    """Check the arguments of `export`, read and digest the source."""
    targets, precision = given["targets"], given["precision"]
    named = [name for each in targets for name in (TARGETS if each == ALL else (each,))]
    asked = tuple(dict.fromkeys(named))
    precisions = (precision,) if isinstance(precision, str) else precision
    schedulers, steps = given["schedulers"], given["steps"]
    options = ExportOptions(
        asked,
        tuple(dict.fromkeys(canonical(each, USUAL) for each in precisions)),
        tuple(schedulers) if schedulers is not None else None,
        tuple(sorted(set(steps))) if steps is not None else None,
        given["height"],
        given["width"],
        given["verify"],
        given["overwrite"],
        gather(given["target_options"], options_of_targets(), asked),
        _calibration(given["calibration_prompts"], given["calibration_samples"]),
        given["fidelity_floor"],
        tuple(given["passes"]),
        tuple(given["tasks"]),
        given["watermark"],
    )
    check(options)
    destination = Path(given["output"])
    check_output(destination)
    others = tuple(Path(each) for each in _texts(given["share_with"]))
    check_shared(others, destination)
    left_out.check(_texts(given["without"]))
    given_files.check(_beside(given))
    progress = Progress(given["report"])
    with progress.stage("source", "read and digest"):
        return _Asked(_found(given), options, destination, progress, others)


def _planned(asked: _Asked) -> _Job:
    """Look at what stands at the output; the caller holds its lock, or changes nothing there."""
    source, options, destination = asked.source, asked.options, asked.destination
    previous = previous_manifest(destination)
    if previous is not None and not options.overwrite:
        refuse_loss(destination, previous, source, options)
    keys = artifact_keys(source, options)
    done = previous is not None and up_to_date(previous, source, destination, keys, options)
    if not done:
        early.check(source, options)
    missing = {} if done else missing_artifacts(keys, destination, previous, asked.others)
    wanted = need(weights_of(source, options), missing, options.verify and not done)
    exported = Exported(destination, previous) if done and previous else None
    return _Job(keys, previous, wanted, exported)


def _with_card(done: Exported, card: Card) -> Exported:
    """Let the manifest of a bundle that is up to date say what its source says of itself now. That
    is in no digest, so that nothing else is made again."""
    source = structs.replace(done.manifest.source, **dataclasses.asdict(card))
    if source == done.manifest.source:
        return done
    manifest = structs.replace(done.manifest, source=source)
    with full_disk_reported():
        files.write(done.bundle / MANIFEST, manifest.checked(), root=done.bundle)
    return dataclasses.replace(done, manifest=manifest)


def _beside(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the files and folders that are given beside the source, by kind."""
    others = {"image-encoder": given["image_encoder"], "config": given["config"]}
    named = {kind: _texts(place) for kind, place in others.items() if place is not None}
    return {**_ingredients(given), **named}


def _ingredients(given: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        "vae": _texts(given["vae"] or ()),
        "lora": _texts(given["lora"]),
        "textual-inversion": _texts(given["textual_inversion"]),
        "controlnet": _texts(given["controlnet"]),
        "t2i-adapter": _texts(given["t2i_adapter"]),
        "ip-adapter": _texts(given["ip_adapter"]),
    }


def _found(given: Mapping[str, Any]) -> PipelineSource:
    configured = None if given["config"] is None else str(given["config"])
    return resolve(
        given["source"],
        given["revision"],
        given["variant"],
        _ingredients(given),
        configured,
        given["allow_pickle"],
        _texts(given["without"]),
        None if given["image_encoder"] is None else str(given["image_encoder"]),
    )


def _texts(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(each) for each in ([given] if isinstance(given, str | Path) else given)]


def _calibration(prompts: str | Path | Sequence[str] | None, samples: int | None) -> Calibration:
    given: dict[str, Any] = {}
    if isinstance(prompts, str | Path):
        given["prompts"] = read_prompts(Path(prompts))
    elif prompts is not None:
        given["prompts"] = tuple(prompts)
    if samples is not None:
        given["samples"] = samples
    return Calibration(**given)
