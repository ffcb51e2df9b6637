"""The calls that a bundle is verified with: arguments that every program takes, made up."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentc.runtimes.bundle.sizes import BINNING
from latentc.runtimes.programs.latents import other_sizes
from latentc.runtimes.programs.statements import Image, Mask, Numbers, Program, SizeOf, Text

PROMPT = "a large red circle above a small blue square"
_OTHER_PROMPT = "a flat drawing"
# Of the whole-loop check. Strong guidance in a few steps multiplies rounding: int8 weights, 2e-2
# off in one call of the built-in model, are 2e-1 off at the end at 7.5, as much as 7.0 would be.
# At 2 they stay 2e-2 off, and another seed or colour or no guidance is a 2e-1 that shows.
GUIDANCE = {"guidance_scale": 2.0}
# So that a call has some steps, and yet starts from its image.
_STRENGTH = {"strength": 0.7}
_LATENTS = 3  # along axes that are no sides: a first frame, one after it, and one after that


def arguments_of(program: Program) -> dict[str, str | float | bool]:
    """Return texts and numbers of a call, without any for the negative prompt, and sizes that are
    no sides, such as the number of frames."""
    names = {argument.name for argument in program.arguments if isinstance(argument, Numbers)}
    numbers = {**GUIDANCE, **({} if masks_of(program) else _STRENGTH)}
    arguments: dict[str, str | float | bool] = {**texts_of(program)}
    arguments |= {name: value for name, value in numbers.items() if name in names}
    arguments |= {name: values[0] for name, values in rows_of(program, 1).items()}
    arguments |= lengths_of(program)
    if program.bins is not None:
        arguments[BINNING] = False  # what is small and quick
    return arguments


def lengths_of(program: Program) -> dict[str, int]:
    """Return small sizes along axes that are neither height nor width, by argument."""
    found = {}
    for symbol in other_sizes(program).values():
        size = max(symbol.least, _LATENTS * symbol.multiple)
        found[symbol.argument] = symbol.argument_of(min(size, symbol.most or size))
    return found


def rows_of(program: Program, count: int) -> dict[str, list[float]]:
    """Return numbers for each of `count` prompts, by argument: whole ones within its limits, one
    after the other from the middle."""
    rows: dict[str, list[float]] = {}
    for argument in program.arguments:
        if isinstance(argument, Numbers) and argument.rows:
            low, high = int(argument.least or 0), int(argument.most or 1)
            span = high - low + 1
            rows[argument.name] = [low + (span // 2 + place) % span for place in range(count)]
    return rows


def texts_of(program: Program) -> dict[str, str]:
    """Return the texts that a call must have, and others for those that fall back to them."""
    texts = [argument for argument in program.arguments if isinstance(argument, Text)]
    prompts = [
        text.name
        for text in texts
        if text.default is None and text.fallback is None and not text.optional
    ]
    own = dict.fromkeys(prompts, PROMPT)
    return own | {each.name: _OTHER_PROMPT for each in texts if each.fallback in own}


def negatives_of(program: Program) -> tuple[str, ...]:
    """Return the texts that a call may leave out and that no other text stands for: what guidance
    leads away from."""
    return tuple(
        argument.name
        for argument in program.arguments
        if isinstance(argument, Text)
        and argument.fallback is None
        and (argument.optional or argument.default is not None)
    )


def images_of(program: Program, height: int, width: int, count: int = 1) -> dict[str, Any]:
    """Return images and masks for a result of `height` by `width` pixels, as Pillow images: one of
    each, or a list of `count` different ones; an argument that is a list has as many as it takes.
    """
    times = enlarges(program)
    arguments: dict[str, Any] = {}
    for argument in program.arguments:
        images: list[Any] = []
        if isinstance(argument, Image):
            number = argument.count or count
            side = height // times, width // times
            images = [probe_image(*side, place) for place in range(number)]
        elif isinstance(argument, Mask):
            images = [probe_mask(height, width)] * count
        if images:
            arguments[argument.name] = images if len(images) > 1 else images[0]
    return arguments


def size_of(program: Program) -> SizeOf | None:
    """Return the image whose size a call has that asks for none."""
    return next((symbol.of for symbol in program.symbols.values() if symbol.of is not None), None)


def enlarges(program: Program) -> int:
    """Return how many times larger than its image a call's result is."""
    size = size_of(program)
    return 1 if size is None else size.times


def masks_of(program: Program) -> list[str]:
    """Return the masks that a call gives."""
    return [argument.name for argument in program.arguments if isinstance(argument, Mask)]


def takes_images(program: Program) -> bool:
    """Return whether a call gives images."""
    return any(isinstance(argument, Image | Mask) for argument in program.arguments)


def probe_image(height: int, width: int, number: int = 0) -> Any:
    """Return a Pillow image of smooth colours with an edge, another one for each `number`."""
    from PIL import Image as Pillow

    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.stack([np.sin(7 * x + (3 + number) * y + k) for k in range(3)], axis=-1)
    pixels = (waves * 100 + 127).astype(np.uint8)
    pixels[: height // 3] = (250, 20, 30 + 40 * number)
    return Pillow.fromarray(pixels)


def probe_mask(height: int, width: int) -> Any:
    """Return a Pillow mask of the middle."""
    from PIL import Image as Pillow

    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = 255
    return Pillow.fromarray(mask)
