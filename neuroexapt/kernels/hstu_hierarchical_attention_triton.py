"""Attention of HSTU in Triton, forward and backward: tiles of scores live in registers and nowhere else.

Shapes: B batch, N longest sequence, H heads, D width of a head's queries and keys, DV of its values, K time
buckets. Rows are those of ``neuroexapt.kernels.ragged``. Tiles are [BLOCK_M queries, BLOCK_N keys]. Sums are
taken in fp32 whatever the dtype; the offset of a sequence's first row is 64 bits wide.

    s = scale · q kᵀ + biases,  a = s σ(s),  y = a v / N
    da = dy vᵀ,  ds = da · (σ + a (1 − σ)) / N,  dq = scale · ds k,  dk = scale · dsᵀ q,  dv = aᵀ dy / N

Without a softmax no row waits for another: there are no statistics to save, and 1 / N and the scale of the
gradients are factors of whole sums.

- Backward is three loops: along keys for dq, along queries for dk and dv, and for the tables along diagonals
  of tiles. Each recomputes its scores, 9 products instead of 5, but owns what it writes: no atomics, the same
  bits every time.
- A tile of a diagonal of tiles has the same j − i in the same place in every sequence and head. So the
  position table's gradient is a sum of whole tiles in registers, and what lies along its diagonals is added
  up once a program, at the end. There the position bias itself is the same for all tiles, too, and not
  looked up again.
- A time bucket's share of a tile is summed for the buckets between the tile's lowest and highest alone:
  buckets grow geometrically, so that tiles away from the diagonal hold few.
- A sigmoid from exp and a quotient takes the multifunction unit twice, at D = 64 longer than both products
  of the forward pass; in bf16 the hardware's tanh does it in one.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.kernels import hstu_hierarchical_attention as definition
from neuroexapt.kernels.ragged_triton import (
    input_precision,
    place_of,
    rows_to_write,
    sequence_count,
    sequence_span,
)
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd
from neuroexapt.kernels.sizes import ceil_div, power_of_two

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_BUCKETS_PER_LOG2 = tl.constexpr(math.log(2) / definition.BUCKET_WIDTH)
# Far above the error of log2 in fp32, far below one bucket.
_BUCKET_MARGIN = tl.constexpr(2.0**-10)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load_rows(base, row, stride, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INSIDE: tl.constexpr):
    """Rows of a matrix, zero from ``length`` on, which none is where INSIDE: [rows, BLOCK]."""
    column = tl.arange(0, BLOCK)
    pointers = base + row[:, None] * stride + column[None, :]
    if INSIDE and WIDTH == BLOCK:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(row < length)[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def _store_rows(base, row, limit, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """Rows of a contiguous result [rows, HEADS, WIDTH], at one head."""
    column = tl.arange(0, BLOCK)
    tl.store(
        base + row[:, None] * (HEADS * WIDTH) + column[None, :],
        values.to(base.dtype.element_ty),
        mask=(row < limit)[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit
def _window(head, max_length, HEADS: tl.constexpr, WINDOWS: tl.constexpr):
    """How many positions a head sees; a WINDOW of 0 is the whole history."""
    window = tl.cast(max_length, tl.int32)
    for level in tl.static_range(len(WINDOWS)):
        if WINDOWS[level] > 0:
            window = tl.where(head // (HEADS // len(WINDOWS)) == level, WINDOWS[level], window)
    return window


@triton.jit
def _times(timestamps_ptr, start, position, length):
    if timestamps_ptr is not None:
        times = tl.load(timestamps_ptr + start + position, mask=position < length, other=0).to(tl.int64)
    else:
        times = position
    return times


@triton.jit
def _look_up(pointers, WIDE: tl.constexpr = False):
    """The fp32 numbers or, WIDE, int64 numbers at ``pointers``, read by the threads that need them.

    ``tl.load`` would choose threads of its own, and every value pass through shared memory.
    """
    if _INTERPRETED:
        values = tl.load(pointers)
    elif WIDE:
        values = tl.inline_asm_elementwise(
            "ld.global.nc.s64 $0, [$1];", "=l,l", [pointers.to(tl.int64)], tl.int64, True, 1
        )
    else:
        values = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers.to(tl.int64)], tl.float32, True, 1
        )
    return values


@triton.jit
def _place(first, max_length, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """The position in its block of what looks up the position table; of what is behind the last, the last's.

    Where blocks fill ``max_length``, EVEN, it is known when compiling, and with it where a tile's entries are
    from the first of a row: otherwise their addresses cost as much as all else.
    """
    offset = tl.arange(0, BLOCK)
    if not EVEN:
        offset = tl.minimum(offset, max_length - 1 - first)
    return offset


@triton.jit
def _log2(x):
    """To 2⁻²², in one instruction instead of fifteen."""
    if _INTERPRETED:
        result = tl.log2(x)
    else:
        result = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return result


@triton.jit
def _bucket(gap, bucket_starts_ptr, BUCKETS: tl.constexpr):
    """The bucket of each difference of timestamps."""
    gap = tl.maximum(tl.abs(gap), 1)
    guess = (_log2(gap.to(tl.float32)) * _BUCKETS_PER_LOG2 + _BUCKET_MARGIN).to(tl.int32)
    guess = tl.minimum(guess, BUCKETS - 1)  # the bucket or the next
    return guess - (gap < _look_up(bucket_starts_ptr + guess, WIDE=True)).to(tl.int32)


@triton.jit
def _with_biases(
    scores, position_ptr, corner, row, column, gap, time_ptr, bucket_starts_ptr, BUCKETS: tl.constexpr
):
    """A tile of scores plus the position table from ``corner`` on and what the time table has for ``gap``."""
    if position_ptr is not None:
        scores += _look_up(position_ptr + corner + row + column)
    if time_ptr is not None:
        scores += _look_up(time_ptr + _bucket(gap, bucket_starts_ptr, BUCKETS))
    return scores


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _silu(scores, FAST: tl.constexpr):
    if FAST:
        half = 0.5 * scores
        result = half * _tanh(half) + half
    else:
        result = scores * tl.sigmoid(scores)
    return result


@triton.jit
def _silu_and_slope(scores, FAST: tl.constexpr):
    """SiLU and its derivative."""
    sigmoid = 0.5 * _tanh(0.5 * scores) + 0.5 if FAST else tl.sigmoid(scores)
    silu = scores * sigmoid
    return silu, sigmoid + (silu - silu * sigmoid)


@triton.jit
def _sees(age, window):
    """Whether 0 ≤ i − j < window, in one comparison: as an unsigned number what is negative is large."""
    return age.to(tl.uint32) < tl.cast(window, tl.uint32)


@triton.jit
def _key_bounds(
    first,
    length,
    window,
    PHASED: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where the keys of a block of queries begin, are all seen by all, are cut by j ≤ i again, and end.

    Where the work on them is not PHASED, all are treated as cut.
    """
    end = tl.where(first < length, tl.minimum(first + BLOCK_M, length), 0)
    diagonal = tl.minimum(first // BLOCK_N * BLOCK_N, end)
    begin, whole = 0, 0
    if LOCAL:
        begin = tl.minimum(tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N, diagonal)
        whole = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, diagonal)
    if not PHASED:
        whole, diagonal = begin, begin
    return begin, whole, diagonal, end


@triton.jit
def _query_bounds(
    first,
    length,
    window,
    PHASED: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where the queries of a block of keys begin, all see all, are cut by the window, and end."""
    begin = first // BLOCK_M * BLOCK_M
    end = tl.where(first < length, tl.minimum(length, first + BLOCK_N - 1 + window), begin)
    diagonal = tl.minimum(tl.cdiv(first + BLOCK_N, BLOCK_M) * BLOCK_M, end)
    whole = end
    if LOCAL:
        whole = tl.minimum(tl.maximum((first + window) // BLOCK_M * BLOCK_M, diagonal), end)
    if not PHASED:
        diagonal, whole = begin, begin
    return begin, diagonal, whole, end


@triton.jit
def hstu_fwd_kernel(
    query_ptr, query_row, query_head, key_ptr, key_row, key_head, value_ptr, value_row, value_head,
    output_ptr, position_ptr, time_ptr, bucket_starts_ptr, timestamps_ptr, lengths_ptr, offsets_ptr,
    max_length, centre,
    scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BUCKETS: tl.constexpr,
    WINDOWS: tl.constexpr, LOCAL: tl.constexpr, PHASED: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of y at one head. Grid: (B · H, blocks of queries, those with the longest history first)."""
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    limit = rows_to_write(length, offsets_ptr, max_length)
    if first >= limit:
        return
    window = _window(head, max_length, HEADS, WINDOWS)
    key_base = key_ptr + start * key_row + head * key_head
    value_base = value_ptr + start * value_row + head * value_head
    i = first + tl.arange(0, BLOCK_M)
    query = _load_rows(
        query_ptr + start * query_row + head * query_head, i, query_row, length, D, BLOCK_D, False
    )
    row = _place(first, max_length, BLOCK_M, EVEN_M)
    time_i = _times(timestamps_ptr, start, i, length)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    bounds = _key_bounds(first, length, window, PHASED, LOCAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(3):
        if phase == 2 or (PHASED and (phase == 1 or LOCAL)):
            for first_key in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                j = first_key + tl.arange(0, BLOCK_N)
                key = _load_rows(key_base, j, key_row, length, D, BLOCK_D, phase == 1)
                value = _load_rows(value_base, j, value_row, length, DV, BLOCK_DV, phase == 1)
                time_j = _times(timestamps_ptr, start, j, length)
                column = _place(first_key, max_length, BLOCK_N, EVEN_N)
                scores = _with_biases(
                    tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale,
                    position_ptr, centre + first_key - first, -row[:, None], column[None, :],
                    time_i[:, None] - time_j[None, :], time_ptr, bucket_starts_ptr, BUCKETS,
                )  # fmt: skip
                weights = _silu(scores, FAST)  # [BLOCK_M, BLOCK_N]
                if phase != 1:
                    weights = tl.where(_sees(i[:, None] - j[None, :], window), weights, 0.0)
                total = tl.dot(weights.to(value.dtype), value, total, input_precision=PRECISION)
    output_base = output_ptr + (start * HEADS + head) * DV
    total = tl.where((i < length)[:, None], total / max_length, 0.0)
    _store_rows(output_base, i, limit, total, DV, BLOCK_DV, HEADS)


@triton.jit
def hstu_bwd_query_kernel(
    query_ptr, query_row, query_head, key_ptr, key_row, key_head, value_ptr, value_row, value_head,
    dy_ptr, dy_row, dy_head, dquery_ptr,
    position_ptr, time_ptr, bucket_starts_ptr, timestamps_ptr, lengths_ptr, offsets_ptr, max_length, centre,
    scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BUCKETS: tl.constexpr,
    WINDOWS: tl.constexpr, LOCAL: tl.constexpr, PHASED: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of dq at one head. Grid: as ``hstu_fwd_kernel``."""
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    limit = rows_to_write(length, offsets_ptr, max_length)
    if first >= limit:
        return
    window = _window(head, max_length, HEADS, WINDOWS)
    key_base = key_ptr + start * key_row + head * key_head
    value_base = value_ptr + start * value_row + head * value_head
    i = first + tl.arange(0, BLOCK_M)
    query = _load_rows(
        query_ptr + start * query_row + head * query_head, i, query_row, length, D, BLOCK_D, False
    )
    dy = _load_rows(dy_ptr + start * dy_row + head * dy_head, i, dy_row, length, DV, BLOCK_DV, False)
    row = _place(first, max_length, BLOCK_M, EVEN_M)
    time_i = _times(timestamps_ptr, start, i, length)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bounds = _key_bounds(first, length, window, PHASED, LOCAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(3):
        if phase == 2 or (PHASED and (phase == 1 or LOCAL)):
            for first_key in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                j = first_key + tl.arange(0, BLOCK_N)
                key = _load_rows(key_base, j, key_row, length, D, BLOCK_D, phase == 1)
                value = _load_rows(value_base, j, value_row, length, DV, BLOCK_DV, phase == 1)
                time_j = _times(timestamps_ptr, start, j, length)
                column = _place(first_key, max_length, BLOCK_N, EVEN_N)
                scores = _with_biases(
                    tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale,
                    position_ptr, centre + first_key - first, -row[:, None], column[None, :],
                    time_i[:, None] - time_j[None, :], time_ptr, bucket_starts_ptr, BUCKETS,
                )  # fmt: skip
                dweights = tl.dot(dy, tl.trans(value), input_precision=PRECISION)
                slope = _silu_and_slope(scores, FAST)[1]
                dscores = dweights * slope  # [BLOCK_M, BLOCK_N]
                if phase != 1:
                    dscores = tl.where(_sees(i[:, None] - j[None, :], window), dscores, 0.0)
                total = tl.dot(dscores.to(key.dtype), key, total, input_precision=PRECISION)
    dquery_base = dquery_ptr + (start * HEADS + head) * D
    _store_rows(dquery_base, i, limit, total * (scale / max_length), D, BLOCK_D, HEADS)


@triton.jit
def hstu_bwd_key_value_kernel(
    query_ptr, query_row, query_head, key_ptr, key_row, key_head, value_ptr, value_row, value_head,
    dy_ptr, dy_row, dy_head, dkey_ptr, dvalue_ptr,
    position_ptr, time_ptr, bucket_starts_ptr, timestamps_ptr, lengths_ptr, offsets_ptr, max_length, centre,
    scale, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BUCKETS: tl.constexpr,
    WINDOWS: tl.constexpr, LOCAL: tl.constexpr, PHASED: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of dk and dv at one head. Grid: (B · H, blocks of keys, those seen most first)."""
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first = tl.program_id(1) * BLOCK_N
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    limit = rows_to_write(length, offsets_ptr, max_length)
    if first >= limit:
        return
    window = _window(head, max_length, HEADS, WINDOWS)
    query_base = query_ptr + start * query_row + head * query_head
    dy_base = dy_ptr + start * dy_row + head * dy_head
    j = first + tl.arange(0, BLOCK_N)
    key = _load_rows(key_ptr + start * key_row + head * key_head, j, key_row, length, D, BLOCK_D, False)
    value = _load_rows(
        value_ptr + start * value_row + head * value_head, j, value_row, length, DV, BLOCK_DV, False
    )
    column = _place(first, max_length, BLOCK_N, EVEN_N)
    time_j = _times(timestamps_ptr, start, j, length)
    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    bounds = _query_bounds(first, length, window, PHASED, LOCAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(3):
        if (PHASED and phase < 2) or (phase == 2 and (LOCAL or not PHASED)):
            for first_query in range(bounds[phase], bounds[phase + 1], BLOCK_M):
                i = first_query + tl.arange(0, BLOCK_M)
                query = _load_rows(query_base, i, query_row, length, D, BLOCK_D, False)
                dy = _load_rows(dy_base, i, dy_row, length, DV, BLOCK_DV, False)
                time_i = _times(timestamps_ptr, start, i, length)
                row = _place(first_query, max_length, BLOCK_M, EVEN_M)
                scores = _with_biases(
                    tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale,
                    position_ptr, centre + first - first_query, column[:, None], -row[None, :],
                    time_i[None, :] - time_j[:, None], time_ptr, bucket_starts_ptr, BUCKETS,
                )  # fmt: skip
                dweights = tl.dot(value, tl.trans(dy), input_precision=PRECISION)
                weights, slope = _silu_and_slope(scores, FAST)
                dscores = dweights * slope  # [BLOCK_N, BLOCK_M]
                if phase != 1:
                    seen = _sees(i[None, :] - j[:, None], window)
                    weights, dscores = tl.where(seen, weights, 0.0), tl.where(seen, dscores, 0.0)
                dvalue = tl.dot(weights.to(dy.dtype), dy, dvalue, input_precision=PRECISION)
                dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision=PRECISION)
    base = start * HEADS + head
    _store_rows(dkey_ptr + base * D, j, limit, dkey * (scale / max_length), D, BLOCK_D, HEADS)
    _store_rows(dvalue_ptr + base * DV, j, limit, dvalue / max_length, DV, BLOCK_DV, HEADS)


@triton.jit
def _histogram(values, bucket, BUCKETS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum of the values of each bucket, [BLOCK_K]; a bucket of −1 is none."""
    sums = tl.zeros([BLOCK_K], tl.float32)
    lowest = tl.min(tl.where(bucket < 0, BUCKETS, bucket))
    for present in range(lowest, tl.max(bucket) + 1):
        total = tl.sum(tl.where(bucket == present, values, 0.0))
        sums += tl.where(tl.arange(0, BLOCK_K) == present, total, 0.0)
    return sums


@triton.jit
def _store_diagonals(out, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``out[BLOCK_N + d] = Σ tile[m, n]`` over m − n = d, for the d of a tile and 0 for d = −BLOCK_N.

    Rows are rotated until what m − n leaves over BLOCK_N in common is in one column.
    """
    m, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    rotated = tl.gather(tile, (m - c) & (BLOCK_N - 1), 1)
    turns = (m - c + BLOCK_N) // BLOCK_N
    for turn in tl.static_range(BLOCK_M // BLOCK_N + 1):
        sums = tl.sum(tl.where(turns == turn, rotated, 0.0), 0)
        tl.store(out + turn * BLOCK_N + tl.arange(0, BLOCK_N), sums)


@triton.jit
def hstu_bwd_bias_kernel(
    query_ptr, query_row, query_head, key_ptr, key_row, key_head, value_ptr, value_row, value_head,
    dy_ptr, dy_row, dy_head, position_partial_ptr, time_partial_ptr,
    position_ptr, time_ptr, bucket_starts_ptr, timestamps_ptr, lengths_ptr, offsets_ptr, max_length, centre,
    scale, sequences, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BUCKETS: tl.constexpr,
    WINDOWS: tl.constexpr, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles of one diagonal in a share of the sequences and heads, N · ds.

    By i − j − lag + BLOCK_N into position_partial [diagonals, splits, BLOCK_N + BLOCK_M], by bucket into
    time_partial [diagonals, splits, K]. Grid: (splits, diagonals). The lag is from the first key of a tile to
    its first query, a multiple of BLOCK_N; where BLOCK_M is larger, the first diagonals' is negative.
    """
    diagonal = tl.program_id(1)
    partial = diagonal.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    lag = (diagonal + 1) * BLOCK_N - BLOCK_M
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    age = lag + m[:, None] - n[None, :]
    bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if position_ptr is not None:
        in_table = tl.minimum(tl.maximum(age, 0), max_length - 1)
        bias = _look_up(position_ptr + (centre - in_table))
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    histogram = tl.zeros([BLOCK_K], tl.float32)
    for pair in range(tl.program_id(0), sequences * HEADS, tl.num_programs(0)):
        sequence, head = tl.cast(pair // HEADS, tl.int32), pair % HEADS
        start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
        window = _window(head, max_length, HEADS, WINDOWS)
        query_base = query_ptr + start * query_row + head * query_head
        key_base = key_ptr + start * key_row + head * key_head
        value_base = value_ptr + start * value_row + head * value_head
        dy_base = dy_ptr + start * dy_row + head * dy_head
        end = tl.where(lag - BLOCK_N + 1 < window, length, 0)
        for first in range(tl.cdiv(tl.maximum(lag, 0), BLOCK_M) * BLOCK_M, end, BLOCK_M):
            i, j = first + m, first - lag + n
            query = _load_rows(query_base, i, query_row, length, D, BLOCK_D, False)
            key = _load_rows(key_base, j, key_row, length, D, BLOCK_D, False)
            value = _load_rows(value_base, j, value_row, length, DV, BLOCK_DV, False)
            dy = _load_rows(dy_base, i, dy_row, length, DV, BLOCK_DV, False)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale + bias
            if time_ptr is not None:
                time_i = _times(timestamps_ptr, start, i, length)
                time_j = _times(timestamps_ptr, start, j, length)
                bucket = _bucket(time_i[:, None] - time_j[None, :], bucket_starts_ptr, BUCKETS)
                scores += _look_up(time_ptr + bucket)
            dweights = tl.dot(dy, tl.trans(value), input_precision=PRECISION)
            slope = _silu_and_slope(scores, FAST)[1]
            dscores = dweights * slope  # [BLOCK_M, BLOCK_N], 0 in rows behind the last
            if LOCAL:
                dscores = tl.where(age < window, dscores, 0.0)
            total += dscores
            if time_ptr is not None:
                seen = _sees(age, window) & (i < length)[:, None]
                histogram += _histogram(dscores, tl.where(seen, bucket, -1), BUCKETS, BLOCK_K)
    if position_ptr is not None:
        _store_diagonals(
            position_partial_ptr + partial * (BLOCK_M + BLOCK_N),
            tl.where(_sees(age, max_length), total, 0.0), BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if time_ptr is not None:
        k = tl.arange(0, BLOCK_K)
        tl.store(time_partial_ptr + partial * BUCKETS + k, histogram, mask=k < BUCKETS)


@triton.jit
def hstu_bwd_bias_reduce_kernel(
    position_partial_ptr, dposition_ptr, time_partial_ptr, dtime_ptr, max_length, centre, diagonals, splits,
    POSITIONS: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both tables' gradients from their partial sums. Grid: blocks of positions, then of buckets."""
    split = tl.arange(0, BLOCK_S)
    block = tl.program_id(0)
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    if block < tl.cdiv(POSITIONS, BLOCK):
        entry = block * BLOCK + tl.arange(0, BLOCK)
        age = centre - entry  # i − j
        for nearer in tl.static_range(BLOCK_M // BLOCK_N + 1):
            # A tile of diagonal t has ages from t · BLOCK_N − BLOCK_M + 1 on.
            diagonal = (age + BLOCK_M - 1) // BLOCK_N - nearer
            place = age - (diagonal + 1) * BLOCK_N + BLOCK_M + BLOCK_N
            inside = (age >= 0) & (age < max_length) & (diagonal >= 0) & (diagonal < diagonals)
            inside = inside & (place > 0) & (place < BLOCK_M + BLOCK_N)
            tile = position_partial_ptr + diagonal.to(tl.int64) * splits * (BLOCK_M + BLOCK_N) + place
            for first in range(0, splits, BLOCK_S):
                total += tl.load(
                    tile[None, :] + (first + split)[:, None] * (BLOCK_M + BLOCK_N),
                    mask=inside[None, :] & (first + split < splits)[:, None],
                    other=0.0,
                )
        tl.store(dposition_ptr + entry, tl.sum(total, 0) / max_length, mask=entry < POSITIONS)
    else:
        entry = (block - tl.cdiv(POSITIONS, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
        for first in range(0, diagonals * splits, BLOCK_S):
            total += tl.load(
                time_partial_ptr + (first + split).to(tl.int64)[:, None] * BUCKETS + entry[None, :],
                mask=(first + split < diagonals * splits)[:, None] & (entry < BUCKETS)[None, :],
                other=0.0,
            )
        tl.store(dtime_ptr + entry, tl.sum(total, 0) / max_length, mask=entry < BUCKETS)


class Call(NamedTuple):
    """The arguments of one call. A window of 0 is the whole history; bucket_starts come with time_bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    position_bias: Tensor | None
    time_bias: Tensor | None
    bucket_starts: Tensor | None
    timestamps: Tensor | None
    lengths: Tensor | None
    offsets: Tensor | None
    max_length: int
    windows: list[int]
    scale: float

    @property
    def sequences(self) -> int:
        return sequence_count(self.query, self.offsets)

    @property
    def pairs(self) -> int:
        """How many pairs of a sequence and a head there are."""
        return self.sequences * self.query.shape[-2]

    @property
    def is_empty(self) -> bool:
        return not (self.value.numel() and self.query.numel() and self.max_length)

    def empty_output(self) -> Tensor:
        """y, not yet computed, contiguous."""
        return self.value.new_empty(self.value.shape)

    def empty_grads(self, needed: list[bool]) -> list[Tensor]:
        """Gradients of q, k, v and both tables, not yet computed; one that is not needed is empty."""
        return [
            self.query.new_empty(0) if x is None or not need else x.new_empty(x.shape)
            for x, need in zip(self[:5], needed, strict=True)
        ]


class Blocks(NamedTuple):
    """Tile of queries by keys and how a kernel runs on it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    # Of a thread at most, so that several programs share a multiprocessor; 0: as many as the compiler likes.
    registers: int = 0


# By kernel and bytes of an element, each for heads up to a width. For 16 bits and heads up to 64 they are the
# best that benchmarks/benchmark_hstu_hierarchical_attention.py --sweep found: small, so that several run on a
# multiprocessor at once. The others follow from what registers and shared memory leave room for, unmeasured.
_BLOCKS: dict[str, dict[int, tuple[tuple[int, Blocks], ...]]] = {
    "forward": {
        2: ((64, Blocks(64, 64, 4, 3, 128)), (128, Blocks(64, 64, 4, 2)), (256, Blocks(64, 32, 4, 2))),
        4: ((64, Blocks(64, 32, 4, 2)), (256, Blocks(16, 32, 4, 1))),
    },
    "query": {
        2: ((64, Blocks(64, 32, 4, 3, 128)), (128, Blocks(64, 32, 4, 2, 168)), (256, Blocks(64, 32, 8, 2))),
        4: ((64, Blocks(64, 32, 4, 2)), (256, Blocks(16, 32, 4, 1))),
    },
    "key_value": {
        2: ((64, Blocks(32, 64, 4, 3, 168)), (128, Blocks(32, 64, 4, 2)), (256, Blocks(32, 64, 8, 2))),
        4: ((64, Blocks(32, 64, 4, 2)), (256, Blocks(32, 16, 4, 1))),
    },
    "bias": {
        2: ((64, Blocks(64, 64, 4, 2)), (128, Blocks(64, 32, 4, 2)), (256, Blocks(64, 64, 8, 1))),
        4: ((64, Blocks(64, 32, 4, 2)), (256, Blocks(16, 16, 4, 1))),
    },
}
# Programs of the bias kernel that share the tiles; more would only add to what is reduced.
_BIAS_PROGRAMS = 2048
_REDUCE = {"BLOCK_S": 128, "BLOCK": 16}


def _blocks(kernel: str, call: Call) -> Blocks:
    """The kernel's tile, no larger than the longest sequence needs."""
    width = max(call.query.shape[-1], call.value.shape[-1])
    if call.time_bias is not None:  # which takes as many registers as a wider head
        width = min(2 * width, _LARGEST_HEAD)
    table = _BLOCKS[kernel][call.query.element_size()]
    blocks = next(blocks for largest, blocks in table if width <= largest)
    enough = max(16, power_of_two(call.max_length))
    return blocks._replace(queries=min(blocks.queries, enough), keys=min(blocks.keys, enough))


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """A tensor [B, N, H, d] or [T, H, d] whose rows lie evenly, and the strides of its rows and heads."""
    rows = x.reshape(-1, *x.shape[-2:])
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0), rows.stride(1)


def _sources(call: Call) -> tuple:
    """What every kernel reads beside its own, in its arguments' order."""
    position_bias, time_bias, bucket_starts, timestamps = call[3:7]
    centre = 0 if position_bias is None else len(position_bias) // 2
    return (
        *(None if table is None else table.float().contiguous() for table in (position_bias, time_bias)),
        bucket_starts,
        None if timestamps is None else timestamps.contiguous(),
        call.lengths,
        call.offsets,
        call.max_length,
        centre,
        call.scale,
    )


def _constants(call: Call, blocks: Blocks) -> dict[str, Any]:
    width, value_width = call.query.shape[-1], call.value.shape[-1]
    return {
        "HEADS": call.query.shape[-2],
        "D": width,
        "DV": value_width,
        "BUCKETS": 0 if call.time_bias is None else len(call.time_bias),
        "WINDOWS": tuple(call.windows),
        "LOCAL": any(call.windows),
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "BLOCK_D": max(16, power_of_two(width)),
        "BLOCK_DV": max(16, power_of_two(value_width)),
        "FAST": call.query.dtype == torch.bfloat16,
        "PRECISION": _precision(max(width, value_width)),
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "maxnreg": blocks.registers or None,
    }


def _precision(width: int) -> str:
    """Of fp32 products. The operands of three TF32 products would fill the registers where heads are wide."""
    precision = input_precision()
    return "ieee" if precision == "tf32x3" and width > 64 else precision


def _loop_constants(call: Call, blocks: Blocks) -> dict[str, bool]:
    """Of the kernels that loop along keys or queries."""
    return {
        # Masks are small beside the search for a bucket or fp32 products, but thrice the code to compile.
        "PHASED": call.time_bias is None and call.query.element_size() == 2,
        "EVEN_M": call.max_length % blocks.queries == 0,
        "EVEN_N": call.max_length % blocks.keys == 0,
    }


def _forward(call: Call, y: Tensor) -> None:
    inputs = [part for x in call[:3] for part in _rows(x)]
    blocks = _blocks("forward", call)
    with torch.cuda.device_of(y):
        hstu_fwd_kernel[call.pairs, ceil_div(call.max_length, blocks.queries)](
            *inputs, y, *_sources(call), **_constants(call, blocks), **_loop_constants(call, blocks)
        )


def _backward(call: Call, dy: Tensor, grads: list[Tensor], needed: list[bool]) -> None:
    inputs = [part for x in (*call[:3], dy) for part in _rows(x)]
    dquery, dkey, dvalue, dposition, dtime = grads
    with torch.cuda.device_of(dy):
        if needed[1] or needed[2]:
            blocks = _blocks("key_value", call)
            dkey, dvalue = (
                grad if need else torch.empty_like(x)
                for grad, need, x in ((dkey, needed[1], call.key), (dvalue, needed[2], call.value))
            )
            hstu_bwd_key_value_kernel[call.pairs, ceil_div(call.max_length, blocks.keys)](
                *inputs, dkey, dvalue, *_sources(call), **_constants(call, blocks),
                **_loop_constants(call, blocks),
            )  # fmt: skip
        if needed[0]:
            blocks = _blocks("query", call)
            hstu_bwd_query_kernel[call.pairs, ceil_div(call.max_length, blocks.queries)](
                *inputs, dquery, *_sources(call), **_constants(call, blocks), **_loop_constants(call, blocks)
            )
        if needed[3] or needed[4]:
            _backward_of_tables(call, inputs, dposition, dtime)


def _backward_of_tables(call: Call, inputs: list, dposition: Tensor, dtime: Tensor) -> None:
    """Both tables' gradients, where there is a table."""
    blocks = _blocks("bias", call)
    diagonals = ceil_div(call.max_length, blocks.queries) * (blocks.queries // blocks.keys)
    splits = max(1, min(call.pairs, _BIAS_PROGRAMS // diagonals))
    buckets = 0 if call.time_bias is None else len(call.time_bias)
    position_partial, time_partial = (
        call.query.new_empty(diagonals, splits, size, dtype=torch.float32)
        for size in (0 if call.position_bias is None else blocks.queries + blocks.keys, buckets)
    )
    hstu_bwd_bias_kernel[splits, diagonals](
        *inputs, position_partial, time_partial, *_sources(call), call.sequences,
        BLOCK_K=power_of_two(max(buckets, 1)), **_constants(call, blocks),
    )  # fmt: skip
    programs = sum(ceil_div(grad.numel(), _REDUCE["BLOCK"]) for grad in (dposition, dtime))
    centre = dposition.numel() // 2
    hstu_bwd_bias_reduce_kernel[programs,](
        position_partial, dposition, time_partial, dtime, call.max_length, centre, diagonals, splits,
        POSITIONS=dposition.numel(), BUCKETS=dtime.numel(), BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
        **_REDUCE,
    )  # fmt: skip


def _run(*arguments) -> Tensor:
    call = Call(*arguments)
    y = call.empty_output()
    if call.is_empty:
        return y.zero_()
    _forward(call, y)
    return y


def _run_backward(dy: Tensor, needed: list[bool], *arguments) -> list[Tensor]:
    call = Call(*arguments)
    grads = call.empty_grads(needed)
    if call.is_empty:
        return [grad.zero_() for grad in grads]
    _backward(call, dy, grads, needed)
    return grads


def _fake_backward(_dy: Tensor, needed: list[bool], *arguments) -> list[Tensor]:
    return Call(*arguments).empty_grads(needed)


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? position_bias, Tensor? time_bias, "
    "Tensor? bucket_starts, Tensor? timestamps, Tensor? lengths, Tensor? offsets, SymInt max_length, "
    "int[] windows, float scale"
)
_op = define(
    f"hstu_hierarchical_attention({_ARGUMENTS}) -> Tensor",
    _run,
    lambda *arguments: Call(*arguments).empty_output(),
)
_backward_op = define(
    f"hstu_hierarchical_attention_backward(Tensor dy, bool[] needed, {_ARGUMENTS}) -> Tensor[]",
    _run_backward,
    _fake_backward,
)


def _save(ctx, arguments: tuple, _y: Tensor) -> None:
    ctx.save_for_backward(*arguments[:9])
    ctx.options = arguments[9:]


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:5])
    grads = _backward_op(dy, needed, *ctx.saved_tensors, *ctx.options)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 7


set_autograd(_op, differentiable_once(_op, _save, _differentiate))


def hstu_hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamps: Tensor | None = None,
    windows: Sequence[int | None] = (None,),
    scale: float | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """``neuroexapt.functional.hstu_hierarchical_attention`` by the kernels."""
    definition.check_arguments(
        query, key, value, position_bias, time_bias, timestamps, windows, lengths, offsets, max_length
    )
    lengths, offsets, longest = place_of(query, lengths, offsets, max_length)
    bucket_starts = None
    if time_bias is not None:
        bucket_starts = definition.time_bucket_starts(len(time_bias), time_bias.device)
    return _op(
        query, key, value, position_bias, time_bias, bucket_starts, timestamps, lengths, offsets, longest,
        [window or 0 for window in windows], definition.default_scale(query, scale),
    )  # fmt: skip


def supports(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Support:
    """Whether the kernels take these arguments."""
    operands = key, value, *(arguments.get(name) for name in ("position_bias", "time_bias", "timestamps"))
    if any(operand is not None and operand.device != query.device for operand in operands):
        return Support(False, "operands on several devices")
    if query.dtype not in _DTYPES:
        return Support(False, f"dtype {query.dtype} is not one of fp32, fp16, bf16")
    if max(query.shape[-1], value.shape[-1]) > _LARGEST_HEAD:
        return Support(False, f"heads wider than {_LARGEST_HEAD}")
    return Support(True)


register_impl("hstu_hierarchical_attention", "triton", hstu_hierarchical_attention, supports)
