"""One seed gives the image that diffusers gives: every family, scheduler and backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline

import latentc
from latentc.exporter.compiler.export import export
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.schedulers.names import DEFAULT_SCHEDULERS
from latentc.exporter.schedulers.tables import build
from latentc.exporter.verification.reference import watched
from latentc.runtimes.verification.verify import psnr, relative_l2
from tests.support.combinations import kept
from tests.support.loaded import Ours, kept_open

STEPS = 20
SEED = 7
LATENTS = 1e-4  # relative L2 of the final latents
IMAGE = 2  # of 255
BACKENDS = ("onnxruntime", "openvino")
PROMPTS = {
    "builtin": {"prompt": "a large red circle above a small blue square", "guidance_scale": 5.0},
    "sd": {"prompt": "a red circle", "negative_prompt": "blue", "guidance_scale": 7.5},
    "sd-v": {"prompt": "a red circle", "guidance_scale": 4.0},
    "lcm": {"prompt": "a red circle", "guidance_scale": 6.0},
    "sdxl": {"prompt": "a red circle", "prompt_2": "flat", "guidance_scale": 5.0},
}

Reference = Callable[[str, str], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def pipes(pipeline_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            folder = latentc.builtin_model() if name == "builtin" else pipeline_folder(name)
            with quiet_loading():
                loaded[name] = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
            loaded[name].set_progress_bar_config(disable=True)
            loaded[name].own_scheduler_config = dict(loaded[name].scheduler.config)
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def reference(pipes: Callable[[str], Any]) -> Reference:
    """Final latents and uint8 images of the diffusers pipeline, computed once."""
    known: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    def get(name: str, scheduler: str) -> tuple[np.ndarray, np.ndarray]:
        if (name, scheduler) not in known:
            known[name, scheduler] = run(pipes(name), name, scheduler)
        return known[name, scheduler]

    def run(pipe: Any, name: str, scheduler: str) -> tuple[np.ndarray, np.ndarray]:
        with quiet_loading():
            pipe.scheduler = build(scheduler, pipe.own_scheduler_config)
        with watched(pipe, pipe.unet) as seen, torch.no_grad():
            images = pipe(
                **PROMPTS[name],
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(SEED),
                output_type="np",
            ).images
        assert seen.latents is not None
        return seen.latents.numpy(), (images * 255).round().astype(np.uint8)

    return get


@pytest.fixture(scope="module")
def ours(exported: Callable[[str], Path]) -> Iterator[Ours]:
    with kept_open(exported) as get:
        yield get


def assert_same(result: Any, latents: np.ndarray, images: np.ndarray) -> None:
    error = relative_l2(result.latents, latents)
    assert error <= LATENTS
    found = np.stack([np.asarray(image) for image in result.images]).astype(int)
    assert np.abs(found - images.reshape(found.shape)).max() <= IMAGE


@pytest.mark.support(family="name", task="text-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheduler", DEFAULT_SCHEDULERS)
@pytest.mark.parametrize("name", ["builtin", "sdxl"])
def test_every_scheduler(
    name: str, scheduler: str, backend: str, ours: Any, reference: Reference
) -> None:
    latents, images = reference(name, scheduler)
    result = ours(name, backend)(
        **PROMPTS[name], num_inference_steps=STEPS, scheduler=scheduler, seed=SEED
    )
    assert_same(result, latents, images)


@pytest.mark.parametrize("seeds", [[SEED], [SEED, 8]])
def test_generators(seeds: list[int], ours: Any, pipes: Callable[[str], Any]) -> None:
    """One generator for both images, or one for each; a second call goes on from the first."""
    theirs, own = ([torch.Generator().manual_seed(s) for s in seeds] for _ in range(2))
    call = {**PROMPTS["sd"], "num_images_per_prompt": 2, "num_inference_steps": 2}
    pipe, made = pipes("sd"), []
    with quiet_loading():
        pipe.scheduler = build("euler_a", pipe.own_scheduler_config)  # which draws in each step
    for _ in range(2):
        given = {"generator": theirs if len(seeds) > 1 else theirs[0], "output_type": "np"}
        with watched(pipe, pipe.unet) as seen, torch.no_grad():
            images = pipe(**call, **given).images
        assert seen.latents is not None
        given = {"generator": own if len(seeds) > 1 else own[0], "scheduler": "euler_a"}
        made.append(ours("sd", BACKENDS[0])(**call, **given))
        assert_same(made[-1], seen.latents.numpy(), (images * 255).round().astype(np.uint8))
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(own, theirs, strict=True))
    first, second = made
    assert first.seeds == second.seeds == tuple(seeds)
    assert first.settings["seed"] == (seeds if len(seeds) > 1 else SEED)
    assert "seed" not in second.settings


@pytest.mark.parametrize("name", ["builtin", "sdxl"])
def test_guidance_window(name: str, ours: Any, pipes: Callable[[str], Any]) -> None:
    """The guidance ends as diffusers' documentation has it: a callback ends it after some steps."""
    pipe, conditions = pipes(name), ["prompt_embeds"]
    if name == "sdxl":
        conditions += ["add_text_embeds", "add_time_ids"]

    def end(pipe: Any, index: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index + 1 == 12:
            given |= {key: given[key].chunk(2)[-1] for key in conditions}
            pipe._guidance_scale = 0.0
        return given

    with quiet_loading():
        pipe.scheduler = build("ddim", pipe.own_scheduler_config)
    with watched(pipe, pipe.unet) as seen, torch.no_grad():
        images = pipe(
            **PROMPTS[name],
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
            callback_on_step_end=end,
            callback_on_step_end_tensor_inputs=conditions,
        ).images
    assert seen.latents is not None
    pixels = (images * 255).round().astype(np.uint8)
    for backend in BACKENDS:
        result = ours(name, backend)(
            **PROMPTS[name],
            num_inference_steps=STEPS,
            scheduler="ddim",
            seed=SEED,
            guidance_stop=0.6,
        )
        assert_same(result, seen.latents.numpy(), pixels)


@pytest.mark.support(family="name", task="text-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sd", "sd-v"])
@pytest.mark.parametrize("scheduler", ["pndm", "dpmpp_2m", "euler_a"])
def test_prediction_types(
    name: str, scheduler: str, backend: str, ours: Any, reference: Reference
) -> None:
    latents, images = reference(name, scheduler)
    result = ours(name, backend)(
        **PROMPTS[name], num_inference_steps=STEPS, scheduler=scheduler, seed=SEED
    )
    assert_same(result, latents, images)


@pytest.mark.support(family="lcm", task="text-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheduler", ["lcm"])
def test_guidance_that_the_denoiser_takes(
    scheduler: str, backend: str, ours: Any, reference: Reference
) -> None:
    latents, images = reference("lcm", scheduler)
    result = ours("lcm", backend)(
        **PROMPTS["lcm"], num_inference_steps=STEPS, scheduler=scheduler, seed=SEED
    )
    assert_same(result, latents, images)
    assert result.settings["guidance_scale"] == 6.0


# Sizes and step counts that no export verifies; without guidance, which is the class's default, and
# with it.
OF_LATENT_DIFFUSION: tuple[dict[str, Any], ...] = (
    {"prompt": ["a red circle", "blue"], "height": 72, "width": 48, "num_inference_steps": 20},
    {"prompt": "Blue Square", "guidance_scale": 3.0, "width": 88, "num_inference_steps": 4},
    {"prompt": ["a", "red"], "guidance_scale": 6.0, "height": 40, "num_inference_steps": 20},
)


@pytest.mark.support(family="name", task="text-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "scheduler"),
    kept([("ldm", "ddim"), ("ldm", "pndm"), ("ldm-vq", "ddim")], ("ldm-vq", "ddim")),
)
@pytest.mark.parametrize("call", OF_LATENT_DIFFUSION)
def test_latent_diffusion(
    call: dict[str, Any],
    name: str,
    scheduler: str,
    backend: str,
    ours: Any,
    pipes: Callable[[str], Any],
) -> None:
    """Its class has no other arguments, and takes any it does not know without a word."""
    pipe = pipes(name)
    with quiet_loading():
        pipe.scheduler = build(scheduler, pipe.own_scheduler_config)
    with watched(pipe, pipe.unet) as seen, torch.no_grad():
        generator = torch.Generator().manual_seed(SEED)
        images = pipe(**call, generator=generator, output_type="np").images
    assert seen.latents is not None
    result = ours(name, backend)(**call, scheduler=scheduler, seed=SEED)
    assert_same(result, seen.latents.numpy(), (images * 255).round().astype(np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 4, 24, 32), (70, 4, 2, 3)])
def test_codebooks(
    shape: tuple[int, ...], backend: str, ours: Any, pipes: Callable[[str], Any]
) -> None:
    """Larger images, and more at once, than PyTorch's own search of the nearest was traced with."""
    vae, latents = pipes("ldm-vq").vqvae, np.random.default_rng(3).standard_normal(shape)
    scaled = torch.tensor(latents * 3.0, dtype=torch.float32)
    with torch.no_grad():
        expected = (vae.decode(scaled / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        plain = vae.decode(scaled / vae.config.scaling_factor, force_not_quantize=True).sample
    found = ours("ldm-vq", backend)(denoised=scaled.numpy(), output_type="np").images
    found = found.transpose(0, 3, 1, 2)
    assert np.abs(found - expected.numpy()).max() <= IMAGE / 255
    assert np.abs(found - (plain / 2 + 0.5).clamp(0, 1).numpy()).max() > 2 * IMAGE / 255


def test_negative_prompts_of_latent_diffusion(ours: Any, pipes: Callable[[str], Any]) -> None:
    """The class has none: that of a bundle is in the place of its empty text."""
    pipe = pipes("ldm-vq")
    call = {"prompt": "a red circle", "guidance_scale": 4.0, "num_inference_steps": 4}
    with quiet_loading():
        pipe.scheduler = build("ddim", pipe.own_scheduler_config)
    tokenizer = pipe.tokenizer

    def instead(texts: Any, **settings: Any) -> Any:
        return tokenizer(["blue"] if texts == [""] else texts, **settings)

    generator = torch.Generator().manual_seed(SEED)
    pipe.tokenizer = instead
    try:
        images = pipe(**call, generator=generator, output_type="np").images
    finally:
        pipe.tokenizer = tokenizer
    made = ours("ldm-vq", "onnxruntime")(
        **call, negative_prompt="blue", seed=SEED, output_type="np"
    )
    plain = ours("ldm-vq", "onnxruntime")(**call, seed=SEED, output_type="np")
    assert np.abs(made.images - images).max() <= IMAGE / 255
    assert np.abs(plain.images - images).max() > 2 * IMAGE / 255


@pytest.mark.support(family="name", task="text-to-image", target="torch")
@pytest.mark.parametrize("name", ["builtin", "sdxl"])
def test_torch_target(name: str, ours: Any, reference: Reference) -> None:
    latents, images = reference(name, "ddim")
    result = ours(name, "torch")(
        **PROMPTS[name], num_inference_steps=STEPS, scheduler="ddim", seed=SEED
    )
    assert_same(result, latents, images)


def test_torch_takes_arrays_that_are_read_only(ours: Any, recwarn: pytest.WarningsRecorder) -> None:
    session = ours("builtin", "torch").sessions["text_encoder"]
    (spec,) = session.inputs.values()
    ids = np.ones([1, 77], spec.dtype)
    ids.setflags(write=False)
    torch.set_warn_always(True)
    try:
        session.run(dict.fromkeys(session.inputs, ids))
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


@pytest.mark.support(
    family="sd", task="text-to-image", target="coreml-reference", precision="precision"
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_coreml_packages(precision: str, coreml_bundle: Path, reference: Reference) -> None:
    """The reference evaluator reads the packages back."""
    latents, images = reference("sd", "pndm")
    with latentc.load(coreml_bundle, backend="coreml-reference", precision=precision) as pipe:
        result = pipe(**PROMPTS["sd"], num_inference_steps=STEPS, scheduler="pndm", seed=SEED)
    if precision == "fp32":
        assert_same(result, latents, images)
    else:
        assert relative_l2(result.latents, latents) <= 1e-2
        assert psnr(np.stack([np.asarray(image) for image in result.images]), images) >= 35


@pytest.mark.support(family="sdxl", task="text-to-image", target="coreml-reference")
@pytest.mark.combinations
def test_coreml_packages_of_sdxl(
    pipeline_folder: Callable[[str], Path], reference: Reference, tmp_path: Path
) -> None:
    export(
        pipeline_folder("sdxl"),
        tmp_path / "b",
        targets=["coreml"],
        steps=[STEPS],
        schedulers=["ddim"],
    )
    latents, images = reference("sdxl", "ddim")
    with latentc.load(tmp_path / "b", backend="coreml-reference") as pipe:
        result = pipe(**PROMPTS["sdxl"], num_inference_steps=STEPS, scheduler="ddim", seed=SEED)
    assert_same(result, latents, images)


def pixel_loop(pipe: Any, scheduler: Any, batch: int) -> np.ndarray:
    """The unconditional loop with what DDPMPipeline leaves out, the schedulers' input scaling."""
    generator = torch.Generator().manual_seed(SEED)
    size = pipe.unet.config.sample_size
    sample = torch.randn((batch, 3, size, size), generator=generator)
    scheduler.set_timesteps(STEPS)
    sample = sample * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    options = {"generator": generator} if takes_generator else {}
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, timestep)
            prediction = pipe.unet(scaled, timestep).sample
            sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
    return sample.numpy()


@pytest.mark.support(family="unconditional", task="unconditional", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheduler", DEFAULT_SCHEDULERS)
def test_unconditional(
    scheduler: str, backend: str, ours: Any, pipes: Callable[[str], Any]
) -> None:
    pipe = pipes("unconditional")
    with quiet_loading():
        made = build(scheduler, pipe.own_scheduler_config)
    latents = pixel_loop(pipe, made, batch=2)
    images = (np.clip(latents / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    result = ours("unconditional", backend)(
        batch_size=2, num_inference_steps=STEPS, scheduler=scheduler, seed=SEED
    )
    assert_same(result, latents, images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_unconditional_pipelines(scheduler: str, ours: Any, pipes: Callable[[str], Any]) -> None:
    pipe = pipes("unconditional")
    with quiet_loading():
        made = build(scheduler, pipe.own_scheduler_config)
    if scheduler == "ddim":
        pipe = DDIMPipeline(unet=pipe.unet, scheduler=made)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe.scheduler = made
    images = pipe(
        batch_size=2,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images
    result = ours("unconditional", "onnxruntime")(
        batch_size=2, num_inference_steps=STEPS, scheduler=scheduler, seed=SEED, output_type="np"
    )
    assert np.abs(result.images - images).max() <= IMAGE / 255


@pytest.mark.parametrize("generators", ["one", "per image"])
def test_batches(generators: str, ours: Any, pipes: Callable[[str], Any]) -> None:
    """Two prompts, two images each, another size, a scheduler that draws noise."""
    pipe = pipes("sd")
    with quiet_loading():
        pipe.scheduler = build("euler_a", pipe.own_scheduler_config)
    seeds = [11, 12, 13, 14]
    generator: Any = torch.Generator().manual_seed(11)
    if generators == "per image":
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments: dict[str, Any] = {
        "prompt": ["a red circle", "blue"],
        "negative_prompt": ["", "red"],
        "num_images_per_prompt": 2,
        "height": 48,
        "width": 40,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }
    images = pipe(**arguments, generator=generator, output_type="np").images
    result = ours("sd", "onnxruntime")(
        **arguments,
        scheduler="euler_a",
        seed=11 if generators == "one" else seeds,
        output_type="np",
    )
    assert result.images.shape == (4, 48, 40, 3)
    assert np.abs(result.images - images).max() <= IMAGE / 255


def test_guidance_off(ours: Any, pipes: Callable[[str], Any]) -> None:
    pipe = pipes("sdxl")
    with quiet_loading():
        pipe.scheduler = build("euler", pipe.own_scheduler_config)
    arguments: dict[str, Any] = {
        "prompt": "a red circle",
        "guidance_scale": 1.0,
        "num_inference_steps": 4,
        "original_size": (64, 96),
        "target_size": (32, 32),
        "crops_coords_top_left": (3, 4),
    }
    generator = torch.Generator().manual_seed(SEED)
    images = pipe(**arguments, generator=generator, output_type="np").images
    result = ours("sdxl", "openvino")(**arguments, seed=SEED, output_type="np")
    assert np.abs(result.images - images).max() <= IMAGE / 255


def test_size_conditioning_matters(ours: Any) -> None:
    pipe = ours("sdxl", "onnxruntime")
    first = pipe("a red circle", num_inference_steps=2, seed=1, output_type="latent")
    other = pipe(
        "a red circle", num_inference_steps=2, seed=1, output_type="latent", target_size=(512, 512)
    )
    assert relative_l2(first.latents, other.latents) > 1e-3
