"""``softmax_sum`` and ``weighted_sum`` in Triton.

Legend: K operands, padded to a power of two, KP; n elements each, in one dense memory order, walked
in tiles of BLOCK; splits: the programs that share a reduction over n. A tile is a [KP, BLOCK] block of
addresses, one row an operand, so that any K takes one load. As in the CUDA version, forward reads K
tensors and writes one, backward reads the gradient and each operand once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import register_impl
from neuroexapt.kernels import softmax_sum as shared

_TILE_BYTES = 16384  # of a [KP, BLOCK] tile, so that each of its 128 threads moves 8 × 16 bytes
_WARPS = 4
# Fixed, so that the order of summation, and with it every bit of the result, depends on n alone.
_MAX_SPLITS = 1024


@triton.jit
def _row_addresses(tensors, KP: tl.constexpr, WANTED: tl.constexpr = -1):
    """The addresses of a tuple of tensors, 0 in the padding rows and where WANTED lacks bit k."""
    rows = tl.arange(0, KP)
    addresses = tl.zeros([KP], tl.int64)
    for k in tl.static_range(len(tensors)):
        if WANTED >> k & 1:
            addresses = tl.where(rows == k, tensors[k].to(tl.int64), addresses)
    return addresses  # [KP]


@triton.jit
def _tile(addresses, offsets, n, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers [KP, BLOCK] to one tile and the mask of those that may be followed."""
    rows = addresses.to(tl.pointer_type(dtype))
    if ALIGNED:  # without the hint, accesses through computed addresses would be one element wide
        rows = tl.multiple_of(rows, 16)
    return rows[:, None] + offsets[None, :], (addresses != 0)[:, None] & (offsets < n)[None, :]


@triton.jit
def _read_weights(scores, K: tl.constexpr, KP: tl.constexpr, IS_LOGITS: tl.constexpr):
    rows = tl.arange(0, KP)
    if IS_LOGITS:
        values = tl.load(scores + rows, mask=rows < K, other=-float("inf"))
        values = tl.exp(values - tl.max(values, axis=0))
        return values / tl.sum(values, axis=0)  # [KP], 0 in the padding rows
    return tl.load(scores + rows, mask=rows < K, other=0.0)  # [KP]


@triton.jit
def softmax_sum_fwd_kernel(
    xs, scores, y, n, KP: tl.constexpr, BLOCK: tl.constexpr, IS_LOGITS: tl.constexpr, ALIGNED: tl.constexpr
):
    dtype: tl.constexpr = y.dtype.element_ty
    weights = _read_weights(scores, len(xs), KP, IS_LOGITS)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pointers, mask = _tile(_row_addresses(xs, KP), offsets, n, dtype, ALIGNED)
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # [KP, BLOCK]
    total = tl.sum(weights[:, None] * x, axis=0)  # [BLOCK]
    tl.store(y + offsets, total.to(dtype), mask=offsets < n)


@triton.jit
def softmax_sum_bwd_kernel(
    grad_y,
    xs,
    scores,
    grad_xs,
    partials,
    n,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_LOGITS: tl.constexpr,
    WANTED: tl.constexpr,
    WANTS_SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``grad_x_k = w_k · g`` and, with WANTS_SCORES, this program's share of ⟨g, x_k⟩.

    ``partials``: [splits, KP]; where WANTED lacks bit k, ``grad_xs[k]`` is left alone.
    """
    dtype: tl.constexpr = grad_y.dtype.element_ty
    weights = _read_weights(scores, len(grad_xs), KP, IS_LOGITS)
    x_rows = _row_addresses(xs, KP)
    grad_rows = _row_addresses(grad_xs, KP, WANTED)
    dots = tl.zeros([KP, BLOCK], tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    for tile in range(start, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        offsets = tile + tl.arange(0, BLOCK)
        g = tl.load(grad_y + offsets, mask=offsets < n, other=0.0).to(tl.float32)  # [BLOCK]
        if WANTS_SCORES:
            pointers, mask = _tile(x_rows, offsets, n, dtype, ALIGNED)
            dots += g[None, :] * tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        pointers, mask = _tile(grad_rows, offsets, n, dtype, ALIGNED)
        tl.store(pointers, (weights[:, None] * g[None, :]).to(dtype), mask=mask)
    if WANTS_SCORES:
        tl.store(partials + tl.program_id(0) * KP + tl.arange(0, KP), tl.sum(dots, axis=1))


@triton.jit
def softmax_sum_bwd_reduce_kernel(
    partials,
    scores,
    grad_scores,
    splits,
    K: tl.constexpr,
    KP: tl.constexpr,
    ROWS: tl.constexpr,
    IS_LOGITS: tl.constexpr,
):
    """Adds up partials [splits, KP]; of logits, ``grad_k = w_k · (dot_k − Σ_j w_j · dot_j)``."""
    columns = tl.arange(0, KP)
    sums = tl.zeros([ROWS, KP], tl.float32)
    for first in range(0, splits, ROWS):
        rows = first + tl.arange(0, ROWS)
        pointers = partials + rows[:, None] * KP + columns[None, :]
        sums += tl.load(pointers, mask=(rows < splits)[:, None], other=0.0)
    grads = tl.sum(sums, axis=0)  # [KP]
    if IS_LOGITS:
        weights = _read_weights(scores, K, KP, IS_LOGITS)
        grads = weights * (grads - tl.sum(weights * grads, axis=0))
    tl.store(grad_scores + columns, grads, mask=columns < K)


def _forward(xs: list[Tensor], scores: Tensor, y: Tensor, is_logits: bool) -> None:
    padded, block = _tile_shape(len(xs), y.itemsize)
    with torch.cuda.device_of(y):
        softmax_sum_fwd_kernel[(triton.cdiv(y.numel(), block),)](
            tuple(xs), scores, y, y.numel(), padded, block, is_logits, _aligned(xs), num_warps=_WARPS
        )


def _backward(
    grad_y: Tensor,
    xs: list[Tensor],
    scores: Tensor,
    grad_xs: list[Tensor | None],
    grad_scores: Tensor | None,
    is_logits: bool,
) -> None:
    n, operands = grad_y.numel(), len(grad_xs)
    padded, block = _tile_shape(operands, grad_y.itemsize)
    splits = min(_MAX_SPLITS, triton.cdiv(n, block))
    partials = scores.new_empty(splits, padded)
    with torch.cuda.device_of(grad_y):
        softmax_sum_bwd_kernel[(splits,)](
            grad_y,
            tuple(xs),
            scores,
            # Triton 3.6 takes no None in a tuple; any tensor stands for a gradient that is not wanted.
            tuple(grad_y if grad_x is None else grad_x for grad_x in grad_xs),
            partials,
            n,
            padded,
            block,
            is_logits,
            sum(1 << k for k, grad_x in enumerate(grad_xs) if grad_x is not None),
            grad_scores is not None,
            _aligned([*xs, *grad_xs]),
            num_warps=_WARPS,
        )
        if grad_scores is not None:
            softmax_sum_bwd_reduce_kernel[(1,)](
                partials, scores, grad_scores, splits, operands, padded, block, is_logits, num_warps=_WARPS
            )


def _tile_shape(operands: int, itemsize: int) -> tuple[int, int]:
    padded = triton.next_power_of_2(operands)
    return padded, _TILE_BYTES // (padded * itemsize)


def _aligned(tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


softmax_sum, weighted_sum = shared.define_ops("triton", _forward, _backward)
register_impl("softmax_sum", "triton", softmax_sum, shared.supports)
register_impl("weighted_sum", "triton", weighted_sum, shared.supports)


def probe() -> None:
    """Compile the kernel and run a tiny sum on the GPU; raises where that fails."""
    shared.probe(weighted_sum)
