"""Core ML: an ML Program (``.mlpackage``) from the captured program.

An artifact is the packages and ``model.json``, which lists them in the order in which they run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.export import ExportedProgram

from latentc.exporter.capture.decompose import decomposed
from latentc.exporter.capture.graphs import quiet
from latentc.exporter.stored_weights import in_one_file
from latentc.exporter.targets.coreml import operations as coreml_operations
from latentc.exporter.targets.coreml import overflow as coreml_overflow
from latentc.exporter.targets.coreml.options import DEPLOYMENT_TARGETS
from latentc.exporter.targets.coreml.shapes import input_types
from latentc.exporter.targets.coreml.weights import compress
from latentc.exporter.targets.options import Settings
from latentc.runtimes.backends.coreml.mil.toolkit import load_toolkit
from latentc.runtimes.bundle.structures import Component

MODEL = "model.json"
PACKAGE = "model.mlpackage"


def lower(
    program: ExportedProgram, component: Component, folder: Path, *, settings: Settings
) -> str:
    """See `latentc.exporter.targets.Target`."""
    load_toolkit()
    with (
        torch.no_grad(),
        quiet(),
        _no_progress_bars(),
        in_one_file(program.state_dict, folder),
    ):
        model = convert(program, component, settings)
        model = compress(model, settings.precision)
        if settings.options.values["chunk_denoiser"] and component.role == "denoiser":
            packages = write_chunks(model, folder)
        else:
            packages = [PACKAGE]
            model.save(str(folder / PACKAGE))
    for package in packages:
        _forget_empty_folders(folder / package)
    (folder / MODEL).write_text(json.dumps({"packages": packages}, indent=2) + "\n", "utf-8")
    return MODEL


def convert(program: ExportedProgram, component: Component, settings: Settings) -> Any:
    """The program as a coremltools MLModel in fp32, or in fp16 but for the time embedding."""
    import coremltools

    coreml_operations.register()
    target = DEPLOYMENT_TARGETS[settings.options.values["coreml_target"]]
    pipeline = coremltools.PassPipeline.DEFAULT
    precision: Any = coremltools.precision.FLOAT32
    if settings.precision == "fp32":
        # It makes a batch normalisation of a scale and an offset, and forgets to set its epsilon:
        # every scale is then 5e-6 too small. In float16 that is nothing.
        pipeline.remove_passes({"common::fuse_elementwise_to_batchnorm"})
    else:
        coreml_overflow.register()
        pipeline.append_pass(coreml_overflow.NAME)
        precision = coremltools.transform.FP16ComputePrecision(op_selector=half_selector())
    return coremltools.convert(
        _plain(program),
        inputs=input_types(program, component, settings),
        outputs=[coremltools.TensorType(name=n, dtype=np.float32) for n in component.outputs],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target[target],
        compute_precision=precision,
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


def write_chunks(model: Any, folder: Path) -> list[str]:
    """The model as two packages, cut where half of the weights are behind: what crosses the cut
    is an output of the first and an input of the second, in float32. Returns their names."""
    from coremltools.models.utils import bisect_model

    bisect_model(model, str(folder), check_output_correctness=False)
    return ["chunk1.mlpackage", "chunk2.mlpackage"]


def _forget_empty_folders(package: Path) -> None:
    """Take folders without files out of a package's list, such as that of the weights of a graph
    without any: artifacts are files, and a package that names what is not there is damaged."""
    path = package / "Manifest.json"
    document = json.loads(path.read_text("utf-8"))
    entries = document["itemInfoEntries"]
    for key, entry in list(entries.items()):
        place = package / "Data" / entry["path"]
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
            del entries[key]
    path.write_text(json.dumps(document, indent=4) + "\n", "utf-8")


def half_selector() -> Callable[[Any], bool]:
    """Return a function that says whether an operation may be done in float16.

    All but the sines and cosines of the time embedding and what leads to them may. Rounding their
    frequencies, which are multiplied by timesteps near 1000, would cost a relative error of 5e-3.
    """
    exact: set[str] = set()

    def selector(operation: Any) -> bool:
        if not exact:
            exact.add("")  # filled, even where nothing is found
            waves = [o for o in operation.enclosing_block.operations if o.op_type in ("sin", "cos")]
            exact.update(_upstream(waves))
        return operation.name not in exact

    return selector


def _upstream(operations: list[Any]) -> set[str]:
    """The names of `operations` and of all that they depend on."""
    found: set[str] = set()
    waiting = list(operations)
    while waiting:
        operation = waiting.pop()
        if operation is None or operation.name in found:
            continue
        found.add(operation.name)
        for value in operation.inputs.values():
            several = value if isinstance(value, list | tuple) else (value,)
            waiting += [each.op for each in several if each is not None]
    return found


def _plain(program: ExportedProgram) -> ExportedProgram:
    """Return the program in coremltools's operator set: decomposed, and without aliases."""
    made = decomposed(program, coreml_operations.table())
    coreml_operations.crop_instead_of_sizing(made)
    graph = made.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            # An alias may be an output, which the signature names as well.
            made.graph_signature.replace_all_uses(node.name, node.args[0].name)
            graph.erase_node(node)
    made.graph_module.recompile()
    return made


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """coremltools draws its own, with tqdm, wherever it works."""
    import functools

    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.optimize.coreml import _quantization_passes

    places = ((ops, "_tqdm"), (pass_pipeline, "tqdm"), (_quantization_passes, "tqdm"))
    with ExitStack() as stack:
        for module, name in places:
            none = functools.partial(getattr(module, name), disable=True)
            stack.enter_context(mock.patch.object(module, name, none))
        yield
