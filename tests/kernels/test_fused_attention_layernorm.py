"""The fused attention's definition and, through Triton's interpreter, its kernels at small sizes."""

import functools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from neuroexapt import functional
from neuroexapt.errors import UserError
from neuroexapt.kernels import fused_attention_layernorm as definition
from tests.kernels.held_to_reference import (
    largest_error,
    random_tensors,
    relative_error,
    results_and_gradients,
    runs_kernels,
)
from tests.kernels.sequences import assert_causal, assert_padding_is_ignored

# Batch, positions, features, heads, features a head: part of a tile, several tiles, heads unlike D.
CASES = [(2, 9, 6, 2, 3), (2, 70, 20, 1, 17), (1, 33, 20, 3, 40), (0, 5, 4, 1, 4)]
LENGTHS = [40, 0, 33]


def inputs(
    batch: int, length: int, width: int, heads: int, head: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """x, queries, keys and values; and the weights in order."""
    per_head = batch, length, heads, head
    shapes = (width, heads * head), (width,), (width,), (width,)
    tensors = random_tensors((batch, length, width), per_head, per_head, per_head, *shapes, dtype=dtype)
    return tensors[:4], tensors[4:]


def by_kernel(*tensors: Tensor, **options) -> Tensor:
    from neuroexapt.kernels import fused_attention_layernorm_triton as kernels

    return kernels.fused_attention_layernorm(*tensors, **options)


def by_hand(x: Tensor, query: Tensor, key: Tensor, value: Tensor, *weights: Tensor) -> Tensor:
    """Of one sequence, position by position."""
    out_weight, out_bias, norm_weight, norm_bias = weights
    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(query.shape[1]):
            shares = torch.softmax(key[: t + 1, h] @ query[t, h] / query.shape[-1] ** 0.5, 0)
            heads.append(shares @ value[: t + 1, h])
        z = x[t] + out_weight @ torch.cat(heads) + out_bias
        rows.append((z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * norm_weight + norm_bias)
    return torch.stack(rows)


def test_is_what_its_formula_says():
    sequences, weights = inputs(2, 7, 6, 2, 3, torch.float64)
    y = functional.fused_attention_layernorm(*sequences, *weights)
    expected = [by_hand(*rows, *weights) for rows in zip(*sequences, strict=True)]
    torch.testing.assert_close(y, torch.stack(expected))


def test_gradients():
    sequences, weights = inputs(2, 4, 3, 2, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*sequences, *weights)]
    op = functools.partial(functional.fused_attention_layernorm, lengths=torch.tensor([4, 2]))
    assert gradcheck(op, leaves)


def test_padding_is_ignored_and_jagged_gives_the_same():
    sequences, weights = inputs(3, 40, 6, 2, 3, torch.float64)
    op = functional.fused_attention_layernorm
    assert_padding_is_ignored(op, sequences, weights, LENGTHS, tolerance=1e-14)
    assert_padding_is_ignored(op, sequences, weights, [0, 0, 0], tolerance=0)


@pytest.mark.parametrize("position", [0, 7, 18])
def test_no_position_depends_on_later_ones(position):
    assert_causal(functional.fused_attention_layernorm, *inputs(2, 20, 6, 2, 3), position)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16, 6)}, r"x must be \[B, N, D\] or, with offsets, \[T, D\]"),
        ({"offsets": torch.tensor([0, 8]), "max_length": 8}, r"x must be \[B, N, D\] or, with offsets"),
        ({"key": torch.zeros(2, 8, 3, 3)}, "must have one shape"),
        ({"query": torch.zeros(2, 7, 2, 3)}, r"query must be \[2, 8, H, d\]"),
        ({"out_weight": torch.zeros(6, 5)}, r"out_weight must have shape \[6, 6\]"),
        ({"norm_bias": torch.zeros(5)}, "norm_bias must have shape"),
        ({"dropout": 1.0}, "dropout"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths must have shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    sequences, weights = inputs(2, 8, 6, 2, 3)
    names = "x", "query", "key", "value", "out_weight", "out_bias", "norm_weight", "norm_bias"
    arguments = dict(zip(names, (*sequences, *weights), strict=True)) | change
    with pytest.raises(UserError, match=message):
        functional.fused_attention_layernorm(**arguments)


@runs_kernels
@pytest.mark.parametrize(("batch", "length", "width", "heads", "head"), CASES)
def test_kernels_match_the_definition(batch, length, width, heads, head, nan_filled_empty):
    sequences, weights = inputs(batch, length, width, heads, head)
    error = largest_error(definition.fused_attention_layernorm, by_kernel, [*sequences, *weights])
    assert error < 2e-5


@runs_kernels
def test_kernels_of_wide_rows_match_the_definition(nan_filled_empty):
    sequences, weights = inputs(1, 9, 270, 2, 3)
    error = largest_error(definition.fused_attention_layernorm, by_kernel, [*sequences, *weights])
    assert error < 2e-5


@runs_kernels
def test_kernels_match_the_definition_at_one_position(nan_filled_empty):
    sequences, weights = inputs(3, 1, 5, 2, 4)
    tensors = [*sequences, *weights]
    actual = results_and_gradients(by_kernel, tensors, torch.float32)
    expected = results_and_gradients(definition.fused_attention_layernorm, tensors, torch.float32)
    # Not relative: the gradients of the only query and key are 0.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@runs_kernels
def test_kernels_take_heads_out_of_one_projection():
    sequences, weights = inputs(2, 20, 6, 2, 3)
    packed = torch.stack(sequences[1:], dim=2)  # [B, N, 3, H, d]
    y = by_kernel(sequences[0], *packed.unbind(2), *weights)
    assert torch.equal(y, by_kernel(*sequences, *weights))


@runs_kernels
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0, 0]])
def test_kernels_ignore_padding(lengths, nan_filled_empty):
    sequences, weights = inputs(3, 40, 6, 2, 3)
    assert_padding_is_ignored(by_kernel, sequences, weights, lengths, tolerance=2e-6)


@runs_kernels
def test_kernels_refuse_lengths_that_do_not_fit():
    sequences, weights = inputs(2, 8, 6, 2, 3)
    with pytest.raises(UserError, match="lengths must have shape"):
        by_kernel(*sequences, *weights, lengths=torch.tensor([8]))


@runs_kernels
def test_kernels_know_no_later_position():
    assert_causal(by_kernel, *inputs(1, 70, 6, 1, 5), position=40)


@runs_kernels
def test_dropout_draws_the_same_mask_both_ways():
    from neuroexapt.kernels.fused_attention_layernorm_triton import project_add_norm

    (x, attended), weights = (
        random_tensors((3, 20, 24), (3, 20, 8)),
        random_tensors((24, 8), (24,), (24,), (24,)),
    )
    options = {"seed": torch.tensor(2**40 + 1), "lengths": None, "eps": 1e-5}
    # With W = 0, b = 1 and x = 0, what is kept is above a row's mean.
    ones, zeros = torch.ones(24), torch.zeros(24)
    of_mask = project_add_norm(
        torch.zeros_like(x), attended, torch.zeros(24, 8), ones, ones, zeros, dropout=0.25, **options
    )
    kept = of_mask > 0
    assert 0.7 < kept.float().mean() < 0.8

    def with_mask(x, attended, weight, bias, norm_weight, norm_bias):
        projected = torch.nn.functional.linear(attended, weight, bias) * kept / 0.75
        return torch.nn.functional.layer_norm(x + projected, (24,), norm_weight, norm_bias)

    op = functools.partial(project_add_norm, dropout=0.25, **options)
    assert largest_error(with_mask, op, [x, attended, *weights]) < 2e-5


@runs_kernels
def test_dropout_follows_the_seed_of_torch():
    sequences, weights = inputs(1, 9, 16, 1, 4)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(by_kernel(*sequences, *weights, dropout=0.5))
    assert torch.equal(draws[0], draws[1])
    assert relative_error(draws[2], draws[0].double()) > 0.1


def test_takes_as_many_heads_as_a_grid_holds():
    from neuroexapt.kernels.fused_attention_layernorm_triton import supports

    def answer(sequences: int, heads: int, **options):
        heads_of_all = [torch.zeros(1).expand(sequences, 2, heads, 3)] * 3
        return supports(torch.zeros(1).expand(sequences, 2, 6), *heads_of_all, *weights, **options)

    _, weights = inputs(1, 1, 6, 3, 3)
    assert answer(65_535 // 3, heads=3).ok
    assert "heads in all sequences" in answer(65_535 // 3 + 1, heads=3).reason
    assert "heads in all sequences" in answer(1, heads=3, offsets=torch.arange(65_537)).reason
