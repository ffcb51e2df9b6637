"""Bad probes, and names that are no plain text."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from latentc.runtimes.errors import LatentcError
from tests.hostile.bad_bundle import BadBundle, case


def _probes(bad: BadBundle, name: str) -> str:
    return str(bad.document()["probes"]["files"][name]["path"])


def _changed(bad: BadBundle, name: str, **changes: Any) -> None:
    path = _probes(bad, name)
    with np.load(io.BytesIO(bad.read(path)), allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays.update(changes)
    data = io.BytesIO()
    np.savez_compressed(data, **{key: x for key, x in arrays.items() if x is not None})
    bad.put(path, data.getvalue())


@case("probes", ".npz")
def probes_not_a_zip(bad: BadBundle) -> None:
    """A component's probes are no archive."""
    bad.put(_probes(bad, "denoiser"), b"no archive")


@case("probes", "loop.npz")
def probes_pickled(bad: BadBundle) -> None:
    """The whole loop's image is a pickle."""

    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(bad.outside / "pwned"), "w"))

    _changed(bad, "loop", image=np.array([Trap()], dtype=object))


@case("probes", "the limit is")
def probes_that_unpack_to_much(bad: BadBundle) -> None:
    """Some megabytes unpack to 5 GiB."""
    data = io.BytesIO()
    import zipfile

    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20,)}
        )
        archive.writestr("random/in/sample.npy", header.getvalue() + bytes(4 << 20))
    raw = bytearray(data.getvalue())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    bad.put(_probes(bad, "denoiser"), bytes(raw))


@case("probes", "latents", LatentcError)
def probes_without_latents(bad: BadBundle) -> None:
    """The whole loop's probe lacks the latents."""
    _changed(bad, "loop", latents=None)


@case("probes", "", LatentcError)
def probes_of_another_shape(bad: BadBundle) -> None:
    """The whole loop's image has another shape."""
    _changed(bad, "loop", image=np.zeros((1, 3, 5, 3), np.uint8))


@case("probes", "", LatentcError)
def probes_with_nan(bad: BadBundle) -> None:
    """The expected latents are NaN, which is equal to nothing and below no limit."""
    _changed(bad, "loop", latents=np.full((1, 4, 16, 8), np.nan, np.float32))


@case("probes", "", LatentcError)
def probes_without_results(bad: BadBundle) -> None:
    """A component's probes hold inputs and no outputs: nothing would be compared."""
    path = _probes(bad, "vae_decoder")
    with np.load(io.BytesIO(bad.read(path)), allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files if "/in/" in key}
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    bad.put(path, data.getvalue())


@case("probes", "", LatentcError)
def probes_of_a_huge_image(bad: BadBundle) -> None:
    """The whole loop is to be run for an image of 2^20 pixels along each side."""
    bad.edit(lambda document: document["probes"]["loop"].update(height=1 << 20, width=1 << 20))


@case("probes", "", LatentcError)
def probes_for_an_unknown_scheduler(bad: BadBundle) -> None:
    """The whole loop is to be run with a scheduler that there is not."""
    bad.set("probes.loop.scheduler", "nobody")


@case("probes", "", LatentcError)
def probes_with_an_unknown_argument(bad: BadBundle) -> None:
    """The whole loop is to be run with an argument that a call does not have."""
    bad.edit(lambda document: document["probes"]["loop"]["arguments"].update({"self": 1}))
