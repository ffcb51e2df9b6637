"""``latentc compute``, and ``--value`` of the commands that call a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import latentc
from latentc.runtimes.backends import backend as engines
from latentc.runtimes.storage.npz import read_arrays
from tests.conftest import Run
from tests.hostile.test_regular_files import ODD
from tests.support.fakes import FakeBackend, make_bundle

CALL = ("--steps", 2, "--seed", 7)


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend, and a cache of its own."""
    monkeypatch.setenv("LATENTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "BACKENDS", {"fake": "tests.support.fakes:FakeBackend"})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_values_go_out_and_in(bundle: Path, run: Run) -> None:
    """Values that were computed before give the same image, each in turn and all at once."""
    call = ("--guidance-scale", 2, "--height", 8, "--width", 32)
    assert run("generate", bundle, "a red circle", *CALL, *call, "-o", "whole.png")[0] == 0
    text = ("--prompt", "a red circle")
    names = ("prompt_embeds", "negative_prompt_embeds", "latents", "denoised")
    code, out, err = run("compute", bundle, *names, *text, *CALL, *call, "-o", "all.npz")
    assert (code, err) == (0, "")
    assert "all.npz  latents  float32 [1, 4, 4, 16]\n" in out
    found = read_arrays("all.npz")
    assert [*found] == [*names]
    with latentc.load(bundle, FakeBackend()) as pipe:
        for name in names:
            expected = pipe.compute(
                *(name,), prompt="a red circle", num_inference_steps=2, seed=7, guidance_scale=2.0,
                height=8, width=32,
            )  # fmt: skip
            np.testing.assert_array_equal(found[name], expected)
    for given, prompt, others in (
        (("prompt_embeds",), (), (*CALL, *call)),
        (("latents",), ("a red circle",), ("--steps", 2, *call)),
        (("prompt_embeds", "negative_prompt_embeds", "latents"), (), ("--steps", 2, *call)),
        (("denoised",), (), ()),
    ):
        values = [word for name in given for word in ("--value", f"{name}=all.npz")]
        assert run("generate", bundle, *prompt, *values, *others, "-o", "again.png")[0] == 0, given
        np.testing.assert_array_equal(pixels("again.png"), pixels("whole.png"), str(given))


def test_files_of_one_array(bundle: Path, run: Run) -> None:
    """By any name, and as .npy; the number of images is that of the rows."""
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    np.save("noise.npy", latents)
    np.savez("noise.npz", anything=latents)
    both = []
    for file in ("noise.npy", "noise.npz"):
        given = ("--value", f"latents={file}", "--prompt", "a", "-n", 2, "--steps", 2)
        assert run("compute", bundle, "denoised", *given, "-o", "made.npz")[0] == 0
        both.append(read_arrays("made.npz")["denoised"])
    np.testing.assert_array_equal(*both)
    assert run("generate", bundle, "--value", "denoised=made.npz", "-o", "x.png")[0] == 0
    assert sorted(path.name for path in Path().glob("x*.png")) == ["x-0.png", "x-1.png"]


@pytest.mark.usefixtures("no_exporter")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("compute BUNDLE -o a.npz", 2, "Missing argument 'NAME...'"),
        ("compute BUNDLE prompt_embeds --prompt a", 2, "Missing option '-o'"),
        ("compute nowhere latents -o a.npz", 4, "no bundle at nowhere"),
        ("compute BUNDLE latents -o a.npy", 2, "the extension '.npy' is not .npz"),
        ("compute BUNDLE latents -o folder.npz", 2, "is a folder; give a file"),
        ("compute BUNDLE latents -o none/a.npz", 2, "does not exist"),
        ("compute BUNDLE _latents -o a.npz", 2, "no value '_latents' can be asked for; did you"),
        ("compute BUNDLE prompt_embeds -o a.npz", 2, "no text given: this bundle needs 'prompt'"),
        ("compute BUNDLE denoised --prompt a --steps 3 -o a.npz", 2, "no sampling plan for 3"),
        ("compute BUNDLE latents --value coffee=one.npz -o a.npz", 2, "no value 'coffee'; this bu"),
        ("generate BUNDLE a --value coffee=one.npz", 2, "no value 'coffee'; this bundle has: "),
        ("generate BUNDLE a --value latents", 2, "--value 'latents': expected NAME=FILE"),
        ("generate BUNDLE a --value latents=", 2, "--value 'latents=': expected NAME=FILE"),
        ("generate BUNDLE a --value latents=none.npz", 2, "--value latents: none.npz: not a .npz"),
        ("generate BUNDLE a --value latents=none.npy", 2, "--value latents: none.npy: not a .npy"),
        ("generate BUNDLE a --value latents=text.npz", 2, "--value latents: text.npz: not a .npz"),
        ("generate BUNDLE a --value latents=pickle.npy", 2, "pickle.npy has dtype |O in C order"),
        ("generate BUNDLE a --value latents=two.npz", 2, "holds a, b: expected one array, or one "),
        ("generate BUNDLE a --value latents=one.npz", 2, "'latents' must have the shape [rows, 4,"),
        (
            "generate BUNDLE --value prompt_embeds=one.npz --value prompt_embeds=one.npz",
            2,
            "--value prompt_embeds: it is given twice",
        ),
        (
            "generate BUNDLE --prompt-embeds texts.npz --value prompt_embeds=one.npz",
            2,
            "--value prompt_embeds: it is given twice",
        ),
    ],
)
def test_failures(arguments: str, code: int, message: str, bundle: Path, run: Run) -> None:
    Path("folder.npz").mkdir()
    Path("text.npz").write_text("no archive")
    np.savez("one.npz", a=np.zeros((1, 2), np.float32))
    np.savez("two.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez("texts.npz", prompt_embeds=np.zeros((1, 6, 2), np.float32))
    np.save("pickle.npy", np.array([{}], object), allow_pickle=True)
    before = sorted(Path().rglob("*"))
    given = [str(bundle) if word == "BUNDLE" else word for word in arguments.split()]
    found, out, err = run(*given)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.timeout(120)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize("make", ODD)
def test_a_value_is_a_bounded_regular_file(
    make: Callable[[Path], None], suffix: str, bundle: Path, run: Run
) -> None:
    make(Path(f"odd{suffix}"))
    code, _, errors = run("generate", bundle, "a", "--value", f"latents=odd{suffix}")
    assert (code, f"--value latents: odd{suffix}" in errors) == (2, True), errors


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, run: Run) -> None:
    bundle = make_bundle(tmp_path / "bad", graphs={"denoiser": "nan_denoiser"})
    Path("a.npz").write_bytes(b"before")
    code, _, err = run("compute", bundle, "denoised", "--prompt", "a", *CALL, "-o", "a.npz")
    assert code == 5
    assert "denoiser" in err
    assert Path("a.npz").read_bytes() == b"before"
    assert not [name for name in os.listdir() if name.startswith(".")]
