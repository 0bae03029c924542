"""What every operator on sequences must keep: padding is never read, jagged is padded, the future is unknown.

An operator is called as ``op(*sequences, *weights, lengths=…)``, with sequences [B, N, …] or jagged [T, …].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.held_to_reference import DEVICE, random_tensors, relative_error

Op = Callable[..., Tensor]


def valid_positions(lengths: Tensor, length: int) -> Tensor:
    """[B, ``length``]"""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def offsets_of(lengths: Tensor) -> Tensor:
    """[B + 1], where jagged sequences of these lengths start."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def with_garbage(sequences: list[Tensor], valid: Tensor) -> list[Tensor]:
    """The same with NaN in every padded position."""
    return [torch.where(valid[(...,) + (None,) * (x.dim() - 2)], x, float("nan")) for x in sequences]


def gradients_for(y: Tensor, inputs: list[Tensor], y_gradient: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, y_gradient)]


def padded_results(op: Op, sequences: list[Tensor], weights: list[Tensor], lengths: Tensor) -> list[Tensor]:
    """Result and gradients of padded input with garbage behind each sequence."""
    valid = valid_positions(lengths, sequences[0].shape[1])
    leaves = [x.detach().requires_grad_() for x in (*with_garbage(sequences, valid), *weights)]
    y = op(*leaves, lengths=lengths)
    (y_gradient,) = random_tensors(y.shape, dtype=y.dtype, seed=5)
    return gradients_for(y, leaves, y_gradient)


def jagged_results(op: Op, sequences: list[Tensor], weights: list[Tensor], lengths: Tensor) -> list[Tensor]:
    """The same of jagged input, padded again."""
    batch, length = sequences[0].shape[:2]
    valid = valid_positions(lengths, length)
    leaves = [x.detach().requires_grad_() for x in (*(x[valid] for x in sequences), *weights)]
    y = op(*leaves, offsets=offsets_of(lengths), max_length=length)
    (y_gradient,) = random_tensors((batch, length, *y.shape[1:]), dtype=y.dtype, seed=5)
    y, *gradients = gradients_for(y, leaves, y_gradient[valid])
    rows = [y, *gradients[: len(sequences)]]
    padded = [x.new_zeros(batch, length, *x.shape[1:]).masked_scatter(expand(valid, x), x) for x in rows]
    return [*padded, *gradients[len(sequences) :]]


def expand(valid: Tensor, x: Tensor) -> Tensor:
    """``valid`` [B, N] for values of the trailing shape of ``x``."""
    return valid[(...,) + (None,) * (x.dim() - 1)].expand(*valid.shape, *x.shape[1:])


def assert_padding_is_ignored(
    op: Op, sequences: list[Tensor], weights: list[Tensor], lengths: list[int], tolerance: float
) -> None:
    """Padded with garbage gives what jagged does, and exact zeros where there is padding."""
    of_each = torch.tensor(lengths, device=DEVICE)
    padded = padded_results(op, sequences, weights, of_each)
    for actual, expected in zip(padded, jagged_results(op, sequences, weights, of_each), strict=True):
        assert relative_error(actual, expected.double()) <= tolerance
    valid = valid_positions(of_each, sequences[0].shape[1])
    assert all((x[~valid] == 0).all() for x in padded[: 1 + len(sequences)])


def assert_causal(op: Op, sequences: list[Tensor], weights: list[Tensor], position: int) -> None:
    """What comes after ``position`` changes no bit of the results up to it, and some bits behind."""
    before = op(*sequences, *weights)
    changed = [x.clone() for x in sequences]
    for x in changed:
        x[:, position + 1 :] += 1 + x[:, position + 1 :].abs()
    after = op(*changed, *weights)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    assert not torch.equal(before, after)
