"""An export holds every program against the diffusers class that it stands for, and writes no
bundle where one does something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

import latentc.exporter.compiler.run
from latentc.exporter import classes
from latentc.exporter.compiler.export import export
from latentc.exporter.components.description import Description
from latentc.exporter.progress import Progress
from latentc.exporter.verification.programs import (
    LIMIT,
    SHAPES,
    Comparison,
    check_programs,
    recorded,
)
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import InputError, VerificationError
from latentc.runtimes.programs.statements import Loop, Noise, Numbers, Pixels, Program, loop_of
from tests.contract.test_every_argument import HAS_TASKS, bundle_of
from tests.support.uncaptured import uncaptured

Change = Callable[[Program], Program]


def with_steps(program: Program, kind: type, **changes: Any) -> Program:
    """Return a program whose statements of a kind are changed."""
    steps = [structs.replace(s, **changes) if isinstance(s, kind) else s for s in program.steps]
    return structs.replace(program, steps=tuple(steps))


def with_default(program: Program, name: str, value: float) -> Program:
    """Return a program in which an argument of one number has another default."""
    arguments = [
        structs.replace(each, default=(value,))
        if isinstance(each, Numbers) and each.name == name
        else each
        for each in program.arguments
    ]
    return structs.replace(program, arguments=tuple(arguments))


def swapped_noise(program: Program) -> Program:
    """Return a program whose second draw comes first."""
    steps = [*program.steps]
    first, second, *_ = (place for place, step in enumerate(steps) if isinstance(step, Noise))
    steps.insert(first, steps.pop(second))
    return structs.replace(program, steps=tuple(steps))


def pushed_further(program: Program) -> Program:
    """Return a program whose branches push by the whole guidance scale, not by what is above 1."""
    branches = [
        structs.replace(each, push=tuple(structs.replace(push, less=0.0) for push in each.push))
        for each in loop_of(program).branches
    ]
    return with_steps(program, Loop, branches=tuple(branches))


def compared(
    kind: str, source: Path, folder: Path, change: Change | None = None
) -> list[Comparison]:
    """Return the comparisons of every program of a kind, changed before."""
    found: list[Comparison] = []

    def examine(pipe: Any, description: Description, manifest: Manifest, root: Path) -> None:
        if change is not None:
            programs = tuple(map(change, manifest.programs))
            manifest = structs.replace(manifest, programs=programs)
        found.extend(check_programs(pipe, description, manifest, root, Progress(None)))

    bundle_of(kind, source, folder, examine=examine)
    return found


# Exports of the others are held against diffusers wherever a test makes one. The class of "ldm"
# makes one image of each prompt, so that its family says how it makes several.
@pytest.mark.parametrize("kind", [*HAS_TASKS, "ldm"])
def test_every_program_of_every_kind(
    kind: str, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each is the same as its class in diffusers, in one image and in several."""
    source = pipeline_folder(kind.partition("+")[0])
    made = compared(kind, source, tmp_path / "bundle")
    assert not [each for each in made if each.refused]
    assert {(each.program.name, each.shape.images) for each in made} == {
        (each.program.name, shape.images) for each in made for shape in SHAPES
    }
    assert max(each.latents for each in made) < LIMIT / 4


def test_step_counts_of_which_a_strength_leaves_none(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bundles for one or two steps are compared at the whole strength: at 0.3 of two steps there is
    nothing to do, which calls refuse."""
    comparisons: list[Comparison] = []

    def examine(pipe: Any, description: Description, manifest: Manifest, root: Path) -> None:
        comparisons.extend(check_programs(pipe, description, manifest, root, Progress(None)))

    folder, tasks = pipeline_folder("sdxl"), ["image-to-image"]
    uncaptured(folder, tmp_path / "bundle", tasks, steps=(1, 2), examine=examine)
    assert len(comparisons) == 2 * len(SHAPES)
    assert max(each.latents for each in comparisons) < LIMIT / 4


# What would be silent: the image is another one, and looks as good.
FAULTS: dict[str, tuple[str, Change]] = {
    "noise in another order": ("upscaler", swapped_noise),
    "noise for each image that is given": (
        "sd",
        lambda program: with_steps(program, Noise, each_made=False),
    ),
    "the step that a strength rounds to": (
        "flux-dev",
        lambda program: with_steps(
            with_default(program, "strength", 0.55),
            Loop,
            part=structs.replace(loop_of(program).part, rounds="down"),
        ),
    ),
    "another default strength": (
        "sdxl",
        lambda program: with_default(program, "strength", 0.5),
    ),
    "control images for images, not for prompts": (
        "sd+controlnet",
        lambda program: with_steps(program, Pixels, for_prompts=False),
    ),
    "an image that is stretched": (
        "sd+ip-adapter",
        lambda program: with_steps(program, Pixels, resample="bilinear"),
    ),
    "guidance by one more": ("sd3", pushed_further),
    "guidance by one more, of a class whose own scale is 1": ("ldm", pushed_further),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(
    fault: str, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, change = FAULTS[fault]
    source = pipeline_folder(kind.partition("+")[0])
    with pytest.raises(VerificationError, match=r"does not do what .* does in diffusers"):
        compared(kind, source, tmp_path / "bundle", change)


@pytest.mark.fault("2.5", "image-to-image of latent consistency models: the strength is another")
def test_consistency_models_have_no_image_to_image(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' class spreads all steps over a part of the schedule, which no plan has."""
    with pytest.raises(InputError, match="has no task image-to-image; it has: text-to-image"):
        uncaptured(pipeline_folder("lcm"), tmp_path / "bundle", ["image-to-image"])
    name = "LatentConsistencyModelPipeline"
    record = replace(classes.CLASSES[name], offers=("image-to-image",))
    monkeypatch.setitem(classes.OWN, name, record)  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="'image-to-image' does not do what"):
        export(
            pipeline_folder("lcm"),
            tmp_path / "bundle",
            tasks=["image-to-image"],
            schedulers=[],
            steps=[4],
        )
    assert not (tmp_path / "bundle").exists()


def test_an_export_records_what_it_compared(smallest: Path, tmp_path: Path) -> None:
    """The manifest says for each call how far off its latents were; an export that verifies
    nothing says nothing, and one that then verifies makes up for it."""
    bundle = tmp_path / "bundle"
    asked: dict[str, Any] = {"schedulers": [], "steps": [2]}
    assert export(smallest, bundle, verify=False, **asked).manifest.programs_checked == ()
    made = export(smallest, bundle, **asked).manifest
    assert Manifest.load(bundle) == made
    (record,) = made.programs_checked
    assert (record.program, record.pipeline_class) == (
        made.programs[0].name,
        made.source.pipeline_class,
    )
    one, several = record.calls
    assert (one.prompts, one.images, one.given, len(one.seeds)) == (1, 1, 0, 1)
    assert several.prompts * several.images == 4
    for call in record.calls:
        assert call.refused is None
        assert call.relative_l2 is not None
        assert 0 < call.relative_l2 < call.tolerance == LIMIT
        assert not call.miniature
    assert export(smallest, bundle, verify=False, **asked).manifest == made


def test_the_record_says_what_diffusers_refuses(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each program has one record, of the class of its task, with all its calls."""
    found = compared("sd", pipeline_folder("sd"), tmp_path / "bundle")
    refused = replace(found[0], latents=0.0, refused="no" * 999)
    records = recorded([refused, *found[1:]])
    assert [each.program for each in records] == [*dict.fromkeys(c.program.name for c in found)]
    assert {each.program: each.pipeline_class for each in records} == {
        each.program.name: each.program.stands_for for each in found
    }
    for record in records:
        own = [each for each in found if each.program.name == record.program]
        assert [call.seeds for call in record.calls] == [each.shape.seeds for each in own]
        takes = record.program != "text-to-image"
        assert [call.given for call in record.calls] == [takes * each.shape.given for each in own]
    call = records[0].calls[0]
    assert call.relative_l2 is None
    assert call.refused == "no" * 150


def test_an_export_writes_nothing_then(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = latentc.exporter.compiler.run.with_planned_steps

    def changed(*arguments: Any) -> Program:
        return with_steps(planned(*arguments), Noise, each_made=False)

    monkeypatch.setattr(latentc.exporter.compiler.run, "with_planned_steps", changed)
    with pytest.raises(VerificationError, match="no bundle was written"):
        export(
            pipeline_folder("sd"),
            tmp_path / "bundle",
            tasks=["image-to-image"],
            schedulers=[],
            steps=[4],
        )
    assert not (tmp_path / "bundle").exists()
