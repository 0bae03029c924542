"""Causal softmax attention in Triton, of padded and jagged sequences: ``softmax(QKᵀ / √d + M) V``.

Shapes: B sequences of up to N positions, R rows (B·N, or T of jagged input), H heads of D features, padded to
DP. A program owns BM queries (or BN keys) of one head of one sequence and walks over the blocks of the other
side that the mask leaves: those on the diagonal are masked, the others are whole. Scores exist as one block.

The forward pass keeps the logarithm (to base 2) of each row's sum of exponentials; backward recomputes the
probabilities from it, once for the queries' gradient and once for the keys' and values': two kernels that
each own what they write need no atomics, so the same input gives the same bits. They cost 7 products where
one kernel with atomics would need 5. Padded rows are neither read nor waited for; their results are zero.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.kernels.ragged_triton import (
    input_precision,
    place_of,
    rows_to_write,
    sequence_count,
    sequence_span,
)
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd
from neuroexapt.kernels.sizes import ceil_div

_LOG2_E = 1.4426950408889634
# By kernel and bytes an element, for heads of up to so many features: queries and keys a block, warps, stages
# and registers a thread, None for as many as the compiler likes. At 64 features those were measured best for
# HSTU's attention, which walks alike: small blocks of which three or four run at once.
_FP32_BLOCKS = ((64, (32, 32, 4, 2, None)), (256, (16, 16, 4, 2, None)))
_BLOCKS = {
    ("fwd", 4): _FP32_BLOCKS,
    ("bwd_q", 4): _FP32_BLOCKS,
    ("bwd_kv", 4): _FP32_BLOCKS,
    ("fwd", 2): (
        (32, (64, 64, 4, 2, None)),
        (64, (64, 64, 4, 3, 128)),
        (128, (64, 64, 4, 2, None)),
        (256, (64, 32, 8, 2, None)),
    ),
    ("bwd_q", 2): (
        (32, (64, 64, 4, 2, None)),
        (64, (64, 64, 4, 3, 128)),
        (128, (64, 32, 4, 2, None)),
        (256, (64, 32, 8, 2, None)),
    ),
    ("bwd_kv", 2): (
        (32, (64, 64, 4, 2, None)),
        (64, (32, 64, 4, 3, 168)),
        (128, (32, 64, 4, 2, None)),
        (256, (32, 64, 8, 2, None)),
    ),
}


@triton.jit
def _load(ptr, rows, stride, mask, D: tl.constexpr, DP: tl.constexpr):
    """[rows, DP] of one head; zero past D and where ``mask`` [rows] is not set."""
    columns = tl.arange(0, DP)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=mask[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _store(ptr, rows, stride, values, mask, D: tl.constexpr, DP: tl.constexpr):
    columns = tl.arange(0, DP)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask[:, None] & (columns < D)[None, :])


@triton.jit
def _attend(
    q, total, sums, largest, k_ptr, v_ptr, k_stride, v_stride, start, length, t, begin, end, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys of positions ``begin`` to ``end`` to a running softmax."""
    for block in range(begin, end, BN):
        s = block + tl.arange(0, BN)
        k = _load(k_ptr, start + s, k_stride, s < length, D, DP)  # [BN, DP]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BM, BN]
        if DIAGONAL:
            scores = tl.where(t[:, None] >= s[None, :], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shares = tl.exp2(scores - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        sums = sums * decay + tl.sum(shares, axis=1)
        v = _load(v_ptr, start + s, v_stride, s < length, D, DP)
        total = tl.dot(shares.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION)
        largest = new_largest
    return total, sums, largest


@triton.jit
def causal_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths, offsets, max_length, scale,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, H,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [R, H, D] and lse [R, H]. The last queries, which see most keys, start first."""
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    start, length = sequence_span(sequence, lengths, offsets, max_length)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if first >= rows_to_write(length, offsets, max_length):
        return
    t = first + tl.arange(0, BM)
    rows = start + t
    q = _load(q_ptr + head * q_head, rows, q_stride, t < length, D, DP)
    k_ptr += head * k_head
    v_ptr += head * v_head
    total = tl.zeros([BM, DP], tl.float32)
    sums = tl.zeros([BM], tl.float32)
    largest = tl.full([BM], -float("inf"), tl.float32)
    before = tl.where(first < length, first, 0)
    total, sums, largest = _attend(
        q, total, sums, largest, k_ptr, v_ptr, k_stride, v_stride, start, length, t, 0, before, scale,
        D, DP, BN, False, PRECISION,
    )  # fmt: skip
    total, sums, largest = _attend(
        q, total, sums, largest, k_ptr, v_ptr, k_stride, v_stride, start, length, t,
        first, tl.minimum(first + BM, length), scale, D, DP, BN, True, PRECISION,
    )  # fmt: skip
    valid, written = t < length, t < rows_to_write(length, offsets, max_length)
    sums = tl.where(valid, sums, 1.0)
    total = tl.where(valid[:, None], total / sums[:, None], 0.0)
    _store(o_ptr + head * D, rows, H * D, total, written, D, DP)
    tl.store(lse_ptr + rows * H + head, largest + tl.log2(sums), mask=valid)


@triton.jit
def _gradient_of_queries(
    q, do, dq, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, length, t, begin, end, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for block in range(begin, end, BN):
        s = block + tl.arange(0, BN)
        k = _load(k_ptr, start + s, k_stride, s < length, D, DP)
        v = _load(v_ptr, start + s, v_stride, s < length, D, DP)
        shares = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        if DIAGONAL:
            shares = tl.where(t[:, None] >= s[None, :], shares, 0.0)
        dshares = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dscores = shares * (dshares - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def causal_attention_bwd_q_kernel(
    do_ptr, o_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, delta_ptr, lengths, offsets, max_length, scale,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, H,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [R, H, D] and, for the other kernel, delta [R, H] = ⟨do, o⟩. ``scale`` is that of base 2."""
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    start, length = sequence_span(sequence, lengths, offsets, max_length)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if first >= rows_to_write(length, offsets, max_length):
        return
    t = first + tl.arange(0, BM)
    rows = start + t
    valid, written = t < length, t < rows_to_write(length, offsets, max_length)
    q = _load(q_ptr + head * q_head, rows, q_stride, valid, D, DP)
    do = _load(do_ptr + head * D, rows, H * D, valid, D, DP)
    o = _load(o_ptr + head * D, rows, H * D, valid, D, DP)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta_ptr + rows * H + head, delta, mask=valid)
    lse = tl.load(lse_ptr + rows * H + head, mask=valid, other=float("inf"))
    k_ptr += head * k_head
    v_ptr += head * v_head
    dq = tl.zeros([BM, DP], tl.float32)
    before = tl.where(first < length, first, 0)
    dq = _gradient_of_queries(
        q, do, dq, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, length, t, 0, before, scale,
        D, DP, BN, False, PRECISION,
    )  # fmt: skip
    dq = _gradient_of_queries(
        q, do, dq, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, length, t,
        first, tl.minimum(first + BM, length), scale, D, DP, BN, True, PRECISION,
    )  # fmt: skip
    _store(dq_ptr + head * D, rows, H * D, dq * (scale * 0.6931471805599453), written, D, DP)


@triton.jit
def _gradient_of_keys(
    k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, H, start, length, s, begin, end, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for block in range(begin, end, BM):
        t = block + tl.arange(0, BM)
        valid = t < length
        q = _load(q_ptr, start + t, q_stride, valid, D, DP)  # [BM, DP]
        do = _load(do_ptr, start + t, H * D, valid, D, DP)
        lse = tl.load(lse_ptr + (start + t) * H, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + (start + t) * H, mask=valid, other=0.0)
        shares = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # [BN, BM]
        if DIAGONAL:
            shares = tl.where(t[None, :] >= s[:, None], shares, 0.0)
        dv = tl.dot(shares.to(do.dtype), do, dv, input_precision=PRECISION)
        dshares = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dscores = shares * (dshares - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def causal_attention_bwd_kv_kernel(
    do_ptr, lse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, lengths, offsets, max_length, scale,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, H,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [R, H, D]. The first keys, which are seen by most queries, start first."""
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    start, length = sequence_span(sequence, lengths, offsets, max_length)
    first = tl.program_id(0) * BN
    if first >= rows_to_write(length, offsets, max_length):
        return
    s = first + tl.arange(0, BN)
    rows = start + s
    k = _load(k_ptr + head * k_head, rows, k_stride, s < length, D, DP)
    v = _load(v_ptr + head * v_head, rows, v_stride, s < length, D, DP)
    q_ptr += head * q_head
    do_ptr += head * D
    lse_ptr += head
    delta_ptr += head
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    dk, dv = _gradient_of_keys(
        k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, H, start, length, s,
        first, tl.minimum(first + BN, length), scale, D, DP, BM, True, PRECISION,
    )  # fmt: skip
    dk, dv = _gradient_of_keys(
        k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, H, start, length, s,
        first + BN, length, scale, D, DP, BM, False, PRECISION,
    )  # fmt: skip
    written = s < rows_to_write(length, offsets, max_length)
    _store(dk_ptr + head * D, rows, H * D, dk * (scale * 0.6931471805599453), written, D, DP)
    _store(dv_ptr + head * D, rows, H * D, dv, written, D, DP)


@functools.cache
def _blocks(kernel: str, head: int, itemsize: int) -> dict[str, Any]:
    """Queries and keys a block, warps, stages and registers a thread."""
    padded = max(16, triton.next_power_of_2(head))
    blocks = next(blocks for widest, blocks in _BLOCKS[kernel, itemsize] if padded <= widest)
    names = "BM", "BN", "num_warps", "num_stages", "maxnreg"
    return {"D": head, "DP": padded, **dict(zip(names, blocks, strict=True))}


def _rows(x: Tensor, offsets: Tensor | None) -> Tensor:
    """[R, H, d], each head contiguous; a view where that is possible."""
    rows = x if offsets is not None else x.flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _empty_results(
    query: Tensor, key: Tensor, value: Tensor, *place: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), value.new_empty(value.shape[:-1], dtype=torch.float32)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
) -> tuple[Tensor, Tensor]:
    o, lse = _empty_results(query, key, value)
    place = lengths, offsets, max_length
    _launch(causal_attention_fwd_kernel, "fwd", (), (query, key, value), (o, lse), *place)
    return o, lse


def _empty_gradients(
    do: Tensor, o: Tensor, lse: Tensor, *arguments: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return o.new_empty(o.shape), o.new_empty(o.shape), o.new_empty(o.shape)


def _backward(
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _empty_gradients(do, o, lse)
    do, delta = do.contiguous(), torch.empty_like(lse)
    inputs, place = (query, key, value), (lengths, offsets, max_length)
    _launch(causal_attention_bwd_q_kernel, "bwd_q", (do, o, lse), inputs, (dq, delta), *place)
    _launch(causal_attention_bwd_kv_kernel, "bwd_kv", (do, lse, delta), inputs, (dk, dv), *place)
    return dq, dk, dv


def _launch(
    kernel: triton.JITFunction,
    name: str,
    saved: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
) -> None:
    """``inputs``: queries, keys and values; ``saved`` and ``results`` are contiguous."""
    query = inputs[0]
    if not query.numel():
        return
    sequences = sequence_count(query, offsets)
    heads, width = query.shape[-2:]
    blocks = _blocks(name, width, query.itemsize)
    tiles = ceil_div(max_length, blocks["BN" if name == "bwd_kv" else "BM"])
    rows = [_rows(tensor, offsets) for tensor in inputs]
    with torch.cuda.device_of(query):
        kernel[tiles, sequences * heads](
            *saved, *rows, *results, lengths, offsets, max_length, _LOG2_E / width**0.5,
            *(stride for tensor in rows for stride in tensor.stride()[:2]), heads,
            PRECISION=input_precision(), **blocks,
        )  # fmt: skip


def _save(ctx, arguments: tuple, results: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_length = arguments
    ctx.save_for_backward(*results, *tensors)


def _differentiate(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(do, *ctx.saved_tensors, ctx.max_length), None, None, None


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? offsets, SymInt max_length"
_op = define(f"causal_attention_triton({_INPUTS}) -> (Tensor, Tensor)", _forward, _empty_results)
_backward_op = define(
    f"causal_attention_triton_backward(Tensor do, Tensor o, Tensor lse, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)
set_autograd(_op, differentiable_once(_op, _save, _differentiate))


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """``softmax(QKᵀ / √d + M) V`` of each head: [B, N, H, d] or, with ``offsets``, [T, H, d] each."""
    return _op(query, key, value, *place_of(query, lengths, offsets, max_length))[0]
