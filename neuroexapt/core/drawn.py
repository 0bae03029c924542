"""Running only the candidates that were drawn, those whose mixing weight is not 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neuroexapt.core.buffers import buffers_changed_if

if TYPE_CHECKING:
    from neuroexapt.core.plan import CellPlan


def can_be_read(weights: Tensor) -> bool:
    """Whether Python may see the values: a graph that is captured or traced has none yet."""
    if torch.compiler.is_compiling():
        return False
    return not (weights.is_cuda and torch.cuda.is_current_stream_capturing())


def strongest(weights: Tensor) -> Tensor:
    """1 for the largest of each row of ``weights`` [E, K], the first of equal ones, 0 for the others."""
    return torch.zeros_like(weights).scatter_(-1, weights.argmax(dim=-1, keepdim=True), 1.0)


def without_gradients_of_zeros(weights: Tensor) -> Tensor:
    """``weights``; the gradient of those that are 0 is 0."""
    return weights.where(weights != 0, 0.0)


def run_drawn(
    ops: Mapping[int, nn.Module], weights: Tensor, run: Callable[[nn.Module], Tensor]
) -> dict[int, Tensor]:
    """``run`` of each of ``ops`` whose weight in ``weights`` [K] is not 0, by its number.

    Where the weights cannot be read all of them run; those of weight 0 leave their buffers as they were.
    """
    drawn = weights != 0
    if can_be_read(drawn):
        is_drawn = drawn.tolist()
        return {k: run(op) for k, op in ops.items() if is_drawn[k]}
    with buffers_changed_if([drawn[k] for k in ops], list(ops.values())):
        return {k: run(op) for k, op in ops.items()}


def statistics_of_drawn(plan: CellPlan, weights: Tensor) -> AbstractContextManager[None]:
    """Inside, all candidates of ``plan`` may run: those of weight 0 leave their buffers as they were."""
    drawn, candidates = weights != 0, list(plan.candidates())
    return buffers_changed_if([drawn[edge, k] for edge, k, _ in candidates], [op for *_, op in candidates])
