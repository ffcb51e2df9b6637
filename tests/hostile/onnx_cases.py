"""Bad graphs of ONNX: missing, altered, with weights from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latentc.runtimes.errors import LatentcError
from tests.hostile.bad_bundle import BadBundle, case


def _onnx(bad: BadBundle, component: str, change: Callable[[Any], object]) -> None:
    path = bad.entry("onnx", component)
    model = onnx.load_from_string(bad.read(path))
    change(model)
    bad.put(path, model.SerializeToString())


def _external(model: Any) -> Any:
    """Return the first weight that is stored beside the graph."""
    return next(each for each in model.graph.initializer if each.external_data)


def _locate(tensor: Any, location: str) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def _moved(bad: BadBundle, location: str) -> None:
    _onnx(bad, "denoiser", lambda model: _locate(_external(model), location))


@case("onnx", "model.onnx", LatentcError)
def onnx_cut_short(bad: BadBundle) -> None:
    """The graph ends in the middle."""
    path = bad.entry("onnx", "denoiser")
    data = bad.read(path)
    bad.put(path, data[: len(data) // 2])


@case("onnx", "model.onnx", LatentcError)
def onnx_empty(bad: BadBundle) -> None:
    """The graph has no bytes."""
    bad.put(bad.entry("onnx", "denoiser"), b"")


@case("onnx", "model.onnx", LatentcError)
def onnx_is_text(bad: BadBundle) -> None:
    """The graph is a text."""
    bad.put(bad.entry("onnx", "denoiser"), b"this is no graph\n" * 100)


@case("onnx", "model.onnx", LatentcError)
def onnx_weights_cut_short(bad: BadBundle) -> None:
    """The weights beside the graph end in the middle."""
    path = bad.entry("onnx", "denoiser") + ".data"
    data = bad.read(path)
    bad.put(path, data[: len(data) // 2])


@case("onnx", "not list", LatentcError)
def onnx_weights_not_listed(bad: BadBundle) -> None:
    """The weights beside the graph are there, but not in the manifest: nobody hashed them."""
    path = bad.entry("onnx", "denoiser")

    def change(document: Any) -> None:
        for build in document["builds"]:
            for artifact in build["artifacts"].values():
                artifact["files"] = [f for f in artifact["files"] if f["path"] != f"{path}.data"]

    bad.edit(change)


@case("onnx", "not list", LatentcError)
def onnx_weights_in_the_folder_above(bad: BadBundle) -> None:
    """A weight lies in the folder above the graph's."""
    _moved(bad, "../text_encoder/model.onnx.data")


@case("onnx", "not list", LatentcError)
def onnx_weights_outside(bad: BadBundle) -> None:
    """A weight lies outside of the bundle, by a path that climbs."""
    _moved(bad, "../../../outside/secret")


@case("onnx", "not list", LatentcError)
def onnx_weights_at_an_absolute_path(bad: BadBundle) -> None:
    """A weight lies outside of the bundle, by an absolute path."""
    _moved(bad, str(bad.outside / "secret"))


@case("onnx", "not list", LatentcError)
def onnx_weights_through_a_link(bad: BadBundle) -> None:
    """A weight lies in an unlisted file of the graph's folder that is a link out of the bundle."""
    path = Path(bad.entry("onnx", "denoiser"))
    (bad.outside / "weights").write_bytes(bad.read(f"{path}.data"))
    _moved(bad, "extra.data")
    bad.link((path.parent / "extra.data").as_posix(), bad.outside / "weights")


@case("onnx", "not list", LatentcError)
def onnx_weights_in_a_fifo(bad: BadBundle) -> None:
    """A weight lies in an unlisted named pipe."""
    _moved(bad, "pipe.data")
    bad.fifo((Path(bad.entry("onnx", "denoiser")).parent / "pipe.data").as_posix())


@case("onnx", "not list", LatentcError)
def onnx_constant_outside(bad: BadBundle) -> None:
    """A constant inside of a node lies outside of the bundle."""

    def change(model: Any) -> None:
        tensor = TensorProto(
            name="stolen",
            data_type=TensorProto.UINT8,
            dims=[27],
            data_location=TensorProto.EXTERNAL,
        )
        tensor.external_data.add(key="location", value="../../../outside/secret")
        model.graph.node.append(helper.make_node("Constant", [], ["stolen"], value=tensor))

    _onnx(bad, "denoiser", change)


@case("onnx", "not list", LatentcError)
def onnx_constant_of_a_subgraph_outside(bad: BadBundle) -> None:
    """A weight of a branch of the graph lies outside of the bundle."""

    def change(model: Any) -> None:
        tensor = TensorProto(
            name="stolen", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL
        )
        tensor.external_data.add(key="location", value="../../../outside/secret")
        out = helper.make_tensor_value_info("taken", TensorProto.FLOAT, [4])
        node = helper.make_node("Identity", ["stolen"], ["taken"])
        branch = helper.make_graph([node], "branch", [], [out], [tensor])
        condition = numpy_helper.from_array(np.array(True), "condition")
        model.graph.initializer.append(condition)
        both = {"then_branch": branch, "else_branch": branch}
        model.graph.node.append(helper.make_node("If", ["condition"], ["either"], **both))

    _onnx(bad, "denoiser", change)


@case("onnx", "model.onnx", LatentcError)
def onnx_custom_operator(bad: BadBundle) -> None:
    """The graph has an operator of a library that would have to be loaded."""

    def change(model: Any) -> None:
        model.opset_import.append(helper.make_opsetid("evil", 1))
        model.graph.node[0].domain = "evil"

    _onnx(bad, "denoiser", change)


@case("onnx results", "", LatentcError)
def onnx_with_another_input(bad: BadBundle) -> None:
    """The graph takes an input that the manifest does not have."""

    def change(model: Any) -> None:
        model.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, [1]))

    _onnx(bad, "denoiser", change)


@case("onnx results", "", LatentcError)
def onnx_without_its_output(bad: BadBundle) -> None:
    """The graph's output has another name."""

    def change(model: Any) -> None:
        old = model.graph.output[0].name
        model.graph.node.append(helper.make_node("Identity", [old], ["other"]))
        model.graph.output[0].name = "other"

    _onnx(bad, "denoiser", change)
