"""Launchers of a fused cell's separable convolutions (``csrc/cell_conv_*.cu``, ``csrc/cell_strided_*.cu``).

See ``cell_operands`` for the legend. Strided ones of some sizes are PyTorch's, or ``sepconv``'s.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from neuroexapt.cuda_ops import sepconv
from neuroexapt.cuda_ops.arguments import (
    addresses,
    allocate,
    allocate_fp32,
    allocate_like,
    current_stream,
    dense,
    dense_pictures,
    stored_in_bf16,
    strided,
)
from neuroexapt.cuda_ops.build import extension
from neuroexapt.cuda_ops.cell_operands import Conv, ConvGrad, Partials
from neuroexapt.cuda_ops.node_kernels import affine_gradients, plane_moments
from neuroexapt.kernels import reference
from neuroexapt.kernels.sepconv import Call


def convolve(convs: Sequence[Conv], exact: bool) -> tuple[list[Tensor], list[Tensor]]:
    """``z`` and ``moments`` of each convolution, usually in one launch; all have one shape and stride."""
    if convs[0].stride > 1:
        return _convolve_strided(convs, exact)
    kernels, shape = extension(), _conv_shape(convs[0].x, exact)
    zs = allocate_like(convs[0].x, len(convs))
    moments = allocate_fp32(convs[0].x, len(convs), kernels.cell_conv_forward_parts(shape), zs[0].shape[1], 3)
    jobs = [
        kernels.ConvJob(
            *strided(conv.x),
            *addresses(conv.stats, conv.depthwise, conv.pointwise, z, m, conv.mixing),
            conv.depthwise.shape[-1],
            conv.dilation,
        )
        for conv, z, m in zip(convs, zs, moments, strict=True)
    ]
    kernels.cell_conv_forward(shape, jobs, current_stream())
    return zs, moments


def backward_second(
    grads: Sequence[ConvGrad], exact: bool, training: bool, wants_weights: bool
) -> tuple[list[Tensor], list[Tensor], Partials]:
    """Of convolutions of normalised inputs: the gradients u of (x − mean) · rstd, and the coef with which
    the input's gradient is A · u + B · x + D."""
    kernels, shape = extension(), _conv_shape(grads[0].z, exact)
    parts, channels = kernels.cell_conv_backward_parts(shape), grads[0].z.shape[1]
    us = allocate_like(grads[0].z, len(grads))
    sums = allocate_fp32(grads[0].z, len(grads), parts, channels, 2)
    coefs = allocate_fp32(grads[0].z, len(grads), channels, 4)
    partials = _partials(grads, parts, wants_weights)
    kernels.cell_conv_backward_second(shape, _grad_jobs(grads, us, sums, partials), current_stream())
    jobs = [
        kernels.ConvCoefJob(*addresses(sum_, grad.conv.stats, coef))
        for sum_, grad, coef in zip(sums, grads, coefs, strict=True)
    ]
    kernels.cell_conv_first_coefficients(shape, training, jobs, current_stream())
    return us, coefs, partials


def backward_first(
    grads: Sequence[Sequence[ConvGrad]], exact: bool, wants_weights: bool
) -> tuple[list[list[Tensor]], Partials]:
    """Of the convolutions of each state: tensors whose sum is the state's gradient; partials of them all."""
    if grads[0][0].conv.stride > 1:
        found = _backward_strided(grads, exact, wants_weights)
    else:
        pairs = (grads[i : i + 2] for i in range(0, len(grads), 2))
        found = [one for pair in pairs for one in _backward_states(pair, exact, wants_weights)]
    dxs, partials = zip(*found, strict=True)
    return list(dxs), Partials(*(list(chain(*same)) for same in zip(*partials, strict=True)))


def _backward_states(
    grads: Sequence[Sequence[ConvGrad]], exact: bool, wants_weights: bool
) -> list[tuple[list[Tensor], Partials]]:
    """Of one state or two, in one launch."""
    z, kernels = grads[0][0].z, extension()
    shape, most = _conv_shape(z, exact), max(map(len, grads))
    splits = kernels.cell_conv_dx_splits(shape, most, len(grads), wants_weights)
    parts = kernels.cell_conv_backward_parts(shape)
    found = [(allocate_like(z, splits), _partials(of_state, parts, wants_weights)) for of_state in grads]
    jobs = [
        job
        for of_state, (dxs, partials) in zip(grads, found, strict=True)
        for job in _grad_jobs(of_state, [dxs[0]] * len(of_state), [None] * len(of_state), partials)
    ]
    kernels.cell_conv_backward_first(shape, jobs, splits, current_stream())
    return found


def can_leave_out(x: Tensor, stride: int) -> bool:
    """Whether all kernels for convolutions of a state like x leave out those that were not drawn."""
    return stride == 1 or _strided_kernels_take(x)


def _strided_kernels_take(x: Tensor) -> bool:
    """Whether the backward pass of strided convolutions of x has kernels of its own."""
    return x.shape[3] % 8 == 0 and extension().cell_strided_backward_takes(_strided_shape(x, exact=False))


def _convolve_strided(convs: Sequence[Conv], exact: bool) -> tuple[list[Tensor], list[Tensor]]:
    """``convolve`` at stride 2: one launch, or PyTorch where the width is no multiple of 8."""
    x = convs[0].x
    batch, channels, height, width = x.shape
    zs = allocate(x, len(convs), batch, channels, -(-height // 2), -(-width // 2))
    if width % 8:
        for conv, z in zip(convs, zs, strict=True):
            z.copy_(_run_by_pytorch(_call(conv)))
        return zs, plane_moments(zs)
    kernels, shape = extension(), _strided_shape(x, exact)
    moments = allocate_fp32(x, len(convs), kernels.cell_strided_forward_parts(shape), channels, 3)
    xs = [dense_pictures(conv.x) for conv in convs]
    jobs = [
        kernels.StridedJob(
            *strided(x),
            *addresses(conv.depthwise, conv.pointwise, z, m, conv.mixing),
            conv.depthwise.shape[-1],
            conv.dilation,
        )
        for conv, x, z, m in zip(convs, xs, zs, moments, strict=True)
    ]
    kernels.cell_strided_forward(shape, jobs, current_stream())
    return zs, moments


def _backward_strided(
    grads: Sequence[Sequence[ConvGrad]], exact: bool, wants_weights: bool
) -> list[tuple[list[Tensor], Partials]]:
    """As ``_convolve_strided``, for each state."""
    x, kernels = grads[0][0].conv.x, extension()
    shape = _strided_shape(x, exact)
    if not _strided_kernels_take(x):
        return [_backward_strided_state(of_state, wants_weights) for of_state in grads]
    parts = kernels.cell_strided_backward_parts(shape)
    found = [(allocate_like(x, 1), _partials(of_state, parts, wants_weights)) for of_state in grads]
    xs = [dense_pictures(of_state[0].conv.x) for of_state in grads]
    operands = [list(map(_strided_operands, of_state)) for of_state in grads]
    states = []
    for x, ((dx,), partials), of_state, tensors in zip(xs, found, grads, operands, strict=True):
        none: list[Tensor | None] = [None] * len(of_state)
        jobs = [
            kernels.StridedGradJob(
                *strided(g),
                *addresses(*others, *partial, grad.conv.mixing),
                grad.conv.depthwise.shape[-1],
                grad.conv.dilation,
            )
            for grad, (g, *others), *partial in zip(
                of_state, tensors, partials.depthwise or none, partials.pointwise or none, strict=True
            )
        ]
        states.append(kernels.StridedStateGrad(*strided(x), *addresses(dx), jobs))
    kernels.cell_strided_backward(shape, states, current_stream())
    return found


def _strided_operands(grad: ConvGrad) -> list[Tensor]:
    weights = grad.conv.depthwise, grad.conv.pointwise
    return [dense_pictures(grad.g), dense(grad.z), dense(grad.coef), *weights]


def _backward_strided_state(grads: Sequence[ConvGrad], wants_weights: bool) -> tuple[list[Tensor], Partials]:
    """A launch for each kernel size and dilation."""
    dxs = allocate_like(grads[0].conv.x, len(grads))
    found: dict[int, Sequence[Any]] = {}
    for same in _alike([grad.conv for grad in grads]):
        calls = [_call(grads[i].conv) for i in same]
        sources = [sepconv.Source(grads[i].g, grads[i].z, grads[i].coef) for i in same]
        partials = _run_backward(calls, sources, [dxs[i] for i in same], (wants_weights, wants_weights))
        found |= zip(same, partials, strict=True)
    ordered = zip(*(found[i] for i in range(len(grads))), strict=True)
    return dxs, Partials(*map(list, ordered)) if wants_weights else Partials([], [])


def _alike(convs: Sequence[Conv]) -> Iterable[list[int]]:
    """The numbers of those that can share a launch."""
    groups = defaultdict(list)
    for i, conv in enumerate(convs):
        groups[id(conv.x), conv.depthwise.shape[-1], conv.dilation].append(i)
    return groups.values()


def _call(conv: Conv) -> Call:
    return Call(conv.x, conv.depthwise, conv.pointwise, conv.stride, conv.dilation, True)


def _run_backward(
    calls: Sequence[Call],
    sources: Sequence[sepconv.Source],
    dxs: Sequence[Tensor],
    wanted: tuple[bool, bool],
) -> Sequence[Sequence[Any]]:
    """Fill dxs together, or by PyTorch where the kernels don't take the shape; returns each call's partial
    gradients of both weights."""
    if not _fits(calls[0]):
        return [_differentiate(*one) for one in zip(calls, sources, dxs, strict=True)]
    partials = sepconv.partials(calls, sources[0].g, wanted)
    results = [sepconv.Results._make((dx, None, None, *two)) for dx, two in zip(dxs, partials, strict=True)]
    sepconv.launch_backward(calls, sources, results)
    return partials


def _fits(call: Call) -> bool:
    return sepconv.fits(call, {call.x.dtype}).ok


def _run_by_pytorch(call: Call) -> Tensor:
    x, depthwise, pointwise, *_ = call
    return reference.sepconv(
        x.to(depthwise.dtype), depthwise, pointwise, stride=call.stride, dilation=call.dilation
    )


def _differentiate(call: Call, source: sepconv.Source, dx: Tensor) -> list[Tensor | None]:
    """The weights' gradients, as the only part; fills dx."""
    leaves = [tensor.detach().requires_grad_() for tensor in call[:3]]
    with torch.enable_grad():
        y = _run_by_pytorch(Call._make((*leaves, *call[3:])))
    assert source.z is not None
    assert source.coef is not None
    (dy,) = affine_gradients([source.g], [source.z], [source.coef])
    gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)
    dx.copy_(gradients[0])
    return [None if gradient is None else gradient.reshape(1, -1) for gradient in gradients[1:]]


def _grad_jobs(
    grads: Sequence[ConvGrad], dxs: Sequence[Tensor], sums: Sequence[Tensor | None], partials: Partials
) -> list[Any]:
    job = extension().ConvGradJob
    none: list[Tensor | None] = [None] * len(grads)
    return [
        job(
            *strided(grad.g),
            *addresses(grad.z, grad.coef),
            *strided(grad.conv.x),
            *addresses(
                grad.conv.stats, grad.conv.depthwise, grad.conv.pointwise, dx, *partial, grad.conv.mixing
            ),
            grad.conv.depthwise.shape[-1],
            grad.conv.dilation,
        )
        for grad, dx, *partial in zip(
            grads, dxs, sums, partials.depthwise or none, partials.pointwise or none, strict=True
        )
    ]


def _partials(grads: Sequence[ConvGrad], parts: int, wanted: bool) -> Partials:
    if not wanted:
        return Partials([], [])
    weights = ([grad.conv.depthwise for grad in grads], [grad.conv.pointwise for grad in grads])
    return Partials(*([weight.new_empty(parts, weight.numel()) for weight in same] for same in weights))


def _conv_shape(x: Tensor, exact: bool) -> Any:
    return extension().ConvShape(*x.shape, stored_in_bf16(x), exact)


def _strided_shape(x: Tensor, exact: bool) -> Any:
    return extension().StridedShape(*x.shape, stored_in_bf16(x), exact)
