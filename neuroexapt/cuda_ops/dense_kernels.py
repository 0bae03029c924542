"""A fused cell's convolutions of all channels: 1x1, those of factorized reductions, and 3x3.

See ``cell_operands`` for the legend; the kernels are in ``csrc/pointwise.cu`` and ``csrc/dense_conv.cu``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.core.operations import two_grids
from neuroexapt.cuda_ops import pointwise
from neuroexapt.cuda_ops.arguments import (
    addresses,
    allocate,
    allocate_fp32,
    allocate_like,
    current_stream,
    dense_pictures,
    stored_in_bf16,
    strided,
)
from neuroexapt.cuda_ops.branch import Branch, NoBranch, launch
from neuroexapt.cuda_ops.build import extension
from neuroexapt.cuda_ops.cell_operands import DenseGrad, Partials, ReduceGrad
from neuroexapt.cuda_ops.node_kernels import affine_gradients, plane_moments, reduce_partials
from neuroexapt.cuda_ops.pointwise import Product, Source, Target


def multiply(x: Tensor, weight: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """z = W · relu(x) with ``weight`` [O, C, 1, 1], and its ``moments``."""
    z = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
    moments = weight.new_empty(pointwise.forward_parts(x, weight), weight.shape[0], 3)
    pointwise.forward([Product(x, weight, z, moments)], 1, exact)
    return z, moments


def backward_multiply(
    x: Tensor, weight: Tensor, z: Tensor, g: Tensor, coef: Tensor, exact: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, where they are wanted, from dz = A · g + B · z + D."""
    dx = torch.empty_like(x) if wanted[0] else None
    partial = weight.new_empty(pointwise.backward_parts(x, weight), weight.numel()) if wanted[1] else None
    pointwise.backward([Target(x, dx, [Source(weight, z, g, coef, partial)])], 1, exact)
    return dx, None if partial is None else reduce_partials([partial], [weight])[0]


def reduce(
    x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], exact: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """``z`` and ``moments`` of factorized reductions of one state, given both halves' weights of each."""
    first, (batch, _, height, width) = weights[0][0], x.shape
    channels = 2 * first.shape[0]
    zs = allocate(x, len(weights), batch, channels, -(-height // 2), -(-width // 2))
    if not pointwise.takes(x, first, 2).ok:
        for z, pair in zip(zs, weights, strict=True):
            z.copy_(_reduce_by_pytorch(x, *pair))
        return zs, plane_moments(zs)
    moments = allocate_fp32(x, len(weights), pointwise.forward_parts(x, first, 2), channels, 3)
    products = [
        Product(x, *half, corner)
        for pair, z, m in zip(weights, zs, moments, strict=True)
        for corner, half in enumerate(zip(pair, z.chunk(2, 1), m.chunk(2, 1), strict=True))
    ]
    pointwise.forward(products, 2, exact)
    return zs, moments


def backward_reduce(
    x: Tensor, grads: Sequence[ReduceGrad], exact: bool, wants_weights: bool
) -> tuple[list[Tensor], Partials]:
    """Tensors whose sum is the gradient of the state, and partial ones of the first and the second halves'
    weights."""
    first = grads[0].weights[0]
    if not pointwise.takes(x, first, 2).ok:
        return _differentiate_reductions(x, grads, wants_weights)
    (dx,) = allocate_like(x, 1)
    parts, targets = pointwise.backward_parts(x, first, 2), []
    for corner in (0, 1):
        sources = []
        for grad in grads:
            z, g, coef = (whole.chunk(2, dim)[corner] for whole, dim in zip(grad[1:], (1, 1, 0), strict=True))
            partial = first.new_empty(parts, first.numel()) if wants_weights else None
            sources.append(Source(grad.weights[corner], z, g, coef, partial))
        targets.append(Target(x, dx, sources, corner))
    pointwise.backward(targets, 2, exact)
    partials = [[s.partial for s in target.sources if s.partial is not None] for target in targets]
    return [dx], Partials(*partials)


def _reduce_by_pytorch(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    grids = two_grids(F.relu(x.to(first.dtype)))
    return torch.cat([F.conv2d(grid, w) for grid, w in zip(grids, (first, second), strict=True)], dim=1)


def _differentiate_reductions(
    x: Tensor, grads: Sequence[ReduceGrad], wants_weights: bool
) -> tuple[list[Tensor], Partials]:
    """What ``backward_reduce`` computes, in plain PyTorch."""
    dzs = affine_gradients(*map(list, zip(*((grad.g, grad.z, grad.coef) for grad in grads), strict=True)))
    dxs, partials = [], Partials([], [])
    for grad, dz in zip(grads, dzs, strict=True):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, *grad.weights)]
        with torch.enable_grad():
            z = _reduce_by_pytorch(*leaves)
        dx, first, second = torch.autograd.grad(z, leaves, dz.to(z.dtype))
        dxs.append(dx)
        partials.depthwise.append(first.reshape(1, -1))
        partials.pointwise.append(second.reshape(1, -1))
    return dxs, partials if wants_weights else Partials([], [])


def convolve_dense(
    x: Tensor, weights: Sequence[Tensor], exact: bool, mixing: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """``z`` and ``moments`` of convolutions of relu(x), stride 1; ``weights``: [C, C, K, K] with K 1 or 3."""
    kernels, (shape, input_, x) = extension(), _dense_shape(x, exact)
    zs = allocate_like(x, len(weights))
    moments = allocate_fp32(x, len(weights), kernels.dense_conv_forward_parts(shape), x.shape[1], 3)
    jobs = [
        kernels.DenseJob(*addresses(weight, z, m, mixing_weight), weight.shape[-1])
        for weight, z, m, mixing_weight in zip(
            weights, zs, moments, mixing or [None] * len(weights), strict=True
        )
    ]
    kernels.dense_conv_forward(shape, input_, jobs, current_stream())
    return zs, moments


def backward_dense(
    x: Tensor, grads: Sequence[DenseGrad], exact: bool, wants_weights: bool, branch: Branch | NoBranch
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors whose sum is the gradient of the state, and partial ones of the weights, as ``branch`` makes
    them."""
    kernels, (shape, input_, x) = extension(), _dense_shape(x, exact)
    splits = kernels.dense_conv_dx_splits(shape, len(grads))
    parts = kernels.dense_conv_backward_parts(shape)
    dxs = allocate_like(x, splits)
    partials = [grad.weight.new_empty(parts, grad.weight.numel()) for grad in grads if wants_weights]
    none: list[Tensor | None] = [None] * len(grads)
    gs = [dense_pictures(grad.g) for grad in grads]
    jobs = [
        kernels.DenseGradJob(
            *strided(g),
            *addresses(grad.z, grad.coef, grad.weight, partial, grad.mixing),
            grad.weight.shape[-1],
        )
        for grad, g, partial in zip(grads, gs, partials or none, strict=True)
    ]
    kernels.dense_conv_input_gradient(shape, input_, jobs, splits, dxs[0].data_ptr(), current_stream())
    if wants_weights:
        with branch:
            branch.keep(x, *gs, *partials, *(tensor for grad in grads for tensor in (grad.z, grad.coef)))
            launch(kernels.dense_conv_weight_gradients, shape, input_, jobs)
    return dxs, partials


def _dense_shape(x: Tensor, exact: bool) -> tuple[Any, Any, Tensor]:
    """The shape, the input, and the tensor that it points to."""
    x = dense_pictures(x)
    return extension().DenseShape(*x.shape, stored_in_bf16(x), exact), extension().DenseInput(*strided(x)), x
