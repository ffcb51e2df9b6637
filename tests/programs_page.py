"""Writes the programs into docs/programs.md: ``python -m tests.programs_page``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.programs.listing import listing

PAGE = Path(__file__).resolve().parent.parent / "docs" / "programs.md"
# The kinds of bundle (test_every_argument.KINDS) and the tasks of each that are shown.
SHOWN: tuple[tuple[str, str, str], ...] = (
    ("sd", "text-to-image", "Stable Diffusion"),
    ("sd", "image-to-image", "Stable Diffusion, from an image"),
    ("sd", "inpainting", "Stable Diffusion, by blending"),
    ("inpaint", "inpainting", "Stable Diffusion with nine channels"),
    ("pix2pix", "instruct-pix2pix", "InstructPix2Pix"),
    ("upscaler", "upscaling", "The x4 upscaler"),
    ("sd+controlnet", "text-to-image", "A ControlNet"),
    ("sd+ip-adapter", "text-to-image", "An IP-Adapter"),
    ("sdxl", "text-to-image", "Stable Diffusion XL"),
    ("flux-dev", "text-to-image", "FLUX.1"),
    ("qwen-image", "text-to-image", "Qwen-Image"),
    ("dit", "class-to-image", "A number of a class for each image"),
    ("panorama", "text-to-image", "A denoiser that looks at views of a wide image"),
    ("wan-2.2", "text-to-video", "Frames of a video, by two denoisers"),
    ("kandinsky", "text-to-image", "A prior and a decoder"),
    ("unconditional", "unconditional", "A model without prompts"),
)


def generated(manifest_of: Callable[[str], Manifest]) -> str:
    """Return the part of the page that is made.

    Args:
        manifest_of: kind of bundle → its manifest.
    """
    parts = []
    for kind, task, title in SHOWN:
        by_name = {program.name: program for program in manifest_of(kind).programs}
        parts.append(f"### {title}\n\n```text\n{listing(by_name[task])}```\n")
    return "\n".join(parts)


def main() -> None:
    """Make the bundles and write the page."""
    from tests.contract.test_every_argument import bundle_of
    from tests.support import tiny

    with tempfile.TemporaryDirectory() as folder:

        def manifest_of(kind: str) -> Manifest:
            source = Path(folder) / kind.partition("+")[0]
            if not source.exists():
                tiny.make(source.name, source)
            with bundle_of(kind, source, Path(folder) / f"bundle {kind}") as pipe:
                return pipe.manifest

        head, _, _ = PAGE.read_text("utf-8").partition("\n### ")
        PAGE.write_text(f"{head.rstrip()}\n\n{generated(manifest_of)}", "utf-8")


if __name__ == "__main__":
    main()
