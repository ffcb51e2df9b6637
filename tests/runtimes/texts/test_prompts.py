"""The manifest decides which texts can be longer, and which weighted.

These tests' bundles have graphs that can be worked out by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentc.runtimes.arrays import Array
from latentc.runtimes.backends.session import Feeds
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.bundle.structures import Component, TensorSpec
from latentc.runtimes.errors import BundleError, InputError
from latentc.runtimes.pipeline.loading import Loading
from latentc.runtimes.pipeline.pipeline import Pipeline, load, open_pipeline
from latentc.runtimes.presets.preset import Preset
from latentc.runtimes.texts.tokenizer import PromptTruncatedWarning
from latentc.runtimes.version_1.fields import Embedding
from tests.support import fakes

LENGTH = fakes.MAX_LENGTH
IDS = TensorSpec("int64", ("batch", LENGTH))
SEQUENCE = TensorSpec("float32", ("batch", "sequence", 2))
POOLED = TensorSpec("float32", ("batch", 3))
LONG = "a red circle a large blue square"  # two chunks
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}


def pooled(feeds: Feeds) -> dict[str, Array]:
    ids = feeds["input_ids"].astype(np.float32)
    return {"text_embeds": ids[:, 1:4] / 10}


def both(feeds: Feeds) -> dict[str, Array]:
    return fakes.text_encoder(feeds) | pooled(feeds)


def second(feeds: Feeds) -> dict[str, Array]:
    return fakes.text_encoder({"input_ids": feeds["input_ids_2"]})


def denoiser(feeds: Feeds) -> dict[str, Array]:
    made = fakes.denoiser({n: v for n, v in feeds.items() if n != "text_embeds"})["prediction"]
    given = feeds["text_embeds"].mean(axis=1) if "text_embeds" in feeds else np.zeros(1)
    return {"prediction": (made + given.reshape(-1, 1, 1, 1)).astype(np.float32)}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"pooled": pooled, "both": both, "second": second, "free_denoiser": denoiser}
    monkeypatch.setattr(fakes, "GRAPHS", {**fakes.GRAPHS, **known})


def of_any_length(inputs: dict[str, TensorSpec]) -> Component:
    taken = {"sample": fakes.SAMPLE, "timestep": TensorSpec("float32", (1,)), **inputs}
    taken["time_ids"] = TensorSpec("float32", ("batch", 3))
    return Component("denoiser", "denoiser", taken, {"prediction": fakes.SAMPLE})


def make(folder: Path, *encoders: tuple[str, Component], **changes: Any) -> Pipeline:
    """A bundle with these encoders (graph and component), whose denoiser takes all they give."""
    given = {
        name: SEQUENCE if name == "encoder_hidden_states" else spec
        for _, each in encoders
        for name, spec in each.outputs.items()
    }
    plain = Manifest.load(fakes.make_bundle(folder / "plain"))
    decoder = plain.component("decoder")
    components = (*(each for _, each in encoders), of_any_length(given), decoder)
    graphs = {each.name: graph for graph, each in encoders} | {"denoiser": "free_denoiser"}
    # Builds are made of the fake's own components: exchange these.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "_components", lambda text: components)
        bundle = fakes.make_bundle(folder / "bundle", graphs=graphs, **changes)
    return load(bundle, fakes.FakeBackend())


def encoder(name: str, *outputs: str, ids: str = "input_ids") -> Component:
    specs = {"encoder_hidden_states": fakes.STATES, "text_embeds": POOLED}
    return Component(name, "encoder", {ids: IDS}, {n: specs[n] for n in outputs})


def states(*ids: int) -> Array:
    return fakes.text_encoder({"input_ids": np.array([ids])})["encoder_hidden_states"][0]


EMBEDDINGS = (
    Embedding("prompt_embeds", {"encoder_hidden_states": {"input_ids": 2}}),
    Embedding("pooled_prompt_embeds", {"text_embeds": {}}),
)
FIRST, REST, EMPTY = (1, 4, 6, 8, 4, 2), (1, 5, 7, 9, 2, 0), (1, 2, 0, 0, 0, 0)


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    own = encoder("text_encoder", "encoder_hidden_states", "text_embeds")
    return make(tmp_path, ("both", own), embeddings=EMBEDDINGS)


def test_chunks_are_joined_and_the_pooled_vector_is_the_first_ones(pipe: Pipeline) -> None:
    found = pipe.encode_prompt([LONG, "red"], max_embeddings_multiples=5)
    expected = [states(*FIRST), states(*REST)], [states(1, 6, 2, 0, 0, 0), states(*EMPTY)]
    assert np.array_equal(found["prompt_embeds"], [np.concatenate(row) for row in expected])
    assert np.allclose(found["pooled_prompt_embeds"], [[0.4, 0.6, 0.8], [0.6, 0.2, 0]])
    negative = found["negative_prompt_embeds"]
    assert np.array_equal(negative, [np.concatenate([states(*EMPTY)] * 2)] * 2)
    result = pipe([LONG, "red"], max_embeddings_multiples=5, **CALL)
    assert np.array_equal(result.latents, pipe(**found, **CALL).latents)
    with pytest.warns(PromptTruncatedWarning, match="max_embeddings_multiples=2 would read on"):
        pipe(LONG, **CALL)


def test_weights_by_hand(pipe: Pipeline) -> None:
    found = pipe.encode_prompt(
        "a (red:3) circle", negative_prompt="(blue:0) square", prompt_weighting=True
    )
    plain = pipe.encode_prompt("a red circle", negative_prompt="blue square")
    empty = states(*EMPTY)
    expected = states(1, 4, 6, 8, 2, 0)
    expected[2] = empty[2] + 3 * (expected[2] - empty[2])
    assert np.allclose(found["prompt_embeds"], [expected], rtol=1e-6)
    negative = states(1, 7, 9, 2, 0, 0)
    negative[1] = empty[1]
    assert np.allclose(found["negative_prompt_embeds"], [negative], rtol=1e-6)
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        assert np.array_equal(found[name], plain[name])
    # Texts that were encoded before are still as they were.
    again = pipe.encode_prompt("a red circle", negative_prompt="blue square")
    assert all(np.array_equal(again[name], plain[name]) for name in plain)


def test_an_encoder_without_a_sequence_reads_one_chunk(tmp_path: Path) -> None:
    """An encoder without a sequence reads one chunk, and the other one, with a tokenizer of its
    own, reads on.
    """
    plain = Manifest.load(fakes.make_bundle(tmp_path / "any"))
    first = plain.tokenizers[0]
    tokenizers = (first, msgspec.structs.replace(first, name="tokenizer_2"))
    embeddings = (
        Embedding("prompt_embeds", {"encoder_hidden_states": {}}),
        Embedding("pooled_prompt_embeds", {"text_embeds": {}}),
    )
    pipe = make(
        tmp_path,
        ("pooled", encoder("first", "text_embeds")),
        ("second", encoder("second", "encoder_hidden_states", ids="input_ids_2")),
        tokenizers=tokenizers,
        texts={"input_ids": ("prompt",), "input_ids_2": ("prompt",)},
        embeddings=embeddings,
    )
    with pytest.warns(PromptTruncatedWarning, match=r"up to 6 tokens: \['large blue square'\]$"):
        found = pipe.encode_prompt(LONG, max_embeddings_multiples=2)
    assert np.array_equal(found["prompt_embeds"], [np.concatenate([states(*FIRST), states(*REST)])])
    assert np.allclose(found["pooled_prompt_embeds"], [[0.4, 0.6, 0.8]])
    with pytest.raises(InputError, match="which numbers of its encoded texts"):
        pipe("a (red:2) circle", prompt_weighting=True, **CALL)
    assert np.array_equal(
        pipe("a red circle", prompt_weighting=True, **CALL).latents,
        pipe("a red circle", **CALL).latents,
    )


def test_a_denoiser_of_one_length(tmp_path: Path) -> None:
    with load(fakes.make_bundle(tmp_path / "bundle"), fakes.FakeBackend()) as pipe:
        with pytest.raises(InputError, match="of one length only: leave max_embeddings_mult"):
            pipe("red", max_embeddings_multiples=2, **CALL)
        with pytest.raises(InputError, match=r"the shape \[prompts, 6, 2\], not \[1, 12, 2\]"):
            pipe(prompt_embeds=np.ones((1, 12, 2)), **CALL)
        found = pipe.encode_prompt("a (red:3)", prompt_weighting=True)
        assert np.array_equal(
            pipe("a (red:3)", prompt_weighting=True, **CALL).latents, pipe(**found, **CALL).latents
        )


def test_a_preset_for_one_size_makes_way(pipe: Pipeline) -> None:
    """Its graphs are for texts of one chunk: the build is loaded again for longer ones."""
    preset = Preset("faithful", {}, 1, {})
    bundle, build, backend = pipe.bundle, pipe.build, pipe.backend
    static = {"guidance_scale": 3.0}
    with open_pipeline(Loading.of(bundle, build, backend, static=static, preset=preset)) as own:
        size = own.sessions.components["denoiser"].inputs["encoder_hidden_states"].shape
        assert size == (2, LENGTH, 2)
        short = own("a (red:2) circle", prompt_weighting=True, **CALL).latents
        assert own._other_sizes is None
        assert np.array_equal(
            short, pipe("a (red:2) circle", prompt_weighting=True, **CALL).latents
        )
        found = own(LONG, max_embeddings_multiples=2, **CALL).latents
        assert own._other_sizes is not None
        assert np.array_equal(found, pipe(LONG, max_embeddings_multiples=2, **CALL).latents)
    with open_pipeline(Loading.of(bundle, build, backend, static=static)) as fixed:
        for call in (
            {"prompt": LONG, "max_embeddings_multiples": 2},
            pipe.encode_prompt(LONG, max_embeddings_multiples=2),
        ):
            with pytest.raises(InputError, match=r"of another length than 6.* without static"):
                fixed(**call, **CALL)


def test_encoders_are_not_run_without_a_text(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pipe.encode_prompt(["red", "blue"])
    expected = pipe(["red", "blue"], **CALL).latents
    monkeypatch.setattr(pipe.sessions["text_encoder"], "_function", fakes.broken)
    pipe.encoded.clear()
    assert np.array_equal(pipe(**found, **CALL).latents, expected)
    twice = pipe(**found, num_images_per_prompt=2, **CALL).latents
    assert twice.shape[0] == 4
    changed = found["prompt_embeds"].copy()
    found["prompt_embeds"] *= 2
    assert not np.array_equal(pipe(**found, **CALL).latents, expected)
    found["prompt_embeds"] = changed
    assert np.array_equal(pipe(**found, **CALL).latents, expected)


def test_an_older_bundle(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle", embeddings=())
    with load(bundle, fakes.FakeBackend()) as pipe:
        with pytest.raises(InputError, match="no arguments for encoded texts; export it again"):
            pipe.encode_prompt("red")
        with pytest.raises(InputError, match="unknown argument 'prompt_embeds'"):
            pipe(prompt_embeds=np.ones((1, 6, 2)), **CALL)


def test_encoded_texts_that_do_not_cover_what_the_denoiser_takes(tmp_path: Path) -> None:
    """A call cannot give what is left: it gives the text beside them."""
    own = encoder("text_encoder", "encoder_hidden_states", "text_embeds")
    with make(tmp_path, ("both", own), embeddings=EMBEDDINGS[:1]) as pipe:
        found = pipe.encode_prompt("red")
        assert found.keys() == {"prompt_embeds", "negative_prompt_embeds"}
        with pytest.raises(InputError, match="no text given: this bundle needs 'prompt'"):
            pipe(**found, **CALL)


def framed(*sizes: int) -> tuple[Embedding, ...]:
    return (Embedding("prompt_embeds", {"encoder_hidden_states": {"input_ids": 2}}, sizes),)  # type: ignore[arg-type]


def test_an_array_with_zeros_around_what_the_encoder_says(tmp_path: Path) -> None:
    bundle = fakes.make_bundle(tmp_path / "bundle", embeddings=framed(LENGTH + 2, 3))
    with load(bundle, fakes.FakeBackend()) as pipe:
        found = pipe.encode_prompt("a (red:3)", prompt_weighting=True)
        array = found["prompt_embeds"]
        assert array.shape == (1, LENGTH + 2, 3)
        expected = states(1, 4, 6, 2, 0, 0)
        expected[2] = states(*EMPTY)[2] + 3 * (expected[2] - states(*EMPTY)[2])
        assert np.allclose(array[0, :LENGTH, :2], expected, rtol=1e-6)
        assert np.count_nonzero(array) == np.count_nonzero(expected)
        weighted = pipe("a (red:3)", prompt_weighting=True, **CALL).latents
        assert np.array_equal(pipe(**found, **CALL).latents, weighted)
        with pytest.raises(InputError, match=r"the shape \[prompts, 8, 3\], not \[1, 6, 2\]"):
            pipe(prompt_embeds=np.ones((1, LENGTH, 2)), **CALL)
        for place in ((0, LENGTH, 0), (0, 0, 2)):
            other = array.copy()
            other[place] = 1
            with pytest.raises(InputError, match="numbers where this bundle's encoders have none"):
                pipe(prompt_embeds=other, **CALL)


@pytest.mark.parametrize(
    ("positions", "columns", "says"),
    [
        *((LENGTH - 1, 3, "or a shape: 1 to 7 sizes"), (LENGTH, 1, "or a shape: 1 to 7 sizes")),
        *((0, 0, "or a shape: 1 to 7 sizes"), (-6, -2, "or a shape: 1 to 7 sizes")),
        *((1 << 40, 3, "up to 67108864"), (LENGTH, 1 << 40, "up to 67108864")),
        (1 << 26, 8, "more than 268435456 numbers"),
    ],
)
def test_zeros_that_cannot_be_around(
    positions: int, columns: int, says: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=rf"statement \d+ \(zeros\): .*{says}"):
        load(
            fakes.make_bundle(tmp_path / "bundle", embeddings=framed(positions, columns)),
            fakes.FakeBackend(),
        )
