"""A pipeline is described by its configuration, before any of its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentc.exporter.compiler.requested import check_sizes, with_size, with_tasks
from latentc.exporter.components.description import Description
from latentc.exporter.families import family_of
from latentc.exporter.options import ExportOptions
from latentc.exporter.source.model_files import CONFIG, read_configuration
from latentc.exporter.source.resolving import PipelineSource, assembled
from latentc.exporter.targets import TARGETS
from latentc.runtimes.errors import LatentcError

_SCHEDULER = "scheduler"


def check(source: PipelineSource, options: ExportOptions) -> None:
    """Refuse what this pipeline cannot have, whatever its weights are.

    Ingredients are not looked at: what a pipeline cannot have, it cannot have with them either. But
    for another VAE, which decides what sides are multiples of.

    Raises:
        InputError: schedulers for another kind of model, tasks that its class does not have, a size
            that its model cannot make, a target that cannot have the pipeline's sizes.
    """
    if options.schedulers and _SCHEDULER in source.parts:
        from latentc.exporter.schedulers.plans import check_kinds

        config = read_configuration(source.folder / _SCHEDULER / "scheduler_config.json")
        check_kinds(options.schedulers, source.parts[_SCHEDULER][1], config)
    replaced = any(each.kind == "vae" for each in source.ingredients)
    sized = options.height is not None and not replaced
    limited = any(TARGETS[target].sides_alone for target in options.targets)
    if not options.tasks and not sized and not limited:
        return
    description = _described(source)
    if description is None:
        return
    description = with_tasks(description, options.tasks_of(source), source.pipeline_class)
    check_sizes(description, options.targets)
    if sized:
        with_size(description, options)


def _described(source: PipelineSource) -> Description | None:
    """Return the description of the pipeline with models that have no weights; None where a
    family looks at them, or it is not to be described: loading it says more."""
    try:
        return family_of(source.pipeline_class).describe(assembled(source, _empty))
    except LatentcError:
        return None
    except (NotImplementedError, RuntimeError):  # PyTorch's, of numbers that there are not
        return None


def _empty(cls: Any, folder: Path, _: str | None) -> Any:
    """Return a model as its folder configures it, without weights."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):  # diffusers'
            return cls.from_config(cls.load_config(folder, local_files_only=True))
        return cls(cls.config_class.from_pretrained(folder / CONFIG, local_files_only=True))
