"""Judges: what they say stands in the verification, and a build that loses images misses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from latentc.runtimes import plugins
from latentc.runtimes.bundle.manifest import MANIFEST, Manifest
from latentc.runtimes.bundle.structures import JudgeProbe, Probes, Verification
from latentc.runtimes.commands.report import print_manifest
from latentc.runtimes.errors import InputError
from latentc.runtimes.verification import judges
from latentc.runtimes.verification.verify import check_build
from tests.support.fakes import FakeBackend, add_probes, make_bundle

PROMPTS = tuple(f"image {number}" for number in range(23))


class Even:
    """Finds images of even numbers right, and looks at none."""

    def prompts(self, count: int) -> Sequence[str]:
        return PROMPTS[:count]

    def agrees(self, image: Image.Image, prompt: str) -> bool:
        assert image.size == (8, 16)
        return int(prompt.split()[1]) % 2 == 0


class Broken:
    def __init__(self) -> None:
        raise RuntimeError("no eyes")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"even": f"{__name__}:Even", "broken": f"{__name__}:Broken"}
    monkeypatch.setattr(plugins, "entry_points", lambda _: here)


def judged(bundle: Path, right: int, judge: str = "even") -> Manifest:
    """Write probes for a judge that found `right` images right at export, and return the manifest.

    The fakes make 12 of 23 images right.
    """
    manifest = add_probes(make_bundle(bundle) if not bundle.exists() else bundle)
    probe = JudgeProbe({"guidance_scale": 2.0}, "plain", 2, 7, 16, 8, judge, PROMPTS, right)
    assert isinstance(manifest.probes, Probes)
    probes = msgspec.structs.replace(manifest.probes, judged=probe)
    manifest = msgspec.structs.replace(manifest, probes=probes)
    (bundle / MANIFEST).write_bytes(manifest.encode())
    return Manifest.load(bundle)


def check(bundle: Path, manifest: Manifest, told: list[str] | None = None) -> Verification:
    report = told.append if told is not None else None
    return check_build(bundle, manifest, manifest.builds[0], FakeBackend(), report=report)


@pytest.mark.parametrize(("right", "least", "passed"), [(12, 12, True), (13, 13, False)])
def test_the_score_is_held_against_that_of_pytorch(
    tmp_path: Path, right: int, least: int, passed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, told = judged(tmp_path / "bundle", right), list[str]()
    found = check(tmp_path / "bundle", manifest, told)
    assert found.score is not None
    assert (found.score.judge, found.score.right, found.score.images) == ("even", 12, 23)
    assert (found.score.least, found.score.passed) == (least, passed)
    assert found.passed == passed
    assert told[-1] == "judge"
    build = msgspec.structs.replace(manifest.builds[0], verification=found)
    again = Manifest.decode(msgspec.structs.replace(manifest, builds=(build,)).encode())
    assert again.builds[0].verification == found
    print_manifest(again)
    assert "12 of 23" in capsys.readouterr().out


def test_images_and_seeds_come_in_order(tmp_path: Path) -> None:
    manifest = judged(tmp_path / "bundle", 12)
    assert manifest.probes is not None
    assert manifest.probes.judged is not None
    seen: list[tuple[str, int]] = []

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        assert len(prompts) <= judges.BATCH
        seen.extend(zip(prompts, seeds, strict=True))
        return [Image.fromarray(np.zeros((16, 8, 3), np.uint8))] * len(prompts)

    probe = manifest.probes.judged
    assert judges.count_right(judges.get("even"), probe.prompts, probe.seed, draw) == 12
    assert seen == [(prompt, 7 + index) for index, prompt in enumerate(PROMPTS)]


def test_a_judge_that_is_not_here_is_not_asked(tmp_path: Path) -> None:
    manifest = judged(tmp_path / "bundle", 12, judge="someone else's")
    found = check(tmp_path / "bundle", manifest)
    assert found.score is None
    assert found.passed


def test_a_slow_backend_is_not_asked_for_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = judged(tmp_path / "bundle", 12)
    monkeypatch.setattr(FakeBackend, "slow", True)
    assert check(tmp_path / "bundle", manifest).score is None


def test_nan_is_no_image(tmp_path: Path) -> None:
    manifest = judged(tmp_path / "good", 12)
    broken = make_bundle(tmp_path / "broken", graphs={"denoiser": "nan_denoiser"})
    (tmp_path / "good/probes").rename(broken / "probes")
    manifest = msgspec.structs.replace(Manifest.load(broken), probes=manifest.probes)
    found = check(broken, manifest)
    assert found.score is not None
    assert (found.score.right, found.score.passed) == (0, False)


def test_what_get_refuses() -> None:
    with pytest.raises(InputError, match=r"no judge named 'x' is installed.*broken, even"):
        judges.get("x")
    with pytest.raises(InputError, match=r"judge 'broken'.*no eyes"):
        judges.get("broken")
