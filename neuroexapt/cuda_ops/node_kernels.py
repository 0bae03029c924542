"""Launchers of what a fused cell does besides convolving (``csrc/node_*.cu``, ``csrc/partial_sums.cu``).

See ``cell_operands`` for the legend.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.core.plan import EPS, MOMENTUM, POOL_SIZE
from neuroexapt.cuda_ops.arguments import (
    addresses,
    allocate,
    allocate_fp32,
    allocate_like,
    current_stream,
    stored_in_bf16,
    strided,
)
from neuroexapt.cuda_ops.branch import launch, launch_early
from neuroexapt.cuda_ops.build import extension
from neuroexapt.cuda_ops.cell_operands import StateGrad, Summand


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
    moments = allocate_fp32(zs[0], len(zs), kernels.node_parts(shape), zs[0].shape[1], 3)
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
    zs = [dict(zip(sorted(kinds), z, strict=True)) for z in allocate(xs[0], len(xs), *size)]
    moments = [
        dict(zip(sorted(kinds), m, strict=True))
        for m in allocate_fp32(xs[0], len(xs), len(kinds), parts, channels, 3)
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
    stats = allocate_fp32(moments[0], len(bns), channels, 2)
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
    nothing: Sequence[tuple[int, int]] = (),
) -> list[Tensor]:
    """``coef`` of each summand, and where they are wanted the gradients of the weights that they have.

    With ``drawn_only`` the weights that are 0 have the gradient Σ g instead, those of the candidates ``none``
    too, whose entries are ``nothing``.
    """
    kernels, shape = extension(), _shape(g)
    coefs = allocate_fp32(g, len(summands), g.shape[1], 4)
    (dots,) = allocate_fp32(g, 1, 1 + len(summands), g.shape[1], kernels.node_parts(shape))
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
    if grad_weights is not None:
        gradients += [
            kernels.NodeTermGradient(0, _element(weights, entry), _element(grad_weights, entry), 0)
            for entry in nothing
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
    dzs = allocate_like(zs[0], len(zs))
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
    dxs = allocate_like(states[0].x, len(states))
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
            state.means_only,
        )
        for state, dx in zip(states, dxs, strict=True)
    ]
    kernels.node_state_gradients(_pool_shape(states[0].x, stride), jobs, drawn_only, current_stream())
    return dxs


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
