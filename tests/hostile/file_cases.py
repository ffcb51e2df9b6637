"""Listed files that are missing, altered, of another kind or somewhere else."""

from __future__ import annotations

import os

from tests.hostile.bad_bundle import BadBundle, case


@case("files", "is missing")
def file_missing(bad: BadBundle) -> None:
    """A listed file is not there."""
    bad.remove(bad.entry("onnx", "denoiser"))


@case("files", "expected SHA-256")
def file_altered(bad: BadBundle) -> None:
    """A listed file has another last byte."""
    path = bad.entry("onnx", "denoiser")
    data = bad.read(path)
    bad.spoil(path, data[:-1] + bytes([data[-1] ^ 1]))


@case("files", "expected SHA-256")
def side_file_altered(bad: BadBundle) -> None:
    """The weights beside a graph have another byte."""
    path = bad.entry("onnx", "denoiser") + ".data"
    data = bad.read(path)
    bad.spoil(path, data[:100] + bytes([data[100] ^ 1]) + data[101:])


@case("files", "bytes, found")
def file_cut_short(bad: BadBundle) -> None:
    """A listed file lacks its last byte."""
    path = bad.entry("onnx", "denoiser")
    bad.spoil(path, bad.read(path)[:-1])


@case("files", "bytes, found")
def file_longer(bad: BadBundle) -> None:
    """A listed file has a byte more."""
    path = bad.entry("onnx", "denoiser")
    bad.spoil(path, bad.read(path) + b"\0")


@case("files", "regular file")
def file_folder(bad: BadBundle) -> None:
    """A listed file is a folder."""
    path = bad.entry("onnx", "denoiser")
    bad.remove(path)
    (bad.root / path).mkdir()


@case("files", "regular file")
def file_fifo(bad: BadBundle) -> None:
    """A listed file is a named pipe."""
    bad.fifo(bad.entry("onnx", "denoiser"))


@case("files", "regular file")
def side_file_fifo(bad: BadBundle) -> None:
    """The weights beside a graph are a named pipe."""
    bad.fifo(bad.entry("onnx", "denoiser") + ".data")


@case("files", "regular file")
def tokenizer_fifo(bad: BadBundle) -> None:
    """The tokenizer's file is a named pipe."""
    bad.fifo(bad.tokenizer())


@case("files", "leads out of")
def file_link_to_device(bad: BadBundle) -> None:
    """A listed file is a link to a device."""
    bad.link(bad.tokenizer(), "/dev/zero")


@case("files", "leads out of")
def file_link_outside(bad: BadBundle) -> None:
    """A listed file is a link to the same content outside of the bundle."""
    path = bad.entry("onnx", "denoiser")
    copy = bad.outside / "copy.onnx"
    copy.write_bytes(bad.read(path))
    bad.link(path, copy)


@case("files", "leads out of")
def folder_link_outside(bad: BadBundle) -> None:
    """The folder of a listed file is a link out of the bundle."""
    folder = (bad.root / bad.tokenizer()).parent
    folder.rename(bad.outside / "tokenizer")
    folder.symlink_to(bad.outside / "tokenizer")


@case("files", "tokenizer.json")
def file_links_in_a_circle(bad: BadBundle) -> None:
    """A listed file is a link to a link that leads back."""
    path = bad.root / bad.tokenizer()
    bad.link(bad.tokenizer(), "round")
    os.symlink(path.name, path.with_name("round"))


@case("files", "bytes, found")
def file_sparse(bad: BadBundle) -> None:
    """A listed file is 64 GiB of nothing where the manifest says less."""
    path = bad.tokenizer()
    bad.remove(path)
    with (bad.root / path).open("wb") as file:
        file.truncate(64 << 30)
