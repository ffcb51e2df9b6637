"""Graphs of ONNX that run and give something else than the manifest says."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from latentc.runtimes.errors import LatentcError, NumericalError
from tests.hostile.bad_bundle import BadBundle, case


def _giving(nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], output: str, kind: int,
            shape: list[Any], constants: dict[str, Any]) -> bytes:  # fmt: skip
    """Return a graph as bytes."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(n, k, s) for n, (k, s) in inputs.items()],
        [helper.make_tensor_value_info(output, kind, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
_SAMPLE = ["batch", 4, "height", "width"]
_DENOISER = {
    "sample": (FLOAT, _SAMPLE),
    "timestep": (FLOAT, ["batch"]),
    "encoder_hidden_states": (FLOAT, ["batch", "sequence", 32]),
}
_DECODER = {"latents": (FLOAT, _SAMPLE)}


def _denoiser(
    bad: BadBundle, nodes: list[Any], kind: int, shape: list[Any], **constants: Any
) -> None:
    data = _giving(nodes, _DENOISER, "prediction", kind, shape, constants)
    bad.put(bad.entry("onnx", "denoiser"), data)


def _decoder(
    bad: BadBundle, nodes: list[Any], kind: int, shape: list[Any], **constants: Any
) -> None:
    data = _giving(nodes, _DECODER, "image", kind, shape, constants)
    bad.put(bad.entry("onnx", "vae_decoder"), data)


def _node(*arguments: Any, **attributes: Any) -> Any:
    return helper.make_node(*arguments, **attributes)


def _int64(*values: int) -> Any:
    return np.array(values, np.int64)


def _float(value: float) -> Any:
    return np.array(value, np.float32)


@case("onnx results", "prediction", LatentcError)
def onnx_result_of_another_rank(bad: BadBundle) -> None:
    """The denoiser gives an array of three dimensions."""
    nodes = [_node("Squeeze", ["part", "axes"], ["prediction"]),
             _node("Gather", ["sample", "first"], ["part"], axis=1)][::-1]  # fmt: skip
    _denoiser(bad, nodes, FLOAT, ["b", "h", "w"], axes=_int64(1), first=_int64(0))


@case("onnx results", "prediction", LatentcError)
def onnx_result_of_another_type(bad: BadBundle) -> None:
    """The denoiser gives integers."""
    _denoiser(bad, [_node("Cast", ["sample"], ["prediction"], to=INT64)], INT64, _SAMPLE)


@case("onnx results", "prediction", LatentcError)
def onnx_result_of_another_size(bad: BadBundle) -> None:
    """The denoiser gives twice as many rows as it takes."""
    nodes = [_node("Concat", ["sample", "sample"], ["prediction"], axis=2)]
    _denoiser(bad, nodes, FLOAT, ["b", 4, "h", "w"])


@case("onnx results", "prediction", LatentcError)
def onnx_result_of_one_number(bad: BadBundle) -> None:
    """The denoiser gives one number, which numpy would spread over the whole image."""
    nodes = [_node("ReduceMean", ["sample"], ["prediction"], keepdims=1)]
    _denoiser(bad, nodes, FLOAT, [1, 1, 1, 1])


@case("onnx results", "prediction", LatentcError)
def onnx_result_without_elements(bad: BadBundle) -> None:
    """The denoiser gives an array of no rows."""
    nodes = [_node("Slice", ["sample", "zero", "zero", "axis"], ["prediction"])]
    _denoiser(bad, nodes, FLOAT, ["b", 4, "h", "w"], zero=_int64(0), axis=_int64(2))


@case("onnx results", "NaN or infinity", NumericalError)
def onnx_result_nan(bad: BadBundle) -> None:
    """The denoiser gives NaN."""
    nodes = [_node("Mul", ["sample", "factor"], ["prediction"])]
    _denoiser(bad, nodes, FLOAT, _SAMPLE, factor=_float(float("nan")))


@case("onnx results", "NaN or infinity", NumericalError)
def onnx_image_infinite(bad: BadBundle) -> None:
    """The decoder gives infinity."""
    nodes = [_node("Slice", ["latents", "from", "to", "axis"], ["three"]),
             _node("Add", ["three", "most"], ["image"])]  # fmt: skip
    constants = {
        "from": _int64(0),
        "to": _int64(3),
        "axis": _int64(1),
        "most": _float(float("inf")),
    }
    _decoder(bad, nodes, FLOAT, ["b", 3, "h", "w"], **constants)


@case("onnx results", "image", LatentcError)
def onnx_image_of_one_pixel(bad: BadBundle) -> None:
    """The decoder gives one pixel, whatever the latents' size."""
    nodes = [_node("Slice", ["latents", "from", "to", "axis"], ["three"]),
             _node("ReduceMean", ["three", "sides"], ["image"], keepdims=1)]  # fmt: skip
    constants = {"from": _int64(0), "to": _int64(3), "axis": _int64(1), "sides": _int64(2, 3)}
    _decoder(bad, nodes, FLOAT, ["b", 3, 1, 1], **constants)


@case("onnx results", "image", LatentcError)
def onnx_image_of_two_dimensions(bad: BadBundle) -> None:
    """The decoder gives a matrix."""
    nodes = [_node("Flatten", ["latents"], ["image"])]
    _decoder(bad, nodes, FLOAT, ["b", "n"])


@case("onnx results", "image", LatentcError)
def onnx_image_of_four_channels(bad: BadBundle) -> None:
    """The decoder gives four channels where the manifest says three."""
    _decoder(bad, [_node("Identity", ["latents"], ["image"])], FLOAT, _SAMPLE)


@case("onnx results", "image", LatentcError)
def onnx_images_for_another_batch(bad: BadBundle) -> None:
    """The decoder gives twice as many images as latents."""
    nodes = [_node("Slice", ["latents", "from", "to", "axis"], ["three"]),
             _node("Concat", ["three", "three"], ["image"], axis=0)]  # fmt: skip
    constants = {"from": _int64(0), "to": _int64(3), "axis": _int64(1)}
    _decoder(bad, nodes, FLOAT, ["b", 3, "h", "w"], **constants)


@case("onnx results", "encoder_hidden_states", LatentcError)
def onnx_text_of_another_width(bad: BadBundle) -> None:
    """The text encoder gives a narrower array than the denoiser takes."""
    nodes = [_node("Cast", ["input_ids"], ["as_float"], to=FLOAT),
             _node("Unsqueeze", ["as_float", "last"], ["encoder_hidden_states"])]  # fmt: skip
    inputs = {"input_ids": (INT64, ["batch", 77])}
    data = _giving(nodes, inputs, "encoder_hidden_states", FLOAT, ["b", 77, 1], {"last": _int64(2)})
    bad.put(bad.entry("onnx", "text_encoder"), data)
