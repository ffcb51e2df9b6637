"""Captions: wording a spec in many ways, and reading a caption back.

An unstated size is medium and an unstated place is the centre, so short captions such as
"a red circle" have one clear meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from latentc.benchmarks.shapes.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    Prompt,
    Spec,
    Thing,
    inverse,
    is_held_out,
    random_spec,
)

OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ")
ENDINGS = ("", "", "", "", "", "", ".", " on a plain background", " on a white background")
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
}
PLACE_WORDS = {
    "centre": ("in the centre", "in the center", "in the middle"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
BESIDE_WORDS = ("and", "and", "next to", "beside")

_PLURAL = {**{shape + "s": shape for shape in SHAPES}, **{shape: shape for shape in SHAPES}}
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}


def caption(spec: Spec, rng: np.random.Generator) -> Prompt:
    """Word ``spec`` at random; the prompt keeps only what the words state."""
    opening, ending = _pick(OPENINGS, rng), _pick(ENDINGS, rng)
    if len(spec.things) == 1:
        text, stated = _say_thing(spec.things[0], rng)
        place = spec.things[0].place or "centre"
        if place != "centre" or rng.random() < 0.4:
            text += " " + _pick(PLACE_WORDS[place], rng)
            stated = Thing(stated.colour, stated.shape, stated.size, place)
        return Prompt(_tidy(opening + text + ending, opening, rng), (stated,))
    first, second = spec.things
    relation: str | None = spec.relation
    assert relation is not None
    if relation == "left of" and rng.random() < 0.3:
        words, relation = _pick(BESIDE_WORDS, rng), None
    else:
        if rng.random() < 0.5:
            first, second, relation = second, first, inverse(relation)
        words = _pick(RELATION_WORDS[relation], rng)
    (first_text, first_stated), (second_text, second_stated) = (
        _say_thing(first, rng),
        _say_thing(second, rng),
    )
    text = f"{opening}{first_text} {words} {second_text}{ending}"
    return Prompt(_tidy(text, opening, rng), (first_stated, second_stated), relation)


def read(text: str) -> Prompt:
    """Find what a caption states; raises ``ValueError`` where it names no known shape."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower())
    ends = [i for i, word in enumerate(words) if word in _PLURAL]
    if not 1 <= len(ends) <= 2:
        raise ValueError(f"a caption names one or two shapes, this one {len(ends)}: {text!r}")
    things = [_read_thing(words[: ends[0] + 1], text)]
    relation = None
    if len(ends) == 2:
        things.append(_read_thing(words[ends[0] + 1 : ends[1] + 1], text))
        relation = _find(" ".join(words[ends[0] + 1 : ends[1]]), RELATION_WORDS)
    else:
        place = _find(" ".join(words[ends[0] + 1 :]), PLACE_WORDS)
        only = things[0]
        things = [Thing(only.colour, only.shape, only.size, place)]
    return Prompt(text, tuple(things), relation)


def all_words() -> list[str]:
    """Return every word and mark a caption can hold, sorted; the tokenizer is built from it."""
    phrases = [*OPENINGS, *ENDINGS, *COLOURS, *_PLURAL, *SIZES, *BESIDE_WORDS, "a an the one"]
    for table in (SIZE_WORDS, PLACE_WORDS, RELATION_WORDS):
        phrases += [phrase for options in table.values() for phrase in options]
    return sorted({word for phrase in phrases for word in re.findall(r"[a-z]+|[.,-]", phrase)})


def _say_thing(thing: Thing, rng: np.random.Generator) -> tuple[str, Thing]:
    words = [thing.colour, thing.shape]
    stated = None
    if thing.size != "medium" or rng.random() < 0.3:
        stated = thing.size
        words.insert(0, _pick(SIZE_WORDS[thing.size or "medium"], rng))
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}", Thing(thing.colour, thing.shape, stated)


def _tidy(text: str, opening: str, rng: np.random.Generator) -> str:
    # Now and then the leading article goes: "red circle on the left".
    if not opening and rng.random() < 0.15:
        return text.split(" ", 1)[1]
    return text


def _read_thing(words: list[str], text: str) -> Thing:
    colour = next((word for word in words if word in COLOURS), None)
    if colour is None:
        raise ValueError(f"a shape without a colour in {text!r}")
    size = next((_SIZE_OF[word] for word in words if word in _SIZE_OF), None)
    return Thing(colour, _PLURAL[words[-1]], size)


def _find(words: str, table: Mapping[str, tuple[str, ...]]) -> str | None:
    # The longest phrase wins: "at the top left" also holds "at the top".
    found = [
        (len(phrase), key)
        for key, options in table.items()
        for phrase in options
        if re.search(rf"\b{phrase}\b", words)
    ]
    return max(found)[1] if found else None


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def held_out_prompts(n: int, objects: int | None = None, seed: int = 0) -> list[Prompt]:
    """Return ``n`` prompts whose images were never trained on, no two with the same text.

    ``objects`` 1 or 2 gives prompts of that many shapes; ``None`` alternates between them.
    """
    rng = np.random.default_rng([seed, 7])
    prompts: list[Prompt] = []
    seen: set[str] = set()
    while len(prompts) < n:
        count = objects or 1 + len(prompts) % 2
        spec = random_spec(rng, count)
        if not is_held_out(spec):
            continue
        prompt = caption(spec, rng)
        if prompt.text not in seen:
            seen.add(prompt.text)
            prompts.append(prompt)
    return prompts
