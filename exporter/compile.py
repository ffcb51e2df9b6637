"""The compiler's driver: source → bundle, verified, written atomically.

Stages: resolve and digest the source; stop if the bundle is up to date; load the pipeline;
sampling plans and tokenizers; reference results from PyTorch; capture and lower what is not
there yet; free PyTorch's copy; verify every build on its runtime; publish by a rename.
"""

from __future__ import annotations

import dataclasses
import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import convert, to_builtins
from msgspec.structs import replace

from exporter.asked import with_size, with_tasks
from exporter.calibration import Calibration, Trajectories, read_prompts
from exporter.families import Description, Graph, TextInput, family_of
from exporter.judged import Judged, judge_probe
from exporter.judged import read as read_judged
from exporter.kept_builds import entry, refuse_loss, with_kept
from exporter.lowering import Lowering
from exporter.memory import (
    free_memory,
    keep_nothing,
    looking_at_what_is_new,
    release_weights,
)
from exporter.options import (
    ALL,
    ExportOptions,
    artifact_keys,
    check,
    up_to_date,
)
from exporter.passes import STEP_CACHE
from exporter.preflight import LARGE, Need, need, refuse, weights_of
from exporter.progress import Event, Progress
from exporter.sharing import check as check_shared
from exporter.sharing import share
from exporter.source import PipelineSource, digest, load, resolve
from exporter.step_cache import split
from exporter.store import Store, missing_artifacts, previous_manifest
from exporter.targets import OPTIONS, TARGETS, computes, verifier
from exporter.targets.options import gather
from exporter.versions import CAPTURE, code, libraries, versions
from runtimes.errors import ExportError, VerificationError
from runtimes.manifest import (
    FORMAT_VERSION,
    Artifact,
    Build,
    CreatedBy,
    Defaults,
    Ingredient,
    JudgeProbe,
    LoopProbe,
    Manifest,
    Probes,
    Schedule,
    Source,
    Tokenizer,
)
from runtimes.npz import write_arrays
from runtimes.precision import build_name, canonical, of_component
from runtimes.tasks import Task
from runtimes.version import __version__

if TYPE_CHECKING:
    from exporter.shifting import Told

PROBES = "probes"


@dataclass(frozen=True)
class Exported:
    """The result: the bundle's folder, its manifest, and the names of what was made anew
    (empty: everything was up to date). `shared`: bytes that another bundle's files hold."""

    bundle: Path
    manifest: Manifest
    made: tuple[str, ...] = field(default=())
    shared: int = 0


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
    config: str | Path | None = None,
    allow_pickle: bool = False,
    without: str | Sequence[str] = (),
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
            `exporter.targets` says what each target has. ``"all"`` is all of them.
        passes: names of passes that make the denoiser faster and the picture another one
            (`exporter.passes.PASSES`). These builds are named after them, and stand beside
            those without: ``precision="w8a8+downsampled-attention"`` asks for the same.
            ``"step-cache"`` adds the denoiser's shallow part to all builds, which the call argument
            `cache_interval` needs.
        schedulers: names instead of the default set; the pipeline's own is always there.
        steps: step counts to make plans for, instead of 1-30, 40, 50 and 100.
        height, width: fix the picture's size, in pixels; both or neither.
        verify: compare every build with PyTorch, and fail if it differs.
        overwrite: replace a bundle that was made from another source.
        revision, variant: as in ``DiffusionPipeline.from_pretrained``.
        calibration_prompts: for precisions that quantise activations: a text file with a prompt
            a line, or prompts; None is a list of varied ones.
        calibration_samples: how many denoiser calls to calibrate with.
        fidelity_floor: PSNR in dB that the picture of the whole loop must reach against PyTorch
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
        t2i_adapter: folders or Hub ids of T2I-Adapters; calls take their picture as `image`, a list
            if there are several.
        ip_adapter: files of IP-Adapters, with their image encoder beside them, or
            ``OWNER/NAME/PATH`` on the Hub; calls take an `ip_adapter_image`, a list of them if
            there are several.
        config: for a checkpoint of one file, a folder or Hub id with the pipeline's configuration;
            None is the one that diffusers takes the file for, from the Hub.
        allow_pickle: read such a file even if it is a pickle, which may run code.
        without: parts to leave out that the pipeline works without, such as ``"text_encoder_3"``.
        share_with: other bundles; what one of them has of the same parts, options and versions is
            not made again, and what is the same in one of them is a hard link to its file, and
            stored once.
        preflight: refuse what does not fit into the memory and the disk that there are; see
            `exporter.preflight`.
        report: called with an `exporter.progress.Event` at the begin and end of each stage.
        target_options: own options of the targets, such as ``coreml_target="iOS17"``.

    Raises:
        InputError, SourceError, ExportError, VerificationError: see `runtimes.errors`.
            Nothing is left at `output` that was not there before.
    """
    job = _prepared(dict(locals()))
    if job.done is not None:
        bundle = job.done.bundle
        return dataclasses.replace(job.done, shared=share(bundle, job.done.manifest, job.others))
    with job.progress.stage("needs", job.need.line()):
        if preflight:
            refuse(job.need, job.destination)
    store = Store(job.destination, job.previous, job.others)
    compilation = _Compilation(job.source, job.options, job.keys, store, job.progress)
    with looking_at_what_is_new():
        return compilation.run(job.previous, job.others)


@dataclass(frozen=True)
class _Job:
    """An export that is ready to begin; `done` if there is nothing to do. `others`: bundles to
    share files with."""

    source: PipelineSource
    options: ExportOptions
    keys: Mapping[tuple[str, str], Mapping[str, str]]
    destination: Path
    previous: Manifest | None
    progress: Progress
    need: Need
    done: Exported | None
    others: tuple[Path, ...] = ()


def preflight(source: str | Path, output: str | Path, **arguments: Any) -> Need:
    """What `export` with these arguments will need; nothing is written.

    Raises:
        InputError, SourceError, ExportError: as `export` does before it begins.
    """
    bound = inspect.signature(export).bind(source, output, **arguments)
    bound.apply_defaults()
    return _prepared(bound.arguments).need


def _prepared(given: Mapping[str, Any]) -> _Job:
    """Check the arguments of `export`, read and digest the source."""
    targets, precision = given["targets"], given["precision"]
    named = [name for each in targets for name in (TARGETS if each == ALL else (each,))]
    asked = tuple(dict.fromkeys(named))
    precisions = (precision,) if isinstance(precision, str) else precision
    schedulers, steps = given["schedulers"], given["steps"]
    options = ExportOptions(
        asked,
        tuple(dict.fromkeys(canonical(each) for each in precisions)),
        tuple(schedulers) if schedulers is not None else None,
        tuple(sorted(set(steps))) if steps is not None else None,
        given["height"],
        given["width"],
        given["verify"],
        given["overwrite"],
        gather(given["target_options"], OPTIONS, asked),
        _calibration(given["calibration_prompts"], given["calibration_samples"]),
        given["fidelity_floor"],
        tuple(given["passes"]),
        tuple(given["tasks"]),
    )
    check(options)
    destination = Path(given["output"])
    others = tuple(Path(each) for each in _texts(given["share_with"]))
    check_shared(others, destination)
    progress = Progress(given["report"])
    with progress.stage("source", "read and digest"):
        found = _found(given)
    previous = previous_manifest(destination)
    if previous is not None and not options.overwrite:
        refuse_loss(destination, previous, found, options)
    keys = artifact_keys(found, options)
    done = previous is not None and up_to_date(previous, found, destination, keys, options)
    missing = {} if done else missing_artifacts(keys, destination, previous, others)
    wanted = need(weights_of(found, options), missing, options.verify and not done)
    exported = Exported(destination, previous) if done and previous else None
    return _Job(found, options, keys, destination, previous, progress, wanted, exported, others)


def _found(given: Mapping[str, Any]) -> PipelineSource:
    asked_for = {
        "vae": _texts(given["vae"] or ()),
        "lora": _texts(given["lora"]),
        "textual-inversion": _texts(given["textual_inversion"]),
        "controlnet": _texts(given["controlnet"]),
        "t2i-adapter": _texts(given["t2i_adapter"]),
        "ip-adapter": _texts(given["ip_adapter"]),
    }
    configured = None if given["config"] is None else str(given["config"])
    return resolve(
        given["source"],
        given["revision"],
        given["variant"],
        asked_for,
        configured,
        given["allow_pickle"],
        _texts(given["without"]),
    )


def _texts(given: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(each) for each in ([given] if isinstance(given, str | Path) else given)]


class _Compilation:
    """One run of the compiler; holds what its stages share."""

    def __init__(
        self,
        source: PipelineSource,
        options: ExportOptions,
        keys: Mapping[tuple[str, str], Mapping[str, str]],
        store: Store,
        progress: Progress,
    ) -> None:
        self.source = source
        self.options = options
        self.keys = keys
        self.store = store
        self.progress = progress

    def run(self, previous: Manifest | None, others: Sequence[Path] = ()) -> Exported:
        keep_nothing()
        try:
            manifest = self._draft(previous)
            manifest = self._verified(manifest)
        except VerificationError:
            self.store.discard()
            raise
        except ExportError as error:
            if "disk is full" in str(error):
                self.store.discard()
            raise
        with self.progress.stage("bundle", "publish"):
            shared = share(self.store.staging, manifest, others)
            self.store.publish(manifest)
        return Exported(self.store.output, manifest, tuple(self.store.made), shared)

    def _draft(self, previous: Manifest | None) -> Manifest:
        """The manifest with everything but verification; writes all files to the staging."""
        from exporter import schedules

        with self.progress.stage("pipeline", "load"):
            pipe = load(self.source)
            description = family_of(self.source.pipeline_class).describe(pipe)
        if self.options.step_cache:
            description = split(description)
        description, tasks = with_tasks(
            description, self.options.tasks_of(self.source), self.source.pipeline_class
        )
        description = with_size(description, self.options)
        self._refuse_other_graphs(previous, description)
        for own in self.options.of_targets.values():
            own.check(description.latents, self.options.height is not None)
        plans = schedules.add_all(
            self.store,
            pipe.scheduler,
            schedules.Wanted(
                self.options.schedulers,
                self.options.steps,
                description.num_inference_steps,
                self._steps_there(previous),
                self._told(pipe.scheduler, description),
            ),
            self.progress,
        )
        tokenizers = tuple(self._tokenizers(pipe, description))
        probes = self._probes(pipe, description, plans[0]) if self.options.verify else None
        scheduler = (type(pipe.scheduler).__name__, schedules.plain_config(pipe.scheduler))
        draft = self._manifest(description, tasks, plans, scheduler, tokenizers, probes)
        draft = replace(draft, builds=self._builds(pipe, description, draft))
        release_weights([graph.module for graph in description.graphs], self.source.folder)
        del pipe, description
        free_memory()
        return with_kept(draft, previous, self.store)

    def _refuse_other_graphs(self, previous: Manifest | None, description: Description) -> None:
        """All builds of a bundle have the same components: others would be lost."""
        if previous is None or self.options.overwrite:
            return
        asked = {build_name(*pair) for pair in self.keys}
        lost = [build.name for build in previous.builds if build.name not in asked]
        components = tuple(graph.component for graph in description.graphs)
        if lost and previous.components != components:
            raise ExportError(
                f"{self.store.output} holds other graphs (of another fixed size, or with or "
                f"without the pass {STEP_CACHE} or a task), and {', '.join(lost)} would be lost; "
                "ask for these builds too, export as they were, or drop them with --overwrite"
            )

    def _told(self, scheduler: Any, description: Description) -> Told:
        """What the pipeline tells its scheduler besides the number of steps."""
        from exporter import shifting
        from exporter.capture import MAX_LATENT

        shift = shifting.line(scheduler.config, description.shifted)
        denoiser = next(g for g in description.graphs if g.component.role == "denoiser").component
        sample, latents = denoiser.inputs["sample"], description.latents
        return shifting.told_by(self.source.pipeline_class, shift, latents, sample, MAX_LATENT)

    def _steps_there(self, previous: Manifest | None) -> Mapping[str, tuple[int, ...]]:
        """Step counts that were added to the bundle since: they are not lost."""
        if previous is None or previous.source.fingerprint != self.source.fingerprint:
            return {}
        return {schedule.name: schedule.steps for schedule in previous.schedules}

    def _manifest(
        self,
        description: Description,
        tasks: tuple[Task, ...],
        plans: tuple[Schedule, ...],
        scheduler: tuple[str, dict[str, Any]],
        tokenizers: tuple[Tokenizer, ...],
        probes: Probes | None,
    ) -> Manifest:
        """All but the builds."""
        return Manifest(
            format_version=FORMAT_VERSION,
            tasks=tasks,
            source=Source(
                self.source.id,
                self.source.pipeline_class,
                self.source.fingerprint,
                *scheduler,
                self.source.revision,
                tuple(
                    Ingredient(each.kind, each.id, each.sha256, each.scale, each.token)
                    for each in self.source.ingredients
                ),
                self.source.without,
            ),
            created_by=created_by(),
            latents=description.latents,
            tokenizers=tokenizers,
            arguments=description.arguments,
            vectors=description.vectors,
            guidance=description.guidance,
            components=tuple(graph.component for graph in description.graphs),
            builds=(),
            schedules=plans,
            defaults=_defaults(plans[0], description.num_inference_steps),
            probes=probes,
            embeddings=description.embeddings,
        )

    def _tokenizers(self, pipe: Any, description: Description) -> list[Tokenizer]:
        from exporter import tokenizers
        from exporter.textual_inversion import expansions

        made = []
        for text in description.text_inputs:
            tokenizer = getattr(pipe, text.attribute)
            key = digest(
                {
                    "kind": "tokenizer",
                    "source": self.source.digests[text.attribute],
                    "length": text.length(tokenizer),
                    "lowercase": text.lowercase,
                    "versions": versions(("transformers", "tokenizers")),
                    "code": code("exporter.tokenizers"),
                }
            )

            def write(
                folder: Path, tokenizer: Any = tokenizer, text: TextInput = text
            ) -> Mapping[str, Any]:
                tokenizers.save(tokenizer, folder / "tokenizer.json", text)
                return {}

            item = self.store.item(key, f"tokenizer/{text.input}", write)
            made.append(
                Tokenizer(
                    item.files[0],
                    text.input,
                    text.length(tokenizer),
                    text.texts,
                    expansions(tokenizer),
                )
            )
        return made

    def _probes(self, pipe: Any, description: Description, own: Schedule) -> Probes:
        from exporter.reference import reference

        sizes, fixed = self._probed_sizes(description)
        judged = None if description.task.pictures else self._judged(fixed)
        key = digest(
            {
                "kind": "probes",
                "source": self.source.fingerprint,
                "size": [self.options.height, self.options.width],
                "sizes": [*sizes, fixed],
                "arguments": dict(description.probe_arguments),
                "schedule": own.key,
                "versions": versions(CAPTURE),
                "code": code(
                    *("exporter.reference", "exporter.judged"),
                    family_of(self.source.pipeline_class).__name__,
                ),
                "judged": judged is not None,
                **({"step_cache": code("exporter.step_cache")} if self.options.step_cache else {}),
            }
        )

        def write(folder: Path) -> Mapping[str, Any]:
            with self.progress.stage("reference", "run in PyTorch") as wrote:
                arrays, loop = reference(pipe, description, own, sizes, fixed)
                for name, values in arrays.items():
                    write_arrays(folder / f"{name}.npz", values)
                    wrote((folder / f"{name}.npz").stat().st_size)
            return {
                "loop": to_builtins(loop),
                "judged": to_builtins(self._judge(description, own, judged)),
            }

        item = self.store.item(key, PROBES, write)
        files = {Path(file.path).stem: file for file in item.files}
        judge = convert(item.meta["judged"], JudgeProbe | None)
        return Probes(files, convert(item.meta["loop"], LoopProbe), key, judge)

    def _judged(self, fixed: tuple[int, int] | None) -> Judged | None:
        """Who judges the pictures, where they may have the size that the judge is for."""
        asked = read_judged(self.source.folder)
        return asked if asked and fixed in (None, (asked.height, asked.width)) else None

    def _judge(
        self, description: Description, own: Schedule, asked: Judged | None
    ) -> JudgeProbe | None:
        if asked is None:
            return None
        with self.progress.counted("judge", "draw in PyTorch", asked.pictures) as told:
            return judge_probe(description, asked, own, told)

    def _probed_sizes(
        self, description: Description
    ) -> tuple[list[dict[str, int]], tuple[int, int] | None]:
        """Values of dimension symbols for the random probes, and the picture's size if it must
        be a certain one."""
        from exporter.capture import symbol_values

        options = self.options
        sizes = [symbol_values(description, traced=False)]
        fixed = (options.height, options.width) if options.height and options.width else None
        for own in options.of_targets.values():
            sizes += own.probe_sizes(description.latents, symbol_values(description, traced=True))
            if description.resizable:
                fixed = fixed or own.loop_size()
        return sizes, fixed

    def _builds(self, pipe: Any, description: Description, manifest: Manifest) -> tuple[Build, ...]:
        from exporter.headroom import probe_samples

        def samples(graph: Graph) -> Iterator[Any]:
            return probe_samples(graph, manifest.probes, self.store.staging)

        trajectories = self._trajectories(pipe, description)
        lowerings = {
            graph.component.name: Lowering(
                graph, description, self.options, self.progress, samples, trajectories
            )
            for graph in description.graphs
        }
        kept = self._kept(lowerings, samples, description, manifest)
        artifacts: dict[tuple[str, str], dict[str, Artifact]] = {pair: {} for pair in self.keys}
        for name, lowering in lowerings.items():
            for pair, made in artifacts.items():
                made[name] = self._artifact(lowering, pair, kept.get(pair, {}))
            lowering.forget()
            free_memory()
        return tuple(self._build(pair, made) for pair, made in artifacts.items())

    def _artifact(
        self,
        lowering: Lowering,
        pair: tuple[str, str],
        kept: Mapping[str, frozenset[str]],
    ) -> Artifact:
        target, precision = pair
        name = lowering.name
        own = of_component(precision, name)

        def write(folder: Path) -> Mapping[str, Any]:
            weights = kept.get(name, frozenset())
            return {**lowering.write(target, own, weights, folder), "kept": sorted(weights)}

        key = self.keys[pair][name]
        item = self.store.item(key, f"{build_name(target, precision)}/{name}", write)
        free_memory()
        compute = computes(target, own)
        return Artifact(
            key, entry(item), item.files, own, compute, tuple(item.meta.get("kept", ()))
        )

    def _build(self, pair: tuple[str, str], artifacts: dict[str, Artifact]) -> Build:
        target, precision = pair
        return Build(build_name(target, precision), target, precision, artifacts)

    def _trajectories(self, pipe: Any, description: Description) -> Callable[[], Trajectories]:
        """Run when a build first asks for them."""

        @cache
        def run() -> Trajectories:
            from exporter.calibration import trajectories

            wanted = self.options.calibration
            with self.progress.counted("calibration", "denoise", wanted.samples) as told:
                return trajectories(pipe, description, wanted, told)

        return run

    def _kept(
        self,
        lowerings: Mapping[str, Lowering],
        samples: Callable[[Graph], Iterator[Any]],
        description: Description,
        manifest: Manifest,
    ) -> dict[tuple[str, str], Mapping[str, frozenset[str]]]:
        """For each quantised build the layers to keep so that it reaches the fidelity floor."""
        if self.options.fidelity_floor is None:
            return {}
        from exporter.floor_search import FloorSearch

        search = FloorSearch(
            lowerings,
            self.options,
            self.store.staging,
            manifest,
            self.progress,
            {graph.component.name: list(samples(graph)) for graph in description.graphs},
        )
        return {
            pair: search.run(*pair)
            for pair, keys in self.keys.items()
            if not all(map(self.store.keep, keys.values()))
        }

    def _verified(self, manifest: Manifest) -> Manifest:
        if manifest.probes is None:
            return manifest
        from runtimes import backend as backends
        from runtimes.verify import check_build

        builds = []
        for build in manifest.builds:
            if build.verification is None or not build.verification.passed:
                precisions = [artifact.precision for artifact in build.artifacts.values()]
                backend = backends.get(verifier(build.target, precisions))
                with self.progress.stage(build.name, f"verify on {backend.name}"):
                    result = check_build(
                        self.store.staging, manifest, build, backend, low_memory=_is_large(build)
                    )
                build = replace(build, verification=result)
                free_memory()
            builds.append(build)
        made = replace(manifest, builds=tuple(builds))
        misses = [line for build in made.builds for line in describe_misses(build)]
        misses += self._below_floor(made)
        if misses:
            raise VerificationError(
                f"the export does not reproduce PyTorch, no bundle was written: {misses[0]}"
                + (f" (and {len(misses) - 1} more)" if len(misses) > 1 else "")
            )
        return made

    def _below_floor(self, manifest: Manifest) -> list[str]:
        floor = self.options.fidelity_floor
        asked = {build_name(*pair) for pair in self.keys}
        return [
            f"{build.name}: the picture has {build.verification.loop.image_psnr:.1f} dB, "
            f"the fidelity floor is {floor:g}"
            for build in manifest.builds
            if floor is not None and build.name in asked
            if build.verification and build.verification.loop
            if build.verification.loop.image_psnr < floor
        ]


def _is_large(build: Build) -> bool:
    """Whether its components should not all be in memory at once to be verified."""
    files = {file.path: file.size for each in build.artifacts.values() for file in each.files}
    return sum(files.values()) >= LARGE


def _calibration(prompts: str | Path | Sequence[str] | None, samples: int | None) -> Calibration:
    given: dict[str, Any] = {}
    if isinstance(prompts, str | Path):
        given["prompts"] = read_prompts(Path(prompts))
    elif prompts is not None:
        given["prompts"] = tuple(prompts)
    if samples is not None:
        given["samples"] = samples
    return Calibration(**given)


def describe_misses(build: Build) -> list[str]:
    """One sentence for each comparison of a build that missed its tolerance."""
    verification = build.verification
    if verification is None:
        return []
    lines = [
        f"{build.name}, {check.subject} on {check.probe}: relative L2 {check.relative_l2:.1e}, "
        f"allowed {check.tolerance:.1e}"
        for check in verification.checks
        if not check.passed
    ]
    loop = verification.loop
    if loop and not loop.passed:
        lines.append(
            f"{build.name}, whole loop: latents differ by {loop.latents_relative_l2:.1e} "
            f"(allowed {loop.tolerance:.1e}), the picture by {loop.image_max_difference} of 255, "
            f"{loop.image_psnr:.1f} dB"
        )
    score = verification.score
    if score and not score.passed:
        lines.append(
            f"{build.name}: the judge finds {score.right} of {score.pictures} pictures right, "
            f"expected {score.least} at least"
        )
    return lines


def created_by() -> CreatedBy:
    """The versions at hand."""
    return CreatedBy(
        latentc=__version__,
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        libraries=libraries(),
    )


def _defaults(own: Schedule, usual: int) -> Defaults:
    """The pipeline's usual step count, or the nearest that there is a plan for."""
    return Defaults(own.name, min(own.steps, key=lambda count: abs(count - usual)))
