"""A call, from its arguments to images, on graphs small enough to work out by hand."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import (
    BackendError,
    BundleError,
    DeviceUnavailable,
    InputError,
    NumericalError,
    PlanNotFound,
)
from latentc.runtimes.pipeline.pipeline import Pipeline, load
from latentc.runtimes.sampling.noise import Generator
from latentc.runtimes.texts.encoded import Encoded
from tests.support import fakes
from tests.support.fakes import FakeBackend, FakeSession, make_bundle

INIT_SCALE = 2.0


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Pipeline:
    return load(bundle, FakeBackend())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """No text at all."""
    return load(make_bundle(tmp_path_factory.mktemp("made") / "plain", text=False), FakeBackend())


def run(pipe: Pipeline, *prompt: Any, **arguments: Any) -> Any:
    return pipe(*prompt, **{"seed": 1, "output_type": "latent", **arguments}).images


def condition(pipe: Pipeline, text: str, sizes: tuple[float, ...] = (16, 16, 0)) -> np.ndarray:
    ids = pipe.tokenizers["tokenizer"].encode([text])
    states = fakes.text_encoder({"input_ids": ids})["encoder_hidden_states"]
    return states.mean() + np.float32(np.mean(sizes) / 100)


def by_hand(
    pipe: Pipeline, positive: float, negative: float, scale: float, noise: np.ndarray
) -> np.ndarray:
    """Four steps of the plain schedule, as in `fakes.plan_table`."""
    sample = noise * INIT_SCALE
    for timestep in np.linspace(900, 100, 4):
        both = [0.3 * sample + c + timestep / 1000 for c in (negative, positive)]
        sample = sample - 0.1 * (both[0] + scale * (both[1] - both[0]))
    return sample


# --- what is computed --------------------------------------------------------------------


def test_guidance_by_hand(pipe: Pipeline) -> None:
    found = run(pipe, "a red circle", negative_prompt="blue", guidance_scale=4.0)
    noise = Generator(1).randn((1, 4, 8, 8))
    contexts = condition(pipe, "a red circle"), condition(pipe, "blue")
    np.testing.assert_allclose(found, by_hand(pipe, *contexts, 4.0, noise), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("window", "rows"),
    [
        ({}, [4, 4, 4, 4]),
        ({"guidance_stop": 0.5}, [4, 4, 2, 2]),
        ({"guidance_start": 0.25, "guidance_stop": 0.8}, [2, 4, 4, 2]),
        ({"guidance_stop": 0.1}, [2, 2, 2, 2]),
        ({"guidance_stop": 0.5, "guidance_scale": 1.0}, [2, 2, 2, 2]),
    ],
)
def test_guidance_in_a_window(
    pipe: Pipeline, window: dict[str, float], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of it the prompt's own prediction is used, and nothing else is computed."""
    seen: list[int] = []
    inner = FakeSession._run

    def counting(self: FakeSession, feeds: Any) -> Any:
        if "sample" in feeds:
            seen.append(len(feeds["sample"]))
        return inner(self, feeds)

    monkeypatch.setattr(FakeSession, "_run", counting)
    arguments = {"guidance_scale": 4.0, **window}
    found = run(pipe, ["a red circle", "blue"], negative_prompt="square", **arguments)
    assert seen == rows
    for index, prompt in enumerate(["a red circle", "blue"]):
        positive, negative = (condition(pipe, text) for text in (prompt, "square"))
        sample = INIT_SCALE * Generator(1).randn((2, 4, 8, 8))[index]
        for timestep, count in zip(np.linspace(900, 100, 4), rows, strict=True):
            guidance = negative + 4 * (positive - negative) if count == 4 else positive
            sample = sample - 0.1 * (0.3 * sample + guidance + timestep / 1000)
        np.testing.assert_allclose(found[index], sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_no_guidance_at_1_or_below(pipe: Pipeline, scale: float) -> None:
    found = run(pipe, "a red circle", negative_prompt="blue", guidance_scale=scale)
    positive, noise = condition(pipe, "a red circle"), Generator(1).randn((1, 4, 8, 8))
    expected = by_hand(pipe, positive, 0.0, 1.0, noise)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_no_negative_prompt_is_the_empty_one(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(run(pipe, "a"), run(pipe, "a", negative_prompt=""))


def test_a_branch_without_text_may_be_zero(tmp_path: Path) -> None:
    guidance = fakes._guidance()
    negative = msgspec.structs.replace(guidance.branches[0], missing="zeros")
    changed = msgspec.structs.replace(guidance, branches=(negative, guidance.branches[1]))
    pipe = load(make_bundle(tmp_path / "b", guidance=changed), FakeBackend())
    noise = Generator(1).randn((1, 4, 8, 8))
    zero = np.float32(32 / 300)  # what the sizes alone amount to
    expected = by_hand(pipe, condition(pipe, "a"), zero, 3.0, noise)
    np.testing.assert_allclose(run(pipe, "a"), expected, rtol=2e-6, atol=2e-6)
    empty = by_hand(pipe, condition(pipe, "a"), condition(pipe, ""), 3.0, noise)
    found = run(pipe, "a", negative_prompt="")
    np.testing.assert_allclose(found, empty, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(run(pipe, "a", negative_prompt_2=""), run(pipe, "a"))
    with pytest.raises(InputError, match="changes nothing without 'negative_prompt'"):
        run(pipe, "a", negative_prompt_2="red")


def test_arguments_fall_back_from_branch_to_call_to_default(pipe: Pipeline) -> None:
    noise = Generator(1).randn((1, 4, 8, 8))

    def expected(positive: tuple[float, ...], negative: tuple[float, ...]) -> np.ndarray:
        contexts = condition(pipe, "a", positive), condition(pipe, "", negative)
        return by_hand(pipe, *contexts, 3.0, noise)

    own = run(pipe, "a", original_size=(64, 32), negative_original_size=[8, 8], crop=3)
    np.testing.assert_allclose(own, expected((64, 32, 3), (8, 8, 3)), rtol=2e-6, atol=2e-6)
    shared = run(pipe, "a", original_size=(64, 32))
    np.testing.assert_allclose(shared, expected((64, 32, 0), (64, 32, 0)), rtol=2e-6, atol=2e-6)
    noise = Generator(1).randn((1, 4, 16, 8))
    sized = run(pipe, "a", height=32, width=16)
    np.testing.assert_allclose(sized, expected((32, 16, 0), (32, 16, 0)), rtol=2e-6, atol=2e-6)


def test_the_second_prompt_replaces_the_first(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(run(pipe, "a", prompt_2="blue"), run(pipe, "blue"))
    np.testing.assert_array_equal(run(pipe, "a", prompt_2=""), run(pipe, "a"))  # as in diffusers


def test_prompts_and_images_per_prompt(pipe: Pipeline) -> None:
    prompts = ["a red circle", "a blue square"]
    noise = np.stack([Generator(seed).randn((4, 8, 8)) for seed in range(4)])
    found = run(pipe, prompts, num_images_per_prompt=2, latents=noise, negative_prompt=["a", ""])
    for index in range(4):
        alone = run(
            pipe,
            prompts[index // 2],
            negative_prompt=["a", ""][index // 2],
            latents=noise[index : index + 1],
        )
        np.testing.assert_allclose(found[index : index + 1], alone, rtol=1e-6, atol=1e-6)


def test_one_negative_prompt_serves_all(pipe: Pipeline) -> None:
    one = run(pipe, ["a", "red"], negative_prompt="blue")
    np.testing.assert_array_equal(one, run(pipe, ["a", "red"], negative_prompt=["blue", "blue"]))


def test_a_text_is_encoded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.encoded.clear()
    batches = []
    session = pipe.sessions["text_encoder"]
    real = session._run
    monkeypatch.setattr(session, "_run", lambda feeds: batches.append(feeds) or real(feeds))
    run(pipe, ["a", "red", "a"], negative_prompt="red", num_images_per_prompt=2)
    (feeds,) = batches
    assert feeds["input_ids"].shape == (2, fakes.MAX_LENGTH)


# --- noise -------------------------------------------------------------------------------


def test_the_same_texts_are_not_encoded_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    work = FakeSession._run

    def counting(self: FakeSession, feeds: Any) -> Any:
        runs.extend([len(feeds["input_ids"])] if "input_ids" in feeds else [])
        return work(self, feeds)

    monkeypatch.setattr(FakeSession, "_run", counting)
    with load(bundle, FakeBackend()) as own:
        first = run(own, "a red circle", negative_prompt="blue")
        np.testing.assert_array_equal(run(own, "a red circle", negative_prompt="blue"), first)
        assert runs == [2]
        other = run(own, "a red circle", negative_prompt="red")
        assert not np.array_equal(other, first)
        run(own, "a red circle", guidance_scale=1.0)
        assert runs == [2, 2, 1]  # rows of another batch are not taken out of one
        own.encoded.clear()
        np.testing.assert_array_equal(run(own, "a red circle", negative_prompt="blue"), first)
        assert runs == [2, 2, 1, 2]


def test_encoded_texts_are_bounded() -> None:
    def ids(value: int) -> dict[str, np.ndarray]:
        return {"ids": np.array([[value]])}

    made = {"states": np.ones((1, 4), np.float32)}
    known = Encoded(entries=2, limit=40)
    for value in (1, 2):
        known.put("encoder", ids(value), made)
    assert known.get("encoder", ids(1)) is not None
    known.put("encoder", ids(3), made)  # the second was not used for longest
    found = [known.get("encoder", ids(value)) is not None for value in (1, 2, 3)]
    assert found == [True, False, True]
    assert known.get("encoder_2", ids(1)) is None
    assert known.get("encoder", {"ids": np.array([1])}) is None
    kept = known.get("encoder", ids(1))
    assert kept is not None
    with pytest.raises(ValueError, match="read-only"):
        kept["states"][:] = 0
    known.put("encoder", ids(4), {"states": np.ones((1, 11), np.float32)})
    assert all(known.get("encoder", ids(value)) is None for value in (1, 3, 4))


def test_one_seed_draws_the_whole_batch(pipe: Pipeline) -> None:
    noise = Generator(5).randn((2, 4, 8, 8))
    expected = run(pipe, ["a", "a"], latents=noise)
    np.testing.assert_array_equal(run(pipe, ["a", "a"], seed=5), expected)


def test_seeds_per_image(pipe: Pipeline) -> None:
    found = run(pipe, "a", num_images_per_prompt=3, seed=[5, 6, 7], scheduler="noisy")
    for index, seed in enumerate((5, 6, 7)):
        alone = run(pipe, "a", seed=seed, scheduler="noisy")
        np.testing.assert_array_equal(found[index : index + 1], alone)


def test_the_scheduler_draws_after_the_latents(pipe: Pipeline) -> None:
    generator = Generator(3)
    latents = generator.randn((1, 4, 8, 8))
    quiet = run(pipe, "a", latents=latents, num_inference_steps=1)
    np.testing.assert_array_equal(
        run(pipe, "a", seed=3, num_inference_steps=1, scheduler="noisy"), quiet
    )
    steps = [s.latents for s in pipe.stream("a", seed=3, num_inference_steps=2, scheduler="noisy")]
    still = [s.latents for s in pipe.stream("a", seed=3, num_inference_steps=2)]
    drawn = 0.5 * generator.randn((1, 4, 8, 8))
    np.testing.assert_allclose(steps[0] - still[0], drawn, rtol=1e-5, atol=1e-6)


def test_no_seed_draws_one_and_reports_it(pipe: Pipeline) -> None:
    first = pipe("a", output_type="latent")
    assert first.seeds != pipe("a", output_type="latent").seeds
    again = pipe("a", output_type="latent", seed=first.seeds[0])
    np.testing.assert_array_equal(first.images, again.images)


def test_settings_make_the_same_again(pipe: Pipeline) -> None:
    first = pipe(["a", "red"], negative_prompt="blue", crop=2, scheduler="noisy", seed=[3, 4])
    loaded = ("source", "build", "backend", "device", "latentc")
    settings = {k: v for k, v in first.settings.items() if k not in loaded}
    np.testing.assert_array_equal(first.latents, pipe(**settings).latents)
    assert first.settings["backend"] == "fake 1.0"


# --- outputs -----------------------------------------------------------------------------


def test_output_types(pipe: Pipeline) -> None:
    latent = pipe("a", seed=1, output_type="latent")
    array = pipe("a", seed=1, output_type="np")
    images = pipe("a", seed=1)
    assert latent.images.shape == (1, 4, 8, 8)
    assert latent.images is latent.latents
    assert array.images.shape == (1, 16, 16, 3)
    assert array.images.dtype == np.float32
    np.testing.assert_array_equal(array.latents, latent.latents)
    (image,) = images.images
    assert (image.mode, image.size) == ("RGB", (16, 16))
    np.testing.assert_array_equal(np.asarray(image), (array.images[0] * 255).round())


def test_timings(pipe: Pipeline) -> None:
    timings = pipe("a").timings
    assert len(timings.steps) == 4
    parts = timings.tokenize + timings.encode + timings.denoise + timings.decode
    assert 0 < sum(timings.steps) <= timings.denoise < parts <= timings.total


def test_unconditional(plain: Pipeline) -> None:
    found = run(plain, batch_size=2, seed=9)
    expected = Generator(9).randn((2, 4, 8, 8)) * INIT_SCALE * (1 - 0.03) ** 4
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert run(plain, num_images_per_prompt=3).shape == (3, 4, 8, 8)
    assert len(plain().images) == 1


# --- steps -------------------------------------------------------------------------------


def test_stream(pipe: Pipeline) -> None:
    run_ = pipe.stream("a", seed=1)
    assert run_.num_timesteps == 4
    steps = list(run_)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.timestep for step in steps] == pytest.approx(np.linspace(900, 100, 4))
    result = run_.finish()
    np.testing.assert_array_equal(steps[-1].latents, result.latents)
    np.testing.assert_array_equal(np.asarray(steps[-1].preview()[0]), np.asarray(result.images[0]))
    assert steps[0].preview("np").shape == (1, 16, 16, 3)
    assert not result.interrupted
    assert run_.finish() is result


def test_finish_runs_what_is_left(pipe: Pipeline) -> None:
    run_ = pipe.stream("a", seed=1, output_type="latent")
    next(run_)
    np.testing.assert_array_equal(run_.finish().images, run(pipe, "a"))


def test_a_closed_run_has_no_result(pipe: Pipeline) -> None:
    run_ = pipe.stream("a")
    next(run_)
    run_.close()
    with pytest.raises(InputError, match="closed or failed"):
        run_.finish()


def test_arguments_are_checked_before_the_first_step(pipe: Pipeline) -> None:
    with pytest.raises(InputError):
        pipe.stream("a", height=3)


def test_the_callback_sees_every_step(pipe: Pipeline) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def callback(handle: Any, index: int, timestep: float, tensors: dict[str, Any]) -> None:
        seen.append((index, timestep, tensors["latents"].shape))

    pipe("a", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    assert {shape for _, _, shape in seen} == {(1, 4, 8, 8)}


def test_the_callback_replaces_latents(pipe: Pipeline) -> None:
    def callback(handle: Any, index: int, timestep: float, tensors: dict[str, Any]) -> Any:
        tensors["latents"] *= 0
        return tensors

    last = run(pipe, "a", callback_on_step_end=callback)
    np.testing.assert_array_equal(last, np.zeros_like(last))
    one = run(
        pipe,
        "a",
        callback_on_step_end=lambda run, index, t, tensors: (
            {"latents": np.zeros((1, 4, 8, 8))} if index == 2 else {}
        ),
    )
    expected = -0.1 * (condition(pipe, "a") * 3 - condition(pipe, "") * 2 + 0.1)
    np.testing.assert_allclose(one, np.full_like(one, expected), rtol=1e-5)


@pytest.mark.parametrize("how", ["method", "attribute"])
def test_the_callback_stops_the_run(pipe: Pipeline, how: str) -> None:
    def callback(handle: Any, index: int, timestep: float, tensors: dict[str, Any]) -> None:
        if index == 1:
            if how == "method":
                handle.interrupt()
            else:
                handle._interrupt = True

    result = pipe("a", seed=1, callback_on_step_end=callback)
    assert result.interrupted
    assert len(result.timings.steps) == 2
    second = list(pipe.stream("a", seed=1))[1]
    np.testing.assert_array_equal(result.latents, second.latents)
    np.testing.assert_array_equal(np.asarray(result.images[0]), np.asarray(second.preview()[0]))


def test_a_run_stopped_before_it_starts(pipe: Pipeline) -> None:
    run_ = pipe.stream("a", seed=1, output_type="latent")
    run_.interrupt()
    result = run_.finish()
    assert result.interrupted
    np.testing.assert_array_equal(result.images, Generator(1).randn((1, 4, 8, 8)) * INIT_SCALE)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3, "must return None or a dictionary"),
        ({"prompt_embeds": 1}, "must return None or a dictionary"),
        ({"latents": np.zeros(3)}, "cannot replace those of shape"),
    ],
)
def test_a_bad_return_of_the_callback(pipe: Pipeline, returned: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("a", callback_on_step_end=lambda *_: returned)


def test_unknown_callback_tensors(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="may only hold 'latents'"):
        pipe("a", callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    with pytest.raises(InputError, match="must be a text, not 3"):
        pipe("a", callback_on_step_end_tensor_inputs=3)


def test_what_help_shows(pipe: Pipeline) -> None:
    shown = inspect.signature(pipe.__call__).parameters
    assert shown["prompt"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert shown["height"].default is None
    assert shown["output_type"].default == "pil"
    assert "\n    height: Height of the image" in (inspect.getdoc(pipe.__call__) or "")
    assert inspect.signature(load).parameters["threads"].default == 0
    assert "callback_on_step_end" not in inspect.signature(pipe.stream).parameters


def test_an_unknown_argument_of_load(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown argument 'thread'; did you mean 'threads'"):
        load(tmp_path, **{"thread": 3})


# --- threads and closing -----------------------------------------------------------------


def test_threads_do_not_disturb_each_other(pipe: Pipeline) -> None:
    alone = [run(pipe, "a red circle", seed=seed, scheduler="noisy") for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda seed: run(pipe, "a red circle", seed=seed, scheduler="noisy"), range(8))
        )
    np.testing.assert_array_equal(alone, together)


def test_stopping_one_thread_stops_no_other(pipe: Pipeline) -> None:
    barrier = threading.Barrier(2, timeout=30)

    def call(stop: bool) -> Any:
        def callback(handle: Any, index: int, *_: Any) -> None:
            if index == 0:
                barrier.wait()
                handle._interrupt = stop
                barrier.wait()

        return pipe("a", callback_on_step_end=callback)

    with ThreadPoolExecutor(2) as pool:
        stopped, whole = pool.map(call, (True, False))
    assert (stopped.interrupted, len(stopped.timings.steps)) == (True, 1)
    assert (whole.interrupted, len(whole.timings.steps)) == (False, 4)


def test_closing(bundle: Path) -> None:
    with load(bundle, FakeBackend()) as pipe:
        run_ = pipe.stream("a")
        next(run_)
    pipe.close()
    with pytest.raises(InputError, match="pipeline is closed"):
        pipe("a")
    with pytest.raises(BackendError, match="pipeline was closed"):
        next(run_)


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no text given: this bundle needs 'prompt'"),
        ({"prompt": []}, "'prompt' is an empty list"),
        ({"prompt": 3}, "'prompt' must be a text or a list of texts, not 3"),
        ({"prompt": ["a", 3]}, "'prompt' must be a text or a list of texts"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "'negative_prompt' has 1 texts for 2"),
        ({"negative_prompt": ["c", "d"]}, "no text given"),
        ({"prompt": ["a", "b"], "prompt_2": ["a"] * 3}, "'prompt' has 2 texts for 3 prompts"),
        ({"prompt": "a", "nonsense": 1}, "unknown argument 'nonsense'; this bundle takes: prompt,"),
        ({"prompt": "a", "batch_size": 2}, "unknown argument 'batch_size'"),
        (
            {"prompt": "a", "num_inference_steps": 0},
            "'num_inference_steps' must be from 1 to 10000",
        ),
        ({"prompt": "a", "num_inference_steps": 2.5}, "'num_inference_steps' must be an integer"),
        ({"prompt": "a", "num_inference_steps": True}, "must be an integer, not True"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "'num_images_per_prompt' must be at least 1"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "'guidance_scale' must be finite"),
        ({"prompt": "a", "guidance_stop": 1.5}, "'guidance_stop' must be from 0 to 1"),
        ({"prompt": "a", "guidance_start": 0.5, "guidance_stop": 0.5}, "guidance_start' 0.5 and"),
        ({"prompt": "a", "guidance_scale": "7"}, "'guidance_scale' must be a number, not '7'"),
        ({"prompt": "a", "height": 18}, "height 18 is not a multiple of 4; nearest: 16 or 20"),
        ({"prompt": "a", "width": 1}, "width 1 is not a multiple of 4; nearest: 4"),
        ({"prompt": "a", "height": -8}, "height -8 is not a multiple of 4; nearest: 4"),
        ({"prompt": "a", "height": 10**9}, "height 1000000000: this model makes"),
        ({"prompt": "a", "width": "64"}, "'width' must be an integer, not '64'"),
        ({"prompt": "a", "seed": "7"}, "'seed' must be an integer"),
        ({"prompt": "a", "seed": 1.0}, "'seed' must be an integer"),
        ({"prompt": "a", "seed": 2**64}, "'seed' must be from"),
        ({"prompt": "a", "seed": [1, 2]}, "2 seeds for 1 images"),
        ({"prompt": ["a", "b"], "seed": [1]}, "1 seeds for 2 images"),
        ({"prompt": "a", "seed": []}, "0 seeds for 1 images"),
        ({"prompt": "a", "scheduler": "dream"}, "no scheduler 'dream' .* has: plain, noisy"),
        ({"prompt": "a", "output_type": "pt"}, "output_type must be one of"),
        ({"prompt": "a", "output_type": []}, "output_type must be one of"),
        ({"prompt": "a", "crop": (1, 2)}, "'crop' takes 1 numbers, not 2"),
        ({"prompt": "a", "original_size": "big"}, "'original_size' must be a number"),
        ({"prompt": "a", "latents": "x"}, "'latents' must be an array of numbers"),
        ({"prompt": "a", "latents": np.zeros((1, 3, 8, 8))}, r"shape \[1, 4, height, width\]"),
        ({"prompt": "a", "latents": np.full((1, 4, 8, 8), np.inf)}, "NaN or infinity"),
        ({"prompt": "a", "latents": np.zeros((1, 4, 8, 8)), "width": 32}, "does not fit 'latents'"),
    ],
)
def test_bad_arguments(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "guidance_scale", "crop"])
def test_no_text_arguments_without_a_text_encoder(plain: Pipeline, name: str) -> None:
    with pytest.raises(InputError, match=f"unknown argument '{name}'.* batch_size, num_inf"):
        plain(**{name: 3})


@pytest.mark.usefixtures("no_exporter")
def test_no_plan(pipe: Pipeline, bundle: Path) -> None:
    with pytest.raises(PlanNotFound) as caught:
        pipe("a", num_inference_steps=3, scheduler="noisy")
    message = str(caught.value)
    assert "there are plans for 1-2, 4" in message
    assert f"latentc schedule {bundle} --scheduler noisy --steps 3" in message


def test_a_scheduler_by_its_class(pipe: Pipeline) -> None:
    found = run(pipe, "a", scheduler="NoisyScheduler")
    np.testing.assert_array_equal(found, run(pipe, "a", scheduler="noisy"))


def test_latents_decide_the_size(pipe: Pipeline) -> None:
    result = pipe("a", latents=np.zeros((1, 4, 4, 6)))
    assert result.images[0].size == (12, 8)


def test_a_bundle_of_one_size(tmp_path: Path, bundle: Path) -> None:
    manifest = Manifest.load(bundle)

    def fixed(spec: Any) -> Any:
        sides = {"height": 8, "width": 8, "2*height": 16, "2*width": 16}
        shape = tuple(sides.get(dim, dim) for dim in spec.shape)
        return msgspec.structs.replace(spec, shape=shape)

    components = tuple(
        msgspec.structs.replace(
            component,
            inputs={name: fixed(spec) for name, spec in component.inputs.items()},
            outputs={name: fixed(spec) for name, spec in component.outputs.items()},
        )
        for component in manifest.components
    )
    pipe = load(make_bundle(tmp_path / "b", components=components), FakeBackend())
    assert run(pipe, "a").shape == (1, 4, 8, 8)
    assert run(pipe, "a", height=16, width=16).shape == (1, 4, 8, 8)
    with pytest.raises(InputError, match="height 32: this bundle was exported for 16 only"):
        pipe("a", height=32)


@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "decoder"])
def test_nan_names_the_component(tmp_path: Path, component: str) -> None:
    graphs = {component: f"nan_{component}"}
    pipe = load(make_bundle(tmp_path / "b", graphs=graphs), FakeBackend())
    with pytest.raises(NumericalError, match=f"^{component}: .*NaN or infinity"):
        pipe("a")


NOT_FINITE: dict[str, Callable[[Pipeline], object]] = {
    "a callback returns it": lambda pipe: pipe(
        "a", callback_on_step_end=lambda *given: {"latents": given[3]["latents"] * np.nan}
    ),
    "a stream is given it": lambda pipe: _stream_of(pipe, np.inf),
    "the latents to decode": lambda pipe: pipe.decode(np.full((1, 4, 8, 8), np.nan, np.float32)),
}


def _stream_of(pipe: Pipeline, value: float) -> None:
    run_ = pipe.stream("a")
    next(run_)
    assert run_.latents is not None
    run_.latents = run_.latents * value


@pytest.mark.fault("2.1", "latents that are NaN or infinity reach a graph that hides it")
@pytest.mark.parametrize("way", NOT_FINITE)
def test_latents_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The graphs here make numbers of NaN, as a clamp of OpenVINO's does."""
    for name in ("denoiser", "decoder"):
        plain = fakes.GRAPHS[name]
        hiding = {"hiding_" + name: lambda feeds, plain=plain: _hidden(plain(feeds))}
        for key, graph in hiding.items():
            monkeypatch.setitem(fakes.GRAPHS, key, graph)  # type: ignore[arg-type]
    graphs = {name: f"hiding_{name}" for name in ("denoiser", "decoder")}
    pipe = load(make_bundle(tmp_path / "b", graphs=graphs), FakeBackend())
    with pytest.raises(NumericalError, match="NaN or infinity"):
        NOT_FINITE[way](pipe)


def _hidden(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.nan_to_num(value) for name, value in outputs.items()}


def test_the_engine_fails(tmp_path: Path) -> None:
    pipe = load(make_bundle(tmp_path / "b", graphs={"denoiser": "broken"}), FakeBackend())
    with pytest.raises(BackendError, match=r"^denoiser: FakeSession: the engine exploded$"):
        pipe("a")


def test_the_engine_refuses_a_graph(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", graphs={"denoiser": "no such graph"})
    with pytest.raises(BackendError, match=r"fake could not load graph\.json of 'denoiser' on cpu"):
        load(bundle, FakeBackend())


def test_no_such_device(bundle: Path) -> None:
    with pytest.raises(DeviceUnavailable, match=r"no device 'tpu' .* it has: cpu"):
        load(bundle, FakeBackend(), "tpu")
    load(bundle, FakeBackend(), "CPU").close()


def test_a_damaged_schedule(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    (bundle / "schedules/plain.json").write_bytes(b"{")
    pipe = load(bundle, FakeBackend())
    with pytest.raises(BundleError, match=r"plain\.json"):
        pipe("a")
