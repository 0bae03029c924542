"""Running only the candidates that were drawn, those whose mixing weight is not 0.

In the place of each of the others stands the constant 1: times a weight of 0 it adds nothing to a node, but
the gradient of that weight is the sum of the node's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

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


def part(weights: Tensor) -> tuple[Tensor, Tensor]:
    """``weights`` [E, K] of what was drawn, and for each edge the constant [E] that the others add, 0.

    They have their gradients from the two, the weights that are 0 from the constants.
    """
    return _Part.apply(weights)


def part_by_nodes(plan: CellPlan, weights: Tensor) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """``part``, and the constants of all edges that enter a node, by its number."""
    weights, constants = part(weights)
    of_edges = constants.unbind()
    return weights, {node.node: [of_edges[row] for row in node.rows] for node in plan.nodes}


def add_constants(y: Tensor, constants: Sequence[Tensor]) -> Tensor:
    """``y``, to which ``constants`` from ``part`` are added; as they are 0, only their gradients tell."""
    return _AddConstants.apply(y, *constants) if constants[0].requires_grad else y


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weights)
        return weights.view_as(weights), weights.new_zeros(len(weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (weights,), (of_drawn, of_constants) = ctx.saved_tensors, gradients
        return of_drawn.where(weights != 0, of_constants[:, None])


class _AddConstants(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *constants: Tensor) -> Tensor:
        ctx.count, ctx.dtype = len(constants), constants[0].dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        return g, *[g.sum(dtype=ctx.dtype)] * ctx.count


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
