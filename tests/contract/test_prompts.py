"""Weights, long texts and encoded texts: as diffusers with `prompt_embeds` made by the documented
formula from the transformers encoders themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import latentc
from latentc.cli import run as command
from latentc.exporter.quiet import quiet_loading
from latentc.exporter.verification.reference import watched
from latentc.runtimes.errors import InputError
from latentc.runtimes.texts.tokenizer import TextTokenizer
from latentc.runtimes.verification.verify import relative_l2
from tests.support.loaded import Ours, kept_open

BACKENDS = ("onnxruntime", "openvino", "torch")
CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0}
SEED = 7
LONG = "a red circle above a small blue square and a green triangle left of a yellow star " * 3
OUTPUTS = ("prompt_embeds", "pooled_prompt_embeds")

# What a prompt is made of: words and the weight of each group of them.
Parts: TypeAlias = Sequence[tuple[str, float]]


@pytest.fixture(scope="module")
def ours(exported: Callable[[str], Path]) -> Iterator[Ours]:
    with kept_open(exported) as get:
        yield get


@pytest.fixture(scope="module")
def theirs(pipeline_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            with quiet_loading():
                loaded[name] = DiffusionPipeline.from_pretrained(pipeline_folder(name))
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return get


def diffusers(pipe: Any, **call: Any) -> np.ndarray:
    """Final latents."""
    tensors = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in call.items()
    }
    with watched(pipe, pipe.unet) as seen, torch.no_grad():
        pipe(generator=torch.Generator().manual_seed(SEED), output_type="np", **CALL, **tensors)
    assert seen.latents is not None
    found: np.ndarray = seen.latents.numpy()
    return found


def latents(pipe: latentc.Pipeline, **call: Any) -> np.ndarray:
    return pipe(seed=SEED, output_type="latent", **{**CALL, **call}).latents


# The formula


def framed(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """A chunk of token ids as the tokenizer makes it of a text."""
    whole = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return whole + [tokenizer.pad_token_id] * (77 - len(whole))


def chunks(tokenizer: Any, parts: Parts) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of 75 tokens each."""
    ids: list[int] = []
    weights: list[float] = []
    for words, weight in parts:
        own = tokenizer(words, add_special_tokens=False, truncation=False).input_ids
        ids += own
        weights += [weight] * len(own)
    made = []
    for start in range(0, max(len(ids), 1), 75):
        part = ids[start : start + 75]
        of_them = weights[start : start + 75]
        made.append((framed(tokenizer, part), [1.0, *of_them, *[1.0] * (76 - len(part))]))
    return made


def states(encoder: Any, ids: list[int], penultimate: bool) -> tuple[np.ndarray, np.ndarray]:
    """[77, width], and the first output, which is the pooled one where there is one."""
    with torch.no_grad():
        made = encoder(torch.tensor([ids]), output_hidden_states=True)
    chosen = made.hidden_states[-2] if penultimate else made[0]
    return chosen[0].numpy(), made[0].numpy()


def encoded(pipe: Any, texts: Sequence[Parts], count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """[1, 77 * chunks, width] and the pooled vector, one of `texts` for each text encoder."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if hasattr(pipe, "tokenizer_2"):
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    columns, pooled = [], np.empty(0)
    for (tokenizer, encoder), parts in zip(pairs, texts, strict=True):
        empty, _ = states(encoder, framed(tokenizer, []), len(pairs) == 2)
        rows = []
        for index, (ids, weights) in enumerate(chunks(tokenizer, parts)):
            state, other = states(encoder, ids, len(pairs) == 2)
            factors = np.array(weights, np.float32)[:, None]
            rows.append(empty + factors * (state - empty))
            if index == 0:
                pooled = other
        rows += [empty] * (count - len(rows))
        columns.append(np.concatenate(rows))
    return np.concatenate(columns, axis=1)[None].astype(np.float32), pooled


def arguments(pipe: Any, negative: np.ndarray, positive: np.ndarray, *pooled: Any) -> Any:
    made = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    if hasattr(pipe, "tokenizer_2"):
        made |= dict(zip(("negative_pooled_prompt_embeds", OUTPUTS[1]), pooled, strict=True))
    return made


WEIGHTED = "a (red circle:1.5), [small] ((blue:0.5)+ square)--"
WEIGHTED_PARTS: Parts = [
    ("a", 1),
    ("red circle", 1.5),
    (",", 1),
    ("small", 1 / 1.1),
    ("blue", 0.5 * 1.1 * 0.81),
    ("square", 0.81),
]


@pytest.mark.support(family="sd", task="weighted prompts", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights(backend: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    pipe = theirs("sd")
    positive, _ = encoded(pipe, [WEIGHTED_PARTS])
    negative, _ = encoded(pipe, [[("fog", 1.21), ("and", 1), ("blue", 0)]])
    expected = diffusers(pipe, **arguments(pipe, negative, positive))
    given = {"prompt": WEIGHTED, "negative_prompt": "fog++ and (blue:0)"}
    found = latents(ours("sd", backend), **given, prompt_weighting=True)
    assert relative_l2(found, expected) <= 1e-4
    assert relative_l2(found, latents(ours("sd", backend), **given)) > 1e-3


@pytest.mark.support(family="sdxl", task="weighted prompts", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_two_encoders(backend: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    """Each weighs its own text; the pooled vector is not weighted."""
    pipe = theirs("sdxl")
    second: Parts = [("flat", 1.3), ("drawing", 1)]
    positive, pooled = encoded(pipe, [WEIGHTED_PARTS, second])
    negative, negative_pooled = encoded(pipe, [[("blue", 0.9)]] * 2)
    given = arguments(pipe, negative, positive, negative_pooled, pooled)
    found = latents(
        ours("sdxl", backend),
        prompt=WEIGHTED,
        prompt_2="(flat:1.3) drawing",
        negative_prompt="blue-",
        prompt_weighting=True,
    )
    assert relative_l2(found, diffusers(pipe, **given)) <= 1e-4


@pytest.mark.support(family="name", task="long prompts", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_long_texts(name: str, backend: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    """The other branch, and the other encoder, go on with chunks of the empty text."""
    pipe = theirs(name)
    parts: Parts = [(LONG, 1), ("purple", 1.5)]
    count = len(chunks(pipe.tokenizer, parts))
    assert count == 3
    texts = [parts, [("flat", 1)]][: 1 + (name == "sdxl")]
    positive, pooled = encoded(pipe, texts, count)
    negative, negative_pooled = encoded(pipe, [[("blue", 1)]] * len(texts), count)
    expected = diffusers(pipe, **arguments(pipe, negative, positive, negative_pooled, pooled))
    given = {"prompt": f"{LONG} (purple:1.5)", "negative_prompt": "blue", "prompt_weighting": True}
    if name == "sdxl":
        given["prompt_2"] = "flat"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = latents(ours(name, backend), **given, max_embeddings_multiples=4)
    assert relative_l2(found, expected) <= 1e-4


def test_zeros_are_as_long(ours: Any, theirs: Callable[[str], Any]) -> None:
    """SDXL's negative branch without a text."""
    pipe = theirs("sdxl")
    positive, pooled = encoded(pipe, [[(LONG, 1)]] * 2)
    zeros = np.zeros_like(positive), np.zeros_like(pooled)
    given = arguments(pipe, zeros[0], positive, zeros[1], pooled)
    found = latents(ours("sdxl"), prompt=LONG, max_embeddings_multiples=3)
    assert relative_l2(found, diffusers(pipe, **given)) <= 1e-4


def test_too_long_texts_are_cut_as_in_diffusers(ours: Any, theirs: Callable[[str], Any]) -> None:
    pipe = ours("sd")
    with pytest.warns(latentc.PromptTruncatedWarning, match="max_embeddings_multiples=2 would"):
        found = latents(pipe, prompt=LONG)
    assert relative_l2(found, diffusers(theirs("sd"), prompt=LONG)) <= 1e-4
    with pytest.warns(latentc.PromptTruncatedWarning, match=r"up to 2 × 77 tokens.*=3 would"):
        pipe.encode_prompt(LONG, max_embeddings_multiples=2)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_nothing_changes_unasked(name: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    """Marks are text unless the call says otherwise; without marks it makes no difference."""
    pipe = ours(name)
    text = "a (red:1.3) circle++, [blue] \\(square\\)"
    found = latents(pipe, prompt=text, negative_prompt="(fog)")
    expected = diffusers(theirs(name), prompt=text, negative_prompt="(fog)")
    assert relative_l2(found, expected) <= 1e-4
    plain = {"prompt": "a red circle, 16:9", "negative_prompt": "well-known fog"}
    asked = latents(pipe, **plain, prompt_weighting=True, max_embeddings_multiples=3)
    assert np.array_equal(asked, latents(pipe, **plain))
    escaped = latents(pipe, prompt="a \\(red\\:1.3\\) C\\+\\+", prompt_weighting=True)
    assert np.array_equal(escaped, latents(pipe, prompt="a (red:1.3) C++"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_batch(name: str, backend: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    """Prompts of different lengths and weights, two images each."""
    pipe, both = theirs(name), 1 + (name == "sdxl")
    rows = [
        encoded(pipe, [parts] * both, 3)
        for parts in ([("red", 1.5), ("circle", 1)], [(LONG, 1)], [("blue", 1)])
    ]
    positive, pooled = (np.concatenate([row[i] for row in rows[:2]]) for i in (0, 1))
    negative, negative_pooled = (np.repeat(each, 2, axis=0) for each in rows[2])
    given = arguments(pipe, negative, positive, negative_pooled, pooled)
    expected = diffusers(pipe, **given, num_images_per_prompt=2)
    found = latents(
        ours(name, backend),
        prompt=["(red:1.5) circle", LONG],
        negative_prompt="blue",
        num_images_per_prompt=2,
        prompt_weighting=True,
        max_embeddings_multiples=3,
    )
    assert found.shape[0] == 4
    assert relative_l2(found, expected) <= 1e-4


# Encoded texts, in and out


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_encode_prompt(name: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    pipe, texts = ours(name), {"prompt": ["a red circle", "blue"], "negative_prompt": ["fog", ""]}
    with torch.no_grad():
        made = theirs(name).encode_prompt(
            **texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    names = [*("prompt_embeds", "negative_prompt_embeds"), OUTPUTS[1], f"negative_{OUTPUTS[1]}"]
    found = pipe.encode_prompt(**texts)
    assert list(found) == list(dict.fromkeys(found))
    assert found.keys() == set(names[: len(made)])
    for argument, expected in zip(names, made, strict=False):
        assert found[argument].dtype == np.float32
        assert relative_l2(found[argument], expected.numpy()) <= 1e-5
        found[argument] += 0  # a copy of its own
    assert np.array_equal(latents(pipe, **found), latents(pipe, **texts))
    alone = pipe.encode_prompt(texts["prompt"], do_classifier_free_guidance=False)
    assert alone.keys() == set(names[: len(made) : 2])


@pytest.mark.support(family="name", task="encoded prompts", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_encoded_texts(name: str, backend: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    """Encoded texts may have any length that both branches have, one row for several prompts."""
    pipe, draw = theirs(name), np.random.default_rng(0)
    shapes = [(2, 40, 32), (1, 40, 32)]
    pooled = []
    if name == "sdxl":
        shapes = [(2, 40, 56), (1, 40, 56)]
        pooled = [draw.standard_normal(shape).astype(np.float32) for shape in ((1, 20), (2, 20))]
    positive, negative = (draw.standard_normal(shape).astype(np.float32) for shape in shapes)
    given = arguments(pipe, negative, positive, *pooled)
    twice = {name: np.repeat(v, 2, axis=0) if len(v) == 1 else v for name, v in given.items()}
    expected = diffusers(pipe, **twice, num_images_per_prompt=2)
    found = latents(ours(name, backend), **given, num_images_per_prompt=2)
    assert relative_l2(found, expected) <= 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_an_encoded_text_and_a_text(name: str, ours: Any, theirs: Callable[[str], Any]) -> None:
    """A negative text is made as long as the encoded one; without it the branch is as ever."""
    pipe, own = theirs(name), ours(name)
    with torch.no_grad():
        positive, pooled = encoded(pipe, [[(LONG, 1)]] * (1 + (name == "sdxl")))
    given = dict(zip(OUTPUTS, (positive, pooled), strict=False))
    if name == "sd":
        del given[OUTPUTS[1]]
    negative, negative_pooled = encoded(pipe, [[("fog", 1)]] * (1 + (name == "sdxl")), 3)
    both = arguments(pipe, negative, positive, negative_pooled, pooled)
    found = latents(own, **given, negative_prompt="fog")
    assert relative_l2(found, diffusers(pipe, **both)) <= 1e-4
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    assert np.array_equal(latents(own, **tensors, negative_prompt="fog"), found)
    if name == "sdxl":
        assert relative_l2(latents(own, **given), diffusers(pipe, **given)) <= 1e-4
    one = {argument: value[:, :77] for argument, value in given.items()}
    assert relative_l2(latents(own, **one), diffusers(pipe, **one)) <= 1e-4


def test_with_what_else_there_is(
    exported: Callable[[str], Path], ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guidance window, guidance that is off, settings, low memory, texts encoded before, and
    graphs for one size."""
    pipe = ours("sdxl")
    texts = {"prompt": f"{LONG} (purple:1.5)", "negative_prompt": "fog++"}
    asked = {**texts, "prompt_weighting": True, "max_embeddings_multiples": 3}
    given = pipe.encode_prompt(**asked)
    assert given["prompt_embeds"].shape == (1, 231, 56)
    window = {"guidance_start": 0.25, "guidance_stop": 0.75}
    assert np.array_equal(latents(pipe, **asked, **window), latents(pipe, **given, **window))
    own = pipe.encode_prompt(**asked, do_classifier_free_guidance=False)
    off = {"guidance_scale": 1.0}
    assert np.array_equal(latents(pipe, **asked, **off), latents(pipe, **own, **off))
    assert np.array_equal(latents(pipe, **given, **off), latents(pipe, **own, **off))
    result = pipe(**asked, **CALL, seed=SEED, output_type="latent")
    assert {n: result.settings[n] for n in asked} == asked
    with latentc.load(exported("sdxl"), backend="onnxruntime", low_memory=True) as low:
        first = latents(low, **asked)
        assert np.array_equal(first, latents(pipe, **asked))
        opened = []
        open_one = low.sessions._open
        monkeypatch.setattr(low.sessions, "_open", lambda n: opened.append(n) or open_one(n))
        assert np.array_equal(latents(low, **asked), first)
        assert "text_encoder" not in opened
    with latentc.load(exported("sdxl"), backend="openvino", static=True) as fixed:
        with pytest.raises(InputError, match=r"of another length than 77.* without static"):
            latents(fixed, **asked)
        with pytest.raises(InputError, match="load it without static"):
            latents(fixed, **given)
        short = {**texts, "prompt": "a (red:1.5) circle", "prompt_weighting": True}
        assert relative_l2(latents(fixed, **short), latents(pipe, **short)) <= 1e-5


def test_words_that_stand_for_several(
    ours: Any, monkeypatch: pytest.MonkeyPatch, theirs: Callable[[str], Any]
) -> None:
    """The words that are written out have the weight of the word that stands for them."""
    pipe = ours("sd")
    known = pipe.tokenizers["tokenizer"]
    words = TextTokenizer(known._tokenizer, 77, "words", {"<cat>": "red red blue"})
    expected = latents(pipe, prompt="a (red red blue:1.5), red", prompt_weighting=True)
    monkeypatch.setitem(vars(pipe), "tokenizers", {"tokenizer": words})
    found = latents(pipe, prompt="a (<cat>:1.5), red", prompt_weighting=True)
    assert np.array_equal(found, expected)


def test_packages_of_one_length(coreml_bundle: Path) -> None:
    """Core ML packages take a chunk; weights do not change the length."""
    with latentc.load(coreml_bundle, backend="coreml-reference", precision="fp32") as pipe:
        with pytest.raises(InputError, match="not made for the shape"):
            latents(pipe, prompt=LONG, max_embeddings_multiples=3, num_inference_steps=1)
        given = {"prompt": "a (red:1.5) circle", "num_inference_steps": 1}
        found = latents(pipe, **given, prompt_weighting=True)
        assert relative_l2(found, latents(pipe, **given)) > 1e-4


def array(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "call", "says"),
    [
        ("sd", {"prompt": "(red", "prompt_weighting": True}, r"'\(' is never closed"),
        ("sd", {"prompt": "red", "negative_prompt": "a)", "prompt_weighting": True}, "closes noth"),
        ("sd", {"prompt": "red", "prompt_weighting": 1}, "must be True or False"),
        ("sd", {"prompt": "red", "max_embeddings_multiples": 0}, "at least 1"),
        ("sd", {"prompt": "red", "max_embeddings_multiples": "2"}, "must be an integer"),
        ("sd", {}, "no text given: this bundle needs 'prompt'"),
        ("sd", {"negative_prompt_embeds": array(1, 77, 32)}, "no text given"),
        ("sd", {"prompt": "a", "prompt_embeds": array(1, 77, 32)}, "say the same thing"),
        (
            "sd",
            {"prompt_embeds": array(1, 77, 31)},
            r"\[prompts, sequence, 32\], not \[1, 77, 31\]",
        ),
        ("sd", {"prompt_embeds": array(77, 32)}, r"not \[77, 32\]"),
        ("sd", {"prompt_embeds": array(0, 77, 32)}, r"not \[0, 77, 32\]"),
        ("sd", {"prompt_embeds": array(1, 77, 32) * np.nan}, "NaN"),
        ("sd", {"prompt_embeds": np.full((1, 77, 32), 1e300)}, "numbers beyond float32"),
        ("sd", {"prompt_embeds": "red"}, "must be an array of numbers"),
        ("sd", {"prompt_embeds": [[1.0], [2.0, 3.0]]}, "must be an array of numbers"),
        ("sd", {"prompt_embeds": torch.ones(1, 77, 32).bfloat16()}, "must be an array of numbers"),
        (
            "sd",
            {"prompt_embeds": array(2, 77, 32), "negative_prompt_embeds": array(3, 77, 32)},
            "'negative_prompt_embeds' has 3 rows for 2 prompts",
        ),
        (
            "sd",
            {"prompt_embeds": array(1, 77, 32), "negative_prompt_embeds": array(1, 154, 32)},
            "encoded texts of different lengths",
        ),
        ("sd", {"prompt_embeds": array(1, 80, 32)}, "has 80 positions.* make 77, or a multiple"),
        (
            "sd",
            {
                "prompt": LONG,
                "max_embeddings_multiples": 3,
                "negative_prompt_embeds": array(1, 77, 32),
            },
            "has 77 positions.* make 231",
        ),
        ("sd", {"prompt": "a", "pooled_prompt_embeds": array(1, 20)}, "unknown argument"),
        ("sdxl", {"prompt_embeds": array(1, 77, 56)}, "without 'pooled_prompt_embeds'"),
        (
            "sdxl",
            {"prompt": "a", "negative_pooled_prompt_embeds": array(1, 20)},
            "without 'negative_prompt_embeds'",
        ),
        (
            "sdxl",
            {
                "prompt_2": "a",
                "prompt_embeds": array(1, 77, 56),
                "pooled_prompt_embeds": array(1, 20),
            },
            "'prompt_2' and '(pooled_)?prompt_embeds' say",
        ),
        (
            "sdxl",
            {"prompt_embeds": array(2, 77, 56), "pooled_prompt_embeds": array(3, 20)},
            "'prompt_embeds' has 2 rows for 3 prompts",
        ),
    ],
)
def test_bad_input(name: str, call: dict[str, Any], says: str, ours: Any) -> None:
    with pytest.raises(InputError, match=says):
        latents(ours(name), **call)


def test_bad_input_of_encode_prompt(ours: Any, unconditional_bundle: Path) -> None:
    pipe = ours("sd")
    for call, says in (
        ({}, "no text given"),
        ({"prompt": "a", "height": 64}, "'height' is no text of this bundle; it takes: prompt"),
        ({"prompt": "a", "prompt_embeds": array(1, 77, 32)}, "'prompt_embeds' is no text"),
        ({"prompt": "(a", "prompt_weighting": True}, "never closed"),
    ):
        with pytest.raises(InputError, match=says):
            pipe.encode_prompt(**call)
    with latentc.load(unconditional_bundle) as plain:
        with pytest.raises(InputError, match="this bundle takes no texts"):
            plain.encode_prompt("a")
        with pytest.raises(InputError, match="unknown argument 'prompt_weighting'"):
            plain(prompt_weighting=True)


def test_the_command(
    exported: Callable[[str], Path], ours: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.png"
    call = ["generate", str(exported("sd")), "--steps", "4", "--seed", "7", "-o", str(output)]
    call += ["--backend", "onnxruntime", "--guidance-scale", "5"]
    reading = ["--prompt-weighting", "--max-embeddings-multiples", "3"]
    text = f"{LONG} (purple:1.5)"
    assert command([*call, text, *reading]) == 0
    made = output.read_bytes()
    given = ours("sd").encode_prompt(text, prompt_weighting=True, max_embeddings_multiples=3)
    np.savez(tmp_path / "texts.npz", **given)
    assert command([*call, "--prompt-embeds", str(tmp_path / "texts.npz")]) == 0
    from PIL import Image

    with Image.open(output) as again:
        found = np.asarray(again).astype(int)
    output.write_bytes(made)
    with Image.open(output) as first:
        assert '"prompt_weighting": true' in first.text["parameters"]  # type: ignore[attr-defined]
        assert np.abs(np.asarray(first).astype(int) - found).max() <= 1
    capsys.readouterr()
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", something=array(1, 2))
    output.unlink()
    for wrong, says in (
        (["(red", "--prompt-weighting"], "never closed"),
        (["red", "--prompt-embeds", str(tmp_path / "texts.npz")], "say the same thing"),
        (["--prompt-embeds", str(tmp_path / "none.npz")], "no such file"),
        (["--prompt-embeds", str(tmp_path / "text.npz")], "not a .npz file"),
        (
            ["--prompt-embeds", str(tmp_path / "other.npz")],
            "no argument 'something'; this bundle has: prompt_em",
        ),
    ):
        assert command([*call, *wrong]) == 2
        assert says in capsys.readouterr().err
    assert not output.exists()
