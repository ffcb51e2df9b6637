"""Bad graphs of OpenVINO: missing, altered, with weights from elsewhere, with other results."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentc.runtimes.errors import LatentcError, NumericalError
from tests.hostile.bad_bundle import BadBundle, case


def _ir(bad: BadBundle, component: str, change: Callable[[str], str]) -> None:
    path = bad.entry("openvino", component)
    old = bad.read(path).decode()
    new = change(old)
    assert new != old, "the case changes nothing"
    bad.put(path, new.encode())


def _weights(bad: BadBundle) -> str:
    return bad.entry("openvino", "denoiser").removesuffix(".xml") + ".bin"


@case("openvino", "model.xml", LatentcError)
def openvino_cut_short(bad: BadBundle) -> None:
    """The graph ends in the middle."""
    _ir(bad, "denoiser", lambda text: text[: len(text) // 2])


@case("openvino", "model.xml", LatentcError)
def openvino_is_empty(bad: BadBundle) -> None:
    """The graph has no bytes."""
    _ir(bad, "denoiser", lambda text: "")


@case("openvino", "", LatentcError)
def openvino_weights_cut_short(bad: BadBundle) -> None:
    """The weights beside the graph end in the middle."""
    path = _weights(bad)
    data = bad.read(path)
    bad.put(path, data[: len(data) // 2])


def _unlisted(bad: BadBundle, path: str) -> None:
    def change(document: Any) -> None:
        for build in document["builds"]:
            for artifact in build["artifacts"].values():
                artifact["files"] = [f for f in artifact["files"] if f["path"] != path]

    bad.edit(change)


@case("openvino", "not list", LatentcError)
def openvino_weights_not_listed(bad: BadBundle) -> None:
    """The weights beside the graph are there, but not in the manifest."""
    _unlisted(bad, _weights(bad))


@case("openvino", "not list", LatentcError)
def openvino_weights_through_a_link(bad: BadBundle) -> None:
    """The weights are an unlisted link out of the bundle."""
    path = _weights(bad)
    _unlisted(bad, path)
    (bad.outside / "weights").write_bytes(bad.read(path))
    bad.link(path, bad.outside / "weights")


@case("openvino", "not list", LatentcError)
def openvino_weights_fifo(bad: BadBundle) -> None:
    """The weights are an unlisted named pipe."""
    path = _weights(bad)
    _unlisted(bad, path)
    bad.fifo(path)


@case("openvino", "not list", LatentcError)
def openvino_weights_device(bad: BadBundle) -> None:
    """The weights are an unlisted link to a device that never ends."""
    path = _weights(bad)
    _unlisted(bad, path)
    bad.link(path, "/dev/zero")


@case("openvino", "model.xml", LatentcError)
def openvino_weights_beyond_the_file(bad: BadBundle) -> None:
    """A constant begins behind the end of the weights."""
    _ir(bad, "denoiser", lambda text: re.sub(r'offset="\d+"', 'offset="4294967296"', text, count=1))


@case("openvino", "document type", LatentcError)
def openvino_expanding_entities(bad: BadBundle) -> None:
    """The XML declares entities that grow ten times ten times … when they are read."""
    entities = "".join(
        f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "aaaaaaaaaa"}">' for i in range(10)
    )
    head = f"<!DOCTYPE net [{entities}]>"
    _ir(bad, "denoiser", lambda text: text.replace('<net name="', f'{head}<net name="&e9;', 1))


@case("openvino", "document type", LatentcError)
def openvino_external_entity(bad: BadBundle) -> None:
    """The XML takes an entity from a file outside of the bundle."""
    head = f'<!DOCTYPE net [<!ENTITY secret SYSTEM "file://{bad.outside}/secret">]>'
    _ir(bad, "denoiser", lambda text: text.replace('<net name="', f'{head}<net name="&secret;', 1))


@case("openvino", "not an OpenVINO IR", LatentcError)
def openvino_is_an_onnx_graph(bad: BadBundle) -> None:
    """The IR is an ONNX graph with weights elsewhere: OpenVINO goes by what a file holds."""
    entry = bad.entry("onnx", "denoiser")
    bad.put(bad.entry("openvino", "denoiser"), bad.read(entry))


def _openvino(bad: BadBundle, component: str, make: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Put a graph of a few operators in a component's place."""
    import openvino as ov
    from openvino import opset13 as ops

    known = next(each for each in bad.document()["components"] if each["name"] == component)
    inputs = {}
    for name, spec in known["inputs"].items():
        shape = [size if isinstance(size, int) else -1 for size in spec["shape"]]
        inputs[name] = ops.parameter(shape, np.dtype(spec["dtype"]), name=name)
        inputs[name].output(0).get_tensor().set_names({name})
    result = make(ops, inputs)
    result.output(0).get_tensor().set_names({next(iter(known["outputs"]))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(ov.Model([result], list(inputs.values())), path, compress_to_fp16=False)
        entry = bad.entry("openvino", component)
        bad.put(entry, path.read_bytes())
        bad.put(entry.removesuffix(".xml") + ".bin", path.with_suffix(".bin").read_bytes())


@case("openvino results", "prediction", LatentcError)
def openvino_result_of_another_rank(bad: BadBundle) -> None:
    """The denoiser gives an array of three dimensions."""
    _openvino(bad, "denoiser", lambda ops, x: ops.reduce_mean(x["sample"], np.int64([1]), False))


@case("openvino results", "prediction", LatentcError)
def openvino_result_of_another_type(bad: BadBundle) -> None:
    """The denoiser gives integers."""
    _openvino(bad, "denoiser", lambda ops, x: ops.convert(x["sample"], "i64"))


@case("openvino results", "prediction", LatentcError)
def openvino_result_of_another_size(bad: BadBundle) -> None:
    """The denoiser gives twice as many rows as it takes."""
    _openvino(bad, "denoiser", lambda ops, x: ops.concat([x["sample"], x["sample"]], 2))


@case("openvino results", "NaN or infinity", NumericalError)
def openvino_result_nan(bad: BadBundle) -> None:
    """The denoiser gives NaN."""
    _openvino(bad, "denoiser", lambda ops, x: ops.multiply(x["sample"], np.float32(np.nan)))


@case("openvino results", "NaN or infinity", NumericalError)
def openvino_nan_in_latents(bad: BadBundle) -> None:
    """The denoiser gives one NaN, which a clamp at the end of the decoder could hide."""

    def make(ops: Any, x: dict[str, Any]) -> Any:
        one = np.zeros((1, 4, 1, 1), np.float32)
        one[0, 0] = np.nan
        return ops.add(x["sample"], one)

    _openvino(bad, "denoiser", make)


@case("openvino results", "image", LatentcError)
def openvino_image_of_one_pixel(bad: BadBundle) -> None:
    """The decoder gives one pixel, whatever the latents' size."""

    def make(ops: Any, x: dict[str, Any]) -> Any:
        three = ops.gather(x["latents"], np.array([0, 1, 2]), np.array(1))
        return ops.reduce_mean(three, np.int64([2, 3]), True)

    _openvino(bad, "vae_decoder", make)
