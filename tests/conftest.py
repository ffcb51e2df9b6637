"""Settings that hold for every test, and the exported bundles that the tests share.

Pipelines and bundles are kept under build/tests/: exporting is content-addressed, so a
second run of the suite only finds that nothing changed.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

# Of several test processes each takes one thread: theirs would wait for each other actively, which
# makes PyTorch many times slower. Set before anything loads it; `one_thread` is for other engines.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support import run_record

# Deterministic, so that a failure on one machine is a failure on all; no deadline, because
# a shared machine's pauses are no property of the code.
settings.register_profile("latentc", deadline=None, derandomize=True, database=None)
settings.load_profile("latentc")

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "tests"
os.environ["LATENTC_CACHE"] = str(KEPT / "cache")  # not the user's own
TARGETS = ("onnx", "openvino", "torch")
WITHOUT_TORCH = ("sd-v", "lcm", "ldm", "ldm-vq")
ENGINES_WITH_THREADS = ("onnxruntime", "openvino")
# By pipeline, those with the same parts but for the configuration.
SAME_PARTS = {"sd-v": "sd"}
# What tiny pipelines are exported for besides, where tests give images.
TASKS_WITH_IMAGES = {
    "sd": ("image-to-image", "inpainting"),
    "sdxl": ("image-to-image", "inpainting"),
}
# By pipeline, where not all default schedulers are tried.
SCHEDULERS_WITH_IMAGES = {"inpaint-xl": ["ddim"], "pix2pix": [], "pix2pix-xl": [], "upscaler": []}
SCHEDULERS_WITH_IMAGES["depth"] = ["ddim"]
STEPS_WITH_IMAGES = (4, 10)
CONTROLLED = {"sd": 1, "sd-two": 2, "sdxl": 1}  # pipelines, by how many ControlNets they have
JUDGED = 4  # images of the built-in model, which says 50
STEPS = (1, 2, 4, 6, 20)
Run = Callable[..., tuple[int, str, str]]
# When the session began, in seconds.
STARTED = time.monotonic()
# Of a session that collects the whole suite: all tests, those that are left out too.
WHOLE = pytest.StashKey[list[pytest.Item]]()
# Files that take longest, in the order in which processes begin them: the last ones are short, and
# neighbours do not wait for the same bundles.
FIRST = (
    *("test_readme_runs", "test_transformer_tasks", "test_parity", "test_export"),
    *("test_step_cache", "test_argument_subsets", "test_miniature", "test_kandinsky"),
    *("test_bundle_format", "test_configurations", "test_image_to_image", "test_t2i_adapter"),
    *("test_sizes", "test_trained_tasks", "test_inpainting", "test_controlnet"),
    *("test_ip_adapter", "test_safety_checker", "test_precision", "test_ingredients"),
    *("test_panorama", "test_weights", "test_watermark", "test_wan", "test_bench_run"),
    *("test_transformers", "test_refiner", "test_coreml", "test_depth", "test_program_check"),
    *("test_downsampled_attention", "test_quantization", "test_few_steps", "test_single_file"),
    *("test_qwen_image", "test_closing", "test_corpus", "test_two_writers", "test_extending"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write how many tests passed, and when, to a file")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write the record of a run (`make test-all`); processes that the run started write none."""
    if config.option.record is not None:
        run_record.write(
            config.option.record,
            terminalreporter.stats,
            time.monotonic() - STARTED,
        )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that is imported and made here goes before the end: it is looked through for cycles
    neither meanwhile nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if [Path(each).resolve() for each in config.args] == [ROOT / "tests"]:
        config.stash[WHOLE] = [*items]
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.fixture(autouse=True, scope="module")
def garbage_of_the_file() -> Iterator[None]:
    """Cycles that a file's tests leave are freed after it, before they count as there for good."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def only_what_is_new_is_looked_through() -> None:
    """Python's collector of cycles leaves alone what there is before a test: the libraries and all
    tests are millions of objects, up to seconds at each look. Every export ends with having all of
    them looked through again."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Run graphs in one thread where several test processes run and a test does not say in how
    many.

    Two that wait for each other actively take two to three times the processors' time.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    from latentc.runtimes.backends.backend import Backend, SessionOptions

    whole = Backend.open

    def opened(
        self: Backend,
        entry: Path,
        component: Any,
        device: str | None = None,
        options: SessionOptions | None = None,
    ) -> Any:
        options = options or SessionOptions()
        if self.name in ENGINES_WITH_THREADS and not options.threads:
            options = replace(options, threads=1)
        return whole(self, entry, component, device, options)

    with mock.patch.object(Backend, "open", opened):
        yield


@pytest.fixture(autouse=True)
def width_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as in a file, whatever the terminal or the test runner says."""
    monkeypatch.delenv("COLUMNS", raising=False)


@contextmanager
def one_at_a_time(name: str) -> Any:
    """Parallel test processes share the kept folders: the first one makes, others wait."""
    import fcntl

    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling plans are traced by nobody, as where the exporter is not installed."""
    from latentc.runtimes.pipeline import plans

    monkeypatch.setattr(plans, "TRACER", "latentc.not_installed:add_plan")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The ``latentc`` command, in this process: exit code, standard output, standard error."""
    from latentc import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def pipeline_folder() -> Callable[[str], Path]:
    """A function: name in `tests.support.tiny.PIPELINES` → the saved pipeline's folder."""
    import hashlib
    import shutil

    from tests.support import tiny, tiny_transformers

    def make(name: str) -> Path:
        code = [Path(each.__file__).read_bytes() for each in (tiny, tiny_transformers)]
        digest = hashlib.sha256(b"".join(code)).hexdigest()[:12]
        folder = KEPT / "pipelines" / f"{name}-{digest}"
        with one_at_a_time(f"pipeline-{name}"):
            if not (folder / "model_index.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                tiny.make(name, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def smallest() -> Path:
    """The saved text-to-image pipeline that is the quickest to export."""
    import torch

    from tests.support import tiny_configurations as tiny

    folder = KEPT / "pipelines" / "smallest"
    with one_at_a_time("pipeline-smallest"):
        torch.manual_seed(3)
        tiny.stable_diffusion(folder, tiny.SMALLEST)
    return folder


@pytest.fixture(scope="session")
def smallest_bundle(smallest: Path) -> Path:
    """Its verified bundle, with a build for each engine."""
    from latentc.exporter.compiler.export import export

    bundle = KEPT / "bundles" / "smallest"
    with one_at_a_time("bundle-smallest"):
        export(smallest, bundle, targets=TARGETS, schedulers=(), steps=(1, 2), overwrite=True)
    return bundle


@pytest.fixture(scope="session")
def smallest_unconditional() -> Path:
    """The saved pipeline that is the quickest to export of all."""
    import torch

    from tests.support import tiny_configurations as tiny

    folder = KEPT / "pipelines" / "smallest-unconditional"
    with one_at_a_time("pipeline-smallest-unconditional"):
        torch.manual_seed(3)
        tiny.unconditional(folder, tiny.SMALLEST_UNCONDITIONAL)
    return folder


@pytest.fixture(scope="session")
def smallest_unconditional_bundle(smallest_unconditional: Path) -> Path:
    """Its verified bundle for ONNX Runtime and PyTorch."""
    from latentc.exporter.compiler.export import export

    bundle = KEPT / "bundles" / "smallest-unconditional"
    with one_at_a_time("bundle-smallest-unconditional"):
        export(
            smallest_unconditional,
            bundle,
            targets=("onnx", "torch"),
            schedulers=(),
            steps=(4,),
            overwrite=True,
        )
    return bundle


@pytest.fixture(scope="session")
def builtin_folder() -> Path:
    """The built-in model, which asks for less to be judged."""
    import json
    import shutil

    import latentc
    from latentc.exporter.source.resolving import NOTES

    folder = KEPT / "pipelines" / "builtin" / "shapes"
    with one_at_a_time("pipeline-builtin"):
        shutil.copytree(latentc.builtin_model(), folder, dirs_exist_ok=True)
        notes = json.loads((folder / NOTES).read_text())
        notes["judge"]["images"] = JUDGED
        (folder / NOTES).write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="session")
def exported(pipeline_folder: Callable[[str], Path], builtin_folder: Path) -> Callable[[str], Path]:
    """A function: name → a verified bundle with every target in fp32, every default scheduler
    and the step counts `STEPS`."""
    from latentc.exporter.compiler.export import export

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            source = builtin_folder if name == "builtin" else pipeline_folder(name)
            steps = (*STEPS, 25) if name == "builtin" else STEPS
            bundle = KEPT / "bundles" / name
            with one_at_a_time(f"bundle-{name}"):
                same = [make(SAME_PARTS[name])] if name in SAME_PARTS else []
                targets = TARGETS[:2] if name in WITHOUT_TORCH else TARGETS
                export(
                    source, bundle, targets=targets, steps=steps, overwrite=True, share_with=same
                )
            made[name] = bundle
        return made[name]

    return make


@pytest.fixture(scope="session")
def bundles(
    pipeline_folder: Callable[[str], Path], exported: Callable[[str], Path]
) -> Callable[[str], Path]:
    """A function: name of a tiny pipeline → its bundle for ONNX Runtime and OpenVINO, for every
    task that starts from an image."""
    from latentc.exporter.compiler.export import export

    @cache
    def get(name: str) -> Path:
        folder = KEPT / "bundles" / f"{name}-images"
        with one_at_a_time(f"bundle-{name}-images"):
            export(
                pipeline_folder(name),
                folder,
                targets=["onnx", "openvino"],
                tasks=TASKS_WITH_IMAGES.get(name, ()),
                steps=STEPS_WITH_IMAGES,
                schedulers=SCHEDULERS_WITH_IMAGES.get(name),
                overwrite=True,
                share_with=[exported(name)] if name in TASKS_WITH_IMAGES else [],
            )
        return folder

    return get


@pytest.fixture(scope="session")
def nets(pipeline_folder: Callable[[str], Path]) -> Callable[[str], list[Path]]:
    """A function: name in `CONTROLLED` → folders of its ControlNets."""
    from diffusers import DiffusionPipeline

    from tests.support import tiny

    def make(name: str) -> list[Path]:
        folders, source = [], name.partition("-")[0]
        for index in range(CONTROLLED[name]):
            folder = KEPT / "controlnets" / f"{source}-{index}"
            with one_at_a_time(f"controlnet-{source}-{index}"):
                if not (folder / "config.json").exists():
                    unet = DiffusionPipeline.from_pretrained(pipeline_folder(source)).unet
                    tiny.controlnet(unet, 10 + index).save_pretrained(folder)
            folders.append(folder)
        return folders

    return make


@pytest.fixture(scope="session")
def controlled(
    pipeline_folder: Callable[[str], Path],
    nets: Callable[[str], list[Path]],
    bundles: Callable[[str], Path],
) -> Callable[[str], Path]:
    """A function: name in `CONTROLLED` → its bundle with ControlNets."""
    from latentc.exporter.compiler.export import export

    @cache
    def get(name: str) -> Path:
        folder, source = KEPT / "bundles" / f"{name}-controlnet", name.partition("-")[0]
        with one_at_a_time(f"bundle-{name}-controlnet"):
            export(
                pipeline_folder(source),
                folder,
                targets=["onnx", "openvino"],
                tasks=["image-to-image", "inpainting"] if name == "sd" else (),
                controlnet=nets(name),
                schedulers=["ddim", "euler_a"],
                steps=[4],
                overwrite=True,
                share_with=[bundles(source)],
            )
        return folder

    return get


@pytest.fixture(scope="session")
def coreml_bundle(pipeline_folder: Callable[[str], Path]) -> Path:
    """The tiny Stable Diffusion pipeline for Core ML, verified by the reference evaluator."""
    from latentc.exporter.compiler.export import export

    bundle = KEPT / "bundles" / "sd-coreml"
    with one_at_a_time("bundle-sd-coreml"):
        export(
            pipeline_folder("sd"),
            bundle,
            targets=("coreml",),
            precision=("fp32", "fp16"),
            tasks=("image-to-image", "inpainting"),
            steps=STEPS,
            schedulers=(),
            overwrite=True,
        )
    return bundle


@pytest.fixture(scope="session")
def sd_bundle(exported: Callable[[str], Path]) -> Path:
    return exported("sd")


@pytest.fixture(scope="session")
def sdxl_bundle(exported: Callable[[str], Path]) -> Path:
    return exported("sdxl")


@pytest.fixture(scope="session")
def unconditional_bundle(exported: Callable[[str], Path]) -> Path:
    return exported("unconditional")


@pytest.fixture(scope="session")
def builtin_bundle(exported: Callable[[str], Path]) -> Path:
    return exported("builtin")


@pytest.fixture(scope="session")
def tensorrt_bundle(pipeline_folder: Callable[[str], Path]) -> Path:
    """TensorRT builds of the tiny text-to-image pipeline in fp32 and fp16."""
    from latentc.exporter.compiler.export import export

    with one_at_a_time("bundle-tensorrt"):
        return export(
            pipeline_folder("sd"),
            KEPT / "tensorrt" / "bundle",
            targets=("tensorrt",),
            precision=("fp32", "fp16"),
            schedulers=(),
            steps=(2, 4),
            overwrite=True,
        ).bundle
