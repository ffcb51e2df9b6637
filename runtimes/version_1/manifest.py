"""The manifest of format 1, as it was."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from latentc.runtimes.bundle.structures import (
    Build,
    Component,
    CreatedBy,
    Defaults,
    File,
    LeftOut,
    Probes,
    Schedule,
    Source,
    files_of,
)
from latentc.runtimes.errors import BundleError
from latentc.runtimes.programs.latents import Latents
from latentc.runtimes.storage.parsing import parser
from latentc.runtimes.strict import Strict
from latentc.runtimes.version_1.fields import Argument, Embedding, Guidance, VectorInput
from latentc.runtimes.version_1.tasks import Task

FORMAT_VERSION = 1
_MOST = 256  # of anything; the work of making programs grows with the square of some


class Tokenizer(Strict, frozen=True):
    """A tokenizer.json and the encoder input that it feeds.

    `texts` names the call arguments that hold the text: the first one given is used. Padding
    and truncation to `max_length` ids are settings of the file itself. `expansions`: words that
    stand for several. `vocabulary`: how many rows the encoder's table of embeddings has.
    """

    file: File
    input: str
    max_length: int
    texts: tuple[str, ...]
    expansions: dict[str, str] = msgspec.field(default_factory=dict)
    vocabulary: int | None = None


class Manifest(Strict, frozen=True):
    """The whole document."""

    format_version: int
    tasks: tuple[Task, ...]
    source: Source
    created_by: CreatedBy
    latents: Latents
    tokenizers: tuple[Tokenizer, ...]
    arguments: tuple[Argument, ...]
    vectors: tuple[VectorInput, ...]
    guidance: Guidance
    components: tuple[Component, ...]
    builds: tuple[Build, ...]
    schedules: tuple[Schedule, ...]
    defaults: Defaults
    probes: Probes | None = None
    embeddings: tuple[Embedding, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    @parser(BundleError, "origin", "a manifest of format 1")
    def decode(cls, data: bytes, origin: str = "manifest.json") -> Manifest:
        """Decode the document. What its fields must keep to is checked where programs are made of
        them. Raises BundleError."""
        manifest = msgspec.json.decode(data, type=cls)
        for name in cls.__struct_fields__:
            members = getattr(manifest, name)
            if isinstance(members, tuple) and len(members) > _MOST:
                raise BundleError(f"{origin}: {len(members)} {name}, expected at most {_MOST}")
        return manifest

    def files(self) -> Iterator[File]:
        """Yield every file that the manifest vouches for."""
        yield from (tokenizer.file for tokenizer in self.tokenizers)
        yield from files_of(self.schedules, self.builds, self.probes)
