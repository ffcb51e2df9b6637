"""Stable Diffusion 3 and FLUX.1 do with images and texts what diffusers' pipelines of these
models do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from msgspec import structs

import latentc
from latentc.exporter.classes import record_of
from latentc.exporter.compiler.export import export
from latentc.exporter.compiler.requested import with_tasks
from latentc.exporter.families import family_of
from latentc.exporter.programs.changes import usual_steps
from latentc.exporter.quiet import quiet_loading
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, UnsupportedPipeline
from latentc.runtimes.programs.statements import Program
from latentc.runtimes.verification.verify import relative_l2
from tests.conftest import KEPT, one_at_a_time
from tests.support.combinations import kept
from tests.support.loaded import Ours, kept_open
from tests.support.sample_images import BACKENDS, assert_same, mask, sample_image
from tests.support.transformers import BUNDLES, STEPS, exported

SEED = 7
PIPELINES = {"sd3": "sd3-shifted", "flux-dev": "flux-dev"}
MASKED = (*PIPELINES, "sd3-masks", "flux-fill")  # the last two were trained for it
WITHOUT = {"sd3-without": {"text_encoder_3": None, "tokenizer_3": None}}
CLASSES = {
    ("sd3", "image-to-image"): "StableDiffusion3Img2ImgPipeline",
    ("sd3", "inpainting"): "StableDiffusion3InpaintPipeline",
    ("sd3-masks", "inpainting"): "StableDiffusion3InpaintPipeline",
    ("flux-fill", "inpainting"): "FluxFillPipeline",
    ("flux-dev", "image-to-image"): "FluxImg2ImgPipeline",
    ("flux-dev", "inpainting"): "FluxInpaintPipeline",
    ("sd3", "text-to-image"): "StableDiffusion3Pipeline",
    ("sd3-without", "text-to-image"): "StableDiffusion3Pipeline",
    ("flux-dev", "text-to-image"): "FluxPipeline",
    ("pixart-alpha", "text-to-image"): "PixArtAlphaPipeline",
}
SIZES = {
    "sd3": {"height": 24, "width": 40},
    "sd3-without": {"height": 24, "width": 40},
    "sd3-masks": {"height": 24, "width": 40},
    "flux-dev": {"height": 48, "width": 80},
    "flux-fill": {"height": 48, "width": 80},
    "pixart-alpha": {"height": 64, "width": 96, "use_resolution_binning": False},
}
CALL: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def ours(
    pipeline_folder: Callable[[str], Path],
) -> Iterator[Ours]:
    """A function: name in `BUNDLES` and backend → the loaded bundle."""
    with kept_open(lambda name: exported(name, pipeline_folder)) as get:
        yield get


@pytest.fixture(scope="module")
def theirs(pipeline_folder: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """A function: name in `BUNDLES` and task → the diffusers pipeline."""
    loaded: dict[tuple[str, str], Any] = {}

    def get(name: str, task: str) -> Any:
        if (name, task) not in loaded:
            folder = pipeline_folder(BUNDLES[name][0])
            with quiet_loading():
                pipe = getattr(diffusers, CLASSES[name, task]).from_pretrained(
                    folder, **WITHOUT.get(name, {})
                )
            pipe.set_progress_bar_config(disable=True)
            pipe.vae.encode = contiguous(pipe.vae.encode)
            loaded[name, task] = pipe
        return loaded[name, task]

    return get


def contiguous(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Return the VAE's encoder for an image in the usual layout, channel by channel.

    diffusers passes it on as it was read, with the channels last. PyTorch's group normalisation of
    that layout sums squares in float32: of 512 by 512 pixels the latents are then 1.2e-4 off from
    those in float64, in the usual layout 7e-7, and so are ours.
    """
    return lambda image, *rest, **more: encode(image.contiguous(), *rest, **more)


def reference(pipe: Any, seed: int | list[int] = SEED, **call: Any) -> tuple[Any, Any]:
    """Final latents [batch, channels, height, width], and images from 0 to 1."""

    def run(output_type: str) -> Any:
        each = [torch.Generator().manual_seed(one) for one in np.atleast_1d(seed).tolist()]
        generator = each if isinstance(seed, list) else each[0]
        with torch.no_grad():
            return pipe(**call, generator=generator, output_type=output_type).images

    latents = run("latent")
    if hasattr(pipe, "_unpack_latents"):
        size = call["height"], call["width"]
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    if type(pipe).__name__ != CLASSES["sd3", "inpainting"]:
        return latents.numpy(), run("np")
    # It leaves out the VAE's shift, which the other pipelines of this model add.
    with torch.no_grad():
        config = pipe.vae.config
        image = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor)[0]
    return latents.numpy(), pipe.image_processor.postprocess(image, output_type="np")


def given(name: str, **more: Any) -> dict[str, Any]:
    size = SIZES[name]
    image = sample_image(size["width"], size["height"])
    return {**CALL, **size, "image": image, "strength": 0.6, "guidance_scale": 3.0, **more}


# From an image


@pytest.mark.support(family="name", task="image-to-image", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PIPELINES)
def test_image_to_image(name: str, backend: str, ours: Any, theirs: Any) -> None:
    """0.6 of four steps are three of them, where the UNets' pipelines run two."""
    call = given(name)
    latents, images = reference(theirs(name, "image-to-image"), **call)
    result = ours(name, backend)(**call, seed=SEED, output_type="np")
    assert_same(result, latents, images)
    assert len(result.timings.steps) == 3


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_strengths_and_sizes(name: str, strength: float, ours: Any, theirs: Any) -> None:
    """At another size, where the noise is another; however little is asked for, a step is run."""
    size = {"height": 64, "width": 48}
    call = given(name, strength=strength, image=sample_image(30, 50), **size)
    latents, images = reference(theirs(name, "image-to-image"), **call)
    assert_same(ours(name)(**call, seed=SEED, output_type="np"), latents, images)


@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
def test_a_large_image(task: str, ours: Any, theirs: Any) -> None:
    """2.4e-5 at most are left, which ONNX Runtime's normalisation of instances rounds off."""
    size = {"height": 384, "width": 512}
    call = {**CALL, **size, "image": sample_image(512, 384), "strength": 0.1, "guidance_scale": 3.0}
    if task == "inpainting":
        call["mask_image"] = mask(512, 384)
    latents, images = reference(theirs("flux-dev", task), **call)
    result = ours("flux-dev")(**call, seed=SEED, output_type="np")
    assert_same(result, latents, images, 3e-5)


@pytest.mark.parametrize("several", [1, 2])
@pytest.mark.parametrize("seed", [5, [5, 9]])
@pytest.mark.parametrize("name", PIPELINES)
def test_batches(name: str, seed: int | list[int], several: int, ours: Any, theirs: Any) -> None:
    """Two images of one, and one of each; with one generator for both, and one for each."""
    if (name, several) == ("sd3", 1) and isinstance(seed, list):
        pytest.skip("diffusers fails there: it encodes no image for the second generator")
    size = SIZES[name]
    two = [sample_image(size["width"], size["height"], seed=each) for each in (0, 40)]
    call = given(name, image=two[:several])
    call |= {"prompt": ["a red circle", "blue"]} if several == 2 else {"num_images_per_prompt": 2}
    latents, images = reference(theirs(name, "image-to-image"), seed, **call)
    assert_same(ours(name)(**call, seed=seed, output_type="np"), latents, images)


def test_defaults_of_calls_with_an_image(ours: Any, theirs: Any) -> None:
    """FLUX.1's guidance is another there than for texts alone; the strength is 0.6."""
    pipe = ours("flux-dev")
    call = given("flux-dev", strength=None, guidance_scale=None)
    latents, _ = reference(
        theirs("flux-dev", "image-to-image"), **{n: v for n, v in call.items() if v is not None}
    )
    found = pipe(**call, seed=SEED, output_type="latent")
    assert relative_l2(found.latents, latents) <= 1e-4
    assert found.settings["strength"] == 0.6
    plain = {**CALL, **SIZES["flux-dev"], "seed": SEED, "output_type": "latent"}
    usual = pipe(**plain).latents
    assert np.array_equal(usual, pipe(**plain, guidance_scale=3.5).latents)
    assert relative_l2(pipe(**plain, guidance_scale=7.0).latents, usual) > 1e-4


def test_an_image_has_the_models_size(ours: Any) -> None:
    """These pipelines do not take the image's own size, as in diffusers."""
    run = ours("sd3").stream(**CALL, image=sample_image(24, 40), seed=1)
    assert run.finish().latents.shape == (1, 16, 16, 16)


def test_latents_in_the_place_of_an_image(ours: Any, theirs: Any) -> None:
    start = np.random.default_rng(0).standard_normal((1, 16, 12, 20)).astype(np.float32)
    call = given("sd3", image=start)
    expected, _ = reference(
        theirs("sd3", "image-to-image"), **{**call, "image": torch.from_numpy(start)}
    )
    found = ours("sd3")(**call, seed=SEED, output_type="latent")
    assert relative_l2(found.latents, expected) <= 1e-4


# A part of an image


def with_mask(name: str, **more: Any) -> dict[str, Any]:
    size = SIZES[name]
    return given(name, **{"mask_image": mask(size["width"], size["height"]), **more})


@pytest.mark.support(family="name", task="inpainting", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", kept(MASKED, *PIPELINES))
def test_inpainting(name: str, backend: str, ours: Any, theirs: Any) -> None:
    call = with_mask(name)
    latents, images = reference(theirs(name, "inpainting"), **call)
    result = ours(name, backend)(**call, seed=SEED, output_type="np")
    assert_same(result, latents, images)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("name", kept(MASKED, *PIPELINES))
def test_strengths_of_inpainting(name: str, strength: float, ours: Any, theirs: Any) -> None:
    """At another size; two images of one."""
    size = {"height": 64, "width": 48}
    call = with_mask(name, strength=strength, num_images_per_prompt=2, **size)
    latents, images = reference(theirs(name, "inpainting"), **call)
    assert_same(ours(name)(**call, seed=SEED, output_type="np"), latents, images)


@pytest.mark.parametrize("name", kept(MASKED, *PIPELINES))
def test_inpainting_with_two_seeds(name: str, ours: Any, theirs: Any) -> None:
    call = with_mask(name, num_images_per_prompt=2)
    latents, images = reference(theirs(name, "inpainting"), [5, 9], **call)
    assert_same(ours(name)(**call, seed=[5, 9], output_type="np"), latents, images)


def test_what_stays(ours: Any) -> None:
    """The part that is black in the mask has the image's latents in the end, to the last bit."""
    pipe, call = ours("flux-dev"), with_mask("flux-dev", seed=SEED, output_type="latent")
    one, other = (pipe(**{**call, "prompt": text}).latents for text in ("blue", "a red circle"))
    white = np.asarray(call["mask_image"])[::8, ::8] > 127
    assert np.array_equal(one[..., ~white], other[..., ~white])
    assert not np.array_equal(one[..., white], other[..., white])


def test_a_part_of_a_large_image(ours: Any, theirs: Any) -> None:
    """The part around the mask is made anew in the asked size, and put back."""
    call = with_mask("flux-dev", image=sample_image(120, 90), mask_image=mask(120, 90))
    with torch.no_grad():
        (expected,) = theirs("flux-dev", "inpainting")(
            **call, padding_mask_crop=3, generator=torch.Generator().manual_seed(SEED)
        ).images
    (found,) = ours("flux-dev")(**call, padding_mask_crop=3, seed=SEED).images
    assert found.size == expected.size == (120, 90)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 2


# Guidance by a negative text


@pytest.mark.support(family="flux-dev", task="true guidance", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
def test_true_guidance(backend: str, ours: Any, theirs: Any) -> None:
    """Beside the scale that the transformer is told; with texts of their own for both encoders."""
    call = {
        **CALL,
        **SIZES["flux-dev"],
        "prompt": ["a red circle", "blue"],
        "negative_prompt": ["a flat drawing", ""],
        "negative_prompt_2": ["blue", "a large square"],
        "true_cfg_scale": 4.0,
        "guidance_scale": 2.5,
        "num_images_per_prompt": 2,
    }
    latents, images = reference(theirs("flux-dev", "text-to-image"), **call)
    result = ours("flux-dev", backend)(**call, seed=SEED, output_type="np")
    assert_same(result, latents, images)
    assert result.settings["true_cfg_scale"] == 4.0


@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
def test_true_guidance_of_images(task: str, ours: Any, theirs: Any) -> None:
    """An empty negative text is one."""
    made = with_mask("flux-dev") if task == "inpainting" else given("flux-dev")
    call = {**made, "negative_prompt": "", "true_cfg_scale": 3.0}
    latents, images = reference(theirs("flux-dev", task), **call)
    assert_same(ours("flux-dev")(**call, seed=SEED, output_type="np"), latents, images)


@pytest.mark.parametrize(
    "alone", [{"true_cfg_scale": 4.0}, {"negative_prompt": "blue"}, {"true_cfg_scale": 1.0}]
)
def test_either_alone_does_nothing(alone: dict[str, Any], ours: Any, theirs: Any) -> None:
    """Either argument alone changes nothing, as in diffusers."""
    call = {**CALL, **SIZES["flux-dev"]}
    latents, images = reference(theirs("flux-dev", "text-to-image"), **call, **alone)
    result = ours("flux-dev")(**call, **alone, seed=SEED, output_type="np")
    assert_same(result, latents, images)
    plain = ours("flux-dev")(**call, seed=SEED, output_type="latent")
    assert np.array_equal(result.latents, plain.latents)


def test_true_guidance_in_a_graph_of_one_size(
    pipeline_folder: Callable[[str], Path], ours: Any
) -> None:
    """`static` takes the argument that turns guidance on; the other scale changes no shape."""
    size = SIZES["flux-dev"]
    call = {**CALL, **size, "seed": SEED, "output_type": "latent"}
    guided = {"negative_prompt": "blue", "true_cfg_scale": 3.0}
    folder = exported("flux-dev", pipeline_folder)
    for scale, more in ({"true_cfg_scale": 3.0}, guided), ({"guidance_scale": 7.0}, {}):
        with latentc.load(folder, backend="openvino", static={**size, **scale}) as pipe:
            found = pipe(**call, **more).latents
            assert relative_l2(found, ours("flux-dev", "openvino")(**call, **more).latents) < 1e-5
            with pytest.raises(InputError, match="rows of guidance and images"):
                pipe(**call, **({} if more else guided))
    with pytest.raises(InputError, match=r"takes: .*guidance_scale, true_cfg_scale"):
        latentc.load(folder, backend="openvino", static={"batch": 1})


# Encoded texts

# By pipeline, what diffusers' `encode_prompt` is asked for and what it gives, in its order.
ENCODED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **dict.fromkeys(
        ("sd3", "sd3-without"),
        (
            {"negative_prompt": ["blue", ""]},
            (
                *("prompt_embeds", "negative_prompt_embeds"),
                *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
            ),
        ),
    ),
    "flux-dev": ({}, ("prompt_embeds", "pooled_prompt_embeds")),
    "pixart-alpha": (
        {"negative_prompt": ["blue", ""]},
        (
            *("prompt_embeds", "prompt_attention_mask"),
            *("negative_prompt_embeds", "negative_prompt_attention_mask"),
        ),
    ),
}


def encoded(pipe: Any, name: str, **texts: Any) -> dict[str, np.ndarray]:
    others = {"prompt_2": None, "prompt_3": None} if name.startswith("sd3") else {}
    with torch.no_grad():
        made = pipe.encode_prompt(**texts, **others, device="cpu", num_images_per_prompt=1)
    return dict(zip(ENCODED[name][1], (each.numpy() for each in made[:4]), strict=False))


@pytest.mark.parametrize("name", kept(ENCODED, "sd3", "flux-dev"))
def test_encode_prompt(name: str, ours: Any, theirs: Any) -> None:
    pipe, texts = ours(name), {"prompt": ["a red circle", "large " * 3], **ENCODED[name][0]}
    expected = encoded(theirs(name, "text-to-image"), name, **texts)
    found = pipe.encode_prompt(**texts)
    assert found.keys() == expected.keys() == set(ENCODED[name][1])
    for argument, value in expected.items():
        assert found[argument].dtype == np.float32
        assert relative_l2(found[argument], value) <= 1e-5
    call = {**SIZES[name], "num_inference_steps": STEPS, "seed": SEED, "output_type": "latent"}
    assert np.array_equal(pipe(**found, **call).latents, pipe(**texts, **call).latents)


@pytest.mark.support(family="name", task="encoded prompts", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", kept(ENCODED, "sd3", "flux-dev"))
def test_encoded_texts(name: str, backend: str, ours: Any, theirs: Any) -> None:
    """Numbers that no text has; two images of each."""
    original, draw = theirs(name, "text-to-image"), np.random.default_rng(0)
    texts = {"prompt": ["a red circle", "blue"], **ENCODED[name][0]}
    given = {
        # Masks stay, and zeros where the encoders have no numbers.
        argument: value if "mask" in argument else np.where(value, draw.normal(size=value.shape), 0)
        for argument, value in encoded(original, name, **texts).items()
    }
    given = {argument: value.astype(np.float32) for argument, value in given.items()}
    call = {**SIZES[name], "num_inference_steps": STEPS}
    own = {"negative_prompt": None} if "pix" in name else {}
    tensors = {argument: torch.from_numpy(value) for argument, value in given.items()}
    # FLUX.1's pipeline does not repeat what is given encoded.
    twice = {argument: value.repeat_interleave(2, dim=0) for argument, value in tensors.items()}
    latents, images = reference(original, **twice, **call, **own)
    call |= {"num_images_per_prompt": 2, "seed": SEED, "output_type": "np"}
    result = ours(name, backend)(**tensors, **call)
    assert_same(result, latents, images)


def test_encoded_texts_that_lead_away(ours: Any, theirs: Any) -> None:
    """A text and an encoded one; the branch is encoded only if it has a text."""
    pipe, texts = ours("flux-dev"), {"prompt": "a red circle", "negative_prompt": "blue"}
    assert pipe.encode_prompt("a red circle").keys() == set(ENCODED["flux-dev"][1])
    both = pipe.encode_prompt(**texts)
    negative = {n: value for n, value in both.items() if n.startswith("negative_")}
    assert (len(both), len(negative)) == (4, 2)
    call = {**SIZES["flux-dev"], "num_inference_steps": STEPS, "true_cfg_scale": 3.0}
    latents, _ = reference(theirs("flux-dev", "text-to-image"), **texts, **call)
    call |= {"seed": SEED, "output_type": "latent"}
    for given in both, {"prompt": texts["prompt"], **negative}:
        assert relative_l2(pipe(**given, **call).latents, latents) <= 1e-4


# By pipeline and tokenizer: the row where its states begin, and whether they are the first columns
# (0), the others (1), or all.
PLACES = {
    "sd3": {"tokenizer": (0, 0), "tokenizer_2": (0, 1), "tokenizer_3": (77, None)},
    "sd3-without": {"tokenizer": (0, 0), "tokenizer_2": (0, 1)},
    "flux-dev": {"tokenizer_2": (0, None)},
    "pixart-alpha": {"tokenizer": (0, None)},
}
WORDS = (("a", 1.0), ("red circle", 20.0), ("small", 0.5))


def weighted(pipe: Any, name: str) -> dict[str, np.ndarray]:
    """The encoded texts of `WORDS`, by the documented formula."""
    text = " ".join(words for words, _ in WORDS)
    negative = {} if name == "flux-dev" else {"negative_prompt": ""}
    made, empty = (encoded(pipe, name, prompt=each, **negative) for each in (text, ""))
    states, nothing = made["prompt_embeds"].copy(), empty["prompt_embeds"]
    for tokenizer, (row, part) in PLACES[name].items():
        first = pipe.text_encoder.config.hidden_size
        columns = {None: slice(None), 0: slice(first), 1: slice(first, None)}[part]
        own = getattr(pipe, tokenizer)
        said: list[str] = []
        for words, weight in WORDS:
            start = len(own(" ".join(said), add_special_tokens=False).input_ids) if said else 0
            said.append(words)
            end = len(own(" ".join(said), add_special_tokens=False).input_ids)
            framed = own("a").input_ids[0] == own.bos_token_id and own.bos_token_id is not None
            rows = slice(row + start + framed, row + end + framed)
            away = states[:, rows, columns] - nothing[:, rows, columns]
            states[:, rows, columns] = nothing[:, rows, columns] + weight * away
    return {**made, "prompt_embeds": states}


@pytest.mark.support(family="name", task="weighted prompts", target="backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", kept(PLACES, "sd3", "flux-dev"))
def test_weights(name: str, backend: str, ours: Any, theirs: Any) -> None:
    """Each encoder's states of the words; vectors of whole texts stay as they are."""
    original = theirs(name, "text-to-image")
    expected = weighted(original, name)
    tensors = {n: torch.from_numpy(each) for n, each in expected.items()}
    call = {**SIZES[name], "num_inference_steps": STEPS}
    own = {"negative_prompt": None} if "pix" in name else {}
    latents, images = reference(original, **tensors, **call, **own)
    call |= {"prompt_weighting": True, "seed": SEED, "output_type": "np"}
    pipe = ours(name, backend)
    text = "a (red circle:20) (small:0.5)"
    for argument, value in pipe.encode_prompt(text, prompt_weighting=True).items():
        assert relative_l2(value, expected[argument]) <= 1e-5
    result = pipe(text, **call)
    assert_same(result, latents, images)
    plain = pipe("a red circle small", **call)
    assert relative_l2(plain.latents, result.latents) > 5e-4


@pytest.mark.parametrize(
    ("name", "call", "says"),
    [
        ("flux-dev", {"prompt_embeds": np.ones((1, 512, 24))}, "without 'pooled_prompt_embeds'"),
        (
            "flux-dev",
            {"prompt_embeds": np.ones((1, 256, 24)), "pooled_prompt_embeds": np.ones((1, 12))},
            r"must have the shape \[prompts, 512, 24\], not \[1, 256, 24\]",
        ),
        (
            "flux-dev",
            {"prompt": "(red:2)", "prompt_2": "red", "prompt_weighting": True},
            "one vector for the whole text",
        ),
        (
            "sd3",
            {"prompt_embeds": np.ones((1, 333, 24)), "pooled_prompt_embeds": np.ones((1, 18))},
            "numbers where this bundle's encoders have none",
        ),
        (
            "flux-dev",
            {"prompt": "red", "max_embeddings_multiples": 2},
            "of one length only: leave",
        ),
        ("pixart-alpha", {"prompt_embeds": np.ones((1, 120, 24))}, "'prompt_attention_mask'"),
    ],
)
def test_encoded_texts_that_cannot_be(
    name: str, call: dict[str, Any], says: str, ours: Any
) -> None:
    with pytest.raises(InputError, match=says):
        ours(name)(**call, **SIZES[name], num_inference_steps=STEPS)


# Pipelines that are saved for it


def renamed(source: Path, target: Path, class_name: str) -> Path:
    """The pipeline's folder as diffusers saves it from another class of the same parts."""
    shutil.copytree(source, target)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name}))
    return target


def test_an_export_of_the_class_itself(
    pipeline_folder: Callable[[str], Path], theirs: Any, tmp_path: Path
) -> None:
    class_name = CLASSES["sd3", "image-to-image"]
    folder = renamed(pipeline_folder(PIPELINES["sd3"]), tmp_path / "pipeline", class_name)
    bundle = KEPT / "bundles" / f"transformers-{class_name}"
    with one_at_a_time(f"bundle-transformers-{class_name}"):
        export(folder, bundle, targets=("onnx",), steps=(STEPS,), overwrite=True)
    manifest = Manifest.load(bundle)
    assert [program.name for program in manifest.programs] == ["text-to-image", "image-to-image"]
    call = given("sd3")
    latents, images = reference(theirs("sd3", "image-to-image"), **call)
    with latentc.load(bundle) as pipe:
        assert_same(pipe(**call, seed=SEED, output_type="np"), latents, images)


def without_steps(program: Program) -> Program:
    """Return a program without its usual step count, which is one that the bundle has plans for."""
    arguments = tuple(a for a in program.arguments if a.name != "num_inference_steps")
    return structs.replace(program, arguments=arguments)


@pytest.mark.parametrize(
    ("name", "task", "steps"),
    [
        ("sd3", "inpainting", 50),
        ("flux-dev", "image-to-image", 28),
        ("flux-dev", "inpainting", 28),
    ],
)
def test_classes_for_images(
    name: str, task: str, steps: int, pipeline_folder: Callable[[str], Path], theirs: Any
) -> None:
    """A pipeline of these classes is exported as one of text-to-image with that task is."""
    pipe = theirs(name, task)
    class_name = type(pipe).__name__
    description = family_of(class_name).describe(pipe)
    made = Manifest.load(exported(name, pipeline_folder))
    assert record_of(class_name).tasks == (task,)
    whole = with_tasks(description, [each.name for each in description.programs], class_name)
    assert [*map(without_steps, whole.programs)] == [*map(without_steps, made.programs)]
    assert tuple(graph.component for graph in whole.graphs) == made.components
    assert {each.name: usual_steps(each) for each in description.programs}[task] == steps
    options = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(1)}
    images = description.call(prompt="a red circle", **SIZES[name], **options)
    assert images.shape == (1, *SIZES[name].values(), 3)


@pytest.mark.parametrize(
    ("name", "task", "channels", "says"),
    [
        ("sd3", "text-to-image", (33, 16), "33 input and 16 output .* expected 16 input"),
        ("sd3", "inpainting", (32, 16), "expected 33 input channels"),
        ("flux-dev", "inpainting", (384, 64), "384 input .* FluxInpaintPipeline: expected 64 in"),
        ("flux-dev", "text-to-image", (128, 64), "for FluxPipeline: expected 64 input"),
        ("flux-fill", "inpainting", (64, 64), "for FluxFillPipeline: expected 384 input"),
    ],
)
def test_denoisers_of_other_channels(
    name: str, task: str, channels: tuple[int, int], says: str, theirs: Any
) -> None:
    pipe = theirs(name, task)
    sizes = dict(zip(("in_channels", "out_channels"), channels, strict=True))
    with torch.device("meta"):
        transformer = type(pipe.transformer).from_config({**pipe.transformer.config, **sizes})
    other = type(pipe)(**{**pipe.components, "transformer": transformer})
    with pytest.raises(UnsupportedPipeline, match=says):
        family_of(type(pipe).__name__).describe(other)


@pytest.mark.combinations
def test_defaults_of_filling(ours: Any, theirs: Any) -> None:
    """The whole of what is white, at FLUX.1 Fill's own guidance scale."""
    call = with_mask("flux-fill", strength=None, guidance_scale=None)
    latents, _ = reference(
        theirs("flux-fill", "inpainting"), **{n: v for n, v in call.items() if v is not None}
    )
    pipe = ours("flux-fill")
    found = pipe(**call, seed=SEED, output_type="latent")
    assert relative_l2(found.latents, latents) <= 1e-4
    assert found.settings["strength"] == 1.0
    description = family_of("FluxFillPipeline").describe(theirs("flux-fill", "inpainting"))
    assert usual_steps(description.program) == 50
    with pytest.raises(InputError, match="this call gives no image; this bundle takes 'image'"):
        pipe(**CALL, **SIZES["flux-fill"])
