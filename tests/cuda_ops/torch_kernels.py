"""The functions of ``neuroexapt.cuda_ops.cell_kernels`` in plain PyTorch, for any device and dtype.

What a candidate that does not run would have written is NaN.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.core.operations import shift_by_one
from neuroexapt.core.plan import EPS, MOMENTUM
from neuroexapt.cuda_ops.cell_operands import (
    Conv,
    ConvGrad,
    DenseGrad,
    Partials,
    ReduceGrad,
    StateGrad,
    Summand,
)
from neuroexapt.kernels import reference

KEEPS_POOLS, LEAVES_OUT = False, True


class Branch:
    """As late as allowed: what a block computes is there after ``join``, NaN before."""

    is_one = True
    active: "Branch | None" = None

    def __init__(self) -> None:
        self._late: list[Callable[[], object]] = []
        self._kept: list[Tensor] = []

    def __enter__(self) -> None:
        Branch.active = self

    def __exit__(self, *_exception: object) -> None:
        Branch.active = None

    def keep(self, *tensors: Tensor) -> None:
        self._kept += tensors

    def start(self) -> None:
        pass

    def join(self) -> None:
        while self._late:
            self._late.pop()()
        self._kept.clear()

    @staticmethod
    def hide(tensor: Tensor) -> Tensor:
        """The tensor itself, filled with NaN if this is a block."""
        if Branch.active is not None:
            value = tensor.clone()
            Branch.active._late.append(lambda: tensor.copy_(value))
            tensor.fill_(torch.nan)
        return tensor


POOLS = {"max": reference.max_pool, "avg": reference.avg_pool}


def convolve(convs: Sequence[Conv], exact: bool) -> tuple[list[Tensor], list[Tensor]]:
    zs = [_if_it_runs(_convolve(conv, conv.x, conv.depthwise, conv.pointwise), conv.mixing) for conv in convs]
    return zs, plane_moments(zs)


def backward_second(
    grads: Sequence[ConvGrad], exact: bool, training: bool, wants_weights: bool
) -> tuple[list[Tensor], list[Tensor], Partials]:
    us, coefs, partials = [], [], Partials([], [])
    for grad in grads:
        dx, depthwise, pointwise = (_if_it_runs(gradient, grad.conv.mixing) for gradient in _gradients(grad))
        mean, rstd = grad.conv.stats.unbind(1)
        us.append(dx / _per_channel(rstd))
        coefs.append(_coef(us[-1], grad.conv.x, mean, rstd, 1.0, training))
        if wants_weights:
            partials.depthwise.append(_split(depthwise))
            partials.pointwise.append(_split(pointwise))
    return us, coefs, partials


def backward_first(
    grads: Sequence[Sequence[ConvGrad]], exact: bool, wants_weights: bool
) -> tuple[list[list[Tensor]], Partials]:
    gradients = [[_gradients(grad) for grad in of_state] for of_state in grads]
    dxs = [
        [
            dx if _runs(grad.conv.mixing) else torch.zeros_like(dx)
            for grad, (dx, _, _) in zip(of_state, own, strict=True)
        ]
        for of_state, own in zip(grads, gradients, strict=True)
    ]
    if not wants_weights:
        return dxs, Partials([], [])
    in_order = list(chain(*gradients))
    return dxs, Partials([_split(dw) for _, dw, _ in in_order], [_split(pw) for _, _, pw in in_order])


def can_leave_out(x: Tensor, stride: int) -> bool:
    return True


def multiply(x: Tensor, weight: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    z = F.conv2d(F.relu(x), weight)
    return z, _moments(z)


def backward_multiply(
    x: Tensor, weight: Tensor, z: Tensor, g: Tensor, coef: Tensor, exact: bool, wanted: tuple[bool, bool]
) -> list[Tensor | None]:
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight)]
        output, _ = multiply(*leaves, exact)
    gradients = torch.autograd.grad(output, leaves, _affine(g, z, coef))
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def reduce(
    x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], exact: bool
) -> tuple[list[Tensor], list[Tensor]]:
    zs = [_reduce(x, *pair) for pair in weights]
    return zs, plane_moments(zs)


def backward_reduce(
    x: Tensor, grads: Sequence[ReduceGrad], exact: bool, wants_weights: bool
) -> tuple[list[Tensor], Partials]:
    dxs: list[Tensor] = []
    partials = Partials([], [])
    for grad in grads:
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in (x, *grad.weights)]
            z = _reduce(*leaves)
        own_dx, first, second = torch.autograd.grad(z, leaves, _affine(grad.g, grad.z, grad.coef))
        dxs.append(own_dx)
        if wants_weights:
            partials.depthwise.append(_split(first))
            partials.pointwise.append(_split(second))
    return dxs, partials


def convolve_dense(
    x: Tensor, weights: Sequence[Tensor], exact: bool, mixing: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    zs = [_convolve_dense(x, weight) for weight in weights]
    zs = [_if_it_runs(z, m) for z, m in zip(zs, mixing or [None] * len(zs), strict=True)]
    return zs, plane_moments(zs)


def backward_dense(
    x: Tensor, grads: Sequence[DenseGrad], exact: bool, wants_weights: bool, branch: object = None
) -> tuple[list[Tensor], list[Tensor]]:
    gradients = []
    for grad in grads:
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in (x, grad.weight)]
            z = _convolve_dense(*leaves)
        dx, dw = torch.autograd.grad(z, leaves, _affine(grad.g, grad.z, grad.coef))
        gradients.append((dx if _runs(grad.mixing) else torch.zeros_like(dx), _if_it_runs(dw, grad.mixing)))
    return [dx for dx, _ in gradients], [_split(dw) for _, dw in gradients if wants_weights]


def _convolve_dense(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.relu(x), weight, padding=weight.shape[-1] // 2)


def reduce_partials(
    partials: Sequence[Tensor], weights: Sequence[Tensor], mixing: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    return [
        Branch.hide(partial.sum(0).view_as(weight) if _runs(m) else torch.zeros_like(weight))
        for partial, weight, m in zip(partials, weights, mixing or [None] * len(partials), strict=True)
    ]


def plane_moments(zs: Sequence[Tensor]) -> list[Tensor]:
    return [_moments(z) for z in zs]


def pool(
    xs: Sequence[Tensor], stride: int, kinds: set[str], mixing: Sequence[Sequence[Tensor]] | None = None
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    wanted = [not of_state or any(map(_runs, of_state)) for of_state in mixing or [()] * len(xs)]
    zs = [
        {kind: _if(is_wanted, POOLS[kind](x, 3, stride)) for kind in kinds}
        for x, is_wanted in zip(xs, wanted, strict=True)
    ]
    moments = [{kind: _moments(z) for kind, z in of_state.items()} for of_state in zs]
    for z in chain(*(of_state.values() for of_state in zs)):
        Branch.hide(z)
    return zs, moments


def statistics(
    bns: Sequence[nn.BatchNorm2d],
    moments: Sequence[Tensor],
    training: bool,
    mixing: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    stats = []
    for bn, partial, m in zip(bns, moments, mixing or [None] * len(bns), strict=True):
        mean, variance = bn.running_mean, bn.running_var
        if training:
            counts, means, squares = partial.unbind(2)
            count = counts.sum(0)
            mean = (counts * means).sum(0) / count
            squares = (squares + counts * (means - mean) ** 2).sum(0)
            variance = squares / count
            if _runs(m):
                bn.running_mean.lerp_(mean, MOMENTUM)
                bn.running_var.lerp_(squares / (count - 1), MOMENTUM)
                bn.num_batches_tracked += 1
        stats.append(Branch.hide(torch.stack([mean, (variance + EPS).rsqrt()], 1)))
    return stats


def add_up(summands: Sequence[Summand], weights: Tensor, y: Tensor, drawn_only: bool = False) -> None:
    read = [term for term in summands if not drawn_only or _weight(weights, term.entry) != 0]
    terms = (_weight(weights, term.entry) * _normalised(term) for term in read)
    y.copy_(sum(terms, start=torch.zeros_like(y)))
    Branch.hide(y)


def backward_add_up(
    summands: Sequence[Summand],
    weights: Tensor,
    g: Tensor,
    grad_weights: Tensor | None,
    training: bool,
    drawn_only: bool = False,
    nothing: Sequence[tuple[int, int]] = (),
) -> list[Tensor]:
    coefs = []
    for entry in nothing:
        if grad_weights is not None and weights[entry] == 0:
            grad_weights[entry] = Branch.hide(g.sum())
    for term in summands:
        if drawn_only and _weight(weights, term.entry) == 0:
            if grad_weights is not None:
                grad_weights[term.entry] = g.sum()
            coefs.append(g.new_zeros(g.shape[1], 4))
            continue
        if term.pooling is not None:
            term = term._replace(z=POOLS[term.pooling.kind](term.z, 3, term.pooling.stride))
        if grad_weights is not None:
            grad_weights[term.entry] = (g * _normalised(term)).sum()
            Branch.hide(grad_weights[term.entry])
        weight = _weight(weights, term.entry)
        if term.stats is None:
            coefs.append(g.new_tensor([weight, 0, 0, 0]).repeat(g.shape[1], 1))
        else:
            coefs.append(_coef(g, term.z, *term.stats.unbind(1), weight, training))
        coefs[-1] = Branch.hide(coefs[-1])
    return coefs


def affine_gradients(gs: Sequence[Tensor], zs: Sequence[Tensor], coefs: Sequence[Tensor]) -> list[Tensor]:
    return [_affine(g, z, coef) for g, z, coef in zip(gs, zs, coefs, strict=True)]


def state_gradients(
    states: Sequence[StateGrad], stride: int, weights: Tensor, drawn_only: bool = False
) -> list[Tensor]:
    return [_state_gradient(state, stride, weights) for state in states]


def _state_gradient(state: StateGrad, stride: int, weights: Tensor) -> Tensor:
    x, pools, addends, _ = state
    dx = sum(addends, start=torch.zeros_like(x))
    for grad in pools:
        if grad.identity is not None:
            dx = dx + weights[grad.identity] * grad.g
        for kind, coef in (("max", grad.max_coef), ("avg", grad.avg_coef)):
            if coef is not None:
                with torch.enable_grad():
                    leaf = x.detach().requires_grad_()
                    z = POOLS[kind](leaf, 3, stride)
                dx = dx + torch.autograd.grad(z, leaf, _affine(grad.g, z.detach(), coef))[0]
    return dx


def _convolve(conv: Conv, x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    if conv.stats is not None:
        mean, rstd = map(_per_channel, conv.stats.unbind(1))
        x = (x - mean) * rstd
    return reference.sepconv(x, depthwise, pointwise, stride=conv.stride, dilation=conv.dilation)


def _reduce(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = F.relu(x)
    return torch.cat([F.conv2d(x, first, stride=2), F.conv2d(shift_by_one(x), second, stride=2)], dim=1)


def _gradients(grad: ConvGrad) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in (grad.conv.x, *grad.conv[2:4])]
        z = _convolve(grad.conv, *leaves)
    return torch.autograd.grad(z, leaves, _affine(grad.g, grad.z, grad.coef))


def _coef(g: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | float, training: bool) -> Tensor:
    """Of BatchNorm's gradient, written as the kernels use it."""
    scale = weight * rstd
    if not training:
        return torch.stack([scale, 0 * scale, 0 * scale, 0 * scale], 1)
    count = g.numel() / g.shape[1]
    dot = (g * (z - _per_channel(mean))).sum((0, 2, 3))
    slope = -scale * rstd**2 * dot / count
    offset = -scale * g.sum((0, 2, 3)) / count - slope * mean
    return torch.stack([scale, slope, offset, 0 * scale], 1)


def _affine(g: Tensor, z: Tensor, coef: Tensor) -> Tensor:
    a, b, d, _ = map(_per_channel, coef.unbind(1))
    return a * g + b * z + d


def _moments(z: Tensor) -> Tensor:
    """In two parts, so that there is something to merge."""
    parts = []
    for part in (z[:, :, :1], z[:, :, 1:]):
        mean = part.mean((0, 2, 3)) if part.numel() else z.new_zeros(z.shape[1])
        squares = ((part - _per_channel(mean)) ** 2).sum((0, 2, 3))
        parts.append(torch.stack([torch.full_like(mean, part.numel() / z.shape[1]), mean, squares], 1))
    return torch.stack(parts)


def _normalised(term: Summand) -> Tensor:
    if term.stats is None:
        return term.z
    mean, rstd = map(_per_channel, term.stats.unbind(1))
    return (term.z - mean) * rstd


def _split(gradient: Tensor) -> Tensor:
    return torch.stack([gradient.flatten() / 4, gradient.flatten() * 3 / 4])


def _runs(mixing: Tensor | None) -> bool:
    return mixing is None or mixing.item() != 0


def _if_it_runs(written: Tensor, mixing: Tensor | None) -> Tensor:
    return _if(_runs(mixing), written)


def _if(is_written: bool, written: Tensor) -> Tensor:
    return written if is_written else torch.full_like(written, torch.nan)


def _weight(weights: Tensor, entry: tuple[int, int] | None) -> Tensor | float:
    return 1.0 if entry is None else weights[entry]


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
