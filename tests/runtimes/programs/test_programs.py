"""The rules of programs, and what a call needs of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from latentc.runtimes.bundle.structures import TensorSpec
from latentc.runtimes.errors import BundleError
from latentc.runtimes.programs.checker import MOST_BINS, MOST_STATEMENTS, problems, types_of
from latentc.runtimes.programs.demand import of_call
from latentc.runtimes.programs.dimensions import Dimension, parse
from latentc.runtimes.programs.listing import listing
from latentc.runtimes.programs.statements import Program, decode
from tests.support.steps import steps_of

DEFAULTS = {"strength": 1.0, "guidance_scale": 7.5, "num_inference_steps": 50}


@dataclass(frozen=True)
class FakeGraph:
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)


def floats(*shape: int | str) -> TensorSpec:
    return TensorSpec("float32", ("batch", *shape))


LATENTS = floats(4, "height", "width")
GRAPHS = {
    "text_encoder": FakeGraph(
        {"input_ids": TensorSpec("int64", ("batch", 77))}, {"states": floats(77, 32)}
    ),
    "vae_encoder": FakeGraph(
        {"image": floats(3, "8*height", "8*width"), "noise": LATENTS}, {"latents": LATENTS}
    ),
    "denoiser": FakeGraph(
        {
            "sample": LATENTS,
            "timestep": TensorSpec("float32", (1,)),
            "encoder_hidden_states": floats("sequence", 32),
        },
        {"prediction": LATENTS},
    ),
    "vae_decoder": FakeGraph({"latents": LATENTS}, {"image": floats(3, "8*height", "8*width")}),
}
# Inpainting by blending, as Stable Diffusion does it.
DOCUMENT: dict[str, Any] = {
    "name": "inpainting",
    "stands_for": "StableDiffusionInpaintPipeline",
    "symbols": {
        "height": {"argument": "height", "unit": 8, "multiple": 8, "default": 64},
        "width": {"argument": "width", "unit": 8, "multiple": 8, "default": 64},
    },
    "arguments": [
        {"kind": "text", "name": "prompt"},
        {"kind": "text", "name": "negative_prompt", "default": ""},
        {"kind": "image", "name": "image", "latents": "image_latents"},
        {"kind": "mask", "name": "mask_image"},
        {"kind": "numbers", "name": "strength", "default": [1.0], "above": 0, "most": 1},
        {"kind": "numbers", "name": "guidance_scale", "default": [7.5]},
        {"kind": "numbers", "name": "num_inference_steps", "default": [50], "whole": True,
         "most": 1000},
    ],
    "steps": [
        {"do": "tokens", "gives": "_ids", "tokenizer": "tokenizer", "text": "prompt"},
        {"do": "run", "component": "text_encoder", "feeds": {"input_ids": "_ids"},
         "gives": {"states": "prompt_embeds"}, "group": "prompt"},
        {"do": "tokens", "gives": "_no_ids", "tokenizer": "tokenizer", "text": "negative_prompt"},
        {"do": "run", "component": "text_encoder", "feeds": {"input_ids": "_no_ids"},
         "gives": {"states": "negative_prompt_embeds"}, "group": "negative"},
        {"do": "pixels", "gives": "_pixels", "of": "image", "shape": [3, "8*height", "8*width"]},
        {"do": "pixels", "gives": "_mask", "of": "mask_image", "shape": [1, "height", "width"]},
        {"do": "noise", "gives": "_image_noise", "shape": [4, "height", "width"],
         "rows": ["image"]},
        {"do": "run", "component": "vae_encoder",
         "feeds": {"image": "_pixels", "noise": "_image_noise"},
         "gives": {"latents": "image_latents"}},
        {"do": "noise", "gives": "latents", "shape": [4, "height", "width"]},
        {"do": "noise", "gives": "_masked_noise", "shape": [4, "height", "width"],
         "rows": ["image"], "always": True},
        {"do": "loop", "denoiser": "denoiser", "plan": {}, "part": {"strength": "strength"},
         "state": {"name": "denoised", "noise": "latents", "clean": "image_latents",
                   "clean_when": [{"argument": "strength", "below": 1}],
                   "keep": {"value": "image_latents", "where": "_mask", "noise": "latents"}},
         "branches": [
             {"name": "negative", "feeds": {"encoder_hidden_states": "negative_prompt_embeds"},
              "when": [{"argument": "guidance_scale", "above": 1}],
              "during": {"count": "floor", "stop": 0.5},
              "push": [{"branch": "positive", "by": "guidance_scale", "less": 1}]},
             {"name": "positive", "feeds": {"encoder_hidden_states": "prompt_embeds"}}]},
        {"do": "run", "component": "vae_decoder", "feeds": {"latents": "denoised"},
         "gives": {"image": "_image"}, "tiles": True},
        {"do": "emit", "kind": "images", "of": "_image"},
    ],
}  # fmt: skip
LOOP, PIXELS, EMIT = 10, 4, 12
STRENGTH, STEPS = 4, 6  # places among the arguments


def made(change: Callable[[dict[str, Any]], object] | None = None) -> Program:
    """Return the program, changed."""
    document = json.loads(json.dumps(DOCUMENT))
    if change is not None:
        change(document)
    return decode(msgspec.json.encode(document))


def put(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    """Return what puts a value into a place of the document."""

    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def again(document: dict[str, Any], place: int) -> None:
    document["steps"].insert(place, dict(document["steps"][place]))


def swap(document: dict[str, Any], one: int, other: int) -> None:
    steps = document["steps"]
    steps[one], steps[other] = steps[other], steps[one]


def insert(*statements: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return what puts statements before the loop."""

    def change(document: dict[str, Any]) -> None:
        document["steps"][LOOP:LOOP] = statements

    return change


BRANCH = ("steps", LOOP, "branches", 0)
BASE = ("steps", LOOP, "branches", 1)
STATE = ("steps", LOOP, "state")
WRONG: Mapping[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "used before it is made": (lambda d: swap(d, 0, 1), "no value '_ids' before it"),
    "a cycle": (put("denoised", "steps", 7, "feeds", "noise"), "no value 'denoised' before it"),
    "a shadowed name": (lambda d: again(d, 8), "two things are named 'latents'"),
    "an argument's name": (put("prompt", "steps", 8, "gives"), "two things are named 'prompt'"),
    "a bad name": (put("Latents", "steps", 8, "gives"), "bad name 'Latents'"),
    "a private argument": (put("_mine", "arguments", 2, "name"), "'_mine' is private"),
    "no argument": (put("text", "steps", 0, "text"), "no argument 'text'"),
    "no text": (put("image", "steps", 0, "text"), "'image' is no text"),
    "no image": (put("prompt", "steps", PIXELS, "of"), "'prompt' is no image"),
    "no component": (put("unet", "steps", LOOP, "denoiser"), "no component 'unet'"),
    "an input too few": (put({}, "steps", 11, "feeds"), "'vae_decoder' takes"),
    "another shape": (put("_pixels", "steps", 11, "feeds", "latents"), "takes float32"),
    "rows of no image": (put(["prompt"], "steps", 6, "rows"), "'prompt', which is no image"),
    "channels": (put([4, "height", "width"], "steps", 5, "shape"), r"shape \[1, height, width\]"),
    "an unknown symbol": (put([4, "h", "width"], "steps", 8, "shape"), "bad shape"),
    "a size of zero": (put([0, "height", "width"], "steps", 8, "shape"), "bad shape"),
    "nothing emitted": (
        lambda d: d["steps"].pop(),
        "0 statements 'emit images' or 'emit frames': expected one",
    ),
    "no loop": (lambda d: d["steps"].pop(LOOP), "0 statements 'loop': expected 1 to 8"),
    "nine loops": (
        lambda d: [again(d, LOOP) for _ in range(8)],
        "9 statements 'loop': expected 1 to 8",
    ),
    "token ids emitted as images": (put("_ids", "steps", EMIT, "of"), "no images"),
    "latents emitted as images": (put("denoised", "steps", EMIT, "of"), "no images"),
    "what a call gives emitted as images": (put("_pixels", "steps", EMIT, "of"), "no images"),
    "images of half the size": (
        lambda d: [each.update(unit=16) for each in d["symbols"].values()],
        r"no images; expected .*16\*height by 16\*width",
    ),
    "an unused value": (lambda d: d["steps"][9].pop("always"), "nothing uses '_masked_noise'"),
    "an unused argument": (
        lambda d: d["arguments"].append({"kind": "text", "name": "more", "optional": True}),
        "nothing uses the argument 'more'",
    ),
    "a test of nothing": (put([{}], *BRANCH, "when"), "a test must say"),
    "a test of a text": (put([{"argument": "prompt", "above": 1}], *BRANCH, "when"), "no number"),
    "a test of a private value": (put([{"given": ["_mask"]}], *BRANCH, "when"), "is private"),
    "a test of numbers": (
        lambda d: d["arguments"][5].update(count=2, default=[1, 2]),
        "a test of 'guidance_scale', which is no number",
    ),
    "a test of a number that may be missing": (
        put({"kind": "numbers", "name": "guidance_scale", "optional": True}, "arguments", 5),
        "a test of 'guidance_scale', which is no number, or has no default",
    ),
    "a test of a size": (
        put(["height"], "arguments", 5, "default"),
        "a test of 'guidance_scale', which is no number",
    ),
    "a test of two limits": (
        put([{"argument": "guidance_scale", "above": 1, "at_most": 2}], *BRANCH, "when"),
        "a test must say",
    ),
    "a test of what nothing is named": (put([{"given": ["x"]}], *BRANCH, "when"), "a test of 'x'"),
    "no base": (put([], "steps", LOOP, "branches"), "0 branches: expected 1 to 16"),
    "a loop whose branches all push": (
        put([{"branch": "negative", "by": "guidance_scale"}], *BASE, "push"),
        "expected one branch that always runs and pushes nothing",
    ),
    "a base that does not always run": (
        put([{"argument": "guidance_scale", "above": 1}], *BASE, "when"),
        "expected one branch that always runs and pushes nothing",
    ),
    "a base that runs for a while": (
        put({"count": "floor", "stop": 0.5}, *BASE, "during"),
        "expected one branch that always runs and pushes nothing",
    ),
    "two branches of one name": (put("negative", *BASE, "name"), "expected different names"),
    "two bases": (put([], *BRANCH, "push"), "one branch that always runs"),
    "a push of one that may not run": (
        lambda document: document["steps"][LOOP]["branches"].append(
            {
                **document["steps"][LOOP]["branches"][0],
                "name": "other",
                "when": [],
                "push": [{"branch": "negative", "by": "guidance_scale"}],
            }
        ),
        "pushes 'negative', which may not run then",
    ),
    "a default that may not be given": (
        put([1.5], "arguments", STRENGTH, "default"),
        "the default 1.5 may not be given",
    ),
    "a default at a limit that is left out": (
        put([0.0], "arguments", STRENGTH, "default"),
        "the default 0 may not be given",
    ),
    "a default that is no integer": (
        put([2.5], "arguments", STEPS, "default"),
        "the default 2.5 may not be given",
    ),
    "a default beyond all numbers": (
        put([1e300], "arguments", STEPS, "default"),
        "expected numbers from",
    ),
    "limits with nothing between": (put(2.0, "arguments", STRENGTH, "above"), "no number from 2"),
    "a push of itself": (put("negative", *BRANCH, "push", 0, "branch"), "pushes 'negative'"),
    "a push by a text": (put("prompt", *BRANCH, "push", 0, "by"), "'prompt' is no number"),
    "a push by what may be missing": (
        lambda d: (
            d["arguments"].append({"kind": "numbers", "name": "more", "optional": True}),
            d["steps"][LOOP]["branches"][0]["push"][0].update(by="more"),
        ),
        "'more' is no number, or none in calls without it",
    ),
    "a branch without its feed": (put({}, *BRANCH, "feeds"), "'negative' feeds"),
    "a branch that feeds what there is not": (
        put("prompt_embeds", *BRANCH, "feeds", "elsewhere"),
        r"'negative' feeds \['elsewhere', 'encoder_hidden_states'\]: expected",
    ),
    "an input fed twice": (
        put({"encoder_hidden_states": "prompt_embeds"}, "steps", LOOP, "feeds"),
        "branch 'negative' feeds what the loop feeds",
    ),
    "a window beyond the loop": (put(2, *BRANCH, "during", "stop"), "a window with 2"),
    "a window before the loop": (put(-0.5, *BRANCH, "during", "start"), "a window with -0.5"),
    "a window of nothing": (put(0, *BRANCH, "during", "stop"), "from 0 to 0, which holds nothing"),
    "a window that ends before it begins": (
        put(0.75, *BRANCH, "during", "start"),
        "from 0.75 to 0.5, which holds nothing",
    ),
    "a window by a text": (put("prompt", *BRANCH, "during", "stop"), "a window by 'prompt'"),
    "seventeen branches": (
        lambda d: d["steps"][LOOP]["branches"].extend(
            {**d["steps"][LOOP]["branches"][0], "name": f"b{i}"} for i in range(16)
        ),
        "expected 1 to 16",
    ),
    "steps without end": (
        lambda d: d["arguments"][6].pop("most"),
        "must have a largest number of at most 10000",
    ),
    "more steps than plans have": (
        put(10_001, "arguments", 6, "most"),
        "must have a largest number of at most 10000",
    ),
    "a start from what there is not": (
        lambda d: (
            d["steps"][LOOP].update(part={"start": "strength"}),
            [d["steps"][LOOP]["state"].pop(name) for name in ("clean", "clean_when")],
        ),
        "a strength, a start, .* none to start from",
    ),
    "noise that is not drawn": (put("image_latents", *STATE, "noise"), "is not drawn"),
    "noise of two axes": (put([4, "height"], "steps", 8, "shape"), r"floats \[4, height\]"),
    "noise of many axes": (put([4] * 9, "steps", 8, "shape"), "bad shape"),
    "an output that there is not": (
        put({"unknown": "_image"}, "steps", 11, "gives"),
        r"'vae_decoder' gives \['image'\], not \['unknown'\]",
    ),
    "outputs that nobody takes": (put({}, "steps", 11, "gives"), "'vae_decoder' gives"),
    "tiles of two inputs": (put(True, "steps", 7, "tiles"), "expected one input and one output"),
    "zeros like nothing": (insert({"do": "zeros", "gives": "z"}), "expected another value"),
    "zeros of nothing": (insert({"do": "zeros", "gives": "z", "shape": [0]}), "expected another"),
    "zeros of many axes": (
        insert({"do": "zeros", "gives": "z", "shape": [1] * 9}),
        "or a shape: 1 to 7 sizes up to 67108864",
    ),
    "zeros without end": (
        insert({"do": "zeros", "gives": "z", "shape": [1 << 25, 1 << 25]}),
        "'z' is floats .*: more than 268435456 numbers",
    ),
    "noise of less than nothing": (
        insert({"do": "noise", "gives": "z", "shape": [4, "height-100", "width"]}),
        r"'z' is floats \[4, height-100, width\]: nothing at the least size",
    ),
    "a join of different forms": (
        insert({"do": "join", "gives": "z", "of": ["prompt_embeds", "_pixels"], "axis": 1}),
        r"values of \[2, 3\] axes",
    ),
    "a join of different widths": (
        insert(
            {"do": "zeros", "gives": "_narrow", "shape": [77, 31]},
            {"do": "join", "gives": "z", "of": ["prompt_embeds", "_narrow"], "axis": 1},
        ),
        "differ in more than axis 1",
    ),
    "a join of rows": (
        insert({"do": "join", "gives": "z", "of": ["prompt_embeds"], "axis": 0}),
        "along axis 0",
    ),
    "a join along a symbol": (
        insert({"do": "join", "gives": "z", "of": ["latents", "latents"], "axis": 2}),
        "must be numbers",
    ),
    "a cut beyond the size": (
        insert({"do": "cut", "gives": ["z"], "of": "prompt_embeds", "axis": 1, "sizes": [78]}),
        r"the sizes \[78\] of 77",
    ),
    "a cut of nothing": (
        insert({"do": "cut", "gives": ["z"], "of": "prompt_embeds", "axis": 1, "sizes": [0]}),
        r"the sizes \[0\] of 77",
    ),
    "a cut of fewer parts": (
        insert({"do": "cut", "gives": ["z"], "of": "prompt_embeds", "axis": 1, "sizes": [1, 2]}),
        "2 sizes for 1 values",
    ),
    "a cut along an axis that there is not": (
        insert({"do": "cut", "gives": ["z"], "of": "prompt_embeds", "axis": 3, "sizes": [1]}),
        "cannot be cut along axis 3",
    ),
    "a choice without a test": (
        insert(
            {"do": "choose", "gives": "z", "when": [], "then": "latents", "otherwise": "latents"}
        ),
        "no test",
    ),
    "a choice between different forms": (
        insert(
            {
                "do": "choose",
                "gives": "z",
                "when": [{"given": ["prompt"]}],
                "then": "latents",
                "otherwise": "_pixels",
            }
        ),
        "'latents' is floats",
    ),
    "a row of what may be missing": (
        lambda d: (
            d["arguments"].append({"kind": "numbers", "name": "more", "optional": True}),
            insert({"do": "numbers", "gives": "z", "of": ["more"]})(d),
        ),
        "'more' holds no numbers in calls without it",
    ),
    "latents that there are not": (
        put("nothing", "arguments", 2, "latents"),
        "image 'image': 'nothing' is no value that a call can give",
    ),
    "latents that are private": (
        put("_pixels", "arguments", 2, "latents"),
        "image 'image': '_pixels' is no value that a call can give",
    ),
    "latents of two axes": (
        put("prompt_embeds", "arguments", 2, "latents"),
        "image 'image': 'prompt_embeds' is floats .*: no latents",
    ),
    "texts that may all be left out": (
        put("", "arguments", 0, "default"),
        "no text that a call must give",
    ),
    "numbers of a text": (
        insert({"do": "numbers", "gives": "z", "of": ["prompt"]}),
        "'prompt' holds no numbers",
    ),
    "a row of no numbers": (insert({"do": "numbers", "gives": "z", "of": []}), "no numbers"),
    "an item of no list": (put(0, "steps", PIXELS, "item"), "item 0 of 'image', which holds no"),
    "a list of no images": (put(0, "arguments", 2, "count"), "a list of 0"),
    "a fill by an image": (put("image", "steps", PIXELS, "fill_where"), "'image' is no mask"),
    "a fill that is no colour": (
        lambda d: d["steps"][PIXELS].update(fill_where="mask_image", fill=2),
        "a fill from 0 to 1",
    ),
    "bins of one argument's name": (
        put({"argument": "prompt", "sizes": []}, "bins"),
        "bins: bad name 'prompt'",
    ),
    "bins too many": (
        put({"argument": "binning", "sizes": [[1.0, 8, 8]] * (MOST_BINS + 1)}, "bins"),
        "1025 bins for 2 sizes",
    ),
    "bins of no size": (
        put({"argument": "binning", "sizes": [[1.0, 0, 8]]}, "bins"),
        "bins: expected sides from 1",
    ),
    "no clean value": (lambda d: d["steps"][LOOP]["state"].pop("clean"), "none to start from"),
    "a clean value of another form": (put("_pixels", *STATE, "clean"), "'_pixels' is floats"),
    "a mask of another form": (put("_pixels", *STATE, "keep", "where"), "expected one channel"),
    "two states of one input": (
        put(
            [{"name": "b", "noise": "latents", "clean": "image_latents"}],
            "steps",
            LOOP,
            "other_states",
        ),
        r"several states with the inputs \['sample', 'sample'\]",
    ),
    "a state of another one's name": (
        put([{"name": "denoised", "noise": "latents"}], "steps", LOOP, "other_states"),
        "two things are named 'denoised'",
    ),
    "sixteen states beside the first": (
        put(
            [{"name": f"s{i}", "noise": "latents"} for i in range(16)],
            "steps",
            LOOP,
            "other_states",
        ),
        "17 states and 0 switches: too many",
    ),
    "a state that begins with no value": (
        put([{"name": "b", "noise": "nothing"}], "steps", LOOP, "other_states"),
        "no value 'nothing' before it",
    ),
    "a denoiser in its own place": (
        put([{"component": "denoiser", "during": {"count": "floor"}}], "steps", LOOP, "switches"),
        "no component 'denoiser' in the place of 'denoiser'",
    ),
    "another denoiser that predicts nothing": (
        put(
            [{"component": "vae_decoder", "during": {"count": "floor"}}], "steps", LOOP, "switches"
        ),
        "'vae_decoder' does not take and predict what 'denoiser' does",
    ),
    "a window before all timesteps": (
        put(
            [{"component": "denoiser", "during": {"count": "timestep", "start": -1}}],
            "steps",
            LOOP,
            "switches",
        ),
        "expected timesteps from 0",
    ),
    "a branch by timesteps": (
        put({"count": "timestep", "stop": 500}, *BRANCH, "during"),
        "a window of timesteps; expected one of evaluations",
    ),
    "a branch named guided": (put("guided", *BRANCH, "name"), "a branch 'guided'"),
    "a push in no step": (
        put({"count": "floor", "start": 0.5, "stop": 0.5}, *BRANCH, "push", 0, "during"),
        "a window from 0.5 to 0.5, which holds nothing",
    ),
    "a combination by nothing": (
        put({"component": "x", "feeds": {}}, "steps", LOOP, "combine"),
        "no component 'x'",
    ),
    "a combination of other inputs": (
        put({"component": "vae_decoder", "feeds": {"x": "guided"}}, "steps", LOOP, "combine"),
        r"'vae_decoder' takes \['latents'\]: fed \['x'\]",
    ),
    "a combination that gives no prediction": (
        put({"component": "vae_decoder", "feeds": {"latents": "guided"}}, "steps", LOOP, "combine"),
        "'vae_decoder' does not take and give 'prediction'",
    ),
    "a combination of no branch": (
        put(
            {"component": "vae_decoder", "feeds": {"latents": "sideways"}}, "steps", LOOP, "combine"
        ),
        "is fed 'sideways': expected one of",
    ),
    "plans of two kinds": (
        put({"fixed": "prior", "scheduler": "other"}, "steps", LOOP, "plan"),
        "the plans of 'prior', and an argument that names others",
    ),
    "no prediction": (put("noise", *STATE, "prediction"), "gives no 'noise'"),
    "no input for the sample": (put("x", *STATE, "input"), "has no input 'x'"),
    "a symbol with a bad default": (put(63, "symbols", "height", "default"), "multiples of 8"),
    "a unit of zero": (put(0, "symbols", "height", "unit"), "bad unit"),
    "a default below the least": (put(65, "symbols", "height", "least"), "a default below"),
    "a default above the most": (put(56, "symbols", "height", "most"), "from 1 to 56"),
    "a most that is no multiple": (put(65, "symbols", "height", "most"), "multiples of 8"),
    "a size of what is no image": (
        put({"image": "prompt"}, "symbols", "height", "of"),
        "'prompt' is no image of the call",
    ),
    "a size of a hundred images": (
        put({"image": "image", "times": 100}, "symbols", "height", "of"),
        "100 times an image",
    ),
    "sizes together with none": (put(["x"], "symbols", "height", "together"), "no sizes"),
    "a bad symbol": (
        lambda d: d["symbols"].update({"2*height": {**d["symbols"]["height"], "argument": "h"}}),
        "bad symbol '2\\*height'",
    ),
    "one size": (lambda d: d["symbols"].pop("width"), "expected two symbols or more"),
    "a size of one argument's name": (
        put("prompt", "symbols", "height", "argument"),
        "two things are named 'prompt'",
    ),
    "an argument of every call": (
        put("scheduler", "arguments", 0, "name"),
        "two things are named 'scheduler'",
    ),
    "a default that is no size": (put(["x"], "arguments", 4, "default"), "'x' is no size"),
    "a number without a default": (put([], "arguments", 4, "default"), "expected a default, a fa"),
    "a fallback to what may be missing": (
        lambda d: d["arguments"].extend(
            [
                {"kind": "numbers", "name": "one", "optional": True},
                {"kind": "numbers", "name": "two", "fallback": "one"},
            ]
        ),
        "its fallback 'one' is none before it",
    ),
    "a fallback that comes later": (
        put({"kind": "text", "name": "prompt", "fallback": "negative_prompt"}, "arguments", 0),
        "is no text before it",
    ),
    "two ways to be left out": (put(True, "arguments", 1, "optional"), "not several of them"),
    "defaults too few": (put(2, "arguments", 4, "count"), "1 defaults for 2"),
    "a thousand statements": (
        lambda d: d["steps"].extend([d["steps"][8]] * MOST_STATEMENTS),
        "269 statements",
    ),
}


def test_a_program_keeps_the_rules() -> None:
    assert list(problems(made(), GRAPHS)) == []
    types = types_of(made(), GRAPHS)
    assert str(types["_pixels"]) == "floats [3, 8*height, 8*width]"
    assert str(types["_image"].rows) == "images"


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_a_rule(name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(BundleError, match=f"program 'inpainting': .*{message}"):
        types_of(made(change), GRAPHS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("fly", "steps", 0, "do"), "Invalid value 'fly'"),
        (put(1, "steps", 0, "tokens"), "unknown field `tokens`"),
        (put("colour", "arguments", 0, "kind"), "Invalid value 'colour'"),
        (put("sometimes", *BRANCH, "during", "count"), "Invalid enum value 'sometimes'"),
        (put(None, "steps"), "Expected `array`"),
    ],
)
def test_documents_that_are_no_programs(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        made(change)


def test_a_program_is_the_same_as_its_document() -> None:
    program = made()
    assert decode(msgspec.json.encode(program)) == program
    assert "push positive away by guidance_scale - 1" in listing(program)
    assert "keep image_latents where _mask = 0, as noisy as the step" in listing(program)


GIVEN = ("prompt", "image", "mask_image")
CALLS: Mapping[str, tuple[tuple[str, ...], dict[str, float], list[str], list[str]]] = {
    # What is given, numbers, which noise is drawn, which components run before the loop.
    "usual": (GIVEN, {}, ["_image_noise", "latents", "_masked_noise"],
              ["text_encoder", "text_encoder", "vae_encoder"]),
    "no guidance": (GIVEN, {"guidance_scale": 1.0},
                    ["_image_noise", "latents", "_masked_noise"], ["text_encoder", "vae_encoder"]),
    "latents": ((*GIVEN, "latents"), {}, ["_image_noise", "_masked_noise"],
                ["text_encoder", "text_encoder", "vae_encoder"]),
    "image latents": (("prompt", "image_latents", "mask_image"), {"strength": 0.5},
                      ["latents", "_masked_noise"], ["text_encoder", "text_encoder"]),
    "encoded": ((*GIVEN[1:], "prompt_embeds"), {}, ["_image_noise", "latents", "_masked_noise"],
                ["text_encoder", "vae_encoder"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_needs(name: str) -> None:
    given, numbers, draws, runs = CALLS[name]
    program = made()
    demand = of_call(program, given, {**DEFAULTS, **numbers})
    steps = [msgspec.to_builtins(program.steps[place]) for place in demand.live]
    found = [s["gives"] for s in steps if s["do"] == "noise" and s["gives"] not in given]
    assert found == draws
    assert [s["component"] for s in steps if s["do"] == "run"][:-1] == runs


def test_what_no_call_could_need() -> None:
    """With the numbers open: a negative prompt may be given where guidance is off."""
    program = made()
    assert of_call(program, (*GIVEN, "negative_prompt"), None).needs("negative_prompt")
    assert not of_call(program, (*GIVEN, "prompt_embeds"), None).needs("prompt")
    alone = of_call(program, GIVEN, DEFAULTS, ["prompt_embeds"])
    assert [program.steps[place] for place in alone.live] == [*program.steps[:2]]


@pytest.mark.parametrize(
    ("wanted", "given", "numbers", "draws"),
    [
        ("prompt_embeds", (), {}, []),
        ("latents", (), {"strength": 0.5}, ["_image_noise", "latents"]),
        ("latents", ("image_latents",), {"strength": 0.5}, ["latents"]),
        ("image_latents", (), {"strength": 0.5}, ["_image_noise"]),
        ("denoised", (), {"strength": 0.5}, ["_image_noise", "latents", "_masked_noise"]),
    ],
)
def test_what_is_asked_for_is_drawn_after_what_the_whole_call_draws_before(
    wanted: str, given: tuple[str, ...], numbers: dict[str, float], draws: list[str]
) -> None:
    program = made()
    demand = of_call(program, (*GIVEN, *given), {**DEFAULTS, **numbers}, [wanted])
    steps = [msgspec.to_builtins(program.steps[place]) for place in demand.live]
    assert [step["gives"] for step in steps if step["do"] == "noise"] == draws


def test_the_work_grows_as_the_program_does() -> None:
    def chain(length: int) -> Program:
        def change(document: dict[str, Any]) -> None:
            zeros = [{"do": "zeros", "gives": "z0", "like": "latents"}]
            zeros += [
                {"do": "zeros", "gives": f"z{i}", "like": f"z{i - 1}"} for i in range(1, length)
            ]
            document["steps"][9:9] = zeros

        return made(change)

    small, large = chain(60), chain(120)
    once, twice = (steps_of(lambda p=p: list(problems(p, GRAPHS))) for p in (small, large))
    assert twice < 2.2 * once
    once, twice = (
        steps_of(lambda p=p, last=last: of_call(p, GIVEN, DEFAULTS, [last]))
        for p, last in ((small, "z59"), (large, "z119"))
    )
    assert twice < 2.2 * once


@pytest.mark.parametrize(
    ("text", "shown", "value"),
    [
        (3, "3", 3),
        ("height", "height", 5),
        ("8*height", "8*height", 40),
        ("4*height-3", "4*height-3", 17),
        ("height+1", "height+1", 6),
    ],
)
def test_dimensions(text: int | str, shown: str, value: int) -> None:
    dimension = parse(text)
    assert dimension is not None
    assert str(dimension) == shown
    assert dimension.value({"height": 5}) == value


@pytest.mark.parametrize("text", [0, -1, 1 << 27, "", "8*", "*height", "0*height", "Height", "a-0"])
def test_what_is_no_dimension(text: int | str) -> None:
    assert parse(text) is None


def test_a_graphs_symbol_from_a_programs() -> None:
    whole, eight = Dimension(0, 16, "height"), Dimension(0, 8, "h")
    assert whole.divided(eight) == Dimension(0, 2, "height")
    assert eight.substituted({"h": Dimension(0, 2, "height")}) == whole
    assert Dimension(17, 0).divided(Dimension(-3, 4, "frames")) == Dimension(5)
    assert Dimension(16, 0).divided(Dimension(-3, 4, "frames")) is None
    assert Dimension(0, 12, "height").divided(eight) is None
