"""Running only the candidates that were drawn, those whose mixing weight is not 0."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from neuroexapt.core.buffers import buffers_changed_if


def can_be_read(weights: Tensor) -> bool:
    """Whether Python may see the values: a graph that is captured or traced has none yet."""
    if torch.compiler.is_compiling():
        return False
    return not (weights.is_cuda and torch.cuda.is_current_stream_capturing())


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
    outputs = {}
    for k, op in ops.items():
        with buffers_changed_if(drawn[k], op):
            outputs[k] = run(op)
    return outputs
