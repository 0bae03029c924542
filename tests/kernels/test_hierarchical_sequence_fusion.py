"""The fusion's definition and, through Triton's interpreter, its kernels at small sizes."""

import functools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from neuroexapt import functional
from neuroexapt.errors import UserError
from neuroexapt.kernels import hierarchical_sequence_fusion as definition
from tests.kernels.held_to_reference import largest_error, random_tensors, runs_kernels
from tests.kernels.sequences import assert_causal, assert_padding_is_ignored

# Batch, positions, features, windows: part of a tile, several tiles, a window over a whole one, few features.
CASES = [
    (2, 9, 6, (1, 3, 7, 15)),
    (2, 70, 20, (1, 3, 7, 15)),
    (1, 130, 16, (2, 40, 129)),
    (3, 1, 5, (4,)),
    (1, 66, 3, (1,)),
    (0, 5, 4, (1, 2)),
]
LENGTHS = [70, 0, 33]


def inputs(
    batch: int, length: int, width: int, windows: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """x, and the weights in order, so scaled that no part of the result is small."""
    shapes = (len(windows), width), (width, 2 * width), (width,), (width, width), (width,), (width,)
    x, *weights = random_tensors((batch, length, width), *shapes, dtype=dtype)
    return [x], [weight / width**0.5 if weight.dim() > 1 else weight for weight in weights]


def by_kernel(*tensors: Tensor, **options) -> Tensor:
    from neuroexapt.kernels import hierarchical_sequence_fusion_triton as kernels

    return kernels.hierarchical_sequence_fusion(*tensors, **options)


def by_hand(x: Tensor, *weights: Tensor, windows: tuple[int, ...], temperature: float) -> Tensor:
    """Of one sequence [N, D], position by position."""
    scales, gate_weight, gate_bias, out_weight, norm_weight, norm_bias = weights
    rows = []
    for t in range(len(x)):
        means = torch.stack([x[max(0, t - window + 1) : t + 1].mean(0) for window in windows])
        fused = torch.softmax(scales @ x[t] / temperature, 0) @ means
        gate = torch.sigmoid(gate_weight @ torch.cat([x[t], fused]) + gate_bias)
        z = x[t] + gate * (out_weight @ fused)
        z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
        rows.append(z * norm_weight + norm_bias)
    return torch.stack(rows)


def test_is_what_its_formula_says():
    (x,), weights = inputs(2, 20, 6, (1, 3, 7, 15), torch.float64)
    y = functional.hierarchical_sequence_fusion(x, *weights, temperature=0.5)
    expected = [by_hand(row, *weights, windows=(1, 3, 7, 15), temperature=0.5) for row in x]
    torch.testing.assert_close(y, torch.stack(expected))


def test_gradients():
    (x,), weights = inputs(2, 5, 3, (1, 3), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
    op = functools.partial(
        functional.hierarchical_sequence_fusion, windows=(1, 3), lengths=torch.tensor([5, 2])
    )
    assert gradcheck(op, leaves)


def test_padding_is_ignored_and_jagged_gives_the_same():
    sequences, weights = inputs(3, 70, 6, (1, 3, 7, 15), torch.float64)
    op = functional.hierarchical_sequence_fusion
    assert_padding_is_ignored(op, sequences, weights, LENGTHS, tolerance=1e-14)
    assert_padding_is_ignored(op, sequences, weights, [0, 0, 0], tolerance=0)


@pytest.mark.parametrize("position", [0, 7, 18])
def test_no_position_depends_on_later_ones(position):
    assert_causal(functional.hierarchical_sequence_fusion, *inputs(2, 20, 6, (1, 3, 7, 15)), position)


def test_autocast_and_weights_of_another_dtype():
    (x,), weights = inputs(2, 8, 6, (1, 3), torch.float32)
    op = functools.partial(functional.hierarchical_sequence_fusion, windows=(1, 3))
    expected = op(*(tensor.bfloat16() for tensor in (x, *weights)))
    assert torch.equal(op(x.bfloat16(), *weights), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x, *weights).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": (1, 3)}, "scale_weight must have shape"),
        ({"windows": (1, 3, 0, 2)}, "windows must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths must have shape"),
        ({"offsets": torch.tensor([0, 2]), "max_length": 2}, r"x must be \[B, N, D\] or, with offsets"),
        ({"x": torch.zeros(16, 6)}, r"x must be \[B, N, D\] or, with offsets"),
        ({"x": torch.zeros(2, 8, 6, dtype=torch.int64)}, "floating-point"),
        ({"x": torch.zeros(16, 6), "offsets": torch.tensor([0, 16])}, "and max_length"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    (x,), weights = inputs(2, 8, 6, (1, 3, 7, 15))
    arguments = {"x": x} | options
    with pytest.raises(UserError, match=message):
        functional.hierarchical_sequence_fusion(arguments.pop("x"), *weights, **arguments)


@runs_kernels
def test_kernels_of_wide_rows_match_the_definition(nan_filled_empty):
    sequences, weights = inputs(2, 70, 140, (1, 3, 7, 15))
    error = largest_error(definition.hierarchical_sequence_fusion, by_kernel, [*sequences, *weights])
    assert error < 2e-5


@runs_kernels
def test_kernels_give_the_same_without_gradients(nan_filled_empty):
    for width in (6, 140):
        sequences, weights = inputs(1, 9, width, (1, 3, 7, 15))
        y = by_kernel(*sequences, *(weight.requires_grad_() for weight in weights))
        with torch.no_grad():
            assert torch.equal(y, by_kernel(*sequences, *weights))


@runs_kernels
@pytest.mark.parametrize(("batch", "length", "width", "windows"), CASES)
def test_kernels_match_the_definition(batch, length, width, windows, nan_filled_empty):
    sequences, weights = inputs(batch, length, width, windows)
    options = {"windows": windows, "temperature": 0.7}
    error = largest_error(
        functools.partial(definition.hierarchical_sequence_fusion, **options),
        functools.partial(by_kernel, **options),
        [*sequences, *weights],
    )
    assert error < 2e-5


@runs_kernels
@pytest.mark.parametrize("widest_in_one_kernel", [16, 128])
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0, 0]])
def test_kernels_ignore_padding(lengths, widest_in_one_kernel, nan_filled_empty, monkeypatch):
    from neuroexapt.kernels import hierarchical_sequence_fusion_triton as kernels

    monkeypatch.setattr(kernels, "_NARROW", widest_in_one_kernel)
    sequences, weights = inputs(3, 70, 20, (1, 3, 7, 15))
    assert_padding_is_ignored(by_kernel, sequences, weights, lengths, tolerance=2e-6)


@runs_kernels
def test_kernels_know_no_later_position():
    assert_causal(by_kernel, *inputs(1, 80, 6, (1, 3, 7, 15)), position=66)


def test_takes_as_many_sequences_as_a_grid_holds():
    from neuroexapt.kernels.hierarchical_sequence_fusion_triton import supports

    _, weights = inputs(1, 1, 4, (1, 3))
    x, most = torch.zeros(1), 65_535
    assert supports(x.expand(most, 2, 4), *weights, windows=(1, 3)).ok
    assert "sequences" in supports(x.expand(most + 1, 2, 4), *weights, windows=(1, 3)).reason
    offsets = torch.arange(most + 2)
    assert supports(x.expand(most, 4), *weights, windows=(1, 3), offsets=offsets[:-1]).ok
    assert "sequences" in supports(x.expand(most, 4), *weights, windows=(1, 3), offsets=offsets).reason
