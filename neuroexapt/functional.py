"""The differentiable ops of the search spaces, each run by the best implementation for the call.

This is the only module that asks the backend what runs; ``neuroexapt.backend.dispatch_report`` tells
what did. Every implementation computes what ``neuroexapt.kernels.reference`` defines. All ops take
fp32, fp16 and bf16 (and, in plain PyTorch, fp64), any memory format and any strides; results follow
the first operand's dtype and memory format. Under autocast operands keep their dtype; weights and
logits are best left in fp32. The GPU kernels sum in fp32 and can be differentiated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neuroexapt.backend.dispatch import dispatch, explain
from neuroexapt.errors import UserError

if TYPE_CHECKING:
    from neuroexapt.core.plan import CellPlan


def softmax_sum(xs: Sequence[Tensor], logits: Tensor) -> Tensor:
    """``y = Σ_k softmax(logits)_k · xs[k]``: the relaxed choice among K candidates.

    Args:
        xs: K tensors of one shape; a stacked tensor [K, …] counts as K tensors.
        logits: [K], before the softmax, which is taken in at least fp32.

    Raises:
        UserError: the shapes differ, or ``logits`` is not [K].

    Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", 2019, equation 2.
    """
    return dispatch("softmax_sum", _operands(xs, logits, "logits"), logits)


def weighted_sum(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``y = Σ_k weights[k] · xs[k]``; the weights are used as they are, with no softmax.

    Args:
        xs: K tensors of one shape; a stacked tensor [K, …] counts as K tensors.
        weights: [K].

    Raises:
        UserError: the shapes differ, or ``weights`` is not [K].
    """
    return dispatch("weighted_sum", _operands(xs, weights, "weights"), weights)


def sepconv(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """relu → depthwise → pointwise convolution, without bias, padded by ``dilation · (k // 2)``.

    Args:
        x: [B, C, H, W].
        depthwise_weight: [C, 1, k, k], k odd.
        pointwise_weight: [C_out, C, 1, 1].

    Returns:
        [B, C_out, ⌈H / stride⌉, ⌈W / stride⌉].

    Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017.
    """
    _check_window(depthwise_weight.shape[-1])
    return dispatch(
        "sepconv", x, depthwise_weight, pointwise_weight, stride=stride, dilation=dilation, relu=relu
    )


def avg_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Average over each window's pixels inside the picture (padding ``k // 2``, not counted).

    ``x``: [B, C, H, W] → [B, C, ⌈H / stride⌉, ⌈W / stride⌉]; ``kernel_size`` must be odd.
    """
    _check_window(kernel_size)
    return dispatch("avg_pool", x, kernel_size, stride)


def max_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Maximum over each window (padding ``k // 2``); the first maximum takes the gradient, NaN wins.

    ``x``: [B, C, H, W] → [B, C, ⌈H / stride⌉, ⌈W / stride⌉]; ``kernel_size`` must be odd.
    """
    _check_window(kernel_size)
    return dispatch("max_pool", x, kernel_size, stride)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over height and width: [B, C, H, W] → [B, C, 1, 1]."""
    return dispatch("global_avg_pool", x)


def relu_conv_bn(x: Tensor, op: nn.Sequential) -> Tensor:
    """``op(x)`` of relu, convolution and BatchNorm; in training mode its running statistics are updated.

    ``x``: [B, C, H, W] → [B, C_out, H', W'].
    """
    return dispatch("relu_conv_bn", x, op)


def factorized_reduce(x: Tensor, op: nn.Module) -> Tensor:
    """``op(x)`` of a ``FactorizedReduce``; in training mode its running statistics are updated.

    ``x``: [B, C, H, W] → [B, C_out, ⌈H / 2⌉, ⌈W / 2⌉].
    """
    return dispatch("factorized_reduce", x, op)


def cell(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``node_j = Σ_{i<j} MixedOp_ij(state_i, weights_ij)`` by plan; the output joins ``plan.outputs``.

    Running statistics of the plan's BatchNorms are updated in training mode.

    Args:
        plan: what ``neuroexapt.core.plan.plan_cell`` made of a search cell.
        states: the cell's inputs [B, C, H, W], of its own width.
        weights: [E, K], a row an edge, used as they are.

    Returns:
        [B, len(plan.outputs) · C, ⌈H / stride⌉, ⌈W / stride⌉].
    """
    return dispatch("cell", _plan_for(states[0], plan), states, weights)


def cell_is_fused(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> bool:
    """Whether ``cell`` gains from the plan of a single edge.

    In plain PyTorch it was measured to on the CPU, where states are small planes in large batches: 1.4 to 2.9
    times as fast, others 0.8 to 1.1. On a GPU without kernels for the plan, operations may have their own.
    """
    x = states[0]
    if x.device != weights.device or x.dtype != weights.dtype:
        return False
    if x.device.type == "cpu":
        are_small = len(x) >= 16 and x.shape[-2:].numel() <= 64
        return are_small and x.dtype in (torch.float32, torch.float64)
    return explain("cell", _plan_for(x, plan), states, weights).impl != "torch"


def _plan_for(x: Tensor, plan: CellPlan) -> CellPlan:
    """In plain PyTorch, what is merged can be of any size."""
    return plan.for_kernels if x.is_cuda else plan


def _operands(xs: Sequence[Tensor], scores: Tensor, name: str) -> list[Tensor]:
    xs = list(xs)
    if not xs:
        raise UserError("a sum over no tensors has no shape; give at least one")
    if scores.shape != (len(xs),):
        raise UserError(f"{name} must have shape [{len(xs)}], one for each tensor, not {[*scores.shape]}")
    for x in xs:
        if x.shape != xs[0].shape:
            raise UserError(f"the tensors must have one shape, not {[*xs[0].shape]} and {[*x.shape]}")
    return xs


def _check_window(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise UserError(f"kernel_size must be odd, not {kernel_size}")
