"""`split_einsum_attention`, with the queries in chunks of 512: Apple's ``SPLIT_EINSUM_V2``.

Less memory, and better use of the Neural Engine, for large images on mobile devices
(https://github.com/apple/ml-stable-diffusion). Sequences must have a fixed length to be cut.
"""

from __future__ import annotations

from torch.export import ExportedProgram

from latentc.exporter.passes import Choices, split_einsum_attention

QUERY_CHUNK = 512


def run(program: ExportedProgram, choices: Choices) -> int:
    """Rewrite `program`; returns how many attentions were rewritten."""
    return split_einsum_attention.run(program, choices, QUERY_CHUNK)
