"""This module tells what a text may name that somebody gives for a model: a file of weights, or an
id on the Hub."""

from __future__ import annotations

SAFE = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "model_index.json"  # of a diffusers pipeline's folder


def names_weights(place: str) -> bool:
    """Return whether a text is the name of a file of weights, there or not."""
    return place.lower().endswith((SAFE, *PICKLES))


def is_hub_id(place: str, inside: bool = False) -> bool:
    """Return whether a text may be ``OWNER/NAME``, or ``OWNER/NAME/PATH`` with `inside`; a file of
    weights in a folder looks like the former, and is none."""
    pieces = place.split("/")
    fits = len(pieces) >= 2 if inside else len(pieces) == 2
    a_file = len(pieces) == 2 and names_weights(place)
    return fits and all(pieces) and not place.startswith((".", "~")) and not a_file
