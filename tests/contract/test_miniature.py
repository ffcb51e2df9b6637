"""Miniatures: the same classes and programs as a pipeline, smaller; what a program does wrong shows
on them as well."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

import latentc.exporter.verification.programs
from latentc.exporter.compiler.export import export
from latentc.exporter.compiler.requested import with_tasks
from latentc.exporter.compiler.run import planned_programs
from latentc.exporter.components.description import Description
from latentc.exporter.families import family_of
from latentc.exporter.progress import Progress
from latentc.exporter.verification.miniature import (
    AFFORDABLE,
    NoMiniature,
    miniature_of,
    numbers_of,
    same_but_for_widths,
)
from latentc.exporter.verification.programs import (
    LIMIT,
    SHAPES,
    Comparison,
    Subject,
    check_programs,
    recorded,
)
from latentc.runtimes.bundle.manifest import Manifest
from latentc.runtimes.errors import VerificationError
from latentc.runtimes.programs.statements import Noise, Program
from tests.contract.test_every_argument import KINDS, bundle_of
from tests.contract.test_program_check import FAULTS, with_default, with_steps
from tests.support import tiny
from tests.support.combinations import kept
from tests.support.published import PUBLISHED
from tests.support.tiny_configurations import (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    UNCONDITIONAL,
    Configuration,
    stable_diffusion,
    stable_diffusion_xl,
    unconditional,
)
from tests.support.uncaptured import uncaptured

MADE: Mapping[Callable[[Path, Configuration], None], Mapping[str, Configuration]] = {
    stable_diffusion: STABLE_DIFFUSION,
    stable_diffusion_xl: STABLE_DIFFUSION_XL,
    unconditional: UNCONDITIONAL,
}


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latentc.exporter.verification.programs, "_LARGE", 0)


def modules_of(pipe: Any) -> list[torch.nn.Module]:
    """Return the parts of a pipeline that have weights."""
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def shapes_of(pipe: Any) -> list[torch.Size]:
    """Return the shapes of a pipeline's weights."""
    return [weights.shape for part in modules_of(pipe) for weights in part.parameters()]


def are_same(some: Sequence[Program], others: Sequence[Program]) -> bool:
    """Return whether programs are the same one by one, but for widths."""
    return len(some) == len(others) and all(map(same_but_for_widths, some, others))


def subject_of(small: Any, manifest: Manifest) -> Subject:
    """Return a miniature with the tasks of a manifest, and what would be its manifest."""
    name = type(small).__name__
    description = family_of(name).describe(small)
    description = with_tasks(description, [each.name for each in manifest.programs[1:]], name)
    components = tuple(graph.component for graph in description.graphs)
    programs = planned_programs(description, manifest.schedules)
    made = structs.replace(manifest, programs=programs, components=components)
    return Subject(small, description, made, miniature=True)


def compared(
    kind: str, source: Path, folder: Path, small: Callable[[Any, Manifest], Subject]
) -> list[Comparison]:
    """Return the comparisons of a large pipeline of a kind, of which `small` makes a miniature."""
    comparisons: list[Comparison] = []

    def examine(pipe: Any, description: Description, manifest: Manifest, root: Path) -> None:
        make = partial(small, pipe, manifest)
        comparisons.extend(
            check_programs(pipe, description, manifest, root, Progress(None), None, make)
        )

    bundle_of(kind, source, folder, examine=examine)
    return comparisons


def usual(pipe: Any, manifest: Manifest) -> Subject:
    """Return the miniature that an export makes."""
    return subject_of(miniature_of(pipe), manifest)


# Latent diffusion's own text encoder cannot be made smaller, nor need it be, nor Kandinsky's parts;
# of panoramas diffusers makes one image right.
SHRINKABLE = tuple(kind for kind in KINDS if kind not in ("ldm", "panorama", "kandinsky"))


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("kind", SHRINKABLE)
def test_every_kind_has_a_miniature(
    kind: str, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """It has the same programs, and does as diffusers does, in one image and in several."""
    made: list[Subject] = []

    def small(pipe: Any, manifest: Manifest) -> Subject:
        before = torch.get_rng_state()
        made.append(usual(pipe, manifest))
        assert torch.equal(torch.get_rng_state(), before)
        assert type(made[0].pipe) is type(pipe)
        assert are_same(made[0].manifest.programs, manifest.programs)
        assert shapes_of(made[0].pipe) != shapes_of(pipe)
        return made[0]

    source = pipeline_folder(kind.partition("+")[0])
    comparisons = compared(kind, source, tmp_path / "bundle", small)
    names = {each.name for each in made[0].manifest.programs}
    of_source = [each for each in comparisons if not each.miniature]
    assert {each.program.name for each in of_source} == names
    assert {each.shape.seeds for each in of_source} == {SHAPES[0].seeds}
    on_miniature = [each for each in comparisons if each.miniature]
    assert [(each.program.name, each.shape.images) for each in on_miniature] == [
        (each.name, shape.images) for each in made[0].manifest.programs for shape in SHAPES
    ]
    assert not [each for each in comparisons if each.refused]
    assert max(each.latents for each in comparisons) < LIMIT
    for record in recorded(comparisons):
        assert [call.miniature for call in record.calls] == [False, True, True]


@pytest.mark.parametrize("name", [*STABLE_DIFFUSION, *STABLE_DIFFUSION_XL, *UNCONDITIONAL])
def test_configurations_unlike_those_of_published_models(name: str, tmp_path: Path) -> None:
    """Every option that a family knows stays as it is."""
    comparisons: list[Comparison] = []

    def examine(pipe: Any, _: Description, manifest: Manifest, root: Path) -> None:
        small = usual(pipe, manifest)
        assert are_same(small.manifest.programs, manifest.programs)
        given = (small.pipe, small.description, small.manifest, root, Progress(None))
        comparisons.extend(check_programs(*given))

    source = tmp_path / "pipeline"
    for make, table in MADE.items():
        if name in table:
            make(source, table[name])
    uncaptured(source, tmp_path / "bundle", examine=examine)
    assert not [each for each in comparisons if each.refused]
    assert max(each.latents for each in comparisons) < LIMIT


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if FAULTS[fault][0] in SHRINKABLE])
def test_a_fault_is_noticed_on_a_miniature(
    fault: str, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, change = FAULTS[fault]

    def examine(pipe: Any, _: Description, manifest: Manifest, root: Path) -> None:
        small = usual(pipe, manifest)
        programs = tuple(map(change, small.manifest.programs))
        wrong = structs.replace(small.manifest, programs=programs)
        check_programs(small.pipe, small.description, wrong, root, Progress(None))

    source = pipeline_folder(kind.partition("+")[0])
    with pytest.raises(VerificationError, match=r"does not do what .* does in diffusers"):
        bundle_of(kind, source, tmp_path / "bundle", examine=examine)


@pytest.mark.usefixtures("everything_is_large")
def test_what_shows_in_several_images_alone(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A family that writes a wrong program writes it of the miniature as well, and there is no
    bundle; one image of the model itself shows nothing."""

    def change(program: Program) -> Program:
        return with_steps(program, Noise, each_made=False)

    def examine(pipe: Any, description: Description, manifest: Manifest, root: Path) -> None:
        def small() -> Subject:
            right = usual(pipe, manifest)
            programs = tuple(map(change, right.manifest.programs))
            return replace(right, manifest=structs.replace(right.manifest, programs=programs))

        wrong = structs.replace(manifest, programs=tuple(map(change, manifest.programs)))
        given = (pipe, description, wrong, root, Progress(None))
        assert not any(each.miniature for each in check_programs(*given))
        check_programs(*given, small=small)

    says = "2 prompts by 2 images, on a miniature of the model, latents"
    with pytest.raises(VerificationError, match=says):
        bundle_of("sd", pipeline_folder("sd"), tmp_path / "bundle", examine=examine)


def broken(pipe: Any, manifest: Manifest) -> Subject:
    """Return a miniature that diffusers cannot run: its UNet is for wider texts."""
    subject = usual(pipe, manifest)
    subject.pipe.text_encoder = pipe.text_encoder
    return subject


def another(pipe: Any, manifest: Manifest) -> Subject:
    """Return a miniature whose program has another default."""
    subject = usual(pipe, manifest)
    programs = [with_default(each, "guidance_scale", 2.5) for each in subject.manifest.programs]
    changed = structs.replace(subject.manifest, programs=tuple(programs))
    return replace(subject, manifest=changed)


def without(pipe: Any, manifest: Manifest) -> Subject:
    """Return nothing: what stands for the UNet is of a class that nothing is known about."""

    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(AFFORDABLE + 1, device="meta"))

    pipe.vae, vae = Other(), pipe.vae
    try:
        return usual(pipe, manifest)
    finally:
        pipe.vae = vae


def not_finite(pipe: Any, manifest: Manifest) -> Subject:
    """Return a miniature whose weights give no numbers."""
    subject = usual(pipe, manifest)
    with torch.no_grad():
        subject.pipe.unet.conv_out.weight.fill_(float("inf"))
    return subject


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("small", "says"),
    [
        (broken, "diffusers cannot run its text-to-image: "),
        (another, "its program 'text-to-image' is another one"),
        (without, "vae: nothing is known about how to make a Other smaller"),
        (not_finite, "its random weights give no finite latents in text-to-image"),
    ],
)
def test_no_miniature_is_said_and_not_recorded(
    small: Any, says: str, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The export goes on, and says that it made calls of one image only."""
    with pytest.warns(UserWarning, match=f"calls of one image only.*{re.escape(says)}"):
        comparisons = compared("sd", pipeline_folder("sd"), tmp_path / "bundle", small)
    assert not any(each.miniature for each in comparisons)
    assert {each.shape.images for each in comparisons} == {1}


def test_models_that_are_not_large_have_none(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def small(pipe: Any, _: Manifest) -> Subject:
        raise AssertionError(f"a miniature of {pipe} was made")

    comparisons = compared("inpaint", pipeline_folder("inpaint"), tmp_path / "bundle", small)
    assert {each.shape.images for each in comparisons} == {1, 2}


@pytest.mark.usefixtures("everything_is_large")
def test_an_export_of_a_large_model(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The manifest says which calls were those of a miniature; the bundle is of the source."""
    source, settings = pipeline_folder("sd-blocks"), {"schedulers": [], "steps": [2]}
    options: dict[str, Any] = {**settings, "passes": ["step-cache"]}
    manifest = export(source, tmp_path / "bundle", **options).manifest
    (record,) = manifest.programs_checked
    assert [call.miniature for call in record.calls] == [False, True, True]
    assert record.passed
    plain = export(source, tmp_path / "plain", verify=False, **options).manifest
    assert manifest.programs == plain.programs
    assert manifest.components == plain.components


@pytest.mark.parametrize(
    "name", kept(PUBLISHED, "stable_diffusion", "flux_dev", "qwen_image", "wan_2_2")
)
def test_a_published_configuration(name: str, tmp_path: Path) -> None:
    """A model with billions of numbers has a miniature with a few millions, which does as diffusers
    does, and has the same programs.
    """
    large = PUBLISHED[name](tmp_path / "tokenizers")
    assert numbers_of(iter(modules_of(large))) > 500_000_000
    small = miniature_of(large)
    assert numbers_of(iter(modules_of(small))) < 5_000_000
    family = family_of(type(large).__name__)
    programs = family.describe(large).programs
    assert are_same(family.describe(small).programs, programs)
    small.save_pretrained(tmp_path / "pipeline")
    comparisons: list[Comparison] = []

    def examine(pipe: Any, description: Description, manifest: Manifest, root: Path) -> None:
        comparisons.extend(check_programs(pipe, description, manifest, root, Progress(None)))

    tasks, steps = [program.name for program in programs[1:]], (2, 8)
    uncaptured(tmp_path / "pipeline", tmp_path / "bundle", tasks, steps, examine=examine)
    assert len(comparisons) == len(programs) * len(SHAPES)
    assert not [each for each in comparisons if each.refused]
    assert max(each.latents for each in comparisons) < LIMIT


def test_parts_that_do_not_fit_have_no_miniature(tmp_path: Path) -> None:
    """Parts that diffusers would refuse only when it runs make no miniature either."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny.make("sd", tmp_path / "pipeline"))
    pipe.unet = tiny.conditional_unet(cross_attention_dim=40)
    with pytest.raises(NoMiniature, match="cross_attention_dim is 40, and 32 are given"):
        miniature_of(pipe)
