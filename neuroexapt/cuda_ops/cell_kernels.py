"""Launchers of the kernels of a fused cell (``csrc/cell_*.cu``, ``csrc/node_*.cu``), taking tensors.

Legend: B pictures of C channels, fp32 or bf16, and all else fp32; ``z``: [B, C, H, W], an input of a
BatchNorm; ``stats``: [C, 2], mean and 1 / sqrt(variance + eps); ``moments``: [parts, C, 3], partial {count,
mean, sum of squared deviations}; ``coef``: [C, 4], {A, B, D, 0} with dz = A · g + B · z + D. Only an input's
first dimension may be strided.

``mixing``: the mixing weight [] of a candidate that runs only if that is not 0, None of one that runs in any
case. What a candidate that does not run would have written holds anything, and no kernel reads it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.core.operations import two_grids
from neuroexapt.core.plan import EPS, MOMENTUM, POOL_SIZE
from neuroexapt.cuda_ops import pointwise, sepconv
from neuroexapt.cuda_ops.arguments import (
    addresses,
    current_stream,
    dense,
    dense_pictures,
    stored_in_bf16,
    strided,
)
from neuroexapt.cuda_ops.branch import Branch as Branch
from neuroexapt.cuda_ops.branch import kept, launch, launch_early
from neuroexapt.cuda_ops.build import extension
from neuroexapt.cuda_ops.pointwise import Product, Source, Target
from neuroexapt.kernels import reference
from neuroexapt.kernels.sepconv import Call

MAX_CONVS, MAX_EDGES, MAX_ADDENDS, MAX_WIDTH = 32, 16, 64, 1024
"""Of one state: convolutions and edges that leave it, parts of its gradient, columns of its pictures."""
MAX_TERMS, MAX_POOLED_EDGES = 96, 16
"""Of one node: terms, and edges with pools."""
LEAVES_OUT = True
"""What was not drawn."""
KEEPS_POOLS = False
"""For the backward pass, which forms them once more from their state."""


class Conv(NamedTuple):
    """W_pw · (W_dw ⋆ relu(x)), or of relu((x − mean) · rstd) where ``stats`` are given, at stride 1 only."""

    x: Tensor
    stats: Tensor | None
    depthwise: Tensor
    pointwise: Tensor
    dilation: int
    stride: int = 1
    mixing: Tensor | None = None


class ConvGrad(NamedTuple):
    """What the gradient of ``conv``, whose output is ``z``, starts from: dz = A · g + B · z + D."""

    conv: Conv
    z: Tensor
    g: Tensor
    coef: Tensor


class ReduceGrad(NamedTuple):
    """What the gradient of a factorized reduction starts from, as in ``ConvGrad``."""

    weights: tuple[Tensor, Tensor]
    z: Tensor
    g: Tensor
    coef: Tensor


class DenseGrad(NamedTuple):
    """What the gradient of a dense convolution starts from, as in ``ConvGrad``."""

    weight: Tensor
    z: Tensor
    g: Tensor
    coef: Tensor
    mixing: Tensor | None = None


class Partials(NamedTuple):
    """Partial weight gradients, [parts, …] for the depthwise and the pointwise weight of each convolution, or
    for the weights of both halves of each factorized reduction."""

    depthwise: list[Tensor]
    pointwise: list[Tensor]


class Pooling(NamedTuple):
    """A pool of ``kind`` "max" or "avg"."""

    kind: str
    stride: int


class Summand(NamedTuple):
    """weights[entry] · (z − mean) · rstd, or of z itself without ``stats``; entry None: weight 1.

    Gradients form ``pooling`` of z, where it is given, once more instead of z itself: pools are not kept. An
    edge has no more than one of a kind.
    """

    z: Tensor
    stats: Tensor | None
    entry: tuple[int, int] | None
    pooling: Pooling | None = None


class PoolGrad(NamedTuple):
    """What a state gets back from one node: through its pools and, with weights[identity], as it is."""

    g: Tensor
    max_coef: Tensor | None
    avg_coef: Tensor | None
    identity: tuple[int, int] | None


class StateGrad(NamedTuple):
    """What the gradient of the state ``x`` adds up: what its pools and identities pass back, and addends."""

    x: Tensor
    pools: Sequence[PoolGrad]
    addends: Sequence[Tensor]


def products_are_exact() -> bool:
    """Whether products are to be of fp32 grade, as those of PyTorch's own convolutions are, or of TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]


def convolve(convs: Sequence[Conv], exact: bool) -> tuple[list[Tensor], list[Tensor]]:
    """``z`` and ``moments`` of each convolution, usually in one launch; all have one shape and stride."""
    if convs[0].stride > 1:
        return _convolve_strided(convs, exact)
    kernels, shape = extension(), _conv_shape(convs[0].x, exact)
    zs = _empty_like(convs[0].x, len(convs))
    moments = _empty_fp32(convs[0].x, len(convs), kernels.cell_conv_forward_parts(shape), zs[0].shape[1], 3)
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
    us = _empty_like(grads[0].z, len(grads))
    sums = _empty_fp32(grads[0].z, len(grads), parts, channels, 2)
    coefs = _empty_fp32(grads[0].z, len(grads), channels, 4)
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
    found = [(_empty_like(z, splits), _partials(of_state, parts, wants_weights)) for of_state in grads]
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
    zs = _empty(x, len(weights), batch, channels, -(-height // 2), -(-width // 2))
    if not pointwise.takes(x, first, 2).ok:
        for z, pair in zip(zs, weights, strict=True):
            z.copy_(_reduce_by_pytorch(x, *pair))
        return zs, plane_moments(zs)
    moments = _empty_fp32(x, len(weights), pointwise.forward_parts(x, first, 2), channels, 3)
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
    (dx,) = _empty_like(x, 1)
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
    zs = _empty_like(x, len(weights))
    moments = _empty_fp32(x, len(weights), kernels.dense_conv_forward_parts(shape), x.shape[1], 3)
    weights = list(map(dense, weights))
    jobs = [
        kernels.DenseJob(*addresses(weight, z, m, mixing_weight), weight.shape[-1])
        for weight, z, m, mixing_weight in zip(
            weights, zs, moments, mixing or [None] * len(weights), strict=True
        )
    ]
    kernels.dense_conv_forward(shape, input_, jobs, current_stream())
    return zs, moments


def backward_dense(
    x: Tensor, grads: Sequence[DenseGrad], exact: bool, wants_weights: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors whose sum is the gradient of the state, and partial ones of the weights."""
    kernels, (shape, input_, x) = extension(), _dense_shape(x, exact)
    splits = kernels.dense_conv_dx_splits(shape, len(grads))
    parts = kernels.dense_conv_backward_parts(shape)
    dxs = _empty_like(x, splits)
    partials = [grad.weight.new_empty(parts, grad.weight.numel()) for grad in grads if wants_weights]
    none: list[Tensor | None] = [None] * len(grads)
    operands = [(dense_pictures(grad.g), dense(grad.weight)) for grad in grads]
    jobs = [
        kernels.DenseGradJob(
            *strided(g), *addresses(grad.z, grad.coef, weight, partial, grad.mixing), weight.shape[-1]
        )
        for grad, (g, weight), partial in zip(grads, operands, partials or none, strict=True)
    ]
    kernels.dense_conv_input_gradient(shape, input_, jobs, splits, dxs[0].data_ptr(), current_stream())
    if wants_weights:
        kernels.dense_conv_weight_gradients(shape, input_, jobs, current_stream())
    return dxs, partials


def reduce_partials(
    partials: Sequence[Tensor], weights: Sequence[Tensor], mixing: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """The weights' gradients, Σ_parts partial; 0 for those of candidates that did not run."""
    kernels = extension()
    gradients = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    jobs = [
        kernels.PartialSumsJob(
            *addresses(partial, gradient, mixing_weight), gradient.numel(), partial.shape[0]
        )
        for partial, gradient, mixing_weight in zip(
            partials, gradients, mixing or [None] * len(partials), strict=True
        )
    ]
    launch_early(kernels.partial_sums_add_up, jobs)
    return gradients


def plane_moments(zs: Sequence[Tensor]) -> list[Tensor]:
    """``moments`` of tensors that no kernel of ours wrote."""
    kernels, shape = extension(), _shape(zs[0])
    moments = _empty_fp32(zs[0], len(zs), kernels.node_parts(shape), zs[0].shape[1], 3)
    jobs = [kernels.MomentsJob(_tensor(z), *addresses(m)) for z, m in zip(zs, moments, strict=True)]
    kernels.node_moments(shape, jobs, current_stream())
    return moments


def pool(
    xs: Sequence[Tensor],
    stride: int,
    kinds: set[str],
    mixing: Sequence[Sequence[Tensor]] | None = None,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """For each of some states of one shape the outputs of the pools of ``kinds``, "max" and "avg", and their
    ``moments``; ``mixing``: of all pools of each state, of which one may run for all."""
    kernels, shape = extension(), _pool_shape(xs[0], stride)
    batch, channels, height, width = xs[0].shape
    size = (len(kinds), batch, channels, -(-height // stride), -(-width // stride))
    parts = kernels.node_pool_parts(shape)
    zs = [dict(zip(sorted(kinds), z, strict=True)) for z in _empty(xs[0], len(xs), *size)]
    moments = [
        dict(zip(sorted(kinds), m, strict=True))
        for m in _empty_fp32(xs[0], len(xs), len(kinds), parts, channels, 3)
    ]
    jobs = [
        kernels.PoolJob(
            _tensor(x),
            *addresses(z.get("max"), m.get("max"), z.get("avg"), m.get("avg")),
            addresses(*mixing_weights),
        )
        for x, z, m, mixing_weights in zip(xs, zs, moments, mixing or [()] * len(xs), strict=True)
    ]
    launch(kernels.node_pool, shape, jobs)
    return zs, moments


def statistics(
    bns: Sequence[nn.BatchNorm2d],
    moments: Sequence[Tensor],
    training: bool,
    mixing: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """``stats`` of each BatchNorm; in training they enter its running statistics, but for candidates that do
    not run; else they are these."""
    kernels, channels = extension(), bns[0].num_features
    stats = _empty_fp32(moments[0], len(bns), channels, 2)
    jobs = [
        kernels.StatsJob(
            m.data_ptr() if training else 0,
            m.shape[0],
            *addresses(s, bn.running_mean, bn.running_var, bn.num_batches_tracked, mixing_weight),
        )
        for bn, m, s, mixing_weight in zip(bns, moments, stats, mixing or [None] * len(bns), strict=True)
    ]
    launch_early(kernels.node_finalize, channels, EPS, MOMENTUM, jobs)
    return stats


def add_up(summands: Sequence[Summand], weights: Tensor | None, y: Tensor, drawn_only: bool = False) -> None:
    """y = the sum of ``summands``, of which one may be y itself; with ``drawn_only`` of those whose weight is
    not 0, in gradients too.
    """
    kernels = extension()
    terms = [
        kernels.NodeTerm(_tensor(term.z), *addresses(term.stats), _element(weights, term.entry))
        for term in summands
    ]
    launch(kernels.node_sum, _shape(y), terms, drawn_only, _tensor(y))


def backward_add_up(
    summands: Sequence[Summand],
    weights: Tensor | None,
    g: Tensor,
    grad_weights: Tensor | None,
    training: bool,
    drawn_only: bool = False,
) -> list[Tensor]:
    """``coef`` of each summand, and where they are wanted the gradients of the weights that they have."""
    kernels, shape = extension(), _shape(g)
    coefs = _empty_fp32(g, len(summands), g.shape[1], 4)
    (dots,) = _empty_fp32(g, 1, 1 + len(summands), g.shape[1], kernels.node_parts(shape))
    terms = [
        kernels.NodeDotTerm(_tensor(term.z), *addresses(term.stats), row, _number(weights, term.entry))
        for row, term in enumerate(summands, 1)
        if term.pooling is None
    ]
    (mixing,) = addresses(weights if drawn_only else None)
    pooled = _pooled_terms(summands, weights)
    launch(kernels.node_dots, shape, g.shape[3], terms, pooled, mixing, _tensor(g), dots.data_ptr())
    gradients = [
        kernels.NodeTermGradient(
            *addresses(term.stats),
            _element(weights, term.entry),
            0 if grad_weights is None else _element(grad_weights, term.entry),
            coef.data_ptr(),
        )
        for term, coef in zip(summands, coefs, strict=True)
    ]
    launch_early(kernels.node_coefficients, shape, training, gradients, drawn_only, dots.data_ptr())
    return coefs


def _pooled_terms(summands: Sequence[Summand], weights: Tensor | None) -> list[Any]:
    """Those with a pooling, both of an edge together."""
    of_edge: defaultdict[int, dict[str, tuple[int, Summand]]] = defaultdict(dict)
    for row, term in enumerate(summands, 1):
        if term.pooling is not None:
            assert term.entry is not None
            of_edge[term.entry[0]][term.pooling.kind] = row, term
    jobs = []
    for of_kind in of_edge.values():
        _, (x, _, _, pooling) = next(iter(of_kind.values()))
        assert pooling is not None
        stats = (of_kind[kind][1].stats if kind in of_kind else None for kind in ("max", "avg"))
        rows = (of_kind[kind][0] if kind in of_kind else 0 for kind in ("max", "avg"))
        entries = (of_kind[kind][1].entry if kind in of_kind else None for kind in ("max", "avg"))
        numbers = (_number(weights, entry) for entry in entries)
        sizes = (*x.shape[2:], pooling.stride)
        jobs.append(extension().NodePooledTerms(_tensor(x), *sizes, *addresses(*stats), *rows, *numbers))
    return jobs


def affine_gradients(gs: Sequence[Tensor], zs: Sequence[Tensor], coefs: Sequence[Tensor]) -> list[Tensor]:
    """dz = A · g + B · z + D for each."""
    kernels = extension()
    dzs = _empty_like(zs[0], len(zs))
    jobs = [
        kernels.AffineJob(_tensor(g), _tensor(z), *addresses(coef, dz))
        for g, z, coef, dz in zip(gs, zs, coefs, dzs, strict=True)
    ]
    kernels.node_affine_gradient(_shape(zs[0]), jobs, current_stream())
    return dzs


def state_gradients(
    states: Sequence[StateGrad], stride: int, weights: Tensor | None, drawn_only: bool = False
) -> list[Tensor]:
    """For each of some states of one shape the sum of its addends and of what the pools and identities of
    every edge pass back to it; with ``drawn_only`` those of weight 0 take no time."""
    if not states:
        return []
    kernels = extension()
    dxs = _empty_like(states[0].x, len(states))
    jobs = [
        kernels.StateJob(
            _tensor(state.x),
            [
                kernels.StateEdge(
                    _tensor(grad.g),
                    *addresses(grad.max_coef, grad.avg_coef),
                    _element(weights, grad.identity),
                )
                for grad in state.pools
            ],
            list(map(_tensor, state.addends)),
            dx.data_ptr(),
        )
        for state, dx in zip(states, dxs, strict=True)
    ]
    kernels.node_state_gradients(_pool_shape(states[0].x, stride), jobs, drawn_only, current_stream())
    return dxs


def _convolve_strided(convs: Sequence[Conv], exact: bool) -> tuple[list[Tensor], list[Tensor]]:
    """``convolve`` at stride 2: one launch, or for odd widths one a state, kernel size and dilation."""
    x = convs[0].x
    batch, channels, height, width = x.shape
    zs = _empty(x, len(convs), batch, channels, -(-height // 2), -(-width // 2))
    if width % 8:
        for same in _alike(convs):
            _run([_call(convs[i]) for i in same], [zs[i] for i in same])
        return zs, plane_moments(zs)
    kernels, shape = extension(), _strided_shape(x, exact)
    moments = _empty_fp32(x, len(convs), kernels.cell_strided_forward_parts(shape), channels, 3)
    operands = [(dense_pictures(conv.x), dense(conv.depthwise), dense(conv.pointwise)) for conv in convs]
    jobs = [
        kernels.StridedJob(
            *strided(x),
            *addresses(depthwise, pointwise, z, m, conv.mixing),
            depthwise.shape[-1],
            conv.dilation,
        )
        for conv, (x, depthwise, pointwise), z, m in zip(convs, operands, zs, moments, strict=True)
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
    found = [(_empty_like(x, 1), _partials(of_state, parts, wants_weights)) for of_state in grads]
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
    weights = (dense(grad.conv.depthwise), dense(grad.conv.pointwise))
    return [dense_pictures(grad.g), dense(grad.z), dense(grad.coef), *weights]


def _backward_strided_state(grads: Sequence[ConvGrad], wants_weights: bool) -> tuple[list[Tensor], Partials]:
    """A launch for each kernel size and dilation."""
    dxs = _empty_like(grads[0].conv.x, len(grads))
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


def _run(calls: Sequence[Call], ys: Sequence[Tensor]) -> None:
    """Fill ys together, or by PyTorch where the kernels don't take the shape."""
    if _fits(calls[0]):
        sepconv.launch_forward(calls, ys)
        return
    for call, y in zip(calls, ys, strict=True):
        y.copy_(_run_by_pytorch(call))


def _run_backward(
    calls: Sequence[Call],
    sources: Sequence[sepconv.Source],
    dxs: Sequence[Tensor],
    wanted: tuple[bool, bool],
) -> Sequence[Sequence[Any]]:
    """As ``_run`` fill dxs; returns each call's partial gradients of both weights."""
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


def _empty(like: Tensor, count: int, *shape: int) -> list[Tensor]:
    return list(kept(like.new_empty(count, *shape)).unbind())


def _empty_fp32(like: Tensor, count: int, *shape: int) -> list[Tensor]:
    return list(kept(like.new_empty(count, *shape, dtype=torch.float32)).unbind())


def _empty_like(x: Tensor, count: int) -> list[Tensor]:
    """Contiguous tensors of x's shape, in one piece."""
    return _empty(x, count, *x.shape)


def _conv_shape(x: Tensor, exact: bool) -> Any:
    return extension().ConvShape(*x.shape, stored_in_bf16(x), exact)


def _strided_shape(x: Tensor, exact: bool) -> Any:
    return extension().StridedShape(*x.shape, stored_in_bf16(x), exact)


def _dense_shape(x: Tensor, exact: bool) -> tuple[Any, Any, Tensor]:
    """The shape, the input, and the tensor that it points to."""
    x = dense_pictures(x)
    return extension().DenseShape(*x.shape, stored_in_bf16(x), exact), extension().DenseInput(*strided(x)), x


def _shape(x: Tensor) -> Any:
    batch, channels, height, width = x.shape
    return extension().NodeShape(batch, channels, height * width, stored_in_bf16(x))


def _pool_shape(x: Tensor, stride: int) -> Any:
    height, width = x.shape[2:]
    sizes = (*x.shape, -(-height // stride), -(-width // stride), POOL_SIZE, stride)
    return extension().PoolShape(*sizes, stored_in_bf16(x))


def _tensor(x: Tensor) -> Any:
    return extension().NodeTensor(*strided(x))


def _element(weights: Tensor | None, entry: tuple[int, int] | None) -> int:
    """The address of weights[entry]; without weights every entry is None."""
    if weights is None or entry is None:
        return 0
    return weights.data_ptr() + weights.element_size() * _number(weights, entry)


def _number(weights: Tensor | None, entry: tuple[int, int] | None) -> int:
    """Where weights[entry] stands, −1 for none."""
    return -1 if weights is None or entry is None else entry[0] * weights.shape[1] + entry[1]
