"""What brings a cell's inputs to its width, on the kernels of the fused cell: 1x1 convolutions and BatchNorm.

Neither relu(x) nor the gradient of what a convolution leaves are ever stored. PyTorch gives every channel of
a BatchNorm one block: 16 blocks for a GPU of 132 multiprocessors.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neuroexapt.backend import Support, register_impl
from neuroexapt.core.hooks import hooks_of
from neuroexapt.core.operations import FactorizedReduce
from neuroexapt.core.plan import splits_off
from neuroexapt.cuda_ops import cell_kernels, pointwise
from neuroexapt.cuda_ops.arguments import dtype_refusals
from neuroexapt.cuda_ops.cell_operands import ReduceGrad, Summand, products_are_exact


def relu_conv_bn(x: Tensor, op: nn.Sequential) -> Tensor:
    """What ``functional.relu_conv_bn`` computes for a 1x1 convolution, with products as in ``cell``."""
    with torch.cuda.device_of(x):
        return run_relu_conv_bn(x, op, cell_kernels)


def supports_relu_conv_bn(x: Tensor, op: nn.Sequential) -> Support:
    """Whether the kernels take these arguments."""
    conv: Any = op[1]
    reason = next(relu_conv_bn_refusals(x, op), "")
    return Support(False, reason) if reason else pointwise.takes(x, conv.weight)


def relu_conv_bn_refusals(x: Tensor, op: nn.Sequential) -> Iterator[str]:
    """What stands in the way of kernels on any tier."""
    conv: Any = op[1]
    if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1, 1), (1, 1), (0, 0), 1):
        yield "only 1x1 convolutions of stride 1"
    if conv.bias is not None:
        yield "the convolution has a bias"
    yield from _refusals(x, op, op[2])


def factorized_reduce(x: Tensor, op: FactorizedReduce) -> Tensor:
    """What ``functional.factorized_reduce`` computes, with products as in ``cell``."""
    with torch.cuda.device_of(x):
        return run_factorized_reduce(x, op, cell_kernels)


def supports_factorized_reduce(x: Tensor, op: FactorizedReduce) -> Support:
    """Whether the kernels take these arguments."""
    reason = next(_refusals(x, op, op.bn), "")
    if x.numel() <= 4 * x.shape[1]:
        reason = reason or "too few pixels"
    return Support(not reason, reason)


def _refusals(x: Tensor, op: nn.Module, bn: nn.Module) -> Iterator[str]:
    """What stands in the way."""
    yield from dtype_refusals([x], op.parameters())
    if any(tensor.device != x.device for tensor in (*op.parameters(), *bn.buffers())):
        yield "tensors on several devices"
    if not x.is_contiguous():
        yield "x is not contiguous"
    if not splits_off(bn):
        yield "only BatchNorms without affine parameters, as a search network has them"
    if not bn.training:
        yield "PyTorch does as well in evaluation mode"
    if x.numel() <= x.shape[1]:
        yield "no two values per channel"
    if any(any(hooks_of(module)) for module in op.modules()):
        yield "hooks want the modules"
    if torch.compiler.is_compiling():
        yield "torch.compile does not see through it"


def run_relu_conv_bn(x: Tensor, op: nn.Sequential, kernels: Any) -> Tensor:
    """It by the functions of ``kernels``: those of ``cell_kernels``, or others that do the same."""
    _, conv, bn = op
    return _ReLUConvBN.apply(kernels, bn, x, conv.weight)


def run_factorized_reduce(x: Tensor, op: FactorizedReduce, kernels: Any) -> Tensor:
    """As ``run_relu_conv_bn``."""
    return _FactorizedReduce.apply(kernels, op.bn, x, op.conv_1.weight, op.conv_2.weight)


def _normalise(kernels: Any, bn: nn.BatchNorm2d, z: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the ``stats`` that it was normalised by."""
    (stats,) = kernels.statistics([bn], [moments], True)
    y = torch.empty_like(z)
    kernels.add_up([Summand(z, stats, None)], None, y)
    return y, stats


def _backward_normalise(kernels: Any, z: Tensor, stats: Tensor, g: Tensor) -> Tensor:
    """The ``coef`` by which z's gradient follows from g."""
    (coef,) = kernels.backward_add_up([Summand(z, stats, None)], None, g, None, True)
    return coef


class _ReLUConvBN(torch.autograd.Function):
    """W · relu(x), normalised."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, bn: nn.BatchNorm2d, x: Tensor, weight: Tensor) -> Tensor:
        exact = products_are_exact()
        z, moments = kernels.multiply(x, weight, exact)
        y, stats = _normalise(kernels, bn, z, moments)
        ctx.kernels, ctx.exact = kernels, exact
        ctx.save_for_backward(x, weight, z, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        x, weight, z, stats = ctx.saved_tensors
        g = g.contiguous()
        coef = _backward_normalise(ctx.kernels, z, stats, g)
        wanted = ctx.needs_input_grad[2:]
        return None, None, *ctx.kernels.backward_multiply(x, weight, z, g, coef, ctx.exact, wanted)


class _FactorizedReduce(torch.autograd.Function):
    """Two halves of channels, each a convolution of a grid of its own, normalised."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, bn: nn.BatchNorm2d, x: Tensor, *weights: Tensor) -> Tensor:
        exact = products_are_exact()
        (z,), (moments,) = kernels.reduce(x, [weights], exact)
        y, stats = _normalise(kernels, bn, z, moments)
        ctx.kernels, ctx.exact = kernels, exact
        ctx.save_for_backward(x, *weights, z, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights, z, stats = ctx.saved_tensors
        g = g.contiguous()
        wants_weights = any(ctx.needs_input_grad[3:])
        coef = _backward_normalise(ctx.kernels, z, stats, g)
        grad = ReduceGrad(tuple(weights), z, g, coef)
        (dx,), partials = ctx.kernels.backward_reduce(x, [grad], ctx.exact, wants_weights)
        if not wants_weights:
            return None, None, dx, None, None
        first, second = partials
        return None, None, dx, *ctx.kernels.reduce_partials([*first, *second], weights)


register_impl("relu_conv_bn", "ext", relu_conv_bn, supports_relu_conv_bn)
register_impl("factorized_reduce", "ext", factorized_reduce, supports_factorized_reduce)
