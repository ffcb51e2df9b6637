"""Where a pipeline comes from: a Hub id, a local diffusers folder, or a checkpoint of one file.

`resolve` reads only small files and digests the rest; `load` makes the pipeline with
diffusers' own loading code and refuses weights that do not fit, instead of leaving them
random as the libraries do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from latentc.exporter.artifacts.versions import digest
from latentc.exporter.classes import CLASSES, not_supported, record_of
from latentc.exporter.families import family_of
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.source import (
    hub,
    model_card,
    model_files,
    single_file,
    unread_keys,
    vocabulary,
)
from latentc.exporter.source.adapters import kinds as ingredients
from latentc.exporter.source.adapters.kinds import Ingredient
from latentc.exporter.source.left_out import OTHER_PARTS, left_out, present, unused
from latentc.exporter.source.model_card import Card
from latentc.exporter.source.single_file import SingleFile
from latentc.exporter.source.weight_files import SAFE, check
from latentc.runtimes.bundle.manifest import MANIFEST
from latentc.runtimes.bundle.structures import LeftOut
from latentc.runtimes.bundle.trust import sha256
from latentc.runtimes.errors import InputError, SourceError, UnsupportedPipeline, first_line
from latentc.runtimes.storage.files import LARGEST_DOCUMENT, read_regular
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.storage.places import INDEX as INDEX
from latentc.runtimes.storage.places import names_weights
from latentc.runtimes.unknown_names import suggestion

NOTES = "latentc.json"  # see latentc.exporter.verification.judging
# Classes that transformers has under another name today, and published pipelines under the old one.
_RENAMED = {"DPTFeatureExtractor": "DPTImageProcessor"}


@dataclass(frozen=True)
class PipelineSource:
    """A resolved source. `digests` maps each part to the SHA-256 of its subfolder's content, and
    of that of the ingredients that change it; `configurations` to that of all but its weights, and
    of what stands in its place. `variants`: of the weights, for the parts that have the one that
    was asked for. `folder` holds but the configuration where `file` has the weights. `without`:
    what was left out, its parts not among `parts`. `card`: what the source says of itself, which
    changes nothing that is made of it, and so no digest."""

    id: str
    folder: Path
    pipeline_class: str
    parts: Mapping[str, tuple[str, str]]
    digests: Mapping[str, str]
    revision: str | None = None
    variants: Mapping[str, str] = field(default_factory=dict)
    ingredients: tuple[Ingredient, ...] = ()
    file: SingleFile | None = None
    without: tuple[str, ...] = ()
    configurations: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    card: Card = field(default_factory=Card)

    @property
    def fingerprint(self) -> str:
        """Return a SHA-256 over the pipeline class and all the digests."""
        return digest({"class": self.pipeline_class, "parts": dict(self.digests)})


def resolve(
    source: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    asked: Mapping[str, Sequence[str]] | None = None,
    config: str | None = None,
    allow_pickle: bool = False,
    without: Sequence[str] = (),
    image_encoder: str | None = None,
) -> PipelineSource:
    """Find the source, check its layout, digest its content.

    Args:
        asked: ingredients, by kind (`latentc.exporter.source.adapters.kinds.KINDS`).
        config: for a checkpoint of one file, a folder or Hub id with the configuration.
        allow_pickle: read such a file, or an ingredient's, even if it is a pickle.
        without: what to leave out of the pipeline (`latentc.exporter.families.optional`).
        image_encoder: a folder or Hub id, for IP-Adapters that have none beside them, or another.

    Raises:
        InputError: something cannot be left out.
        SourceError: nothing there, not a diffusers pipeline, or a damaged file.
        UnsupportedPipeline: a pipeline class that no family handles.
    """
    file = None
    if names_weights(str(source)) and not Path(source).expanduser().exists():
        raise SourceError(f"no such file: {source}")
    if Path(source).expanduser().is_file():
        file = single_file.find(Path(source).expanduser(), config, allow_pickle)
    elif config is not None:
        raise SourceError(f"{source} has its own configuration; --config is for single files")
    place = str(file.config if file else source)
    if not Path(place).expanduser().is_dir():
        _look_ahead(place, revision, without)
    folder, revision = _locate(place, revision, variant)
    class_name, parts, others = _parts(folder, without, file is not None)
    for name in parts:
        if not (folder / name).is_dir():
            raise SourceError(f"{folder}: {INDEX} names {name!r}, but there is no such folder")
        model_files.refuse_incomplete(folder / name, parts[name][1])
    configured = {name: _digests(model_files.configuration(folder / name)) for name in parts}
    configurations = {name: digest(each) for name, each in configured.items()}
    variants, weights = {}, {}
    if file is None:
        variants = model_files.variants(folder, parts, variant)
        weights = {
            name: _digests(model_files.required(folder / name, library, variants.get(name)))
            for name, (library, _) in parts.items()
        }
    digests = {name: digest(configured[name] | weights.get(name, {})) for name in sorted(parts)}
    if file:
        digests = {name: digest([file.sha256, value]) for name, value in digests.items()}
    for name in (INDEX, NOTES):
        if (folder / name).is_file():
            digests[name] = sha256(folder / name)
    local = file.path if file else Path(source).expanduser()
    name = local.resolve().name if local.exists() else str(source)
    reading = ingredients.Reading(allow_pickle, image_encoder)
    found = ingredients.find(asked or {}, reading)
    changed = ingredients.changed(digests, found, class_name)
    digests |= {part: digest(each) for part, each in changed.items()}
    digests |= ingredients.added(found)
    replaced = ingredients.replaced(found, class_name)
    configurations |= {name: digests[name] for name in replaced if name in configurations}
    return PipelineSource(
        name,
        folder,
        class_name,
        parts,
        digests,
        revision,
        variants,
        found,
        file,
        tuple(sorted({name for name in without if name not in others})),
        configurations,
        left_out(class_name, others, without),
        _card(file, place, folder, revision),
    )


def _card(file: SingleFile | None, place: str, folder: Path, revision: str | None) -> Card:
    """Return what the source says of itself, in the place that its kind has for that. The
    configuration of a checkpoint of one file is another pipeline's, and so is its card."""
    if file:
        return model_card.of_checkpoint(file.path)
    if Path(place).expanduser().is_dir():
        return model_card.of_folder(folder)
    return model_card.of_hub(place, folder, revision)


def _look_ahead(source: str, revision: str | None, without: Sequence[str]) -> None:
    """Refuse what the index of a pipeline on the Hub tells, before anything else is downloaded.

    Raises:
        InputError, SourceError: as `resolve`. Nothing where the index cannot be had: the download
            says why.
    """

    def get() -> str:
        import huggingface_hub

        huggingface_hub.model_info(source, revision=revision)  # without a network fails at once
        return str(huggingface_hub.hf_hub_download(source, INDEX, revision=revision))

    try:
        path = hub.fetch(source, "folder", "folder", get)
    except SourceError:
        return
    _parts(path.parent, without)


def _parts(
    folder: Path, without: Sequence[str], single_file: bool = False
) -> tuple[str, dict[str, tuple[str, str]], list[str]]:
    """Read a pipeline's index.

    Returns:
        the pipeline's class; the library and class of each part that is exported; what it has
        besides, which is left out.
    """
    index = _read_index(folder)
    class_name = index["_class_name"]
    family_of(class_name)
    not_used = unused(class_name, index, single_file)
    parts = {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] and name not in not_used
    }
    _refuse_several(folder, parts)
    others = present(class_name, index, single_file)
    left = _left_out(class_name, parts, without, others)
    return class_name, {n: value for n, value in parts.items() if n not in left}, others


def _refuse_several(folder: Path, parts: Mapping[str, tuple[str, str]]) -> None:
    classes = {class_name for _, class_name in parts.values()}
    for name, (what, option) in {
        "MultiControlNetModel": ("ControlNets", "--controlnet"),
        "MultiAdapter": ("T2I-Adapters", "--t2i-adapter"),
    }.items():
        if name in classes:
            raise UnsupportedPipeline(
                f"{folder} holds several {what}; export the pipeline without them, and give each "
                f"with {option}"
            )


def load(source: PipelineSource) -> Any:
    """Return the diffusers pipeline, in float32, every weight accounted for, its ingredients in it.

    Raises:
        SourceError: a file is damaged, or a model's weights or an ingredient are missing or do not
            fit.
    """
    pipe = _load_file(source) if source.file else assembled(source, load_model)
    pipe.set_progress_bar_config(disable=True)
    vocabulary.check(pipe)
    return ingredients.apply(pipe, source.ingredients)


def _load_file(source: PipelineSource) -> Any:
    assert source.file is not None
    from latentc.exporter import stored_weights as weights

    absent = _absent(source)
    classes = [_find_class(*named) for named in source.parts.values()]
    with quiet_loading(), weights.as_stored(*(class_name for class_name in classes if class_name)):
        return single_file.load(source.file, source.pipeline_class, absent)


def assembled(source: PipelineSource, model: Callable[[Any, Path, str | None], Any]) -> Any:
    """Return the diffusers pipeline with what `model` makes of its models.

    It gets the class, folder and variant of each.

    Raises:
        SourceError: it cannot be put together.
    """
    import diffusers
    import torch

    models = {}
    with quiet_loading():
        for name, (library, class_name) in source.parts.items():
            cls = _find_class(library, class_name)
            if cls is not None and issubclass(cls, torch.nn.Module):
                models[name] = model(cls, source.folder / name, source.variants.get(name))
        absent = _absent(source)
        # The class's own method: that of DiffusionPipeline loads parts with a default although
        # None is passed for them.
        cls = getattr(diffusers, source.pipeline_class)
        try:
            with _former_names(source):
                return cls.from_pretrained(
                    source.folder, local_files_only=True, **{**absent, **models}
                )
        except Exception as error:
            raise SourceError(f"{source.id}: {first_line(error)}") from error


@contextmanager
def _former_names(source: PipelineSource) -> Iterator[None]:
    """Give transformers the names that this pipeline has for its classes while this lasts."""
    import transformers

    missing = [
        name
        for library, name in source.parts.values()
        if library == "transformers" and name in _RENAMED and not hasattr(transformers, name)
    ]
    for name in missing:
        setattr(transformers, name, getattr(transformers, _RENAMED[name]))
    try:
        yield
    finally:
        for name in missing:
            delattr(transformers, name)


def _locate(source: str, revision: str | None, variant: str | None) -> tuple[Path, str | None]:
    path = Path(source).expanduser()
    if path.is_dir():
        return path, None
    return _download(source, revision, variant)


def _download(source: str, revision: str | None, variant: str | None) -> tuple[Path, str | None]:
    def get() -> str:
        import diffusers

        download = diffusers.DiffusionPipeline.download
        with hub.with_room():
            return str(download(source, revision=revision, variant=variant))

    folder = hub.fetch(source, "folder", "folder", get)
    # The cache's layout is …/snapshots/<commit>/.
    return folder, folder.name if folder.parent.name == "snapshots" else revision


@parser(SourceError, "folder", f"a diffusers pipeline with a {INDEX} that can be read")
def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file() and (folder / MANIFEST).is_file():
        raise SourceError(f"{folder} is a bundle already: latentc inspect {folder} shows it")
    if not path.is_file():
        raise SourceError(
            f"{folder} is not a diffusers pipeline: it has no {INDEX} "
            "(save one with pipe.save_pretrained(folder))"
        )
    index = json.loads(read_regular(path, LARGEST_DOCUMENT))
    named = index.get("_class_name") if isinstance(index, dict) else None
    if isinstance(named, list):  # the file of the code, and the class in it
        own = f"a pipeline with code of its own ({'.'.join(map(str, named))})"
        raise UnsupportedPipeline(not_supported(own))
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"no _class_name; supported classes: {', '.join(CLASSES)}")
    for name, value in index.items():
        of_a_part = isinstance(value, list) and len(value) == 2
        if of_a_part and not all(isinstance(each, str | None) for each in value):
            raise ValueError(f"{name!r} is {value!r:.80}, expected a library and a class")
    return index


def digest_folder(folder: Path, library: str = "diffusers") -> str:
    """Return SHA-256 over the configuration and the weights in a model's folder.

    Raises:
        SourceError: no weights, or a damaged file of weights.
    """
    weights = model_files.required(folder, library, None)
    return digest(_digests([*model_files.configuration(folder), *weights]))


def _digests(files: Iterable[Path]) -> dict[str, str]:
    """Return the digest of each file, by its name."""
    entries = {}
    for path in files:
        if path.suffix == SAFE:
            check(path)
        entries[path.name] = sha256(path)
    return entries


def _find_class(library: str, class_name: str) -> Any:
    """Return the class of a part, None if there is none: of a pipeline's module in diffusers, which
    indexes call by its last name, or of a library."""
    for module in (f"diffusers.pipelines.{library}", library):
        with suppress(ImportError):
            found = getattr(import_module(module), class_name, None)
            if found is not None:
                return found
    return None


def _library(cls: Any) -> str:
    """Return the library whose files a model's class is loaded from: where diffusers has a class of
    its own for a text encoder, it is one of transformers' models."""
    from transformers import PreTrainedModel

    return "transformers" if issubclass(cls, PreTrainedModel) else "diffusers"


def load_model(cls: Any, folder: Path, variant: str | None) -> Any:
    """Return a model in float32.

    Weights that are stored in half precision stay in their files
    (`latentc.exporter.stored_weights`).

    Raises:
        SourceError: a file is damaged, or weights are missing, do not fit or are not finite.
    """
    from latentc.exporter import stored_weights as weights

    files = model_files.required(folder, _library(cls), variant)
    try:
        dtype = weights.stored_type(files if all(file.suffix == SAFE for file in files) else ())
        with weights.as_stored(cls):
            model, info = cls.from_pretrained(
                folder,
                torch_dtype=dtype,
                variant=variant,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise SourceError(f"{folder}: {first_line(error)}") from error
    _check_keys(folder, cls.__name__, info)
    weights.taken_over(model, dtype, str(folder))
    return model.eval()


def _check_keys(folder: Path, class_name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which some weights stayed at their random initial values, or a folder with
    weights that the model has no place for."""
    missing, mismatched, unexpected = (
        unread_keys.in_folder(class_name, (str(key) for key in info.get(kind) or ()))
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
    )
    if missing or mismatched:
        parts = [
            f"{len(keys)} {what} (such as {keys[0]})"
            for keys, what in (
                (missing, "missing"),
                (mismatched, "of another shape"),
                (unexpected, "unknown"),
            )
            if keys
        ]
        raise SourceError(
            f"{folder}: the weights do not fit the model, {', '.join(parts)}; "
            "it would run with random weights. Save it again with the installed versions"
        )
    unread_keys.refuse(str(folder), class_name, unexpected)


def _left_out(
    class_name: str, parts: Mapping[str, Any], without: Sequence[str], others: Sequence[str]
) -> frozenset[str]:
    """Return the parts that go with what is left out; `others` are those that always are.

    Raises:
        InputError: it is not there, or the pipeline does not work without it.
    """
    parts_by_name = record_of(class_name).may_lack
    names = [name for name in without if name not in others]
    for name in names:
        if name not in parts_by_name or name not in parts:
            possible = [*(each for each in parts_by_name if each in parts), *others]
            hint = suggestion(
                name, possible, "it works without", listed="" if possible else "nothing"
            )
            raise InputError(f"{class_name} cannot be exported without {name!r}; {hint}")
    return frozenset(part for name in names for part in parts_by_name[name])


def _absent(source: PipelineSource) -> dict[str, None]:
    """Return the parts that are not to be loaded, each None: those that no graph needs, and those
    that are left out, here or in the source already."""
    import inspect

    import diffusers

    taken = inspect.signature(getattr(diffusers, source.pipeline_class).__init__).parameters
    lacked = [part for each in record_of(source.pipeline_class).may_lack.values() for part in each]
    parts = (*(part for part in OTHER_PARTS if part in taken), *lacked)
    return {part: None for part in parts if part not in source.parts}
