"""Manifests whose programs, components or tokenizers break a rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.hostile.bad_bundle import MANIFEST, BadBundle, case

Program = dict[str, Any]


def _edit(bad: BadBundle, change: Callable[[Program], object]) -> None:
    """Change the first program."""
    bad.edit(lambda document: change(document["programs"][0]))


def _first(program: Program, do: str) -> dict[str, Any]:
    """Return the first statement of a kind."""
    found: dict[str, Any] = next(step for step in program["steps"] if step["do"] == do)
    return found


def _shorter(step: dict[str, Any], most: int) -> None:
    """Let texts be as long as they are, up to a number of ids."""
    if step["do"] == "tokens":
        step["up_to"] = most


def _before_the_loop(bad: BadBundle, *statements: dict[str, Any]) -> None:
    """Add statements before the loop of the first program."""

    def change(program: Program) -> None:
        place = program["steps"].index(_first(program, "loop"))
        program["steps"][place:place] = statements

    _edit(bad, change)


def _branch(bad: BadBundle, place: int, **members: Any) -> None:
    """Change a branch of the loop; of this bundle the first one pushes, the last one is the
    base."""
    _edit(bad, lambda program: _first(program, "loop")["branches"][place].update(members))


# Programs as a whole


@case("manifest", "0 programs")
def programs_none(bad: BadBundle) -> None:
    """There is no program, and nothing that a call could do."""
    bad.set("programs", [])


@case("manifest", "17 programs")
def programs_seventeen(bad: BadBundle) -> None:
    """There are seventeen programs."""

    def change(document: Any) -> None:
        program = document["programs"][0]
        document["programs"] = [{**program, "name": f"p{i}"} for i in range(17)]

    bad.edit(change)


@case("manifest", "two programs are named")
def programs_of_one_name(bad: BadBundle) -> None:
    """Two programs have the same name."""
    bad.edit(lambda document: document["programs"].append(document["programs"][0]))


@case("manifest", "two programs take the same images")
def programs_for_the_same_images(bad: BadBundle) -> None:
    """Two programs take the same images, so that no call says which one it means."""
    bad.edit(
        lambda document: document["programs"].append({**document["programs"][0], "name": "other"})
    )


@case("manifest", "no program uses 'idle'")
def component_that_nothing_uses(bad: BadBundle) -> None:
    """A component is there that no program runs."""

    def change(document: Any) -> None:
        document["components"].append({**document["components"][0], "name": "idle"})
        for build in document["builds"]:
            build["artifacts"]["idle"] = build["artifacts"]["text_encoder"]

    bad.edit(change)


@case("manifest", "positions")
def positions_that_do_not_fit(bad: BadBundle) -> None:
    """The positions of an output have more numbers than the output."""
    bad.set("components.0.positions.encoder_hidden_states.input_ids", 33)


@case("manifest", "positions")
def positions_of_no_input(bad: BadBundle) -> None:
    """The positions of an output are of an input that the component does not have."""
    bad.set("components.0.positions.encoder_hidden_states", {"nothing": 32})


@case("manifest", "1000 statements")
def program_of_a_thousand_statements(bad: BadBundle) -> None:
    """A program has a thousand statements."""

    def change(program: Program) -> None:
        noise = _first(program, "noise")
        more = [{**noise, "gives": f"n{i}"} for i in range(1000 - len(program["steps"]))]
        program["steps"] = [*more, *program["steps"]]

    _edit(bad, change)


# Statements and values


@case("manifest", "'fly'")
def statement_of_no_kind(bad: BadBundle) -> None:
    """A statement does what no reader knows."""
    _edit(bad, lambda program: program["steps"].insert(0, {"do": "fly", "gives": "wings"}))


@case("manifest", "surprise")
def statement_with_an_unknown_member(bad: BadBundle) -> None:
    """A statement has a member that statements of its kind do not have."""
    _edit(bad, lambda program: _first(program, "noise").update(surprise=1))


@case("manifest", "do")
def statement_without_a_kind(bad: BadBundle) -> None:
    """A statement does not say what it does."""
    _edit(bad, lambda program: program["steps"][0].pop("do"))


@case("manifest", "no value 'denoised' before it")
def value_in_a_cycle(bad: BadBundle) -> None:
    """A value that feeds a loop is made of what the loop gives."""
    _before_the_loop(bad, {"do": "zeros", "gives": "around", "like": "denoised"})
    _branch(bad, 0, feeds={"encoder_hidden_states": "around"})


@case("manifest", "before it")
def value_used_before_it_is_made(bad: BadBundle) -> None:
    """The first two statements stand in the wrong order."""

    def change(program: Program) -> None:
        first, second, *others = program["steps"]
        program["steps"] = [second, first, *others]

    _edit(bad, change)


@case("manifest", "two things are named 'latents'")
def value_given_twice(bad: BadBundle) -> None:
    """A statement gives a name that an earlier one gave."""
    _edit(
        bad,
        lambda program: program["steps"].insert(0, dict(_first(program, "noise"))),
    )


@case("manifest", "two things are named 'prompt'")
def value_named_as_an_argument(bad: BadBundle) -> None:
    """A statement gives the name of an argument."""
    _before_the_loop(bad, {"do": "zeros", "gives": "prompt", "shape": [1]})


@case("manifest", "bad name")
def value_of_no_name(bad: BadBundle) -> None:
    """A value's name is no name."""
    _before_the_loop(bad, {"do": "zeros", "gives": "__import__('os')", "shape": [1]})


@case("manifest", "nothing uses '_idle'")
def value_that_nothing_uses(bad: BadBundle) -> None:
    """A private value is made for nothing."""
    _before_the_loop(bad, {"do": "zeros", "gives": "_idle", "shape": [1]})


@case("manifest", "expected one '{}'")
def tokens_of_no_text(bad: BadBundle) -> None:
    """Texts are read in a template that has no place for them."""
    _edit(bad, lambda program: _first(program, "tokens").update(template="a drawing"))


@case("manifest", "expected one '{}', and at most 4096")
def tokens_of_a_long_template(bad: BadBundle) -> None:
    """Texts are read in a template of a million characters."""
    _edit(bad, lambda program: _first(program, "tokens").update(template="{}" + "a" * 10**6))


@case("manifest", "of one length only")
def tokens_of_any_length_for_one(bad: BadBundle) -> None:
    """Texts are as long as they are, and the encoder takes them in one length."""
    _edit(bad, lambda program: [_shorter(step, 77) for step in program["steps"]])


@case("manifest", "ids up to 78, of a tokenizer for 77")
def tokens_beyond_the_tokenizer(bad: BadBundle) -> None:
    """Texts may be longer than their tokenizer makes them."""
    bad.set("components.0.inputs.input_ids.shape", ["batch", "tokens"])
    bad.set("components.0.outputs.encoder_hidden_states.shape", ["batch", "tokens", 32])
    _edit(bad, lambda program: [_shorter(step, 78) for step in program["steps"]])


@case("manifest", "texts of up to 0 ids")
def tokens_of_nothing(bad: BadBundle) -> None:
    """Texts have no ids at all."""
    _edit(bad, lambda program: [_shorter(step, 0) for step in program["steps"]])


@case("manifest", "values of [2, 3] axes")
def join_of_different_forms(bad: BadBundle) -> None:
    """Encoded texts are joined with noise."""
    of = ["prompt_embeds", "latents"]
    _before_the_loop(bad, {"do": "join", "gives": "joined", "of": of, "axis": 1})


@case("manifest", "the sizes [78] of 77")
def cut_beyond_the_size(bad: BadBundle) -> None:
    """A value of 77 positions is cut at the 78th."""
    cut = {"do": "cut", "gives": ["part"], "of": "prompt_embeds", "axis": 1, "sizes": [78]}
    _before_the_loop(bad, cut)


@case("manifest", "expected another value, or a shape")
def zeros_of_more_than_any_memory(bad: BadBundle) -> None:
    """A value has 2^60 zeros."""
    _before_the_loop(bad, {"do": "zeros", "gives": "much", "shape": [1 << 60]})


@case("manifest", "more than 268435456 numbers")
def zeros_overflow(bad: BadBundle) -> None:
    """A value has 2^75 zeros, few along each axis."""
    _before_the_loop(bad, {"do": "zeros", "gives": "much", "shape": [1 << 25] * 3})


@case("manifest", "is not what components of one input make of what the loop gives")
def emit_of_latents(bad: BadBundle) -> None:
    """The latents are emitted as images."""
    _edit(bad, lambda program: _first(program, "emit").update(of="denoised"))


@case("manifest", "no images")
def emit_of_encoded_texts(bad: BadBundle) -> None:
    """Encoded texts are emitted as images."""
    _edit(bad, lambda program: _first(program, "emit").update(of="prompt_embeds"))


@case("manifest", "no frames")
def emit_of_frames_without_their_axis(bad: BadBundle) -> None:
    """Images are emitted as the frames of a video."""
    _edit(bad, lambda program: _first(program, "emit").update(kind="frames"))


@case("manifest", "in a second")
def emit_of_images_at_a_rate(bad: BadBundle) -> None:
    """So many images are to be shown in a second as no video has, and they are no frames."""
    _edit(bad, lambda program: _first(program, "emit").update(rate=1e300))


@case("manifest", "0 statements 'emit images'")
def emit_of_nothing(bad: BadBundle) -> None:
    """A program emits nothing."""
    _edit(bad, lambda program: program["steps"].pop())


def _emit(bad: BadBundle, *names: str) -> None:
    """Emit values as arrays, besides the images."""
    emits = [{"do": "emit", "kind": "arrays", "of": name} for name in names]
    _edit(bad, lambda program: program["steps"].extend(emits))


@case("manifest", "2 statements 'emit images'")
def emit_of_images_twice(bad: BadBundle) -> None:
    """A program emits its images twice."""
    _edit(bad, lambda program: program["steps"].append(dict(program["steps"][-1])))


@case("manifest", "'_image' is private")
def emit_of_a_private_array(bad: BadBundle) -> None:
    """An array has a name that no caller may know."""
    _emit(bad, "_image")


@case("manifest", "'prompt_embeds' is not what a component gives by itself")
def emit_of_a_group(bad: BadBundle) -> None:
    """Encoded texts are emitted, which a call may also give."""
    _emit(bad, "prompt_embeds")


@case("manifest", "'latents' is not what a component gives")
def emit_of_noise(bad: BadBundle) -> None:
    """The noise that a call begins with is emitted, which a call may also give."""
    _emit(bad, "latents")


@case("manifest", "an array is emitted twice")
def emit_of_an_array_twice(bad: BadBundle) -> None:
    """An array is emitted twice."""
    _emit(bad, "prompt_embeds", "prompt_embeds")


@case("manifest", "no value 'flags' before it")
def emit_of_an_array_that_there_is_not(bad: BadBundle) -> None:
    """An array is emitted that nothing gives."""
    _emit(bad, "flags")


@case("manifest", "is not what components of one input make of what the loop gives")
def emit_of_images_of_an_encoder(bad: BadBundle) -> None:
    """Images are decoded of noise that no loop has denoised."""
    _edit(bad, lambda program: program["steps"][-2].update(feeds={"latents": "latents"}))


@case("manifest", "nothing at the least size")
def noise_of_less_than_nothing(bad: BadBundle) -> None:
    """The height of a draw is that of the image less a hundred."""
    shape = [4, "height-100", "width"]
    _before_the_loop(bad, {"do": "noise", "gives": "less", "shape": shape})


@case("manifest", "numbers")
def noise_overflow(bad: BadBundle) -> None:
    """A draw has some 10^10 numbers for an image of the default size."""
    shape = [4, "9999*height", "9999*width"]
    _before_the_loop(bad, {"do": "noise", "gives": "much", "shape": shape, "always": True})


@case("manifest", "numbers")
def joins_overflow(bad: BadBundle) -> None:
    """Fifty joins make each value twice as long as the one before."""
    joins = [
        {"do": "join", "gives": f"z{i + 1}", "of": [f"z{i}"] * 2, "axis": 1} for i in range(50)
    ]
    _before_the_loop(bad, {"do": "zeros", "gives": "z0", "shape": [1]}, *joins)


# Loops


@case("manifest", "expected one branch that always runs")
def loop_without_a_base_branch(bad: BadBundle) -> None:
    """Each branch of a loop pushes another one."""
    _branch(bad, -1, push=[{"branch": "negative", "by": "guidance_scale"}])


@case("manifest", "expected one branch that always runs")
def loop_with_a_base_branch_at_times(bad: BadBundle) -> None:
    """The base of a loop runs only where guidance is strong."""
    _branch(bad, -1, when=[{"argument": "guidance_scale", "above": 1}])


@case("manifest", "17 branches")
def loop_of_seventeen_branches(bad: BadBundle) -> None:
    """A loop has seventeen branches."""

    def change(program: Program) -> None:
        branches = _first(program, "loop")["branches"]
        branches[:0] = [{**branches[0], "name": f"b{i}"} for i in range(17 - len(branches))]

    _edit(bad, change)


@case("manifest", "0 statements 'loop'")
def program_without_a_loop(bad: BadBundle) -> None:
    """A program makes images of what nothing has denoised."""

    def change(program: Program) -> None:
        loop = _first(program, "loop")
        program["steps"].remove(loop)
        _first(program, "noise")["gives"] = loop["state"]["name"]

    _edit(bad, change)


@case("manifest", "9 statements 'loop'")
def program_of_nine_loops(bad: BadBundle) -> None:
    """A program has nine loops, each of which may have ten thousand steps."""

    def change(program: Program) -> None:
        loop = _first(program, "loop")
        for number in range(8):
            own = {**loop, "state": {**loop["state"], "name": f"d{number}"}}
            program["steps"].insert(program["steps"].index(loop), own)

    _edit(bad, change)


@case("manifest", "follows the schedule 'nowhere', which is not among")
def loop_of_plans_that_are_missing(bad: BadBundle) -> None:
    """A loop follows plans in every call that the bundle does not have."""
    _edit(bad, lambda program: _first(program, "loop")["plan"].update(fixed="nowhere"))


@case("manifest", "is not among the schedules")
def default_plans_that_calls_may_not_choose(bad: BadBundle) -> None:
    """The default scheduler is one that a loop follows in every call."""

    def change(document: Any) -> None:
        plan = _first(document["programs"][0], "loop")["plan"]
        plan["fixed"] = document["defaults"]["scheduler"]

    bad.edit(change)


@case("manifest", "17 states and 0 switches")
def loop_of_seventeen_states(bad: BadBundle) -> None:
    """A loop has seventeen states."""

    def change(program: Program) -> None:
        loop = _first(program, "loop")
        own = loop["state"]
        loop["other_states"] = [{**own, "name": f"s{i}"} for i in range(16)]

    _edit(bad, change)


@case("manifest", "several states with the inputs")
def two_states_of_one_input(bad: BadBundle) -> None:
    """Two states enter the denoiser by the same input."""

    def change(program: Program) -> None:
        loop = _first(program, "loop")
        loop["other_states"] = [{**loop["state"], "name": "another"}]

    _edit(bad, change)


@case("manifest", "no component 'nobody' in the place of")
def denoiser_that_is_missing_at_times(bad: BadBundle) -> None:
    """In some steps a component is to run that there is not."""
    switch = {"component": "nobody", "during": {"count": "timestep", "stop": 500}}
    _edit(bad, lambda program: _first(program, "loop").update(switches=[switch]))


@case("manifest", "does not take and predict what")
def denoiser_of_another_kind_at_times(bad: BadBundle) -> None:
    """In some steps the decoder is to run in the denoiser's place."""
    switch = {"component": "vae_decoder", "during": {"count": "timestep", "stop": 500}}
    _edit(bad, lambda program: _first(program, "loop").update(switches=[switch]))


@case("manifest", "expected timesteps from 0")
def window_before_all_timesteps(bad: BadBundle) -> None:
    """A push counts from before the first timestep."""
    window = {"count": "timestep", "start": -1, "stop": 5}
    push = {"branch": "positive", "by": "guidance_scale", "during": window}
    _branch(bad, 0, push=[push])


@case("manifest", "does not take and give 'prediction'")
def combination_by_the_decoder(bad: BadBundle) -> None:
    """A component that makes images combines what the branches predict."""
    combine = {"component": "vae_decoder", "feeds": {"latents": "guided"}}
    _edit(bad, lambda program: _first(program, "loop").update(combine=combine))


@case("manifest", "is fed 'sideways'")
def combination_of_no_branch(bad: BadBundle) -> None:
    """A component combines what a branch predicts that there is not."""
    combine = {"component": "vae_decoder", "feeds": {"latents": "sideways"}}
    _edit(bad, lambda program: _first(program, "loop").update(combine=combine))


@case("manifest", "which holds nothing")
def window_of_nothing(bad: BadBundle) -> None:
    """A branch runs in no step."""
    _branch(bad, 0, during={"count": "floor", "stop": 0})


@case("manifest", "expected fractions")
def window_beyond_the_loop(bad: BadBundle) -> None:
    """A branch runs until after the last step."""
    _branch(bad, 0, during={"count": "floor", "stop": 1.5})


@case("manifest", "expected fractions")
def window_before_the_loop(bad: BadBundle) -> None:
    """A branch runs from before the first step."""
    _branch(bad, 0, during={"count": "floor", "start": -1})


@case("manifest", "a test of 'guidance_scale'")
def test_of_a_number_that_may_be_missing(bad: BadBundle) -> None:
    """A branch is tested by a number that a call may leave out, and that has no default."""

    def change(program: Program) -> None:
        (scale,) = (each for each in program["arguments"] if each["name"] == "guidance_scale")
        del scale["default"]
        scale["optional"] = True

    _edit(bad, change)


@case("manifest", "largest number of at most 10000")
def steps_beyond_what_readers_allow(bad: BadBundle) -> None:
    """A call may have a thousand million steps."""

    def change(program: Program) -> None:
        for argument in program["arguments"]:
            if argument["name"] == "num_inference_steps":
                argument["most"] = 10**9

    _edit(bad, change)


@case("manifest", "largest number of at most 10000")
def steps_without_end(bad: BadBundle) -> None:
    """A call may have any number of steps."""

    def change(program: Program) -> None:
        for argument in program["arguments"]:
            if argument["name"] == "num_inference_steps":
                del argument["most"]

    _edit(bad, change)


@case("manifest", "is not drawn")
def noise_that_is_none(bad: BadBundle) -> None:
    """A loop begins with zeros in the place of noise."""
    _before_the_loop(bad, {"do": "zeros", "gives": "none", "like": "latents"})
    _edit(bad, lambda program: _first(program, "loop")["state"].update(noise="none"))


# Arguments and sizes


@case("manifest", "is private")
def argument_that_is_private(bad: BadBundle) -> None:
    """An argument has a name that no call can give."""

    def change(document: Any) -> None:
        text = json.dumps(document["programs"][0])
        document["programs"][0] = json.loads(text.replace('"prompt"', '"_prompt"'))

    bad.edit(change)


@case("manifest", "nothing uses the argument 'idle'")
def argument_that_nothing_uses(bad: BadBundle) -> None:
    """An argument changes nothing."""
    idle = {"kind": "text", "name": "idle", "optional": True}
    _edit(bad, lambda program: program["arguments"].append(idle))


@case("manifest", "'colour'")
def argument_of_no_kind(bad: BadBundle) -> None:
    """An argument is of a kind that no reader knows."""
    _edit(bad, lambda program: program["arguments"].append({"kind": "colour", "name": "c"}))


@case("manifest", "no argument 'nothing'")
def tokens_of_no_argument(bad: BadBundle) -> None:
    """Token ids are of an argument that there is not."""
    _edit(bad, lambda program: _first(program, "tokens").update(text="nothing"))


@case("manifest", "expected multiples of 3")
def symbol_whose_default_is_no_multiple(bad: BadBundle) -> None:
    """The default of a size is none of the sizes that a call may have."""
    _edit(bad, lambda program: program["symbols"]["height"].update(multiple=3))


@case("manifest", "default, multiple and least from 1 to")
def symbol_whose_default_is_above_the_most(bad: BadBundle) -> None:
    """The default of a size is larger than a call's may be."""
    _edit(bad, lambda program: program["symbols"]["height"].update(most=8))


@case("manifest", "an offset of")
def symbol_whose_offset_leaves_nothing(bad: BadBundle) -> None:
    """The least height is less than a pixel."""
    _edit(bad, lambda program: program["symbols"]["height"].update(offset=-(1 << 62)))


@case("manifest", "the nearest size")
def symbol_of_which_nothing_is_rounded(bad: BadBundle) -> None:
    """The nearest height is to be taken, and none is rounded."""
    _edit(bad, lambda program: program["symbols"]["height"].update(nearest=True))


@case("manifest", "bad symbol")
def symbol_that_is_a_product(bad: BadBundle) -> None:
    """A symbol is named as another one's double."""

    def change(program: Program) -> None:
        symbol = {**program["symbols"]["height"], "argument": "twice"}
        program["symbols"]["2*height"] = symbol

    _edit(bad, change)


@case("manifest", "2000 bins")
def bins_too_many(bad: BadBundle) -> None:
    """There are two thousand sizes to choose from."""
    sizes = [[1 + place / 2000, 16, 16] for place in range(2000)]
    bins = {"argument": "use_resolution_binning", "sizes": sizes}
    _edit(bad, lambda program: program.update(bins=bins))


# Tokenizers, as the manifest describes them


@case("manifest", "no tokenizer 'nobody'")
def tokens_by_no_tokenizer(bad: BadBundle) -> None:
    """Token ids are made by a tokenizer that there is not."""
    _edit(bad, lambda program: _first(program, "tokens").update(tokenizer="nobody"))


@case("manifest", "its tokenizer gives 76 ids")
def tokens_too_few(bad: BadBundle) -> None:
    """A tokenizer gives fewer ids than the encoder takes."""
    bad.set("tokenizers.0.max_length", 76)


@case("manifest", "two tokenizers are named")
def tokenizers_of_one_name(bad: BadBundle) -> None:
    """Two tokenizers have the same name."""
    bad.edit(lambda document: document["tokenizers"].append(document["tokenizers"][0]))


@case("manifest", "ids before and after")
def tokenizer_frame_longer_than_a_row(bad: BadBundle) -> None:
    """More ids stand before a text than a row has."""
    bad.set("tokenizers.0.before", [194] * 78)


@case("manifest", "ids before and after")
def tokenizer_frame_beyond_the_vocabulary(bad: BadBundle) -> None:
    """The id after a text is no row of the encoder's table."""
    bad.set("tokenizers.0.after", [196])


@case("manifest", "ids before and after")
def tokenizer_frame_below_zero(bad: BadBundle) -> None:
    """The id that fills a row up is negative."""
    bad.set("tokenizers.0.pad", -1)


@case("tokenizer", "frames or fills a text otherwise than the manifest says")
def tokenizer_that_frames_otherwise(bad: BadBundle) -> None:
    """The manifest has another id before each text than the tokenizer puts there."""
    bad.set("tokenizers.0.before", [195])


@case("tokenizer", "frames or fills a text otherwise than the manifest says")
def tokenizer_that_fills_otherwise(bad: BadBundle) -> None:
    """The tokenizer fills a row with another id than the manifest says."""
    path = bad.tokenizer()
    document = json.loads(bad.read(path))
    document["padding"]["pad_id"] = 0
    bad.put(path, json.dumps(document).encode())


# The document around them


@case("manifest", "optional")
def optional_sections_as_a_list(bad: BadBundle) -> None:
    """The sections that readers may leave alone are a list, without names."""
    bad.set("optional", [1])


@case("manifest", "manifest.json")
def optional_section_without_bottom(bad: BadBundle) -> None:
    """A section that readers may leave alone is 100,000 objects deep."""
    bad.set("optional", {"deep": 12345})
    deep = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000
    bad.put(MANIFEST, bad.read(MANIFEST).replace(b"12345", deep, 1))


# Numbers for each prompt, and numbers in the place of arguments


def _with_argument(bad: BadBundle, of: list[Any], **argument: Any) -> None:
    """Add an argument ``label`` of a row of numbers, which nothing but a test of the call uses."""
    _edit(bad, lambda program: program["arguments"].append({"kind": "numbers", **argument}))
    _before_the_loop(bad, {"do": "numbers", "gives": "labels", "of": of})


@case("manifest", "for each prompt: expected one")
def rows_of_two_numbers(bad: BadBundle) -> None:
    """There are two numbers for each prompt, and nobody could tell which is whose."""
    _with_argument(bad, ["label"], name="label", rows=True, count=2)


@case("manifest", "for each prompt: expected one")
def rows_that_may_be_missing(bad: BadBundle) -> None:
    """A number for each prompt may be left out, and a row of numbers needs it."""
    _with_argument(bad, ["label"], name="label", rows=True, optional=True)


@case("manifest", "a default that is a size")
def rows_that_are_sizes(bad: BadBundle) -> None:
    """A number for each prompt is the height, which is that of all."""
    _with_argument(bad, ["label"], name="label", rows=True, default=["height"])


@case("manifest", "'label' is no number")
def rows_that_rescale(bad: BadBundle) -> None:
    """The whole call is rescaled by a number that each prompt has of its own."""
    _with_argument(bad, ["label"], name="label", rows=True)
    _edit(bad, lambda program: _first(program, "loop").update(rescale="label"))


@case("manifest", "the number 1e+10")
def number_beyond_all(bad: BadBundle) -> None:
    """A row of numbers holds one that is larger than any may be."""
    _before_the_loop(bad, {"do": "numbers", "gives": "labels", "of": [1e10]})


# Images that are made smaller in steps


@case("manifest", "a reducing gap of 0.5")
def gap_that_enlarges(bad: BadBundle) -> None:
    """An image is made larger before it is made smaller."""
    pixels = {"do": "pixels", "gives": "small", "of": "image", "shape": [3, "height", "width"]}

    def change(program: Program) -> None:
        program["arguments"].append({"kind": "image", "name": "image"})
        program["steps"].insert(0, {**pixels, "reducing_gap": 0.5})

    _edit(bad, change)


# A learned variance


@case("manifest", "gives no 'variance' like 'prediction'")
def variance_that_nothing_gives(bad: BadBundle) -> None:
    """The state's variance is an output that the denoiser does not have."""
    _edit(bad, lambda program: _first(program, "loop")["state"].update(variance="variance"))


@case("manifest", "gives no 'prediction' like 'prediction'")
def variance_that_is_the_prediction(bad: BadBundle) -> None:
    """The state's variance is what the denoiser predicts."""
    _edit(bad, lambda program: _first(program, "loop")["state"].update(variance="prediction"))


# Views of the state


def _views(bad: BadBundle, **members: Any) -> None:
    """Let the denoiser look at views of sides that are multiples of 4."""

    def change(program: Program) -> None:
        for symbol in program["symbols"].values():
            symbol["multiple"] = 4
        _first(program, "loop")["views"] = members

    _edit(bad, change)


@case("manifest", "views of 0 every 0")
def views_of_nothing(bad: BadBundle) -> None:
    """A view is nothing, and the next one is where it is."""
    _views(bad, size=0, stride=0)


@case("manifest", "views of 8 every 0")
def views_that_do_not_move(bad: BadBundle) -> None:
    """The next view is where the one before is, without end."""
    _views(bad, size=8, stride=0)


@case("manifest", "views of 4 every 8")
def views_with_gaps(bad: BadBundle) -> None:
    """Between one view and the next something is left out."""
    _views(bad, size=4, stride=8)


@case("manifest", "views every 8 of")
def views_that_leave_something_out(bad: BadBundle) -> None:
    """Sides are multiples of 4, and views of 8 every 8 leave out the last 4 of 12."""
    _views(bad, size=8, stride=8)


@case("manifest", "views of 10000000: expected at most 4096")
def views_beyond_all(bad: BadBundle) -> None:
    """A view is ten million latents wide."""
    _views(bad, size=10**7, stride=4)


@case("manifest", "expected different symbols")
def views_of_one_symbol(bad: BadBundle) -> None:
    """The denoiser takes views as wide as they are high, and those at the end are not."""
    _views(bad, size=8, stride=4)

    def change(document: Any) -> None:
        (denoiser,) = (each for each in document["components"] if each["role"] == "denoiser")
        for spec in (denoiser["inputs"]["sample"], denoiser["outputs"]["prediction"]):
            spec["shape"][3] = spec["shape"][2]

    bad.edit(change)
