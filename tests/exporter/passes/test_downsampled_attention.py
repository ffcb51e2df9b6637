"""Downsampled keys and values: what diffusers computes with a processor that does the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.export import ExportedProgram

import latentc
from latentc.cli import run as command
from latentc.exporter import targets
from latentc.exporter.capture.graphs import capture, example_inputs, symbol_values, variant
from latentc.exporter.capture.interpreter import Watched
from latentc.exporter.compiler.export import export
from latentc.exporter.components.description import Description, Graph
from latentc.exporter.families import family_of
from latentc.exporter.lowering.calibration import ranges
from latentc.exporter.options import export_options
from latentc.exporter.passes import W8A8, Choices, downsampled_attention
from latentc.exporter.source.resolving import load, resolve
from latentc.exporter.targets.coreml.options import CoreMLOptions
from latentc.exporter.targets.options import Settings
from latentc.runtimes.backends import backend as backends
from latentc.runtimes.backends.backend import SessionOptions
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.precisions import PASSES, PRECISIONS
from latentc.runtimes.errors import ExportError
from latentc.runtimes.verification.verify import relative_l2
from tests.support import tiny
from tests.support.combinations import kept

NAME = "downsampled-attention"
PASS = "downsampled_attention"
EXACT = 1e-5
SDPA = torch.ops.aten.scaled_dot_product_attention.default
# Attention from the first level on, as in Stable Diffusion 1.x: a convolution makes the tokens.
SD = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
# From the second one on, as in SDXL: a linear layer makes them, several blocks share them.
SDXL = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 1),
    "cross_attention_dim": 32 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
    "use_linear_projection": True,
}


@dataclass(frozen=True)
class Case:
    """A UNet; `level`: by what its largest attentions' sides are smaller than the latents';
    `changed` of its `attentions` have that size. `height` and `width` are of the latents."""

    pipeline: str
    unet: Mapping[str, Any]
    level: int
    changed: int
    attentions: int
    height: int = 24
    width: int = 16


CASES = {
    "sd": Case("sd", SD, 1, 3, 14),
    "sdxl": Case("sdxl", SDXL, 2, 6, 20),
    # Sides of 5 and 3 at the only level that has attention: the last row and column are odd.
    "odd": Case("sd", {}, 2, 4, 8, 10, 6),
}


@dataclass(frozen=True)
class Captured:
    case: Case
    description: Description
    graph: Graph
    program: ExportedProgram
    changed: ExportedProgram

    def inputs(self) -> dict[str, torch.Tensor]:
        """At sizes that were not traced."""
        sizes = symbol_values(self.description, traced=False)
        sizes |= {"height": self.case.height, "width": self.case.width, "sequence": 77}
        return example_inputs(self.graph, sizes, seed=5)


@pytest.fixture(scope="module")
def captured(pipeline_folder: Callable[[str], Path]) -> Callable[[str], Captured]:
    known: dict[str, Captured] = {}

    def get(name: str) -> Captured:
        if name not in known:
            known[name] = make(CASES[name])
        return known[name]

    def make(case: Case) -> Captured:
        source = resolve(pipeline_folder(case.pipeline), None, None)
        pipe = load(source)
        if case.unet:
            torch.manual_seed(7)
            pipe.register_modules(unet=tiny.conditional_unet(**case.unet).eval())
        description = family_of(source.pipeline_class).describe(pipe)
        graph = denoiser_of(description)
        sizes = symbol_values(description, traced=True)
        program = capture(graph, description.latents.multiple, sizes)
        return Captured(case, description, graph, program, variant(program, (PASS,)))

    return get


def denoiser_of(description: Description) -> Graph:
    return next(graph for graph in description.graphs if graph.component.role == "denoiser")


class Downsampling:
    """diffusers' attention, but keys and values come from the image at half of its size."""

    def __init__(self, height: int, width: int) -> None:
        self.size = (height, width)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        height, width = self.size
        if encoder_hidden_states is None and hidden_states.shape[1] == height * width:
            image = hidden_states.transpose(1, 2).unflatten(2, self.size)
            image = F.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False)
            encoder_hidden_states = image.flatten(2).transpose(1, 2)
        made: torch.Tensor = AttnProcessor2_0()(
            attn, hidden_states, encoder_hidden_states, attention_mask
        )
        return made


def reference(captured: Captured, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Return what diffusers makes of the inputs, as an array."""
    case, unet = captured.case, captured.description.denoiser
    unet.set_attn_processor(Downsampling(case.height // case.level, case.width // case.level))
    try:
        with torch.no_grad():
            made: np.ndarray = captured.graph.module(**inputs)[0].numpy()
        return made
    finally:
        unet.set_attn_processor(AttnProcessor2_0())


def run(program: ExportedProgram, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
    return Watched(program).run(inputs)[0].numpy()


@pytest.mark.parametrize("name", kept(CASES, "sd", "odd"))
def test_what_diffusers_computes(captured: Callable[[str], Captured], name: str) -> None:
    made = captured(name)
    inputs = made.inputs()
    plain, expected = run(made.program, inputs), reference(made, inputs)
    assert relative_l2(run(made.changed, inputs), expected) <= EXACT
    assert relative_l2(plain, expected) >= 100 * EXACT  # it is not nothing
    with torch.no_grad():
        untouched = made.graph.module(**inputs)[0].numpy()
    assert relative_l2(plain, untouched) <= EXACT


@pytest.mark.parametrize("name", kept(CASES, "sd", "odd"))
def test_the_largest_self_attentions_only(captured: Callable[[str], Captured], name: str) -> None:
    """There are as many queries as before everywhere; a quarter of the keys in the largest ones."""
    made = captured(name)
    before, after = (lengths(each, made.inputs()) for each in (made.program, made.changed))
    assert before.keys() == after.keys()
    assert len(before) == made.case.attentions
    height, width = (each // made.case.level for each in (made.case.height, made.case.width))
    fewer = (height * width, ((height + 1) // 2) * ((width + 1) // 2))
    largest = (height * width, height * width)
    assert after == {at: fewer if each == largest else each for at, each in before.items()}
    assert list(after.values()).count(fewer) == made.case.changed


def lengths(
    program: ExportedProgram, inputs: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, int]]:
    """By the name of an attention, how many queries and keys it really has."""
    found: dict[str, tuple[int, int]] = {}

    def look(node: torch.fx.Node, arguments: tuple[Any, ...], result: Any) -> None:
        if node.target is SDPA:
            found[node.name] = (arguments[0].shape[2], arguments[1].shape[2])
            assert arguments[1].shape == arguments[2].shape

    Watched(program).run(inputs, look)
    return found


@pytest.mark.parametrize(
    ("target", "name"),
    kept(
        [*product(["onnx", "openvino", "torch"], ["sd", "sdxl"]), ("coreml", "sd")],
        *product(["onnx", "openvino", "torch"], ["sd"]),
    ),
)
def test_every_engine(
    captured: Callable[[str], Captured], name: str, target: str, tmp_path: Path
) -> None:
    made = captured(name)
    settings = {}
    if target == "coreml":
        latents = made.description.latents
        settings = {"settings": Settings("fp32", CoreMLOptions(), latents)}
    component = made.graph.component
    entry = targets.get(target).lower(made.changed, component, tmp_path, **settings)
    backend = backends.get(
        "coreml-reference" if target == "coreml" else targets.TARGETS[target].backend
    )
    device = backend.device(None)
    inputs = made.inputs()
    with backend.open(tmp_path / entry, component, device, SessionOptions()) as session:
        (found,) = session.run({key: value.numpy() for key, value in inputs.items()}).values()
    assert relative_l2(found, reference(made, inputs)) <= EXACT


def test_a_fixed_size(captured: Callable[[str], Captured]) -> None:
    """Numbers in the place of open dimensions."""
    made = captured("sd")
    inputs = made.inputs()
    program = torch.export.export(made.graph.module.eval(), (), kwargs=inputs, strict=False)
    found = run(variant(program, (PASS,)), inputs)
    assert relative_l2(found, reference(made, inputs)) <= EXACT


def test_together_with_integers(captured: Callable[[str], Captured]) -> None:
    """Ranges that were met without the pass are found by the same layers' names with it."""
    made = captured("sd")
    inputs = made.inputs()
    choices = Choices(ranges=ranges(made.program, [inputs], lambda _: None))
    program = variant(made.program, (PASS, *W8A8["w8a8"]), choices)
    error = relative_l2(run(program, inputs), reference(made, inputs))
    assert 1e-3 < error < 6e-2


def test_a_denoiser_without_such_attention(pipeline_folder: Callable[[str], Path]) -> None:
    pipe = load(resolve(pipeline_folder("unconditional"), None, None))
    description = family_of("DDPMPipeline").describe(pipe)
    sizes = symbol_values(description, traced=True)
    program = capture(denoiser_of(description), description.latents.multiple, sizes)
    with pytest.raises(ExportError, match=r"no self-attention .* export without it"):
        downsampled_attention.run(program, Choices())


def test_builds_of_its_own(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, sd_bundle: Path
) -> None:
    """Beside those without the pass, whose other components they share; never taken unasked."""
    bundle = tmp_path / "b"
    settings: dict[str, Any] = {"targets": ["openvino"], "schedulers": ["ddim"], "steps": [4]}
    settings["share_with"] = sd_bundle
    source = pipeline_folder("sd")
    only = export(source, bundle, passes=[NAME], **settings)
    assert [build.name for build in only.manifest.builds] == [f"openvino-fp32-{NAME}"]
    assert command(["generate", str(bundle), "red", "-o", str(tmp_path / "x.png")]) == 2
    both = export(source, bundle, precision="fp32", **settings)
    builds = {build.precision: build for build in both.manifest.builds}
    assert set(builds) == {"fp32", f"fp32+{NAME}"}
    plain, fewer = builds["fp32"].artifacts, builds[f"fp32+{NAME}"].artifacts
    assert {name for name in plain if plain[name].key != fewer[name].key} == {"denoiser"}
    assert fewer["denoiser"].precision == f"fp32+{NAME}"
    assert {a.precision for name, a in fewer.items() if name != "denoiser"} == {"fp32"}
    assert export(source, bundle, precision=f"fp32+{NAME}", **settings).made == ()
    _check_measured(both.manifest, fewer["denoiser"].precision)
    images = {}
    for asked in (None, "fp32", f"fp32+{NAME}"):
        with latentc.load(bundle, precision=asked) as pipe:
            made = pipe("red", num_inference_steps=4, seed=3, output_type="np")
        images[asked] = made.latents
    assert np.array_equal(images[None], images["fp32"])
    assert 1e-4 < relative_l2(images[f"fp32+{NAME}"], images["fp32"]) < 0.5


def _check_measured(manifest: Manifest, precision: str) -> None:
    """Check that what a build is off by stands in the manifest, within tolerances of its own."""
    build = next(each for each in manifest.builds if each.precision == precision)
    assert build.verification is not None
    assert build.verification.loop is not None
    checks = [check for check in build.verification.checks if check.subject == "denoiser"]
    limit = PASSES[NAME].tolerance
    assert limit is not None
    assert {check.tolerance for check in checks} == {limit.component}
    assert all(1e-4 < check.relative_l2 <= limit.component for check in checks)
    others = [check for check in build.verification.checks if check.subject != "denoiser"]
    assert {check.tolerance for check in others} == {PRECISIONS["fp32"].tolerance.component}
    assert build.verification.loop.image_psnr >= limit.image_psnr


def test_asked_by_name() -> None:
    options = export_options(
        targets="openvino", precision=("w8a8", "fp32,denoiser=int8"), passes=NAME
    )
    assert [precision for _, precision in options.builds()] == [
        f"w8a8+{NAME}",
        f"fp32,denoiser=int8+{NAME}",
    ]
    assert options.passes("openvino", f"w8a8+{NAME}") == (PASS, *W8A8["w8a8"])
    every = export_options(targets="onnx", precision="all")
    assert not [precision for _, precision in every.builds() if NAME in precision]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pass", "nonsense"], f"unknown pass 'nonsense'; there are: {NAME}"),
        (["-p", "fp32+nonsense"], f"in a precision; passes that a precision may have: {NAME}"),
        (["-p", "fp32+step-cache"], "unknown pass 'step-cache' in a precision"),
        (["-p", f"vae_decoder=fp16+{NAME}"], "only the denoiser has passes"),
        (["--pass", NAME, "-p", "fp12"], "target 'onnx' has no precision 'fp12'"),
    ],
)
def test_bad_input(
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    output = tmp_path / "bundle"
    assert command(["export", str(pipeline_folder("sd")), "-o", str(output), *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not output.exists()
