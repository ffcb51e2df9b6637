"""NaN and infinity end a call with the component's name, on every engine: none becomes an image."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from latentc.runtimes.backends.backend import find
from latentc.runtimes.backends.openvino import OpenVinoBackend
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import NumericalError
from latentc.runtimes.pipeline.pipeline import Pipeline, load

# By component weights of its source that every call uses, of which the first is broken that a build
# holds as it is (some are folded into others), and what runs it.
Use = Callable[[Pipeline], object]
WEIGHTS: Mapping[str, tuple[str, tuple[str, ...], Use]] = {
    "text_encoder": (
        "text_encoder/model.safetensors",
        ("encoder.layers.0.mlp.fc1.weight",),
        lambda pipe: pipe.encode_prompt("a red circle"),
    ),
    "denoiser": (
        "unet/diffusion_pytorch_model.safetensors",
        ("conv_out.weight",),
        lambda pipe: next(pipe.stream("a red circle", seed=1, height=64, width=64)),
    ),
    "vae_decoder": (
        "vae/diffusion_pytorch_model.safetensors",
        ("decoder.conv_out.weight", "decoder.mid_block.resnets.0.conv1.weight"),
        lambda pipe: pipe.decode(np.full((1, 4, 8, 8), 0.5, np.float32)),
    ),
}
ENGINES = ("onnxruntime", "openvino", "openvino bf16", "torch", "coreml-reference")


@pytest.mark.fault("2.1", "a weight that is NaN or infinity gives an image")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_broken_weight(
    engine: str,
    component: str,
    value: float,
    tmp_path: Path,
    pipeline_folder: Callable[[str], Path],
    request: Any,
) -> None:
    backend, _, compute = engine.partition(" ")
    file, weights, use = WEIGHTS[component]
    made = "coreml_bundle" if engine.startswith("coreml") else "sd_bundle"
    bundle = tmp_path / "bundle"
    shutil.copytree(request.getfixturevalue(made), bundle)
    loaded = load_file(pipeline_folder("sd") / file)
    assert any(
        _replace(bundle, component, backend, *_broken(form, value))
        for weight in weights
        for form in (loaded[weight], np.ascontiguousarray(loaded[weight].T))
    )
    with (
        load(
            bundle, backend, precision="fp32", compute=compute or None, cache=None, low_memory=True
        ) as pipe,
        pytest.raises(NumericalError, match=f"^{component}: .*NaN or infinity"),
    ):
        use(pipe)


def _broken(weight: np.ndarray, value: float) -> tuple[bytes, bytes]:
    """A weight's bytes as they are and with one value replaced."""
    weight = weight.astype("<f4")
    broken = weight.copy()
    broken.reshape(-1)[0] = value
    return weight.tobytes(), broken.tobytes()


def _replace(bundle: Path, component: str, backend: str, old: bytes, new: bytes) -> bool:
    """Put other bytes in a component's files of the fp32 build that a backend loads, and their
    hashes in the manifest."""
    manifest, replaced, builds = Manifest.load(bundle), False, []
    for build in manifest.builds:
        artifacts = dict(build.artifacts)
        if build.precision == "fp32" and build.target == find(backend).targets[0]:
            files = []
            for file in artifacts[component].files:
                path = bundle / file.path
                replaced |= _replace_in(path, old, new)
                data = path.read_bytes()
                sha = hashlib.sha256(data).hexdigest()
                files.append(msgspec.structs.replace(file, size=len(data), sha256=sha))
            artifacts[component] = msgspec.structs.replace(artifacts[component], files=tuple(files))
        builds.append(msgspec.structs.replace(build, artifacts=artifacts))
    manifest = msgspec.structs.replace(manifest, builds=tuple(builds))
    (bundle / MANIFEST).write_bytes(manifest.encode())
    return replaced


def _replace_in(path: Path, old: bytes, new: bytes) -> bool:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for info, data in members:
                archive.writestr(info, data.replace(old, new))
        return any(old in data for _, data in members)
    data = path.read_bytes()
    path.unlink()  # it may be a hard link
    path.write_bytes(data.replace(old, new))
    return old in data


# Fixture of a bundle, backend, precision and compute of what calculates in float16 here.
HALVES = (
    ("sd_bundle", "openvino", "fp32", "fp16"),
    ("tensorrt_bundle", "onnxruntime", "fp16", None),
    ("tensorrt_bundle", "openvino", "fp16", "fp16"),
    ("coreml_bundle", "coreml-reference", "fp16", None),
)
# Of latents: float16 has room for it, and not for the first layers' results. float32 has, and the
# decoder's first normalisation makes an image of it.
MUCH = 2e4


@pytest.mark.fault("2.1", "a decoder that overflows in float16 gives an image")
@pytest.mark.parametrize(("bundle", "backend", "precision", "compute"), HALVES)
def test_a_decoder_that_overflows(
    bundle: str, backend: str, precision: str, compute: str | None, request: Any
) -> None:
    folder = request.getfixturevalue(bundle)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).clip(-1, 1)
    latents = latents.astype(np.float32) * np.float32(MUCH)
    options: dict[str, Any] = {"cache": None, "low_memory": True}
    with load(folder, backend, precision="fp32", **options) as pipe:
        assert 0.05 < pipe.decode(latents, "np").std() < 0.5
    with load(folder, backend, precision=precision, compute=compute, **options) as pipe:
        assert 0.05 < pipe.decode(latents / np.float32(MUCH), "np").std() < 0.5
        with pytest.raises(NumericalError, match=r"^vae_decoder: its output .image. holds"):
            pipe.decode(latents, "np")


@pytest.mark.fault("2.1", "a variance beyond float16 gives a plain grey image")
@pytest.mark.parametrize(("bundle", "backend", "precision", "compute"), HALVES)
def test_a_variance_that_overflows(
    bundle: str, backend: str, precision: str, compute: str | None, request: Any
) -> None:
    """float16 has room for all the layers' results, and not for the squares of these."""
    folder = request.getfixturevalue(bundle)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32) * 5e3
    options: dict[str, Any] = {"cache": None, "low_memory": True}
    with load(folder, backend, precision="fp32", **options) as pipe:
        wanted = pipe.decode(latents, "np")
    with load(folder, backend, precision=precision, compute=compute, **options) as pipe:
        if bundle == "coreml_bundle":
            with pytest.raises(NumericalError, match=r"^vae_decoder: its output .image. holds"):
                pipe.decode(latents, "np")
        else:
            np.testing.assert_allclose(pipe.decode(latents, "np"), wanted, atol=0.05)


class Rectified(torch.nn.Module):
    """Ends as a depth estimator does, and begins like the tiny autoencoder's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.last = torch.nn.Conv2d(4, 1, 3, padding=1)
        self.inplace = torch.nn.ReLU(inplace=True)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.relu(self.last(self.inplace(self.first(image)))),)


@pytest.mark.fault("2.1", "OpenVINO's ReLU makes 0 of NaN")
def test_a_relu_keeps_nan(tmp_path: Path) -> None:
    from latentc.exporter.targets.openvino import lowering as openvino

    torch.manual_seed(0)
    module, image = Rectified().eval(), torch.randn(2, 3, 8, 8)
    component = Component(
        "estimator",
        "image_encoder",
        {"image": TensorSpec("float32", (2, 3, 8, 8))},
        {"depth": TensorSpec("float32", (2, 1, 8, 8))},
    )
    program = torch.export.export(module, (image,))
    entry = openvino.lower(program, component, tmp_path)
    with OpenVinoBackend().open(tmp_path / entry, component) as session:
        found = session.run({"image": image.numpy()})["depth"]
        with torch.no_grad():
            np.testing.assert_allclose(found, module(image)[0].numpy(), atol=1e-6)
        assert (found == 0).any()
        image[0, 0, 3, 3] = torch.nan
        assert np.isnan(session.run({"image": image.numpy()})["depth"]).any()
