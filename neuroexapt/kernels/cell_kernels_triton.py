"""Launchers of the Triton kernels of a fused cell.

They take and return what those of ``neuroexapt.cuda_ops.cell_kernels`` do; the legend of ``cell_operands``
holds here, too, but for ``Moments``. Factorized reductions and dense convolutions are PyTorch's.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.core.operations import two_grids
from neuroexapt.core.plan import EPS, MOMENTUM
from neuroexapt.cuda_ops.branch import NoBranch
from neuroexapt.cuda_ops.cell_operands import (
    Conv,
    ConvGrad,
    DenseGrad,
    Partials,
    PoolGrad,
    ReduceGrad,
    StateGrad,
    Summand,
)
from neuroexapt.kernels.cell_conv_triton import (
    cell_conv_bwd_depthwise_kernel,
    cell_conv_bwd_pointwise_kernel,
    cell_conv_fwd_kernel,
)
from neuroexapt.kernels.node_triton import (
    node_affine_kernel,
    node_coefficients_kernel,
    node_dots_kernel,
    node_moments_kernel,
    node_pool_kernel,
    node_state_gradient_kernel,
    node_statistics_kernel,
    node_sum_kernel,
    node_window_gradients_kernel,
)
from neuroexapt.kernels.sizes import ceil_div, power_of_two

MAX_CHANNELS = 128
Branch = NoBranch
KEEPS_POOLS = True
"""Forming them once more in the backward pass takes longer than reading them."""
LEAVES_OUT = False
"""What was not drawn: it runs with a weight of 0."""
_JOBS, _BATCH_NORMS = 8, 16
"""Convolutions and BatchNorms of a launch: filled up to them, since another number is another compilation."""
_TILE_PIXELS = 128
"""Of a batch, for what a tile has all by itself."""


class Moments(NamedTuple):
    """(mean, sum of squared deviations) of every ``tile_pixels`` pixels of a batch: [tiles, 2, C]."""

    partials: Tensor
    tile_pixels: int
    pixels: int


def convolve(convs: Sequence[Conv], exact: bool) -> tuple[list[Tensor], list[Moments]]:
    """``z`` and ``moments`` of each convolution; all have one shape and stride."""
    found: dict[int, tuple[Tensor, Moments]] = {}
    for numbers in _launches(convs):
        part = [convs[i] for i in numbers]
        x = part[0].x
        shape = _output_shape(x, part[0].stride)
        pixels, blocks = _pixels(shape), _forward_blocks(shape, len(part))
        tiles = ceil_div(pixels, blocks["BLOCK_P"])
        zs = x.new_empty(len(part), *shape)
        partials = _empty_fp32(x, len(part), tiles, 2, shape[1])
        cell_conv_fwd_kernel[tiles, len(part)](
            *_inputs(part), zs, partials, pixels, *x.shape[2:], *shape[2:],
            **_options(part[0]), PRECISION=_precision(x, exact), **blocks,
        )  # fmt: skip
        moments = (Moments(partial, blocks["BLOCK_P"], pixels) for partial in partials)
        found.update(zip(numbers, zip(zs, moments, strict=True), strict=True))
    zs_in_order, moments_in_order = zip(*(found[i] for i in range(len(convs))), strict=True)
    return list(zs_in_order), list(moments_in_order)


def backward_second(
    grads: Sequence[ConvGrad], exact: bool, training: bool, wants_weights: bool
) -> tuple[list[Tensor], list[Tensor], Partials]:
    """Of convolutions of normalised inputs: the gradients u of (x − mean) · rstd, and the coef with which
    the input's gradient is A · u + B · x + D."""
    found = _backward_convolutions(grads, exact, wants_weights)
    coefs: dict[int, Tensor] = {}
    for numbers in _launches([grad.conv for grad in grads]):
        stats = [_stats_of(grads[i].conv) for i in numbers]
        dots = found[numbers[0]].dots
        assert dots is not None
        pixels = _pixels(grads[numbers[0]].conv.x.shape)
        of_part = _coefficients(dots, stats, [1] * len(stats), None, None, pixels, training)
        coefs.update(zip(numbers, of_part, strict=True))
    in_order = [found[i] for i in range(len(grads))]
    return [one.dx for one in in_order], [coefs[i] for i in range(len(grads))], _partials(in_order)


def backward_first(
    grads: Sequence[Sequence[ConvGrad]], exact: bool, wants_weights: bool
) -> tuple[list[list[Tensor]], Partials]:
    """Of the convolutions of each state: tensors whose sum is the state's gradient; partials of them all."""
    found = _backward_convolutions(list(chain(*grads)), exact, wants_weights)
    in_order = [found[i] for i in range(len(found))]
    dxs = iter([one.dx for one in in_order])
    return [[next(dxs) for _ in of_state] for of_state in grads], _partials(in_order)


class _ConvGradients(NamedTuple):
    """Of one convolution: those of its input and of its weights, [1, …]; of its launch: ``dots``."""

    dx: Tensor
    depthwise: Tensor | None
    pointwise: Tensor | None
    dots: Tensor | None


def _backward_convolutions(
    grads: Sequence[ConvGrad], exact: bool, wants_weights: bool
) -> dict[int, _ConvGradients]:
    """By number of the convolution."""
    found: dict[int, _ConvGradients] = {}
    for numbers in _launches([grad.conv for grad in grads]):
        results = _backward_launch([grads[i] for i in numbers], exact, wants_weights)
        found.update(zip(numbers, results, strict=True))
    return found


def _backward_launch(grads: Sequence[ConvGrad], exact: bool, wants_weights: bool) -> list[_ConvGradients]:
    """Of the convolutions of one launch."""
    convs = [grad.conv for grad in grads]
    x, z, jobs = convs[0].x, grads[0].z, len(grads)
    channels, kernel_size = x.shape[1], convs[0].depthwise.shape[-1]
    xs, x_strides, stats, depthwise, pointwise = _inputs(convs)
    options = {**_options(convs[0]), "NEED_WEIGHTS": wants_weights}
    sizes = (*x.shape[2:], *z.shape[2:])

    splits, blocks = _pointwise_blocks(z.shape, jobs, wants_weights)
    e = z.new_empty(jobs, *z.shape)
    partials = _empty_fp32(z, jobs, splits if wants_weights else 0, channels * channels)
    cell_conv_bwd_pointwise_kernel[splits, ceil_div(channels, blocks["BLOCK_C"]), jobs](
        *_pictures([grad.g for grad in grads], _JOBS), _filled([grad.z.contiguous() for grad in grads]),
        _filled([grad.coef.contiguous() for grad in grads]), xs, x_strides, stats, depthwise, pointwise, e,
        partials, _pixels(z.shape), *sizes, **options, PRECISION=_precision(x, exact),
        **blocks,
    )  # fmt: skip
    pointwise_grads: Any = partials.sum(1, keepdim=True) if wants_weights else [None] * jobs

    tiles, blocks = _depthwise_blocks(x.shape)
    dxs = x.new_empty(jobs, *x.shape)
    partials = _empty_fp32(x, jobs, tiles if wants_weights else 0, channels * kernel_size**2)
    dots = None if stats is None else _empty_fp32(x, jobs, tiles, 2, channels)
    cell_conv_bwd_depthwise_kernel[tiles, ceil_div(channels, blocks["BLOCK_C"]), jobs](
        e, xs, x_strides, stats, depthwise, dxs, partials, dots, _pixels(x.shape), *sizes,
        **options, **blocks,
    )  # fmt: skip
    depthwise_grads: Any = partials.sum(1, keepdim=True) if wants_weights else [None] * jobs
    return [_ConvGradients(*one, dots) for one in zip(dxs, depthwise_grads, pointwise_grads, strict=True)]


def reduce_partials(partials: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights' gradients, which are added up already."""
    return [partial.view(weight.shape) for partial, weight in zip(partials, weights, strict=True)]


def reduce(
    x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], exact: bool
) -> tuple[list[Tensor], list[Moments]]:
    """``z`` and ``moments`` of factorized reductions of one state, given both halves' weights of each."""
    first, second = _joined(weights)
    zs = list(_reduce(x, first, second, len(weights)).unbind(1))
    return zs, plane_moments(zs)


def backward_reduce(
    x: Tensor, grads: Sequence[ReduceGrad], exact: bool, wants_weights: bool
) -> tuple[list[Tensor], Partials]:
    """The gradient of the state, and those of the first and the second halves' weights."""
    leaves = [x, *_joined([grad.weights for grad in grads])]
    dz = torch.stack([_dz(grad) for grad in grads], 1)
    reduce_all = functools.partial(_reduce, count=len(grads))
    dx, *halves = _differentiate(reduce_all, leaves, dz, wants_weights)
    of_weights = [list(half.view(len(grads), 1, -1)) for half in halves]
    return [dx], Partials(*of_weights) if wants_weights else Partials([], [])


def multiply(x: Tensor, weight: Tensor, exact: bool) -> tuple[Tensor, Moments]:
    """z = W · relu(x) with ``weight`` [O, C, 1, 1], and its ``moments``."""
    z = _convolve_dense(x, weight)
    return z, _moments(z)


def backward_multiply(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    g: Tensor,
    coef: Tensor,
    exact: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, where they are wanted, from dz = A · g + B · z + D."""
    leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip((x, weight), wanted, strict=True)]
    with torch.enable_grad():
        y = _convolve_dense(*leaves)
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], _affine(g, z, coef)))
    dx, dw = (next(found) if want else None for want in wanted)
    return dx, dw


def convolve_dense(x: Tensor, weights: Sequence[Tensor], exact: bool) -> tuple[list[Tensor], list[Moments]]:
    """``z`` and ``moments`` of convolutions of relu(x), stride 1; ``weights``: [C, C, K, K]."""
    zs = [_convolve_dense(x, weight) for weight in weights]
    return zs, plane_moments(zs)


def backward_dense(
    x: Tensor, grads: Sequence[DenseGrad], exact: bool, wants_weights: bool, branch: NoBranch
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors whose sum is the gradient of the state, and the gradients of the weights."""
    found = [_differentiate(_convolve_dense, [x, grad.weight], _dz(grad), wants_weights) for grad in grads]
    return [dx for dx, *_ in found], [dw.unsqueeze(0) for _, *dws in found for dw in dws]


def plane_moments(zs: Sequence[Tensor]) -> list[Moments]:
    """``moments`` of tensors that no kernel of ours wrote."""
    return [_moments(z) for z in zs]


def _moments(z: Tensor) -> Moments:
    tiles, grid, blocks = _tiles(z.shape)
    partials = _empty_fp32(z, tiles, 2, z.shape[1])
    node_moments_kernel[grid](
        z, z.stride(0), partials, z.shape[1], _pixels(z.shape), z.shape[2:].numel(), **blocks
    )
    return Moments(partials, _TILE_PIXELS, _pixels(z.shape))


def pool(
    xs: Sequence[Tensor], stride: int, kinds: set[str]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Moments]]]:
    """For each of some states of one shape the outputs of the pools of ``kinds``, "max" and "avg", and their
    ``moments``."""
    zs, moments = zip(*(_pool(x, stride, kinds) for x in xs), strict=True)
    return list(zs), list(moments)


def _pool(x: Tensor, stride: int, kinds: set[str]) -> tuple[dict[str, Tensor], dict[str, Moments]]:
    shape = _output_shape(x, stride)
    tiles, grid, blocks = _tiles(shape)
    z = {kind: x.new_empty(shape) for kind in kinds}
    partials = {kind: _empty_fp32(x, tiles, 2, shape[1]) for kind in kinds}
    node_pool_kernel[grid](
        x, x.stride(0), z.get("max"), partials.get("max"), z.get("avg"), partials.get("avg"), shape[1],
        _pixels(shape), *x.shape[2:], *shape[2:], STRIDE=stride, MAX="max" in kinds, AVG="avg" in kinds,
        **blocks,
    )  # fmt: skip
    return z, {kind: Moments(partial, _TILE_PIXELS, _pixels(shape)) for kind, partial in partials.items()}


def statistics(bns: Sequence[nn.BatchNorm2d], moments: Sequence[Moments], training: bool) -> list[Tensor]:
    """``stats`` of each BatchNorm; in training they enter its running statistics, else they are these."""
    channels = bns[0].num_features
    stats = _empty_fp32(moments[0].partials, len(bns), channels, 2)
    for first in range(0, len(bns), _BATCH_NORMS):
        part, of_part = bns[first : first + _BATCH_NORMS], moments[first : first + _BATCH_NORMS]
        jobs: tuple[list[Any], ...] = (
            [one.partials for one in of_part],
            [one.tile_pixels for one in of_part],
            *([getattr(bn, name) for bn in part] for name in _RUNNING),
        )
        node_statistics_kernel[len(part), ceil_div(channels, 16)](
            *(_filled(things, _BATCH_NORMS) for things in jobs), stats[first:], of_part[0].pixels, channels,
            EPS, MOMENTUM, TRAINING=training, BLOCK_T=256, BLOCK_C=16, num_warps=8,
        )  # fmt: skip
    return list(stats)


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def add_up(summands: Sequence[Summand], weights: Tensor | None, y: Tensor) -> None:
    """y = the sum of ``summands``."""
    if not summands:
        y.zero_()
        return
    grid, blocks = _plane_tiles(y.shape, _SUM_TILE)
    node_sum_kernel[grid](
        *_pictures([term.z for term in summands]), tuple(map(_stats_of, summands)),
        tuple(_code(term, weights) for term in summands), weights, y, y.stride(0), y.shape[1],
        y.shape[2:].numel(),
        WEIGHTED=sum(1 << k for k, term in enumerate(summands) if term.entry is not None), **blocks,
    )  # fmt: skip


def backward_add_up(
    summands: Sequence[Summand],
    weights: Tensor,
    g: Tensor,
    grad_weights: Tensor | None,
    training: bool,
) -> list[Tensor]:
    """``coef`` of each summand, and where they are wanted the gradients of the weights that they have."""
    channels, pixels = g.shape[1], _pixels(g.shape)
    zs, strides = _pictures([term.z for term in summands])
    stats = list(map(_stats_of, summands))
    rows = ceil_div(len(summands), _DOTS["ROWS"])
    parts = _splits(ceil_div(pixels, _DOTS["BLOCK"]), channels * rows, _PROGRAMS)
    dots = _empty_fp32(g, len(summands), parts, 2, channels)
    node_dots_kernel[channels, parts, rows](
        g, g.stride(0), zs, strides, tuple(stats), dots, channels, pixels, g.shape[2:].numel(),
        ALIGNED=all(z.data_ptr() % 16 == 0 for z in zs) and all(stride % 16 == 0 for stride in strides),
        **_DOTS,
    )  # fmt: skip
    codes = [_code(term, weights) for term in summands]
    return _coefficients(dots, stats, codes, weights, grad_weights, pixels, training)


_DOTS = {"ROWS": 8, "BLOCK": 256}


def _coefficients(
    dots: Tensor,
    stats: Sequence[Tensor],
    codes: Sequence[int],
    weights: Tensor | None,
    grad_weights: Tensor | None,
    pixels: int,
    training: bool,
) -> list[Tensor]:
    jobs, parts, _, channels = dots.shape
    coefs = _empty_fp32(dots, jobs, channels, 4)
    node_coefficients_kernel[jobs,](
        dots, tuple(stats), tuple(codes), weights, grad_weights, coefs, pixels, parts, channels,
        WEIGHTED=weights is not None, NEED_WEIGHTS=grad_weights is not None, TRAINING=training,
        BLOCK_T=1024 // power_of_two(channels), BLOCK_C=power_of_two(channels),
    )  # fmt: skip
    return list(coefs)


def affine_gradients(gs: Sequence[Tensor], zs: Sequence[Tensor], coefs: Sequence[Tensor]) -> list[Tensor]:
    """dz = A · g + B · z + D for each."""
    return [_affine(*one) for one in zip(gs, zs, coefs, strict=True)]


def state_gradients(states: Sequence[StateGrad], stride: int, weights: Tensor | None) -> list[Tensor]:
    """For each of some states the sum of its addends and of what the pools and identities of every edge pass
    back to it."""
    return [_state_gradient(state, stride, weights) for state in states]


def _state_gradient(state: StateGrad, stride: int, weights: Tensor | None) -> Tensor:
    x = state.x
    shape = _output_shape(x, stride)
    pooled = _window_gradients(x, state.pools, stride, shape)
    direct = [grad for grad in state.pools if grad.identity is not None]
    codes = tuple(2 * _index(grad.identity, weights) for grad in direct) or None
    dx = x.new_empty(x.shape)
    grid, blocks = _plane_tiles(x.shape, _STATE_TILE)
    node_state_gradient_kernel[grid](
        *_pictures(state.addends), *_pictures([grad.g for grad in direct]), codes, weights,
        pooled.get("max"), pooled.get("winner"), pooled.get("avg"), dx, x.shape[1],
        *x.shape[2:], *shape[2:], STRIDE=stride, MAX="max" in pooled, AVG="avg" in pooled, **blocks,
    )  # fmt: skip
    return dx


def _window_gradients(
    x: Tensor, pools: Sequence[PoolGrad], stride: int, shape: torch.Size
) -> dict[str, Tensor]:
    """Those of the outputs of both pools, and where the maxima are."""
    pools = [grad for grad in pools if grad.max_coef is not None or grad.avg_coef is not None]
    kinds = {
        kind for kind in ("max", "avg") if any(getattr(grad, f"{kind}_coef") is not None for grad in pools)
    }
    found = {kind: x.new_empty(shape) for kind in kinds}
    if not found:
        return {}
    if "max" in kinds:
        found["winner"] = x.new_empty(shape, dtype=torch.uint8)
    nothing = _no_coefficients(shape[1], x.device)
    coefs = (
        tuple(nothing if coef is None else coef for coef in of_kind)
        for of_kind in zip(*((grad.max_coef, grad.avg_coef) for grad in pools), strict=True)
    )
    grid, blocks = _plane_tiles(shape, _STATE_TILE)
    node_window_gradients_kernel[grid](
        x, x.stride(0), *_pictures([grad.g for grad in pools]), *coefs, found.get("max"), found.get("winner"),
        found.get("avg"), shape[1], *x.shape[2:], *shape[2:], STRIDE=stride, MAX="max" in kinds,
        AVG="avg" in kinds, **blocks,
    )  # fmt: skip
    return found


def _affine(g: Tensor, z: Tensor, coef: Tensor) -> Tensor:
    dz = z.new_empty(z.shape)
    _, grid, blocks = _tiles(z.shape)
    node_affine_kernel[grid](
        g, g.stride(0), z, z.stride(0), coef.contiguous(), dz, z.shape[1], _pixels(z.shape),
        z.shape[2:].numel(), **blocks,
    )  # fmt: skip
    return dz


def _dz(grad: ReduceGrad | DenseGrad) -> Tensor:
    return _affine(grad.g, grad.z, grad.coef)


def _joined(weights: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The first and the second halves' weights of all factorized reductions."""
    return [torch.cat(halves) for halves in zip(*weights, strict=True)]


def _reduce(x: Tensor, first: Tensor, second: Tensor, count: int) -> Tensor:
    """[B, count, C, H', W'], of all factorized reductions."""
    grids = two_grids(F.relu(x).to(first.dtype))
    halves = [F.conv2d(grid, half) for grid, half in zip(grids, (first, second), strict=True)]
    return torch.stack([half.unflatten(1, (count, -1)) for half in halves], 2).flatten(2, 3).to(x.dtype)


def _convolve_dense(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.relu(x).to(weight.dtype), weight, padding=weight.shape[-1] // 2).to(x.dtype)


def _differentiate(function: Any, tensors: Sequence[Tensor], g: Tensor, wants_weights: bool) -> list[Tensor]:
    """The gradients of the first of ``tensors`` and, where they are wanted, of the others."""
    leaves = [tensor.detach() for tensor in tensors]
    wanted = [leaf.requires_grad_() for leaf in (leaves if wants_weights else leaves[:1])]
    with torch.enable_grad():
        y = function(*leaves)
    return list(torch.autograd.grad(y, wanted, g))


def _partials(gradients: Sequence[_ConvGradients]) -> Partials:
    pairs = [(one.depthwise, one.pointwise) for one in gradients]
    return Partials(*([weight for weight in same if weight is not None] for same in zip(*pairs, strict=True)))


def _launches(convs: Sequence[Conv]) -> Iterable[list[int]]:
    """The numbers of those that share a launch."""
    alike = defaultdict(list)
    for i, conv in enumerate(convs):
        alike[conv.depthwise.shape[-1], conv.dilation].append(i)
    return [same[i : i + _JOBS] for same in alike.values() for i in range(0, len(same), _JOBS)]


def _inputs(convs: Sequence[Conv]) -> tuple[Any, ...]:
    """Inputs with their strides, their statistics if there are any, and both weights."""
    stats = None if convs[0].stats is None else _filled([_stats_of(conv) for conv in convs])
    weights = (
        [conv.depthwise.contiguous() for conv in convs],
        [conv.pointwise.contiguous() for conv in convs],
    )
    return *_pictures([conv.x for conv in convs], _JOBS), stats, *map(_filled, weights)


def _options(conv: Conv) -> dict[str, Any]:
    return {
        "C": conv.x.shape[1],
        "K": conv.depthwise.shape[-1],
        "STRIDE": conv.stride,
        "DILATION": conv.dilation,
        "NORMED": conv.stats is not None,
    }


def _filled(things: Sequence[Any], count: int = _JOBS) -> tuple[Any, ...]:
    return (*things, *(things[0] for _ in range(count - len(things))))


def _pictures(xs: Sequence[Tensor], count: int = 0) -> tuple[Any, Any]:
    """Tensors and the distances of their pictures, filled up to ``count``; None for none."""
    if not xs:
        return None, None
    return _filled(xs, count), _filled([x.stride(0) for x in xs], count)


def _stats_of(thing: Conv | Summand) -> Tensor:
    """With (0, 1) in place of statistics that are not there."""
    if thing.stats is not None:
        return thing.stats
    source = thing.x if isinstance(thing, Conv) else thing.z
    return _no_statistics(source.shape[1], source.device)


def _code(term: Summand, weights: Tensor | None) -> int:
    return 2 * _index(term.entry, weights) + (term.stats is not None)


def _index(entry: tuple[int, int] | None, weights: Tensor | None) -> int:
    """In the flat weights."""
    return 0 if entry is None or weights is None else entry[0] * weights.shape[1] + entry[1]


@functools.cache
def _no_statistics(channels: int, device: torch.device) -> Tensor:
    """Mean 0 and 1 / sqrt(variance + eps) = 1."""
    with torch.inference_mode(False):
        return torch.tensor([[0.0, 1.0]], device=device).repeat(channels, 1)


@functools.cache
def _no_coefficients(channels: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(channels, 4, device=device)


def _precision(x: Tensor, exact: bool) -> str:
    return "tf32x3" if exact and x.dtype == torch.float32 else "tf32"


def _pixels(shape: torch.Size) -> int:
    return shape[0] * shape[2] * shape[3]


def _output_shape(x: Tensor, stride: int) -> torch.Size:
    batch, channels, height, width = x.shape
    return torch.Size((batch, channels, ceil_div(height, stride), ceil_div(width, stride)))


def _empty_fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


_SUM_TILE, _STATE_TILE = (256, 1024), (128, 512)
"""Pixels and elements of a tile of one picture."""
_PROGRAMS = 2048
"""About as many share a reduction; fixed, so that the order of summation depends on shapes alone."""


def _splits(tiles: int, programs: int, wanted: int) -> int:
    return max(1, min(tiles, wanted // programs))


def _block(channels: int, largest: int) -> int:
    """Channels of a tile: a power of two from 16, which products need, to ``largest``."""
    return min(max(16, power_of_two(channels)), largest)


def _forward_blocks(shape: torch.Size, jobs: int) -> dict[str, int]:
    """Those that need fewest instructions an element and no stack; likewise below."""
    channels = shape[1]
    block_p = 64 if channels <= 16 else 32
    while block_p > 16 and _pixels(shape) * jobs // block_p < 256:
        block_p //= 2
    return {
        "BLOCK_C": _block(channels, 64),
        "BLOCK_O": _block(channels, MAX_CHANNELS),
        "BLOCK_P": block_p,
        "num_warps": {16: 2, 32: 1, 64: 2}.get(_block(channels, MAX_CHANNELS), 8),
        "num_stages": 1,
    }


def _pointwise_blocks(shape: torch.Size, jobs: int, wants_weights: bool) -> tuple[int, dict[str, int]]:
    """Splits of the pixels, and blocks."""
    block_o = _block(shape[1], MAX_CHANNELS)
    if wants_weights:
        best = {16: (16, 64, 2), 32: (32, 32, 2), 64: (64, 32, 8)}.get(block_o, (32, 16, 8))
    else:
        best = {16: (16, 64, 2), 32: (32, 64, 2), 64: (64, 32, 4)}.get(block_o, (64, 32, 8))
    block_c, block_p, num_warps = best
    blocks = {
        "BLOCK_C": block_c,
        "BLOCK_O": block_o,
        "BLOCK_P": block_p,
        "num_warps": num_warps,
        "num_stages": 1,
    }
    programs = jobs * ceil_div(shape[1], block_c)
    # With more channels fewer programs fill a GPU, and a part of the weights' gradients is larger.
    return _splits(ceil_div(_pixels(shape), block_p), programs, 16 * _PROGRAMS // shape[1]), blocks


def _depthwise_blocks(shape: torch.Size) -> tuple[int, dict[str, int]]:
    """Tiles of the pixels, and blocks."""
    blocks = {"BLOCK_C": 4, "BLOCK_P": _TILE_PIXELS, "num_warps": 1}
    return ceil_div(_pixels(shape), _TILE_PIXELS), blocks


def _tiles(shape: torch.Size) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Their number, grid and blocks, for what a tile has all by itself."""
    tiles, block_c = ceil_div(_pixels(shape), _TILE_PIXELS), min(4, power_of_two(shape[1]))
    blocks = {"BLOCK_C": block_c, "BLOCK_P": _TILE_PIXELS, "num_warps": 4}
    return tiles, (tiles, ceil_div(shape[1], block_c)), blocks


def _plane_tiles(shape: torch.Size, largest: tuple[int, int]) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and blocks of tiles of one picture each; ``largest``: their pixels and elements."""
    batch, channels, plane = shape[0], shape[1], shape[2:].numel()
    block_p = min(largest[0], power_of_two(plane))
    block_c = min(largest[1] // block_p, power_of_two(channels))
    grid = batch * ceil_div(plane, block_p), ceil_div(channels, block_c)
    return grid, {"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": 4}
