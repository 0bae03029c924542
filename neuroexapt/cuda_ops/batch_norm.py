"""``batch_norm`` on the kernels of the fused cell, for the BatchNorms outside of cells' edges.

PyTorch gives every channel one block: 16 blocks for a GPU of 132 multiprocessors.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neuroexapt.backend import Support, register_impl
from neuroexapt.core.plan import splits_off
from neuroexapt.cuda_ops import cell_kernels
from neuroexapt.cuda_ops.cell_kernels import Summand


def batch_norm(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """What ``functional.batch_norm`` computes, in training mode; deterministic."""
    with torch.cuda.device_of(x):
        return run(x, bn, cell_kernels)


def supports(x: Tensor, bn: nn.Module) -> Support:
    """Whether the kernels take these arguments."""
    reason = next(_refusals(x, bn), "")
    return Support(not reason, reason)


def _refusals(x: Tensor, bn: nn.Module) -> Iterator[str]:
    """What stands in the way."""
    if x.dtype != torch.float32:
        yield "only fp32"
    if not x.is_contiguous():
        yield "x is not contiguous"
    if not splits_off(bn):
        yield "only BatchNorms without affine parameters, as a search network has them"
    if not bn.training:
        yield "PyTorch does as well in evaluation mode"
    if x.numel() <= x.shape[1]:
        yield "no two values per channel"
    if any((bn._forward_hooks, bn._forward_pre_hooks, bn._backward_hooks, bn._backward_pre_hooks)):
        yield "hooks want the module itself"
    if torch.compiler.is_compiling():
        yield "torch.compile does not see through it"


def run(x: Tensor, bn: nn.BatchNorm2d, kernels: Any) -> Tensor:
    """It by the functions of ``kernels``: those of ``cell_kernels``, or others that do the same."""
    return _BatchNorm.apply(kernels, bn, x)


class _BatchNorm(torch.autograd.Function):
    """A node that a single term enters, with weight 1."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
        (stats,) = kernels.statistics([bn], kernels.plane_moments([x]), True)
        y = torch.empty_like(x)
        kernels.add_up([Summand(x, stats, None)], None, y)
        ctx.kernels = kernels
        ctx.save_for_backward(x, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor]:
        x, stats = ctx.saved_tensors
        g = g.contiguous()
        coefs = ctx.kernels.backward_add_up([Summand(x, stats, None)], None, g, None, True)
        (dx,) = ctx.kernels.affine_gradients([g], [x], coefs)
        return None, None, dx


register_impl("batch_norm", "ext", batch_norm, supports)
