"""Every argument matters: for each task of each kind of pipeline, each argument that it takes, with
two values in calls that are else the same. An argument that changes nothing must be refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from latentc.exporter.progress import Progress
from latentc.exporter.verification.probe_calls import rows_of
from latentc.runtimes.bundle.sizes import BINNING
from latentc.runtimes.bundle.structures import Tokenizer
from latentc.runtimes.calls.call_arguments import CallArguments
from latentc.runtimes.errors import InputError, NumericalError
from latentc.runtimes.options import declared
from latentc.runtimes.pipeline.pipeline import Pipeline
from latentc.runtimes.programs.statements import (
    Image,
    Loop,
    Mask,
    Noise,
    Numbers,
    Program,
    loop_of,
    names_given,
)
from latentc.runtimes.version_1.upgrade import upgrade
from tests import programs_page
from tests.runtimes.version_1.test_upgrade import ARCHIVE as OLD_BUNDLES
from tests.runtimes.version_1.test_upgrade import KINDS as OLD_KINDS
from tests.support import tiny
from tests.support.sample_images import mask, sample_image
from tests.support.uncaptured import Mixing, uncaptured

SIDE = 32
PROMPTS = ["a red circle", "a blue square"]
IMAGES: Mapping[str, Any] = {
    "image": sample_image(SIDE, SIDE),
    "mask_image": mask(SIDE, SIDE),
    "control_image": sample_image(SIDE, SIDE, seed=40),
    "ip_adapter_image": sample_image(SIDE, SIDE, seed=50),
}
OTHERS: Mapping[str, Any] = {
    "image": sample_image(SIDE, SIDE, seed=9),
    "mask_image": mask(SIDE, SIDE).transpose(0),  # type: ignore[arg-type]
    "control_image": sample_image(SIDE, SIDE, seed=60),
    "ip_adapter_image": sample_image(SIDE, SIDE, seed=70),
}
# What a call needs besides for an argument to count: the others of its group, or guidance.
NEGATIVE = {"negative_prompt": "blue"}
SIZES = {"negative_original_size": (24, 16), "negative_target_size": (40, 8)}
BESIDE: Mapping[str, Mapping[str, Any]] = {
    "guidance_rescale": {"guidance_scale": 3.0},
    "image_guidance_scale": {"guidance_scale": 3.0},
    "true_cfg_scale": NEGATIVE,
    "negative_prompt": {"true_cfg_scale": 3.0},
    **{f"negative_prompt_{n}": {**NEGATIVE, "true_cfg_scale": 3.0} for n in (2, 3)},
    "guidance_start": {**NEGATIVE, "true_cfg_scale": 3.0, "num_inference_steps": 4},
    "guidance_stop": {**NEGATIVE, "true_cfg_scale": 3.0, "num_inference_steps": 4},
    "negative_original_size": SIZES,
    "negative_target_size": SIZES,
    "negative_crops_coords_top_left": SIZES,
    "control_guidance_start": {"num_inference_steps": 4},
    "control_guidance_end": {"num_inference_steps": 4},
    "adapter_conditioning_factor": {"num_inference_steps": 4},
    "denoising_end": {"num_inference_steps": 4},
    "strength": {"num_inference_steps": 4},
    "prompt_weighting": {"prompt": "a (red:1.8) circle"},
    "max_embeddings_multiples": {"prompt": "red blue " * 60},
    "mask_blur": {"output_type": "pil"},
    "padding_mask_crop": {"output_type": "pil"},
    "output_type": {},
}
VALUES: Mapping[str, Any] = {
    "guidance_start": 0.5, "guidance_stop": 0.5, "strength": 0.5, "denoising_end": 0.499,
    "control_guidance_start": 0.5, "control_guidance_end": 0.5, "adapter_conditioning_factor": 0.5,
    "guidance_rescale": 0.7, "num_inference_steps": 3, "seed": 6, "height": 48, "width": 48,
    "num_images_per_prompt": 2, "num_videos_per_prompt": 2, "num_frames": 9, "batch_size": 2,
    "output_type": "np", "prompt_weighting": True,
    "use_resolution_binning": True, "class_labels": 360, "prior_num_inference_steps": 3,
    "max_embeddings_multiples": 3, "mask_blur": 4, "padding_mask_crop": 2,
}  # fmt: skip
# What the tiny pipelines have one of, or what stands for texts, images and the seed, tested
# elsewhere.
ELSEWHERE = (
    "generator",
    *("scheduler", "latents", "image_latents", "denoised", "denoising_start", "cache_interval"),
    *("prior_latents", "negative_prior_latents", "image_embeds", "negative_image_embeds"),
)
# By argument that some bundles know and have no use for: why, as the refusal says it.
REFUSED = {
    "max_embeddings_multiples": "takes encoded texts of one length only",
    "prompt_weighting": "does not say which numbers of its encoded texts",
    **dict.fromkeys(("height", "width"), "this bundle was exported for [0-9]+ only"),
}
KINDS = (
    *("sd", "sdxl", "inpaint", "inpaint-xl", "pix2pix", "pix2pix-xl", "upscaler", "depth"),
    *("refiner", "lcm", "sd3", "sd3-masks", "flux-dev", "flux-fill", "pixart-alpha"),
    *("ldm", "dit", "qwen-image", "panorama", "kandinsky", "unconditional", "wan-2.2"),
    *("sd+controlnet", "sdxl+t2i-adapter", "sd+ip-adapter"),
)
HAS_PARTS = ("pix2pix-xl", "sd+controlnet", "sdxl+t2i-adapter", "sd+ip-adapter")
# By kind, the tasks that its class offers.
OFFERS = {"kandinsky": ("image-to-image",)}
HAS_TASKS = ("sd", "sdxl", "sd3", "flux-dev", "sd+controlnet", "sd+ip-adapter")


@pytest.fixture(scope="module")
def opened(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pipeline]:
    """A function: one of `KINDS` → the pipeline by way of a bundle, for all its tasks."""

    @cache
    def get(kind: str) -> Pipeline:
        source = pipeline_folder(kind.partition("+")[0])
        return bundle_of(kind, source, tmp_path_factory.mktemp("kind"))

    return get


def bundle_of(kind: str, source: Path, folder: Path, **options: Any) -> Pipeline:
    """Return one of `KINDS` by way of a bundle below `folder`, for all its tasks.

    Args:
        options: of `uncaptured`, others than are usual here.
    """
    added = kind.partition("+")[2]
    folder.mkdir(exist_ok=True)
    usual = {"steps": (1, 2, 3, 4), "mixing": True}
    return uncaptured(
        source,
        folder / "bundle",
        ("image-to-image", "inpainting") if kind in HAS_TASKS else OFFERS.get(kind, ()),
        asked=_added(added, source, folder),
        **{**usual, **options},
    )


def _added(kind: str, source: Path, folder: Path) -> dict[str, list[str]]:
    from diffusers import UNet2DConditionModel

    if not kind:
        return {}
    unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    if kind == "ip-adapter":
        return {kind: [str(tiny.ip_adapter(unet, folder))]}
    made = (
        tiny.controlnet(unet, 3) if kind == "controlnet" else tiny.t2i_adapter("full_adapter_xl", 3)
    )
    made.save_pretrained(folder / kind)
    return {kind: [str(folder / kind)]}


def images_of(*programs: Program) -> tuple[str, ...]:
    """Return the arguments of these programs that are images or masks."""
    arguments = (each for program in programs for each in program.arguments)
    return tuple(dict.fromkeys(each.name for each in arguments if isinstance(each, Image | Mask)))


def numbers_of(*programs: Program) -> dict[str, Numbers]:
    """Return the arguments of these programs that are numbers, by name."""
    arguments = (each for program in programs for each in program.arguments)
    return {each.name: each for each in arguments if isinstance(each, Numbers)}


def call_of(pipe: Pipeline, program: Program) -> dict[str, Any]:
    """A call of the task with all texts and images that it needs."""
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "output_type": "latent"}
    if pipe.manifest.latents.default_width > 512:
        call |= {"height": 2 * SIDE, "width": 2 * SIDE}
    if "num_frames" in pipe.signature.sizes:
        call["num_frames"] = 5
    unit = pipe.manifest.latents.factor * pipe.manifest.latents.multiple
    if unit > SIDE:
        call |= {"height": unit, "width": unit}
    if BINNING in pipe.signature.names:
        call[BINNING] = False
    if pipe.signature.texts:
        call["prompt"] = "a red circle"
    if "guidance_scale" in pipe.signature.scales:
        call["guidance_scale"] = 3.0
    if "strength" in numbers_of(program):
        masks = any(isinstance(each, Mask) for each in program.arguments)
        call["strength"] = 1.0 if masks else 0.75
        call["num_inference_steps"] = 4
    if "prior_num_inference_steps" in numbers_of(program):
        call["prior_num_inference_steps"] = 2
    call |= rows_of(program, 1)
    return call | {name: IMAGES[name] for name in images_of(program)}


def another(pipe: Pipeline, name: str) -> Any:
    """Another value than the default."""
    latents = pipe.manifest.latents
    if name in ("height", "width") and VALUES[name] % (latents.factor * latents.multiple):
        return 2 * latents.factor * latents.multiple
    if name in VALUES:
        return VALUES[name]
    if name in OTHERS:
        return OTHERS[name]
    if name in pipe.signature.numbers:
        numbers = numbers_of(*pipe.manifest.programs)[name]
        if numbers.least is not None and numbers.most is not None:
            return [(numbers.least + numbers.most) / 4] * numbers.count
        return [9.0] * pipe.signature.numbers[name]
    return 4.5 if name in pipe.signature.scales else "a blue square"


def encoded(pipe: Pipeline, name: str) -> dict[str, Any]:
    """Encoded texts in the place of the call's own, or of those of the negative prompt."""
    prefix = "negative_" if name.startswith("negative_") else ""
    text = {prefix + "prompt": "a blue square"} if prefix else {}
    made = pipe.encode_prompt("a blue square", **text)
    return {n: v for n, v in made.items() if n.startswith(prefix) == bool(prefix) or not prefix}


def result_of(pipe: Pipeline, call: Mapping[str, Any]) -> np.ndarray:
    made = pipe(**{n: v for n, v in call.items() if n not in pipe.signature.names or v is not None})
    images = made.images
    return np.asarray(images) if isinstance(images, np.ndarray) else np.stack(images)


def pair(pipe: Pipeline, program: Program, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two calls that differ in one argument."""
    others = BESIDE.get("negative_prompt" if "negative_" in name else "", {})
    beside = {n: v for n, v in BESIDE.get(name, others).items() if n in pipe.signature.names}
    call = {**call_of(pipe, program), **beside}
    if name in pipe.signature.embeddings:
        own = {n: v for n, v in call.items() if n != "prompt" or name.startswith("negative_")}
        if not name.startswith("negative_"):
            return call, own | {
                n: v for n, v in encoded(pipe, name).items() if "negative_" not in n
            }
        return call, own | {n: v for n, v in encoded(pipe, name).items() if "negative_" in n}
    return call, {**call, name: another(pipe, name)}


@pytest.mark.fault("2.7", "guidance_rescale of InstructPix2Pix")
@pytest.mark.fault("2.7", "every argument of every task changes the result, or is refused")
@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_matters(kind: str, opened: Callable[[str], Pipeline]) -> None:
    pipe = opened(kind)
    useful: set[str] = set()
    known: dict[str, np.ndarray] = {}
    for program in pipe.manifest.programs:
        for name in pipe.signature.names:
            if name in ELSEWHERE or (
                name in images_of(*pipe.manifest.programs) and name not in images_of(program)
            ):
                continue
            one, other = pair(pipe, program, name)
            try:
                pipe.stream(**other)
            except InputError:
                continue
            if repr(one) not in known:
                known[repr(one)] = result_of(pipe, one)
            before, after = known[repr(one)], result_of(pipe, other)
            assert before.shape != after.shape or not np.array_equal(before, after), (
                f"{program.name}: {name} changes nothing"
            )
            useful.add(name)
    assert {*pipe.signature.names} <= {*declared(CallArguments)}, "type checkers know less"
    left = set(pipe.signature.names) - useful - set(ELSEWHERE)
    assert left <= set(REFUSED), f"taken by no task: {sorted(left)}"
    assert kind == "dit" or not left & {"height", "width"}
    assert kind in ("qwen-image", "kandinsky") or "prompt_weighting" not in left
    for name in left:
        with pytest.raises(InputError, match=REFUSED[name]):
            pipe.stream(**pair(pipe, pipe.manifest.programs[0], name)[1])


@pytest.mark.fault("2.1", "what a component gives is NaN or infinity in one number")
@pytest.mark.parametrize("kind", HAS_PARTS)
def test_no_component_hides_what_is_not_finite(
    kind: str, opened: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders of texts and images, ControlNets, T2I-Adapters, depth estimators, denoisers and
    decoders."""
    pipe = opened(kind)
    calls = [
        call_of(pipe, program) | {"output_type": "np"}
        for program in reversed(pipe.manifest.programs)
    ]
    places = [(c.name, output) for c in pipe.manifest.components for output in c.outputs]
    for index, (component, output) in enumerate(places):
        monkeypatch.setattr(Mixing, "spoilt", (component, output, (np.nan, -np.inf)[index % 2]))
        with pytest.raises(NumericalError, match=component):
            _run_all(pipe, calls)


def _run_all(pipe: Pipeline, calls: list[dict[str, Any]]) -> None:
    pipe.encoded.clear()  # what earlier calls encoded is finite
    for call in calls:
        pipe(**call)


def calls_of(pipe: Pipeline, program: Program) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield calls of a task that differ from its usual one in an argument, and more of them."""
    every, own = images_of(*pipe.manifest.programs), images_of(program)
    for name in pipe.signature.names:
        if name not in ELSEWHERE and (name not in every or name in own):
            yield name, pair(pipe, program, name)[1]
    usual = call_of(pipe, program)
    counted = "batch_size" in pipe.signature.names
    many = {"batch_size" if counted else pipe.signature.several: 2}
    yield "several seeds", {**usual, **many, "seed": [4, 5]}
    if pipe.signature.texts:
        yield "several prompts", {**usual, "prompt": PROMPTS, **many, "seed": [1, 2, 3, 4]}
        weighted = {"prompt_weighting": True, "prompt": "a (red:1.4) circle [small]"}
        yield "weights", {**usual, **weighted}
        long = {"prompt": "a red circle " * 60, "max_embeddings_multiples": 3}
        yield "chunks", {**usual, **long, **({} if pipe.signature.images else weighted)}
    if "guidance_scale" in pipe.signature.scales:
        yield "no guidance", {**usual, "guidance_scale": 1.0}
    yield from _starts(pipe, program, usual)


def _starts(
    pipe: Pipeline, program: Program, usual: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield calls that begin elsewhere."""
    latents = pipe(**{**usual, "output_type": "latent"}).latents
    yield "latents", {**usual, "latents": latents}
    for strength in (0.3, 0.6, 1.0) if "strength" in numbers_of(program) else ():
        yield f"strength {strength}", {**usual, "strength": strength}
    images = (each for each in program.arguments if isinstance(each, Image))
    for name in (each.name for each in images if each.latents is not None):
        whole = {key: value for key, value in usual.items() if key != "strength"}
        yield "latents as image", {**usual, name: latents}
        ensemble = {name: latents, "denoising_start": 0.25, "denoising_end": 0.8}
        yield "a part of the schedule", {**whole, **ensemble}


def test_the_page_of_programs(opened: Callable[[str], Pipeline]) -> None:
    page = programs_page.PAGE.read_text("utf-8")
    assert page.endswith(programs_page.generated(lambda kind: opened(kind).manifest)), (
        "python -m tests.programs_page writes it"
    )


def without_place(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer whatever its file is called."""
    return structs.replace(tokenizer, file=structs.replace(tokenizer.file, path=""))


@pytest.mark.parametrize("kind", OLD_KINDS)
def test_upgraded_bundles_have_the_same_programs(
    kind: str, opened: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    """A bundle of format 1 says after its upgrade what an export of today says."""
    with zipfile.ZipFile(OLD_BUNDLES) as archive:
        members = [name for name in archive.namelist() if name.startswith(f"{kind}/")]
        archive.extractall(tmp_path, members)
    upgraded, manifest = upgrade(tmp_path / kind, Progress(None)), opened(kind).manifest
    assert upgraded is not None
    by_name = {program.name: program for program in upgraded.programs}
    for program in manifest.programs:  # format 1 knows the class of the pipeline alone
        named = structs.replace(by_name[program.name], stands_for=program.stands_for)
        assert named == program
    assert [*map(without_place, upgraded.tokenizers)] == [*map(without_place, manifest.tokenizers)]
    positions = {each.name: each.positions for each in upgraded.components}
    assert all(positions[each.name] == each.positions for each in manifest.components)


def test_values_can_be_asked_for(opened: Callable[[str], Pipeline]) -> None:
    pipe = opened("sdxl")
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds")
    call = {"prompt": PROMPTS, "negative_prompt": "a green star"}
    encoded = pipe.encode_prompt(**call)
    for name, array in pipe.compute(*names, **call).items():
        np.testing.assert_array_equal(array, encoded[name])


def draws(pipe: Pipeline, call: Mapping[str, Any]) -> set[str]:
    """Return the values that a call draws, and those of loops before the main one, which draw."""
    request = pipe.calls.request(call)
    steps = [request.facts.program.steps[place] for place in request.demand.live]
    return {
        name
        for step in steps
        if isinstance(step, Noise) or (isinstance(step, Loop) and step is not request.facts.loop)
        for name in names_given(step)
    }


def given_back(pipe: Pipeline, program: Program, call: Mapping[str, Any], name: str) -> Any:
    """Return a call with a computed value in the place of what makes it: with all of its group,
    and with the noise that is drawn after an image's, which is an earlier draw without it."""
    state = loop_of(program).state
    groups = [getattr(step, "group", None) for step in program.steps if name in names_given(step)]
    group = [
        each
        for step in program.steps
        if groups != [None] and getattr(step, "group", None) == groups[0]
        for each in names_given(step)
        if not each.startswith("_")
    ]
    starts = name in (state.clean, state.noise) and state.clean in pipe.signature.values
    names = group or ([state.clean, state.noise] if starts else [name])
    left = {"image"} if starts else {each for each in call if each in groups}
    if pipe.calls.choose(call).encoded & {*names}:
        texts = {*pipe.signature.texts, *pipe.signature.branch_texts}
        left |= {*texts, "prior_num_inference_steps"}
    if name == state.name:
        left = {*call} - {"output_type", BINNING}
    made = {each: pipe.compute(each, **call) for each in names}
    rest = {each: value for each, value in call.items() if each not in left}
    if name != state.name and draws(pipe, rest | made) < draws(pipe, call) - {*names}:
        # What is drawn after a loop that does not run now would be an earlier draw.
        own = [state.noise, *([] if state.clean is None else [state.clean])]
        made |= {each: pipe.compute(each, **call) for each in own}
        left |= {"image"} if state.clean is not None else set()
    if len(names) > 1:
        together = pipe.compute(*names[:1], *names[1:], **call)
        assert all(np.array_equal(made[each], together[each]) for each in names)
    return {each: value for each, value in call.items() if each not in left} | made


def _is_not_alone(pipe: Pipeline, program: Program, call: Mapping[str, Any], name: str) -> bool:
    """Return whether a call draws more after this noise, or has a clean value to start from that
    cannot be given."""
    state = loop_of(program).state
    if state.clean is not None and not state.clean_when and state.clean.startswith("_"):
        with pytest.raises(InputError, match="both what to start from"):
            pipe.stream(**call, latents=pipe.compute("latents", **call))
        return True
    demand = pipe.calls.request(call).demand
    drawn = [step for p in demand.live if isinstance(step := program.steps[p], Noise)]
    return drawn[-1].gives != name


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_can_be_given_back(kind: str, opened: Callable[[str], Pipeline]) -> None:
    """Each public value of each program, computed and given to a call in the place of what makes
    it: the same latents to the bit, and the same image.

    Less the noise where other noise is drawn after it, which is then an earlier draw, as in
    diffusers, and where the call starts from an image that has no public value.
    """
    pipe = opened(kind)
    for program in pipe.manifest.programs:
        call = call_of(pipe, program) | {"output_type": "np"}
        if "negative_prompt" in pipe.signature.names:
            call["negative_prompt"] = "a green star"
        if "true_cfg_scale" in pipe.signature.names:
            call["true_cfg_scale"] = 3.0
        if kind in (
            "lcm",
            "unconditional",
            "kandinsky",
        ):  # whose other steps draw, too: an earlier draw then
            call |= {"num_inference_steps": 1} | ({"strength": 1.0} if "strength" in call else {})
        whole = pipe(**call)
        noises = {step.gives for step in program.steps if isinstance(step, Noise)}
        public = [each for step in program.steps for each in names_given(step) if each[0] != "_"]
        for name in public:
            if name in noises and _is_not_alone(pipe, program, call, name):
                continue
            again = pipe(**given_back(pipe, program, call, name))
            label = f"{program.name}: {name}"
            np.testing.assert_array_equal(again.latents, whole.latents, label)
            np.testing.assert_array_equal(again.images, whole.images, label)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": "a", "colour": 3}, "unknown argument 'colour'"),
        ({}, "no text given"),
        ({"prompt": "a", "negative_prompt_2": "b"}, "'negative_prompt_2' changes nothing"),
        ({"prompt": "a", "negative_target_size": (8, 8)}, "'negative_target_size' changes"),
        ({"prompt": "a", "strength": 0.5, "image": "x"}, "'image': expected a Pillow image"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "3 texts for 2 prompts"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "'num_inference_steps' must be an integer"),
        ({"prompt": "a", "height": 33}, "height 33 is not a multiple of 2"),
        ({"prompt": "a", "_time_ids": np.zeros((1, 6))}, "unknown argument '_time_ids'"),
        ({"prompt": "a", "guidance_rescale": 2}, "'guidance_rescale' must be from 0 to 1"),
        ({"prompt_embeds": np.zeros((1, 77, 56))}, "without 'pooled_prompt_embeds'"),
        ({"prompt": "a", "latents": np.zeros((1, 3, 4, 4))}, r"must have the shape \[1, 4"),
    ],
)
def test_calls_that_a_program_refuses(
    call: dict[str, Any], message: str, opened: Callable[[str], Pipeline]
) -> None:
    with pytest.raises(InputError, match=message):
        opened("sdxl").calls.request(call)
