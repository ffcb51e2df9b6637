"""The runtime's promise: no PyTorch, and only the engine that is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("onnxruntime", "openvino", "coremltools")
BANNED = ("torch", "diffusers", "transformers", "onnx", "latentc.exporter")

GENERATE = """
import sys
import latentc
with latentc.load({bundle!r}, backend={backend!r}) as pipe:
    result = pipe(**{arguments!r}, num_inference_steps=2, seed=1)
result.images[0].save({image!r})
loaded = [name for name in {banned!r} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def fresh(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("backend", "other"), [("onnxruntime", "openvino"), ("openvino", "onnxruntime")]
)
def test_generating_text_to_image(
    sd_bundle: Path, tmp_path: Path, backend: str, other: str
) -> None:
    image = tmp_path / "image.png"
    fresh(
        GENERATE.format(
            bundle=str(sd_bundle),
            backend=backend,
            arguments={"prompt": "a red circle"},
            image=str(image),
            banned=(*BANNED, other),
        )
    )
    assert image.exists()


def test_generating_without_text(unconditional_bundle: Path, tmp_path: Path) -> None:
    fresh(
        GENERATE.format(
            bundle=str(unconditional_bundle),
            backend=None,
            arguments={"scheduler": "ddim"},
            image=str(tmp_path / "image.png"),
            banned=(*BANNED, "tokenizers", "openvino"),
        )
    )


def test_importing_every_module_of_the_runtime() -> None:
    fresh(
        "import sys, pkgutil, importlib, latentc.runtimes\n"
        "for module in pkgutil.walk_packages(latentc.runtimes.__path__, 'latentc.runtimes.'):\n"
        "    importlib.import_module(module.name)\n"
        f"banned = {(*BANNED, *ENGINES, 'PIL', 'rich', 'tokenizers')!r}\n"
        "loaded = [name for name in banned if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
