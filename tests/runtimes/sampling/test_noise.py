"""The numpy generator against the real ones of torch and diffusers."""

import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st

from latentc.runtimes.errors import InputError
from latentc.runtimes.sampling import noise

# Three times what was measured over a few million values; a wrong word or pairing is off by 1.
TOLERANCE = 1e-6

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1, -1, -42, -(2**63)]
SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (15,),
    (16,),
    (17,),
    (31,),
    (32,),
    (33,),
    (1, 3, 5, 7),
    (2, 0, 4),
    (1, 4, 16, 16),
    (3, 4, 9, 11),
    (2, 4, 64, 64),
    (1, 4, 128, 128),
]


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == tuple(theirs.shape)
    assert ours.flags.c_contiguous
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_shapes(seed: int, shape: tuple[int, ...]) -> None:
    ours = noise.Generator(seed).randn(shape)
    assert_same(ours, torch.randn(shape, generator=torch_generator(seed)))


@pytest.mark.parametrize("size", [3, 16, 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(seed: int, size: int) -> None:
    assert_same(
        noise.Generator(seed).randn(size), torch.randn(size, generator=torch_generator(seed))
    )


def test_small_draws_are_bit_equal() -> None:
    ours, theirs = noise.Generator(7), torch_generator(7)
    for size in [1, 1, 2, 3, 15, 8, 1] * 20:
        np.testing.assert_array_equal(ours.randn(size), torch.randn(size, generator=theirs).numpy())


def test_a_million_values() -> None:
    ours = noise.Generator(5).randn(1 << 20)
    assert_same(ours, torch.randn(1 << 20, generator=torch_generator(5)))


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    sizes=st.lists(
        st.one_of(st.integers(0, 40), st.sampled_from([48, 255, 256, 1000])), max_size=12
    ),
)
def test_sequences_of_draws(seed: int, sizes: list[int]) -> None:
    """Small draws cache a value over large ones; the tail rule eats 16 more words."""
    ours, theirs = noise.Generator(seed), torch_generator(seed)
    for size in sizes:
        assert_same(ours.randn(size), torch.randn(size, generator=theirs))


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(0, 9), max_size=4),
)
def test_any_shape(seed: int, shape: list[int]) -> None:
    assert_same(
        noise.Generator(seed).randn(shape), torch.randn(shape, generator=torch_generator(seed))
    )


@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (3, 1, 2, 2), (3, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("seeds", [[11], [11, 22, 33], [5, 5, 5]], ids=str)
def test_batches_against_diffusers(seeds: list[int], shape: tuple[int, ...]) -> None:
    """Initial latents, then the draws of a stochastic scheduler from the same generators."""
    ours, theirs = noise.seeded(seeds), [torch_generator(seed) for seed in seeds]
    for _ in range(3):
        assert_same(noise.draw(ours, shape), randn_tensor(shape, generator=theirs))


def test_one_generator_for_the_batch_against_diffusers() -> None:
    ours, theirs = noise.seeded(99), torch_generator(99)
    for _ in range(3):
        shape = (2, 4, 8, 8)
        assert_same(noise.draw(ours, shape), randn_tensor(shape, generator=theirs))


def test_an_image_does_not_depend_on_its_batch() -> None:
    shape = (3, 4, 8, 8)
    batch = noise.draw(noise.seeded([7, 8, 9]), shape)
    alone = noise.draw(noise.seeded(8), (1, *shape[1:]))
    np.testing.assert_array_equal(batch[1:2], alone)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, 1.5, True, "1", None], ids=repr)
def test_bad_seeds(seed: object) -> None:
    """Seeds that torch refuses are refused, too, by an error of ours that names the seed."""
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        torch_generator(seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed must be"):
        noise.Generator(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [[], "12", b"12"], ids=repr)
def test_bad_seed_lists(seed: object) -> None:
    with pytest.raises(InputError, match="seed must be"):
        noise.seeded(seed)  # type: ignore[arg-type]


def test_numpy_integers_are_seeds() -> None:
    np.testing.assert_array_equal(
        noise.Generator(np.int64(3)).randn(20), noise.Generator(3).randn(20)
    )


def test_wrong_number_of_generators() -> None:
    with pytest.raises(InputError, match="2 generators for a batch of 3"):
        noise.draw(noise.seeded([1, 2]), (3, 4, 8, 8))


def test_negative_dimension() -> None:
    with pytest.raises(InputError, match="negative"):
        noise.Generator(0).randn((2, -1))


def test_fresh_seeds_differ_and_fit() -> None:
    seeds = {noise.fresh_seed() for _ in range(64)}
    assert len(seeds) > 60
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_numpys_own_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    noise.Generator(0).randn(100)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_generators_of_several_threads_do_not_disturb_each_other() -> None:
    expected = noise.Generator(3).randn(10_000)
    results: list[np.ndarray] = []

    def work() -> None:
        generator = noise.Generator(3)
        results.append(np.concatenate([generator.randn(2_000) for _ in range(5)]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(result, expected) for result in results)


def test_distribution() -> None:
    """A guard that needs no torch: mean, deviation, no infinity."""
    values = noise.Generator(123).randn(1 << 18)
    assert np.isfinite(values).all()
    assert abs(float(values.mean())) < 5 / math.sqrt(values.size)
    assert abs(float(values.std()) - 1) < 0.01


def test_importing_is_cheap() -> None:
    """Neither torch nor numpy.random is loaded by the import."""
    code = (
        "import sys, latentc.runtimes.sampling.noise; "
        "sys.exit(int('torch' in sys.modules or 'numpy.random' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
