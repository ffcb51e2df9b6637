"""docs/support.md: what the tests compare with diffusers, collected from the tests themselves.

    python -m tests.support_page            writes the page
    python -m tests.support_page --check    says whether it is what the tests say

A test says what it shows by the marker ``support(family, task, target, precision)``. A value that
is the name of one of the test's parameters stands for the value of that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from tests.support import run_record
from tests.support.loaded import EAGER

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
TESTS = ("tests/contract", "tests/exporter/source/test_ingredients.py")

# What tests call pipelines → what the page calls them; in the page's order.
FAMILIES = {
    "sd": "Stable Diffusion 1.x, 2.x",
    "builtin": "Stable Diffusion 1.x, 2.x",
    "sd-two": "Stable Diffusion 1.x, 2.x",
    "sd-blocks": "Stable Diffusion 1.x, 2.x",
    "sd-plus": "Stable Diffusion 1.x, 2.x",
    "sd-blocks-two": "Stable Diffusion 1.x, 2.x",
    "sd-checked": "Stable Diffusion 1.x, 2.x",
    "sd-v": "Stable Diffusion 2.x, v-prediction",
    "zero-snr": "Stable Diffusion 2.x, zero terminal SNR",
    "inpaint": "Stable Diffusion, trained for inpainting",
    "pix2pix": "InstructPix2Pix",
    "upscaler": "Stable Diffusion x4 upscaler",
    "depth": "Stable Diffusion 2 depth",
    "lcm": "Latent consistency models",
    "ldm": "Latent diffusion",
    "ldm-vq": "Latent diffusion with a codebook",
    "turbo": "SD-Turbo, SDXL-Turbo",
    "lcm-lora": "LCM-LoRA",
    "sdxl": "SDXL",
    "sdxl-plus": "SDXL",
    "inpaint-xl": "SDXL, trained for inpainting",
    "pix2pix-xl": "SDXL InstructPix2Pix",
    "refiner": "SDXL refiner",
    "pixart": "PixArt-α",
    "pixart-alpha": "PixArt-α",
    "pixart-sigma": "PixArt-Σ",
    "sd3": "Stable Diffusion 3, 3.5",
    "sd3-without": "Stable Diffusion 3 without T5",
    "sd3-masks": "Stable Diffusion 3, trained for inpainting",
    "flux": "FLUX.1",
    "flux-dev": "FLUX.1 dev",
    "flux-schnell": "FLUX.1 schnell",
    "flux-fill": "FLUX.1 Fill",
    "panorama": "Stable Diffusion panorama (MultiDiffusion)",
    "qwen-image": "Qwen-Image",
    "dit": "DiT",
    "wan-2.2": "Wan 2.2",
    "kandinsky": "Kandinsky 2.2",
    "unconditional": "Unconditional (DDPM, DDIM)",
}
TARGETS = {
    "onnxruntime": "ONNX",
    "openvino": "OpenVINO",
    "coreml-reference": "Core ML",
    "coreml_reference": "Core ML",
    "torch": "PyTorch",
}
TASKS = (
    "text-to-image",
    "unconditional",
    "class-to-image",
    "panorama",
    "text-to-video",
    "image-to-image",
    "inpainting",
    "true guidance",
    "instruct-pix2pix",
    "upscaling",
    "depth-to-image",
    "ControlNet",
    "ControlNet, image-to-image",
    "ControlNet, inpainting",
    "two ControlNets",
    "T2I-Adapter",
    "two T2I-Adapters",
    "IP-Adapter",
    "IP-Adapter and IP-Adapter Plus at once",
    "IP-Adapter Plus and full at once",
    "base and refiner in turn",
    "weighted prompts",
    "long prompts",
    "encoded prompts",
    "LoRA",
    "textual inversion",
    "another VAE",
    "safety checker",
    "watermark",
)

# Where a test's parameter stands for the task.
NAMED = {
    ("pix2pix", "pix2pix"): "instruct-pix2pix",
    ("pix2pix-xl", "pix2pix-xl"): "instruct-pix2pix",
    ("upscaler", "upscaler"): "upscaling",
    ("sd-two", "ControlNet"): "two ControlNets",
    ("sd-plus", "IP-Adapter"): "IP-Adapter and IP-Adapter Plus at once",
    ("sdxl-plus", "IP-Adapter"): "IP-Adapter Plus and full at once",
    ("sd-blocks-two", "T2I-Adapter"): "two T2I-Adapters",
}

HEAD = """# What is tested

This page is made from the tests (`python -m tests.support_page`), and a test compares it with them:
it cannot claim what is not tested. Each entry is a tiny pipeline of the real classes with random
weights, exported to the target, run by latentc's own loop, and compared with the diffusers pipeline
itself, same seed: in fp32 the final latents to a relative L2 of 1e-4 (unconditional: 1e-3) and
images to 2 of 255, other precisions as the [format](bundle-format.md#12-probes-and-verification)
says. Besides, every export of yours is verified on your machine.

Core ML is run by an evaluator of its programs in Python, on any machine; on Apple's own engine
nothing was run. [TensorRT](tensorrt.md#what-was-run) builds from the ONNX graphs, and was not
run on a GPU here. Other precisions of the built-in model, by target: [Precisions](precisions.md).
"""


class Collector:
    """A plugin that looks at the collected tests' markers."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str, str, str]] = set()

    def pytest_collection_modifyitems(self, items: Iterable[pytest.Item]) -> None:
        """Read every test's marker."""
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            for marker in item.iter_markers("support"):
                target = marker.kwargs["target"]
                if parameters.get(target, target) != EAGER:  # which is no target
                    self.found.add(self._entry(marker.kwargs, parameters))

    def _entry(
        self, said: Mapping[str, str], parameters: Mapping[str, Any]
    ) -> tuple[str, str, str, str]:
        own = {
            name: ", ".join(str(parameters.get(part, part)) for part in value.split(", "))
            for name, value in said.items()
        }
        own["task"] = NAMED.get((own["family"], own["task"]), own["task"])
        target = TARGETS[own["target"]]
        return FAMILIES[own["family"]], own["task"], target, own.get("precision", "fp32")


def noted(items: Iterable[pytest.Item]) -> set[tuple[str, str, str, str]]:
    """(family, task, target, precision) of these tests."""
    collector = Collector()
    collector.pytest_collection_modifyitems(items)
    return collector.found


def collected() -> set[tuple[str, str, str, str]]:
    """(family, task, target, precision) of all tests."""
    collector = Collector()
    arguments = ["--collect-only", "-q", "-q", "-p", "no:cacheprovider", *TESTS]
    if pytest.main(arguments, plugins=[collector]) != 0:
        raise click.ClickException("the tests cannot be collected")
    return collector.found


def page(found: set[tuple[str, str, str, str]]) -> str:
    """The page's text."""
    targets = list(dict.fromkeys(TARGETS.values()))
    lines = [
        HEAD + run_record.sentence(),
        f"| Family | Task | {' | '.join(targets)} |",
        "|---" * (2 + len(targets)) + "|",
    ]
    for family in dict.fromkeys(FAMILIES.values()):
        for task in sorted({f[1] for f in found if f[0] == family}, key=TASKS.index):
            cells = []
            for target in targets:
                precisions = sorted(
                    p for f, t, e, p in found if (f, t, e) == (family, task, target)
                )
                cells.append(", ".join(precisions) or "–")
            lines.append(f"| {family} | {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if the page is another.")
def main(check: bool) -> None:
    """Make docs/support.md of what the tests say."""
    made = page(collected())
    if not check:
        PAGE.write_text(made, encoding="utf-8")
    elif made != PAGE.read_text(encoding="utf-8"):
        click.echo(f"{PAGE} is not what the tests say: run python -m tests.support_page", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
