"""Every operator of the MIL evaluator against PyTorch, edge cases included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latentc.runtimes.backends.coreml.mil.operators import table

OPERATORS = table()


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(values, np.float32)


def t(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


X = rand(2, 3, 8, 10)
Y = rand(2, 3, 8, 10, seed=1)
POSITIVE = np.abs(X) + np.float32(0.1)
INTEGERS = np.array([[-7, -1, 0], [1, 5, 9]], np.int32)
WIDE = np.array([-1e4, -100, -6, -4, -1e-3, 0, 1e-3, 4, 6, 100, 1e4], np.float32)
SEQUENCE = rand(2, 4, 9, 8)
KEYS = rand(2, 4, 5, 8, seed=2)
VALUES = rand(2, 4, 5, 8, seed=3)
MASK = np.tril(np.ones((9, 5), bool))

# operator → (inputs, what PyTorch says), one entry per case
Case = tuple[dict[str, Any], Callable[[], Any]]
CASES: dict[str, list[Case]] = {
    "abs": [({"x": X}, lambda: t(X).abs())],
    "add": [({"x": X, "y": Y[:1, :, :1]}, lambda: t(X) + t(Y[:1, :, :1]))],
    "batch_norm": [
        (
            {"x": X, "mean": rand(3), "variance": POSITIVE[0, :, 0, 0], "gamma": rand(3, seed=5),
             "beta": rand(3, seed=6), "epsilon": 1e-3},
            lambda: F.batch_norm(t(X), t(rand(3)), t(POSITIVE[0, :, 0, 0]), t(rand(3, seed=5)),
                                 t(rand(3, seed=6)), eps=1e-3),
        ),
        (
            {"x": X, "mean": rand(3), "variance": POSITIVE[0, :, 0, 0]},
            lambda: F.batch_norm(t(X), t(rand(3)), t(POSITIVE[0, :, 0, 0])),
        ),
    ],
    "band_part": [
        ({"x": X, "lower": -1, "upper": 0}, lambda: t(X).tril()),
        ({"x": X, "lower": 2, "upper": -1}, lambda: t(X).triu(-2)),
        ({"x": X}, lambda: t(X)),
    ],
    "cast": [
        ({"x": WIDE, "dtype": "int32"}, lambda: t(WIDE).to(torch.int32)),
        ({"x": WIDE, "dtype": "bool"}, lambda: t(WIDE).to(torch.bool)),
        ({"x": WIDE, "dtype": "fp16"}, lambda: t(WIDE).half()),
        ({"x": np.array([True, False]), "dtype": "fp32"}, lambda: torch.tensor([1.0, 0.0])),
    ],
    "ceil": [({"x": X}, lambda: t(X).ceil())],
    "clip": [({"x": X, "alpha": -0.5, "beta": 0.25}, lambda: t(X).clamp(-0.5, 0.25))],
    "concat": [
        ({"values": [X, Y], "axis": 1}, lambda: torch.cat([t(X), t(Y)], 1)),
        ({"values": [np.int32(3), np.array([4, 5], np.int32)], "axis": 0},
         lambda: torch.tensor([3, 4, 5], dtype=torch.int32)),
        ({"values": [X, Y], "axis": 1, "interleave": True},
         lambda: torch.stack([t(X), t(Y)], 2).reshape(2, 6, 8, 10)),
    ],
    "cos": [({"x": X}, lambda: t(X).cos())],
    "cumsum": [
        ({"x": X, "axis": 2}, lambda: t(X).cumsum(2)),
        ({"x": X, "axis": 3, "reverse": True}, lambda: t(X).flip(3).cumsum(3).flip(3)),
        ({"x": X, "axis": 1, "exclusive": True}, lambda: t(X).cumsum(1) - t(X)),
    ],
    "einsum": [
        ({"values": [SEQUENCE, KEYS], "equation": "bhqc,bhkc->bhqk"},
         lambda: torch.einsum("bhqc,bhkc->bhqk", t(SEQUENCE), t(KEYS))),
        # The form that ML Programs have.
        ({"values": [rand(2, 7, 3, 8), rand(2, 8, 3, 6)], "equation": "nchw,nwhu->nchu"},
         lambda: torch.einsum("nchw,nwhu->nchu", t(rand(2, 7, 3, 8)), t(rand(2, 8, 3, 6)))),
    ],
    "equal": [({"x": INTEGERS, "y": np.int32(5)}, lambda: t(INTEGERS) == 5)],
    "erf": [({"x": WIDE}, lambda: t(WIDE).erf()), ({"x": X}, lambda: t(X).erf())],
    "exp": [({"x": X}, lambda: t(X).exp())],
    "exp2": [({"x": X}, lambda: t(X).exp2())],
    "expand_dims": [
        ({"x": X, "axes": [0, -1]}, lambda: t(X)[None, ..., None]),
        ({"x": np.float32(2), "axes": [0]}, lambda: torch.tensor([2.0])),
    ],
    "fill": [({"shape": [2, 3], "value": 0.5}, lambda: torch.full((2, 3), 0.5).double())],
    "fill_like": [({"ref_tensor": X, "value": 2.0}, lambda: torch.full_like(t(X), 2.0).double())],
    "floor": [({"x": X}, lambda: t(X).floor())],
    "floor_div": [
        ({"x": INTEGERS, "y": np.int32(3)}, lambda: t(INTEGERS).div(3, rounding_mode="floor")),
        ({"x": X, "y": POSITIVE}, lambda: t(X).div(t(POSITIVE), rounding_mode="floor")),
    ],
    "gather": [
        ({"x": X, "indices": np.array([2, 0, -1]), "axis": 1}, lambda: t(X[:, [2, 0, 2]])),
        ({"x": X, "indices": np.int32(1), "axis": -1}, lambda: t(X)[..., 1]),
        ({"x": X, "indices": np.array([[0, 7], [3, 3]], np.int32), "axis": 2, "batch_dims": 1},
         lambda: torch.stack([t(X)[0][:, [0, 7]], t(X)[1][:, [3, 3]]])),
    ],
    "gather_along_axis": [
        ({"x": INTEGERS, "indices": np.array([[2, 2], [0, 1]], np.int32), "axis": 1},
         lambda: torch.gather(t(INTEGERS), 1, torch.tensor([[2, 2], [0, 1]]))),
    ],
    "gather_nd": [
        ({"x": X, "indices": np.array([[0, 2], [1, 0]], np.int32)},
         lambda: torch.stack([t(X)[0, 2], t(X)[1, 0]])),
        ({"x": X, "indices": np.array([[2], [1]], np.int32), "batch_dims": 1},
         lambda: torch.stack([t(X)[0, 2], t(X)[1, 1]])),
    ],
    "gelu": [
        ({"x": X}, lambda: F.gelu(t(X))),
        ({"x": WIDE, "mode": "EXACT"}, lambda: F.gelu(t(WIDE))),
        ({"x": X, "mode": "TANH_APPROXIMATION"}, lambda: F.gelu(t(X), approximate="tanh")),
        ({"x": X, "mode": "SIGMOID_APPROXIMATION"}, lambda: t(X) * torch.sigmoid(1.702 * t(X))),
    ],
    "greater": [({"x": X, "y": Y}, lambda: t(X) > t(Y))],
    "greater_equal": [({"x": INTEGERS, "y": np.int32(0)}, lambda: t(INTEGERS) >= 0)],
    "identity": [({"x": X}, lambda: t(X))],
    "inverse": [({"x": POSITIVE, "epsilon": 1e-4}, lambda: 1 / (t(POSITIVE) + 1e-4))],
    "layer_norm": [
        ({"x": X, "axes": [-1], "gamma": rand(10), "beta": rand(10, seed=4), "epsilon": 1e-5},
         lambda: F.layer_norm(t(X), (10,), t(rand(10)), t(rand(10, seed=4)))),
        ({"x": X, "axes": [2, 3], "epsilon": 1e-2}, lambda: F.layer_norm(t(X), (8, 10), eps=1e-2)),
    ],
    "less": [({"x": X, "y": Y}, lambda: t(X) < t(Y))],
    "less_equal": [({"x": X, "y": np.float32(0)}, lambda: t(X) <= 0)],
    "linear": [
        ({"x": X, "weight": rand(4, 10), "bias": rand(4)},
         lambda: F.linear(t(X), t(rand(4, 10)), t(rand(4)))),
        ({"x": X, "weight": rand(4, 10)}, lambda: F.linear(t(X), t(rand(4, 10)))),
    ],
    "log": [({"x": POSITIVE}, lambda: t(POSITIVE).log())],
    "logical_and": [({"x": X > 0, "y": Y > 0}, lambda: (t(X) > 0) & (t(Y) > 0))],
    "logical_not": [({"x": X > 0}, lambda: ~(t(X) > 0))],
    "logical_or": [({"x": X > 0, "y": Y > 0}, lambda: (t(X) > 0) | (t(Y) > 0))],
    "logical_xor": [({"x": X > 0, "y": Y > 0}, lambda: (t(X) > 0) ^ (t(Y) > 0))],
    "matmul": [
        ({"x": X, "y": Y, "transpose_y": True}, lambda: t(X) @ t(Y).mT),
        ({"x": X, "y": Y, "transpose_x": True}, lambda: t(X).mT @ t(Y)),
        ({"x": X, "y": rand(10, 4)}, lambda: t(X) @ t(rand(10, 4))),
    ],
    "maximum": [({"x": X, "y": Y}, lambda: torch.maximum(t(X), t(Y)))],
    "minimum": [({"x": X, "y": Y}, lambda: torch.minimum(t(X), t(Y)))],
    "mod": [({"x": INTEGERS, "y": np.int32(4)}, lambda: t(INTEGERS).remainder(4))],
    "mul": [({"x": X, "y": Y}, lambda: t(X) * t(Y))],
    "not_equal": [({"x": INTEGERS, "y": np.int32(5)}, lambda: t(INTEGERS) != 5)],
    "pad": [
        ({"x": X, "pad": [0, 0, 0, 0, 0, 1, 2, 3]}, lambda: F.pad(t(X), (2, 3, 0, 1))),
        ({"x": X, "pad": [1, 2], "constant_val": 7.0}, lambda: F.pad(t(X), (1, 2), value=7.0)),
        ({"x": X, "pad": [1, 2, 3, 4], "mode": "reflect"},
         lambda: F.pad(t(X), (3, 4, 1, 2), mode="reflect")),
        ({"x": X, "pad": [1, 2, 3, 4], "mode": "replicate"},
         lambda: F.pad(t(X), (3, 4, 1, 2), mode="replicate")),
    ],
    "pow": [({"x": POSITIVE, "y": np.float32(1.5)}, lambda: t(POSITIVE) ** 1.5)],
    "range_1d": [({"start": 1, "end": 9, "step": 3}, lambda: torch.arange(1, 9, 3))],
    "real_div": [
        ({"x": X, "y": POSITIVE}, lambda: t(X) / t(POSITIVE)),
        ({"x": INTEGERS, "y": np.int32(2)},
         lambda: t(INTEGERS).div(2, rounding_mode="trunc").double()),
    ],
    "reduce_argmax": [
        ({"x": X, "axis": -1}, lambda: t(X).argmax(-1)),
        ({"x": INTEGERS, "axis": 0, "keep_dims": True}, lambda: t(INTEGERS).argmax(0, True)),
    ],
    "reduce_max": [({"x": X, "axes": [1, 3]}, lambda: t(X).amax((1, 3)))],
    "reduce_mean": [
        ({"x": X, "axes": [2, 3], "keep_dims": True}, lambda: t(X).mean((2, 3), True)),
        ({"x": X}, lambda: t(X).mean()),
    ],
    "reduce_min": [({"x": X, "axes": [-1]}, lambda: t(X).amin(-1))],
    "reduce_prod": [({"x": X, "axes": [1]}, lambda: t(X).prod(1))],
    "reduce_sum": [({"x": X, "axes": [0, 1]}, lambda: t(X).sum((0, 1)))],
    "relu": [({"x": X}, lambda: t(X).relu())],
    "reshape": [
        ({"x": X, "shape": [0, -1, 5]}, lambda: t(X).reshape(2, -1, 5)),
        ({"x": X, "shape": np.array([480], np.int32)}, lambda: t(X).reshape(480)),
    ],
    "round": [({"x": 3 * X}, lambda: t(3 * X).round())],
    "rsqrt": [({"x": POSITIVE}, lambda: t(POSITIVE).rsqrt())],
    "scaled_dot_product_attention": [
        ({"query": SEQUENCE, "key": KEYS, "value": VALUES},
         lambda: F.scaled_dot_product_attention(t(SEQUENCE), t(KEYS), t(VALUES))),
        ({"query": SEQUENCE, "key": KEYS, "value": VALUES, "attn_mask": MASK},
         lambda: F.scaled_dot_product_attention(t(SEQUENCE), t(KEYS), t(VALUES), t(MASK))),
        ({"query": SEQUENCE, "key": KEYS, "value": VALUES, "attn_mask": rand(9, 5)},
         lambda: F.scaled_dot_product_attention(t(SEQUENCE), t(KEYS), t(VALUES), t(rand(9, 5)))),
    ],
    "select": [({"cond": X > 0, "a": X, "b": np.float32(-1)},
                lambda: torch.where(t(X) > 0, t(X), -1.0))],
    "shape": [({"x": X}, lambda: torch.tensor([2, 3, 8, 10], dtype=torch.int32))],
    "sigmoid": [({"x": X}, lambda: t(X).sigmoid()), ({"x": WIDE}, lambda: t(WIDE).sigmoid())],
    "sign": [({"x": INTEGERS}, lambda: t(INTEGERS).sign())],
    "silu": [({"x": X}, lambda: F.silu(t(X))), ({"x": WIDE}, lambda: F.silu(t(WIDE)))],
    "sin": [({"x": X}, lambda: t(X).sin())],
    "slice_by_index": [
        ({"x": X, "begin": [0, 1, 2, 3], "end": [2, 3, 8, 9], "stride": [1, 1, 2, 3]},
         lambda: t(X)[0:2, 1:3, 2:8:2, 3:9:3]),
        ({"x": X, "begin": [0, -2, 0, 0], "end": [0, -1, 0, 0],
          "begin_mask": [True, False, True, True], "end_mask": [True, False, True, True]},
         lambda: t(X)[:, -2:-1]),
        ({"x": X, "begin": [0, 1, 0, 0], "end": [0, 0, 0, 0], "end_mask": [True, True, True, True],
          "squeeze_mask": [False, True, False, False]}, lambda: t(X)[:, 1]),
        ({"x": X, "begin": [0, 0, 0, 9], "end": [2, 3, 8, 0], "stride": [1, 1, 1, -1],
          "end_mask": [False, False, False, True]}, lambda: t(X).flip(3)),
    ],
    "slice_by_size": [
        ({"x": X, "begin": [0, 1, 2, 0], "size": [2, 1, 3, -1]}, lambda: t(X)[:, 1:2, 2:5]),
        ({"x": X, "begin": [0, 0, 0, -3], "size": [-1, -1, -1, 2]}, lambda: t(X)[..., -3:-1]),
    ],
    "softmax": [
        ({"x": X, "axis": 1}, lambda: t(X).softmax(1)),
        ({"x": 1000 * X, "axis": -1}, lambda: t(1000 * X).softmax(-1)),
    ],
    "split": [
        ({"x": X, "axis": 3, "split_sizes": [2, 5, 3]}, lambda: t(X).split([2, 5, 3], 3)),
        ({"x": X, "axis": -2, "num_splits": 2}, lambda: t(X).chunk(2, -2)),
    ],
    "sqrt": [({"x": POSITIVE}, lambda: t(POSITIVE).sqrt())],
    "square": [({"x": X}, lambda: t(X).square())],
    "squeeze": [
        ({"x": X[:, :1], "axes": [1]}, lambda: t(X)[:, 0]),
        ({"x": X[:1, :1]}, lambda: t(X)[0, 0]),
    ],
    "stack": [({"values": [X, Y], "axis": 2}, lambda: torch.stack([t(X), t(Y)], 2))],
    "sub": [({"x": X, "y": Y}, lambda: t(X) - t(Y))],
    "tanh": [({"x": X}, lambda: t(X).tanh())],
    "tile": [({"x": X, "reps": [1, 2, 1, 3]}, lambda: t(X).repeat(1, 2, 1, 3))],
    "transpose": [({"x": X, "perm": [0, -1, 1, 2]}, lambda: t(X).permute(0, 3, 1, 2))],
    "upsample_nearest_neighbor": [
        ({"x": X, "scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3)},
         lambda: F.interpolate(t(X), scale_factor=(2, 3))),
        ({"x": X, "scale_factor_height": 1.5, "scale_factor_width": 0.5},
         lambda: F.interpolate(t(X), scale_factor=(1.5, 0.5))),
    ],
}  # fmt: skip


def flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in CASES.items() for case in range(len(cases))]
)
def test_against_torch(name: str, case: int) -> None:
    inputs, expected = CASES[name][case]
    found, wanted = flat(OPERATORS[name](**inputs)), flat(expected())
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.shape(ours) == tuple(theirs.shape)
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs.double().numpy(), rtol=2e-6, atol=2e-6
        )


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel": 3, "pad": 1},
    {"kernel": 1, "pad": 0},
    {"kernel": 3, "pad": 1, "stride": 2},
    {"kernel": (3, 5), "pad": (1, 2), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel": 2, "pad": 0, "dilation": 3},
    {"kernel": 3, "pad": 1, "groups": 2},
    {"kernel": 3, "pad": 1, "groups": 4},
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(case: dict[str, Any], bias: bool) -> None:
    def two(value: Any) -> tuple[int, int]:
        return value if isinstance(value, tuple) else (value, value)

    groups, pad = case.get("groups", 1), two(case["pad"])
    x, weight = rand(2, 4, 11, 13), rand(8, 4 // groups, *two(case["kernel"]), seed=1)
    stride, dilation = two(case.get("stride", 1)), two(case.get("dilation", 1))
    offset = rand(8, seed=2) if bias else None
    found = OPERATORS["conv"](
        x=x, weight=weight, bias=offset, strides=stride, dilations=dilation, groups=groups,
        pad_type="custom", pad=[pad[0], pad[0], pad[1], pad[1]],
    )  # fmt: skip
    wanted = F.conv2d(
        t(x), t(weight), None if offset is None else t(offset), stride, pad, dilation, groups
    )
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_convolution_paddings() -> None:
    """Uneven padding, padding by name, and another number of dimensions."""
    x, weight = rand(1, 3, 7, 8), rand(5, 3, 3, 3)
    uneven = OPERATORS["conv"](x=x, weight=weight, pad_type="custom", pad=[0, 1, 2, 0])
    wanted = F.conv2d(F.pad(t(x), (2, 0, 0, 1)), t(weight))
    np.testing.assert_allclose(uneven, wanted.numpy(), rtol=1e-5, atol=1e-5)
    valid = OPERATORS["conv"](x=x, weight=weight)
    np.testing.assert_allclose(valid, F.conv2d(t(x), t(weight)).numpy(), rtol=1e-5, atol=1e-5)
    same = OPERATORS["conv"](x=x, weight=weight, pad_type="same", strides=[2, 2])
    wanted = F.conv2d(F.pad(t(x), (0, 1, 1, 1)), t(weight), stride=2)
    np.testing.assert_allclose(same, wanted.numpy(), rtol=1e-5, atol=1e-5)
    lower = OPERATORS["conv"](x=x, weight=weight, pad_type="same_lower", strides=[2, 2])
    wanted = F.conv2d(F.pad(t(x), (1, 0, 1, 1)), t(weight), stride=2)
    np.testing.assert_allclose(lower, wanted.numpy(), rtol=1e-5, atol=1e-5)
    line, kernel = rand(2, 3, 20), rand(4, 3, 5)
    found = OPERATORS["conv"](x=line, weight=kernel, pad_type="custom", pad=[2, 2], strides=[3])
    wanted = F.conv1d(t(line), t(kernel), padding=2, stride=3)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    assert set(OPERATORS) == {*CASES, "conv"}


def test_erf_is_exact() -> None:
    points = np.linspace(-5, 5, 2001)
    exact = np.array([math.erf(point) for point in points])
    assert np.abs(OPERATORS["erf"](x=points) - exact).max() < 1e-15
