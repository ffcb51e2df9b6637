"""Bundles that a reader may use, or refuse, but that must not make it do any harm."""

from __future__ import annotations

from typing import Any

from tests.hostile.bad_bundle import MANIFEST, BadBundle, case

# Clears the screen, sets the window's title, asks the terminal for an answer; one byte, no escape.
_ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b[6n\x9b31m\r"


@case("anything", "", None)
def names_with_escape_sequences(bad: BadBundle) -> None:
    """Names that are printed hold sequences that terminals obey."""

    def change(document: Any) -> None:
        document["source"]["id"] += _ESCAPES
        document["source"]["pipeline_class"] += _ESCAPES
        document["builds"][0]["name"] += _ESCAPES
        document["created_by"]["platform"] += _ESCAPES
        document["schedules"][0]["class_name"] += _ESCAPES
        ingredient = {"kind": "lora" + _ESCAPES, "id": _ESCAPES, "sha256": "0" * 64}
        document["source"]["ingredients"] = [ingredient]

    bad.edit(change)


@case("anything", "", None)
def names_with_markup(bad: BadBundle) -> None:
    """Names that are printed hold the markup of the library that prints them."""

    def change(document: Any) -> None:
        document["source"]["id"] = "[link=file:///etc/passwd]id[/link][/]"
        document["builds"][0]["name"] = "[bold"
        document["schedules"][0]["class_name"] = "[/]"

    bad.edit(change)


@case("anything", "", None)
def names_that_turn_the_line_round(bad: BadBundle) -> None:
    """Names hold characters that make a terminal show the rest of a line backwards."""
    bad.edit(lambda document: document["source"].update(id="\u202egpj.exe\u2066"))


@case("anything", "", None)
def temporary_manifest_is_a_link(bad: BadBundle) -> None:
    """The name that a writer might give its new manifest is a link to a file of the user."""
    for name in (f".{MANIFEST}.new", f"{MANIFEST}.tmp", f"{MANIFEST}.new", f".{MANIFEST}.tmp"):
        (bad.root / name).symlink_to(bad.outside / "secret")


@case("anything", "", None)
def schedules_folder_is_a_link(bad: BadBundle) -> None:
    """The folder that new plans are written to leads out of the bundle."""
    (bad.root / "schedules").rename(bad.root / "plans")

    def change(document: Any) -> None:
        for schedule in document["schedules"]:
            schedule["file"]["path"] = schedule["file"]["path"].replace("schedules/", "plans/")

    bad.edit(change)
    (bad.root / "schedules").symlink_to(bad.outside)


@case("anything", "", None)
def unlisted_fifo(bad: BadBundle) -> None:
    """A file that the manifest does not list is a named pipe."""
    bad.fifo("README.md")
    bad.fifo("tuning.json")


@case("anything", "", None)
def unlisted_link_outside(bad: BadBundle) -> None:
    """A file that the manifest does not list is a link out of the bundle."""
    bad.link("onnx-fp32/secret", bad.outside / "secret")
    bad.link("everything", "/")


@case("anything", "", None)
def source_with_odd_configuration(bad: BadBundle) -> None:
    """The pipeline's scheduler is named and configured in a way that must not be imported."""

    def change(document: Any) -> None:
        document["source"]["scheduler_class"] = "os.system"
        document["source"]["scheduler_config"]["_class_name"] = "../../outside"

    bad.edit(change)
