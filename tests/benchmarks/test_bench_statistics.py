"""Quantiles, bootstrap intervals, verdicts and energy counters of `latentc bench`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from latentc.benchmarks.bench import energy, fidelity, roofline, statistics
from latentc.benchmarks.bench.fidelity import Images
from latentc.benchmarks.bench.model import Operations, Peak
from tests.support.bench_reports import series


def test_quantiles_are_those_of_all_values() -> None:
    found = statistics.summarise([[1.0, 2.0], [3.0, 4.0, 5.0], []])
    assert (found.p50, found.p90, found.count, found.rounds) == (3.0, pytest.approx(4.6), 5, 2)
    with pytest.raises(ValueError, match="no values"):
        statistics.summarise([[], []])


def test_the_interval_agrees_with_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(4.0, 1.0, 60)
    # Rounds of one value: drawing rounds is then the ordinary bootstrap.
    found = statistics.summarise([[float(v)] for v in values])
    wanted = stats.bootstrap(
        (values,), np.median, n_resamples=5000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = wanted.high - wanted.low
    assert found.low == pytest.approx(wanted.low, abs=0.15 * width)
    assert found.high == pytest.approx(wanted.high, abs=0.15 * width)


def test_the_ratios_interval_agrees_with_scipys() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.gamma(9.0, 1.0, 80), draw.gamma(6.0, 1.0, 70)
    found = statistics.ratio([[float(v)] for v in a], [[float(v)] for v in b])
    wanted = stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.median(x, axis=axis) / np.median(y, axis=axis),
        n_resamples=5000, method="percentile", rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    width = wanted.high - wanted.low
    assert found.value == pytest.approx(np.median(a) / np.median(b))
    assert found.low == pytest.approx(wanted.low, abs=0.2 * width)
    assert found.high == pytest.approx(wanted.high, abs=0.2 * width)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(60):
        found = statistics.ratio(
            series(3.0, rounds=12, seed=2 * seed), series(2.0, rounds=12, seed=2 * seed + 1)
        )
        inside += found.low <= 1.5 <= found.high
    assert inside >= 51  # of 60; 95% of them less what twelve rounds cost


def test_moments_that_rounds_share_cancel_in_a_ratio() -> None:
    moment = [1.0, 3.0, 1.5, 2.5, 1.2]
    case = [[m * x for x in (0.99, 1.0, 1.01)] for m in moment]
    other = [[2 * value for value in each] for each in case]
    found = statistics.ratio(other, case)
    assert found.value == pytest.approx(2)
    assert 1.9 < found.low <= found.high < 2.1


def test_noise_is_how_far_rounds_lie_apart() -> None:
    assert statistics.noise([[1.0], [1.2], [1.1]]) == pytest.approx(0.1 / 1.1)
    assert statistics.noise([[2.0, 2.0, 2.0]]) == 0.0
    assert statistics.noise([[1.0, 2.0, 3.0, 4.0, 5.0]]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("value", "low", "high", "noise", "word"),
    [
        (1.5, 1.3, 1.7, 0.1, "more"),
        (1.5, 0.9, 2.1, 0.1, "same"),  # the interval holds 1
        (1.5, 1.3, 1.7, 0.6, "same"),  # less than the noise
        (0.5, 0.4, 0.6, 0.1, "less"),
        (0.95, 0.94, 0.96, 0.1, "same"),
    ],
)
def test_verdicts(value: float, low: float, high: float, noise: float, word: str) -> None:
    assert statistics.verdict(statistics.Ratio(value, low, high), noise) == word


def test_energy_counters_are_read_and_may_start_again(tmp_path: Path) -> None:
    assert energy.read(tmp_path).joules_since(energy.read(tmp_path)) is None
    zone = tmp_path / "intel-rapl:0"
    part = tmp_path / "intel-rapl:0:0"  # is counted in the whole already
    for folder in (zone, part):
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text("10000000\n")
        (folder / "energy_uj").write_text("9000000\n")
    before = energy.read(tmp_path)
    (zone / "energy_uj").write_text("9500000\n")
    assert energy.read(tmp_path).joules_since(before) == 0.5
    (zone / "energy_uj").write_text("250000\n")
    assert energy.read(tmp_path).joules_since(before) == 1.25


def test_limits_follow_the_roofline() -> None:
    peaks = [
        Peak(device="cpu", threads=0, name="fp32", unit="operations/s", value=100.0),
        Peak(device="cpu", threads=0, name=roofline.BANDWIDTH, unit="bytes/s", value=10.0),
    ]

    def work(operations: int, weights: int) -> Operations:
        return Operations(component="denoiser_step", batch=1, height=8, width=8, steps=1,
                          operations=operations, weights=weights, transfers=0)  # fmt: skip

    found = roofline.limit(work(200, 1), 8.0, peaks, "cpu", 0, "fp32")
    assert found is not None
    assert (found.seconds, found.fraction, found.bound) == (2.0, 0.25, "compute")
    found = roofline.limit(work(200, 50), 10.0, peaks, "cpu", 0, "fp32")
    assert found is not None
    assert (found.seconds, found.fraction, found.bound) == (5.0, 0.5, "memory")
    assert roofline.limit(work(200, 1), 8.0, peaks, "cpu", 0, "bf16") is None
    assert roofline.limit(work(200, 1), 8.0, peaks, "cpu", 2, "fp32") is None


def test_operations_are_counted_in_attention_too() -> None:
    import torch

    a, b = torch.ones(3, 5), torch.ones(5, 7)
    query = torch.ones(2, 4, 9, 16)
    with roofline.counting() as counter:
        torch.mm(a, b)
        assert counter() == 2 * 3 * 5 * 7
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert counter() - 2 * 3 * 5 * 7 == 2 * (2 * 2 * 4 * 9 * 9 * 16)


def test_the_best_of_several_peaks_counts() -> None:
    record = {"device": "cpu", "threads": 0, "name": "fp32", "unit": "operations/s", "value": 2.0}
    (found,) = roofline.best([[record], [{**record, "value": 3.0}], []])
    assert found.value == 3.0


def test_fidelity_of_equal_and_of_other_images() -> None:
    draw = np.random.default_rng(5)
    images = draw.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    latents = draw.standard_normal((2, 4, 8, 8)).astype(np.float32)
    same = fidelity.compare(Images(images, latents), Images(images, latents))
    assert same is not None
    assert (same.psnr, same.ssim, same.latents_relative_l2, same.max_difference) == (99, 1, 0, 0)
    other = images.copy()
    other[0, 0, 0, 0] ^= 64
    found = fidelity.compare(Images(other, latents * np.float32(1.1)), Images(images, latents))
    assert found is not None
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / (64**2 / images.size)))
    assert found.latents_relative_l2 == pytest.approx(0.1, rel=1e-3)
    assert found.max_difference == 64
    assert 0.9 < found.ssim < 1
    assert fidelity.compare(Images(images[:, :8], None), Images(images, None)) is None


def test_a_map_of_differences_is_black_where_they_are_largest(tmp_path: Path) -> None:
    from PIL import Image

    images = np.zeros((1, 4, 4, 3), np.uint8)
    other = images.copy()
    other[0, 1, 2, 0] = 5
    assert fidelity.save_difference(other, images, tmp_path / "map.png") == 5
    shade = np.asarray(Image.open(tmp_path / "map.png"))
    assert shade[1, 2] == 0
    assert (np.delete(shade.ravel(), 6) == 255).all()
