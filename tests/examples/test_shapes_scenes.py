"""Scenes, captions, drawing and the judge of the shapes example."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from examples.shapes import data
from latentc.benchmarks.shapes import captions, draw, judge, scenes
from latentc.benchmarks.shapes.scenes import Prompt, Spec, Thing


def drawn(spec: Spec, rng: np.random.Generator) -> Image.Image:
    return draw.render(scenes.place_scene(spec, rng))


def other(value: str, options: tuple[str, ...], rng: np.random.Generator) -> str:
    rest = [option for option in options if option != value]
    return rest[int(rng.integers(len(rest)))]


def one_word_wrong(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """The prompt with one stated attribute changed."""
    which = int(rng.integers(len(prompt.things)))
    thing = prompt.things[which]
    changed = [
        dataclasses.replace(thing, colour=other(thing.colour, scenes.COLOURS, rng)),
        dataclasses.replace(thing, shape=other(thing.shape, scenes.SHAPES, rng)),
    ]
    if thing.size:
        changed.append(dataclasses.replace(thing, size=other(thing.size, scenes.SIZES, rng)))
    if thing.place:
        changed.append(dataclasses.replace(thing, place=other(thing.place, scenes.PLACES, rng)))
    things = list(prompt.things)
    things[which] = changed[int(rng.integers(len(changed)))]
    return dataclasses.replace(prompt, things=tuple(things))


@pytest.mark.parametrize("objects", [1, 2])
def test_judge_agrees_with_true_images(objects: int) -> None:
    rng = np.random.default_rng(11)
    right = 0
    for _ in range(300):
        spec = scenes.random_spec(rng, objects)
        right += judge.agrees(drawn(spec, rng), captions.caption(spec, rng))
    assert right >= 297


@pytest.mark.parametrize("objects", [1, 2])
def test_judge_rejects_one_wrong_attribute(objects: int) -> None:
    rng = np.random.default_rng(12)
    for _ in range(200):
        spec = scenes.random_spec(rng, objects)
        prompt = one_word_wrong(captions.caption(spec, rng), rng)
        if objects == 2 and (prompt.things[0] == prompt.things[1] or prompt.relation is None):
            continue
        assert judge.reasons(drawn(spec, rng), prompt), prompt.text


def test_judge_rejects_wrong_relations() -> None:
    rng = np.random.default_rng(13)
    for _ in range(100):
        spec = scenes.random_spec(rng, 2)
        assert spec.relation is not None
        image = drawn(spec, rng)
        for relation in scenes.RELATIONS:
            prompt = Prompt("", spec.things, relation)
            assert judge.agrees(image, prompt) == (relation == spec.relation)


def test_judge_rejects_unrelated_images_and_counts() -> None:
    rng = np.random.default_rng(14)
    blank = Image.new("RGB", (64, 64), draw.BACKGROUND)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for objects in (1, 2):
        spec = scenes.random_spec(rng, objects)
        prompt = captions.caption(spec, rng)
        wrong_count = drawn(scenes.random_spec(rng, 3 - objects), rng)
        for image in (blank, noise, wrong_count):
            assert judge.reasons(image, prompt)
    assert judge.look(blank) == []


def test_judge_reports_what_it_sees() -> None:
    spec = Spec((Thing("purple", "star", "large", "bottom left"),))
    (seen,) = judge.look(drawn(spec, np.random.default_rng(0)))
    assert (seen.colour, seen.shape, seen.size, seen.place) == (
        "purple",
        "star",
        "large",
        "bottom left",
    )
    assert abs(seen.diameter - 34) < 2
    with pytest.raises(ValueError, match="64 by 64"):
        judge.look(Image.new("RGB", (32, 32)))


def test_captions_read_back() -> None:
    rng = np.random.default_rng(15)
    texts = set()
    for _ in range(1000):
        prompt = captions.caption(scenes.random_spec(rng), rng)
        assert captions.read(prompt.text) == prompt
        texts.add(prompt.text)
    assert len(texts) > 800  # worded in many ways
    with pytest.raises(ValueError, match="one or two shapes"):
        captions.read("a cat on a mat")
    with pytest.raises(ValueError, match="without a colour"):
        captions.read("a large circle")


def test_held_out_images_never_reach_training() -> None:
    assert 0.1 < np.mean([scenes.is_held_out(spec) for spec in scenes.one_thing_specs()]) < 0.25
    trained = {data.spec_at(seed, index)[0] for seed in (1, 2) for index in range(2000)}
    assert not any(scenes.is_held_out(spec) for spec in trained)
    words = {
        captions.caption(spec, np.random.default_rng(i)).text for i, spec in enumerate(trained)
    }
    for objects in (1, 2):
        prompts = captions.held_out_prompts(100, objects)
        assert len({prompt.text for prompt in prompts}) == 100
        assert all(len(prompt.things) == objects for prompt in prompts)
        assert not {prompt.text for prompt in prompts} & words


def test_every_size_of_a_held_out_pair_is_held_out() -> None:
    rng = np.random.default_rng(16)
    for _ in range(200):
        spec = scenes.random_spec(rng, 2)
        resized = dataclasses.replace(
            spec, things=tuple(dataclasses.replace(t, size="small") for t in spec.things)
        )
        assert scenes.is_held_out(spec) == scenes.is_held_out(resized)


def test_held_out_prompts_are_repeatable() -> None:
    assert captions.held_out_prompts(20, seed=3) == captions.held_out_prompts(20, seed=3)
    assert captions.held_out_prompts(20, seed=3) != captions.held_out_prompts(20, seed=4)
    assert {len(prompt.things) for prompt in captions.held_out_prompts(4)} == {1, 2}


def test_images_are_repeatable_and_stay_inside() -> None:
    assert np.array_equal(data.image_at(1, 5), data.image_at(1, 5))
    border = [
        image[edge]
        for image in (data.image_at(1, index) for index in range(100))
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1])
    ]
    assert (np.stack(border) == np.asarray(draw.BACKGROUND)).all()
