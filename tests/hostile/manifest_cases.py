"""Bad manifests: documents that cannot be read, or that break a rule of the format."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.hostile.bad_bundle import MANIFEST, BadBundle, case


def _symbol(bad: BadBundle, name: str, **members: Any) -> None:
    """Change a symbol of the first program."""
    bad.edit(lambda document: document["programs"][0]["symbols"][name].update(members))


def _argument(bad: BadBundle, name: str, **members: Any) -> None:
    """Change an argument of the first program."""

    def change(document: Any) -> None:
        arguments = document["programs"][0]["arguments"]
        next(each for each in arguments if each["name"] == name).update(members)

    bad.edit(change)


@case("manifest", "has no manifest.json")
def manifest_missing(bad: BadBundle) -> None:
    """The folder has no manifest."""
    bad.remove(MANIFEST)


@case("manifest", "regular file")
def manifest_fifo(bad: BadBundle) -> None:
    """The manifest is a named pipe that nobody writes to."""
    bad.fifo(MANIFEST)


@case("manifest", "manifest.json")
def manifest_folder(bad: BadBundle) -> None:
    """The manifest is a folder."""
    bad.remove(MANIFEST)
    (bad.root / MANIFEST).mkdir()


@case("manifest", "leads out of")
def manifest_link_to_device(bad: BadBundle) -> None:
    """The manifest is a link to a device that never ends."""
    bad.link(MANIFEST, "/dev/zero")


@case("manifest", "leads out of")
def manifest_link_outside(bad: BadBundle) -> None:
    """The manifest is a link to a good one outside of the bundle."""
    data = bad.read(MANIFEST)
    (bad.outside / "good.json").write_bytes(data)
    bad.link(MANIFEST, bad.outside / "good.json")


@case("manifest", "manifest.json")
def manifest_link_to_itself(bad: BadBundle) -> None:
    """The manifest is a link to itself."""
    bad.link(MANIFEST, MANIFEST)


@case("manifest", "manifest.json")
def manifest_link_nowhere(bad: BadBundle) -> None:
    """The manifest is a link to a file that does not exist."""
    bad.link(MANIFEST, "nowhere.json")


@case("manifest", "bytes")
def manifest_too_large(bad: BadBundle) -> None:
    """The manifest is a sparse file of 64 GiB."""
    bad.remove(MANIFEST)
    with (bad.root / MANIFEST).open("wb") as file:
        file.truncate(64 << 30)


@case("manifest", "manifest.json")
def manifest_empty(bad: BadBundle) -> None:
    """The manifest has no bytes."""
    bad.put(MANIFEST, b"")


@case("manifest", "manifest.json")
def manifest_cut_short(bad: BadBundle) -> None:
    """The manifest ends in the middle."""
    data = bad.read(MANIFEST)
    bad.put(MANIFEST, data[: len(data) // 2])


@case("manifest", "manifest.json")
def manifest_deep(bad: BadBundle) -> None:
    """The manifest holds 100,000 arrays, each in the one before."""
    bad.put(
        MANIFEST, b'{"format_version": 2, "programs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    )


@case("manifest", "manifest.json")
def manifest_deep_in_free_object(bad: BadBundle) -> None:
    """The scheduler's configuration, a free object, is 100,000 objects deep."""
    text = json.dumps(bad.document())
    deep = '{"a": ' * 100_000 + "1" + "}" * 100_000
    text = re.sub(r'"scheduler_config": \{[^}]*\}', lambda _: f'"scheduler_config": {deep}', text)
    bad.put(MANIFEST, text.encode())


@case("manifest", "manifest.json")
def manifest_nan(bad: BadBundle) -> None:
    """A number of the manifest is NaN, which JSON does not have."""
    _argument(bad, "guidance_scale", default=[float("nan")])


@case("manifest", "manifest.json")
def manifest_infinity(bad: BadBundle) -> None:
    """A number of the manifest is too large for a float."""
    _argument(bad, "guidance_scale", default=[12345.0])
    bad.put(MANIFEST, bad.read(MANIFEST).replace(b"12345.0", b"1e999"))


@case("manifest", "manifest.json")
def manifest_utf16(bad: BadBundle) -> None:
    """The manifest is written in UTF-16."""
    bad.put(MANIFEST, json.dumps(bad.document()).encode("utf-16"))


@case("manifest", "manifest.json")
def manifest_byte_order_mark(bad: BadBundle) -> None:
    """The manifest begins with a byte order mark."""
    bad.put(MANIFEST, b"\xef\xbb\xbf" + bad.read(MANIFEST))


@case("manifest", "manifest.json")
def manifest_latin_1(bad: BadBundle) -> None:
    """A name holds a byte that is not UTF-8."""
    text = json.dumps(bad.document()).encode()
    bad.put(MANIFEST, text.replace(b'"id": "', b'"id": "\xe9', 1))


@case("manifest", "manifest.json")
def manifest_list(bad: BadBundle) -> None:
    """The manifest is an array."""
    bad.put(MANIFEST, b"[1, 2, 3]")


@case("manifest", "format_version 3")
def manifest_newer_version(bad: BadBundle) -> None:
    """The manifest has a version that no reader knows, and a field of the future."""
    bad.edit(lambda document: document.update(format_version=3, future={}))


@case("manifest", "latentc upgrade")
def manifest_older_version(bad: BadBundle) -> None:
    """The manifest is one of format 1, which the upgrade alone reads."""

    def change(document: Any) -> None:
        for name in ("programs", "needs", "optional"):
            del document[name]
        document.update(format_version=1, tasks=[{"name": "text-to-image"}])

    bad.edit(change)


@case("manifest", "which this latentc does not know")
def manifest_unknown_need(bad: BadBundle) -> None:
    """The manifest needs what no reader knows, as that of a later writer would."""
    bad.edit(lambda document: document.update(needs=["video"], future={}))


@case("manifest", "needs")
def manifest_need_of_no_name(bad: BadBundle) -> None:
    """The manifest needs a number."""
    bad.set("needs", [1])


@case("manifest", "format_version")
def manifest_version_is_true(bad: BadBundle) -> None:
    """The version is the boolean true, which some languages take for 1."""
    bad.set("format_version", True)


@case("manifest", "format_version")
def manifest_version_missing(bad: BadBundle) -> None:
    """The manifest says no version."""
    bad.edit(lambda document: document.pop("format_version"))


@case("manifest", "programs")
def manifest_field_missing(bad: BadBundle) -> None:
    """A required field is missing."""
    bad.edit(lambda document: document.pop("programs"))


@case("manifest", "surprise")
def manifest_field_unknown(bad: BadBundle) -> None:
    """There is a field that the format does not have."""
    bad.edit(lambda document: document.update(surprise=1))


@case("manifest", "components")
def manifest_wrong_type(bad: BadBundle) -> None:
    """The components are an object, not an array."""
    bad.set("components", {"denoiser": {}})


@case("manifest", "symbols")
def manifest_fraction(bad: BadBundle) -> None:
    """A size is a fraction."""
    _symbol(bad, "height", default=16.5)


@case("manifest", "manifest.json")
def manifest_huge_integer(bad: BadBundle) -> None:
    """A size is an integer of 5,000 digits."""
    _symbol(bad, "height", default=987654321)
    bad.put(MANIFEST, bad.read(MANIFEST).replace(b"987654321", b"9" * 5000))


@case("manifest", "symbol 'height'")
def manifest_integer_beyond_64_bits(bad: BadBundle) -> None:
    """A size is 2^70."""
    _symbol(bad, "height", default=2**70)


@case("manifest", "symbol 'height'")
def manifest_sizes_overflow(bad: BadBundle) -> None:
    """The default sizes make latents of more than any memory's bytes."""
    _symbol(bad, "width", default=2**52)
    _symbol(bad, "height", default=2**52)


@case("manifest", "bad unit")
def manifest_unit_zero(bad: BadBundle) -> None:
    """A latent stands for no pixels, which readers divide by."""
    _symbol(bad, "height", unit=0)


@case("manifest", "two components are named")
def manifest_duplicate_component(bad: BadBundle) -> None:
    """Two components have the same name."""
    bad.edit(lambda document: document["components"].append(document["components"][0]))


@case("manifest", "two builds are named")
def manifest_duplicate_build(bad: BadBundle) -> None:
    """Two builds have the same name."""
    bad.edit(lambda document: document["builds"].append(document["builds"][0]))


@case("manifest", "two schedules are named")
def manifest_duplicate_schedule(bad: BadBundle) -> None:
    """Two schedules have the same name."""
    bad.edit(lambda document: document["schedules"].append(document["schedules"][0]))


def _path(bad: BadBundle, path: str) -> None:
    bad.set("tokenizers.0.file.path", path)


@case("manifest", "leaves the bundle")
def path_parent(bad: BadBundle) -> None:
    """A listed path climbs out of the bundle."""
    _path(bad, "../outside/secret")


@case("manifest", "leaves the bundle")
def path_absolute(bad: BadBundle) -> None:
    """A listed path begins at the root of the file system."""
    _path(bad, "/etc/passwd")


@case("manifest", "leaves the bundle")
def path_of_windows(bad: BadBundle) -> None:
    """A listed path climbs out of the bundle on Windows."""
    _path(bad, "..\\outside\\secret")


@case("manifest", "leaves the bundle")
def path_drive(bad: BadBundle) -> None:
    """A listed path names a drive."""
    _path(bad, "C:/secret")


@case("manifest", "leaves the bundle")
def path_with_null(bad: BadBundle) -> None:
    """A listed path holds a null character, at which C ends."""
    _path(bad, "tokenizer\0/tokenizer.json")


@case("manifest", "leaves the bundle")
def path_empty(bad: BadBundle) -> None:
    """A listed path is empty: the bundle's folder itself."""
    _path(bad, "")


@case("manifest", "manifest.json")
def path_with_surrogate(bad: BadBundle) -> None:
    """A listed path is a lone surrogate, which no file system's encoding has."""
    text = json.dumps(bad.document())
    old = json.dumps(bad.tokenizer())
    bad.put(MANIFEST, text.replace(f'"path": {old}', '"path": "a\\ud800b"').encode())


@case("manifest", "sha256")
def hash_of_other_letters(bad: BadBundle) -> None:
    """A hash is written in capital letters."""
    bad.edit(
        lambda document: document["tokenizers"][0]["file"].update(
            sha256=document["tokenizers"][0]["file"]["sha256"].upper()
        )
    )


@case("manifest", "negative size")
def size_negative(bad: BadBundle) -> None:
    """A file has a negative size."""
    bad.set("tokenizers.0.file.size", -1)


@case("manifest", "not listed")
def entry_not_listed(bad: BadBundle) -> None:
    """The file that an engine is to load is none of the listed files."""
    bad.set("builds.0.artifacts.denoiser.entry", "onnx-fp32/denoiser/other.onnx")


@case("manifest", "defaults.scheduler")
def default_scheduler_unknown(bad: BadBundle) -> None:
    """The default scheduler is none of the schedules."""
    bad.set("defaults.scheduler", "nobody")


@case("manifest", "source.licence has 100000 characters")
def licence_of_100000_characters(bad: BadBundle) -> None:
    """The licence would fill a terminal many times."""
    bad.set("source.licence", "x" * 100_000)


@case("manifest", "source.base_model has 201 characters")
def base_model_too_long(bad: BadBundle) -> None:
    """The name of a base model is one character too long."""
    bad.set("source.base_model", ["owner/name", "x" * 201])


@case("manifest", "source.base_model names 100000")
def base_models_without_end(bad: BadBundle) -> None:
    """The source was made from 100,000 models."""
    bad.set("source.base_model", ["owner/name"] * 100_000)


def _checked(bad: BadBundle, **members: Any) -> None:
    """Change the first call in the record of the first program."""
    bad.edit(lambda document: document["programs_checked"][0]["calls"][0].update(members))


@case("manifest", "programs_checked")
def programs_checked_as_an_object(bad: BadBundle) -> None:
    """The record of what programs were held against is an object, not an array."""
    bad.edit(lambda document: document.update(programs_checked={"program": "unconditional"}))


@case("manifest", "relative_l2")
def program_checked_with_a_word_for_an_error(bad: BadBundle) -> None:
    """The error of a program is a word."""
    _checked(bad, relative_l2="small")


@case("manifest", "manifest.json")
def program_checked_with_an_error_that_is_nan(bad: BadBundle) -> None:
    """The error of a program is NaN, which no comparison with a limit notices."""
    _checked(bad, relative_l2=float("nan"))


@case("manifest", "manifest.json")
def program_checked_with_an_infinite_limit(bad: BadBundle) -> None:
    """The limit for a program's error is too large for a float."""
    _checked(bad, tolerance=12345.0)
    bad.put(MANIFEST, bad.read(MANIFEST).replace(b"12345.0", b"1e999"))


@case("manifest", "a negative error or limit")
def program_checked_with_a_negative_error(bad: BadBundle) -> None:
    """A program is nearer to diffusers than the same latents would be."""
    _checked(bad, relative_l2=-1e-7)


@case("manifest", "expected 1 to 64 prompts")
def program_checked_with_negative_prompts(bad: BadBundle) -> None:
    """A program was called with fewer than no prompts."""
    _checked(bad, prompts=-1)


@case("manifest", "expected 1 to 64 prompts")
def program_checked_with_2_to_the_40_images(bad: BadBundle) -> None:
    """A program made so many images that their seeds would fill any memory."""
    _checked(bad, images=2**40)


@case("manifest", "seeds for")
def program_checked_with_seeds_without_end(bad: BadBundle) -> None:
    """A call of one image has 100,000 seeds."""
    _checked(bad, seeds=[1] * 100_000)


@case("manifest", "a seed is beyond 2^53")
def program_checked_with_a_huge_seed(bad: BadBundle) -> None:
    """A seed has 400 digits, which no integer of a machine holds."""
    _checked(bad, seeds=[10**400])


@case("manifest", "refused has 100000 characters")
def program_checked_with_100000_characters(bad: BadBundle) -> None:
    """The refusal of diffusers would fill a terminal many times."""
    _checked(bad, relative_l2=None, refused="x" * 100_000)


@case("manifest", "expected one of relative_l2 and refused")
def program_checked_without_a_result(bad: BadBundle) -> None:
    """A call was neither compared nor refused."""
    _checked(bad, relative_l2=None)


@case("manifest", "expected one of relative_l2 and refused")
def program_checked_and_refused(bad: BadBundle) -> None:
    """A call was compared, although diffusers refused it."""
    _checked(bad, refused="no")


@case("manifest", "calls, expected 1 to 16")
def program_checked_without_calls(bad: BadBundle) -> None:
    """A program is said to be checked, in no call."""
    bad.set("programs_checked.0.calls", [])


@case("manifest", "calls, expected 1 to 16")
def program_checked_calls_without_end(bad: BadBundle) -> None:
    """A program was called 20,000 times."""
    calls = bad.document()["programs_checked"][0]["calls"]
    bad.set("programs_checked.0.calls", calls[:1] * 20_000)


@case("manifest", "no program has this name")
def program_checked_that_is_none(bad: BadBundle) -> None:
    """The record is of a program that the bundle does not have."""
    bad.set("programs_checked.0.program", "nobody")


@case("manifest", "checked programs are named")
def programs_checked_without_end(bad: BadBundle) -> None:
    """A program was checked 20,000 times."""
    bad.edit(
        lambda document: document.update(programs_checked=document["programs_checked"] * 20_000)
    )


@case("manifest", "holds")
def build_without_component(bad: BadBundle) -> None:
    """A build lacks the denoiser."""
    bad.edit(lambda document: document["builds"][0]["artifacts"].pop("denoiser"))


@case("manifest", "dimension")
def dimension_not_a_symbol(bad: BadBundle) -> None:
    """A dimension is an expression that a careless reader would evaluate."""
    bad.set("components.1.inputs.sample.shape", ["batch", 4, "__import__('os')", "width"])


@case("manifest", "axes")
def dimensions_without_end(bad: BadBundle) -> None:
    """A tensor has a thousand axes."""
    bad.set("components.1.inputs.sample.shape", ["batch", *[1] * 999])


@case("manifest", "no images")
def image_of_one_pixel_as_declared(bad: BadBundle) -> None:
    """The manifest says that images have one pixel, whatever size is asked for."""
    last = len(bad.document()["components"]) - 1
    bad.set(f"components.{last}.outputs.image.shape", ["batch", 3, 1, 1])


@case("manifest", "gives no 'prediction'")
def prediction_of_integers_as_declared(bad: BadBundle) -> None:
    """The manifest says that the denoiser gives integers."""
    bad.set("components.1.outputs.prediction.dtype", "int64")


@case("manifest", "20008 arguments: expected at most")
def manifest_20000_arguments(bad: BadBundle) -> None:
    """A program has 20,000 arguments, and another fault that would be found last."""

    def change(document: Any) -> None:
        document["programs"][0]["arguments"] += [
            {"kind": "numbers", "name": f"a{i}", "default": [0.0]} for i in range(20_000)
        ]
        document["defaults"]["scheduler"] = "nobody"

    bad.edit(change)
