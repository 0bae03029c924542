"""The gradients of HSTU's position and time tables: kernels along diagonals of tiles.

A tile of a diagonal of tiles has the same j − i in the same place in every sequence and head. So the position
table's gradient is a sum of whole tiles in registers, and what lies along its diagonals is added up once a
program, at the end. There the position bias itself is the same for all tiles, too, and not looked up again.

A time bucket's share of a tile is summed for the buckets between the tile's lowest and highest alone: buckets
grow geometrically, so that tiles away from the diagonal hold few.

Shapes: as in ``hstu_hierarchical_attention_triton``.
"""

import triton
import triton.language as tl

from neuroexapt.kernels.hstu_tiles_triton import (
    bucket_of,
    load_head,
    look_up,
    sees,
    silu_and_slope,
    times_of,
    window_of,
)
from neuroexapt.kernels.ragged_triton import sequence_span


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
        bias = look_up(position_ptr + (centre - in_table))
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    histogram = tl.zeros([BLOCK_K], tl.float32)
    for pair in range(tl.program_id(0), sequences * HEADS, tl.num_programs(0)):
        sequence, head = tl.cast(pair // HEADS, tl.int32), pair % HEADS
        start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
        window = window_of(head, max_length, HEADS, WINDOWS)
        query_base = query_ptr + start * query_row + head * query_head
        key_base = key_ptr + start * key_row + head * key_head
        value_base = value_ptr + start * value_row + head * value_head
        dy_base = dy_ptr + start * dy_row + head * dy_head
        end = tl.where(lag - BLOCK_N + 1 < window, length, 0)
        for first in range(tl.cdiv(tl.maximum(lag, 0), BLOCK_M) * BLOCK_M, end, BLOCK_M):
            i, j = first + m, first - lag + n
            query = load_head(query_base, i, query_row, length, D, BLOCK_D, False)
            key = load_head(key_base, j, key_row, length, D, BLOCK_D, False)
            value = load_head(value_base, j, value_row, length, DV, BLOCK_DV, False)
            dy = load_head(dy_base, i, dy_row, length, DV, BLOCK_DV, False)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale + bias
            if time_ptr is not None:
                time_i = times_of(timestamps_ptr, start, i, length)
                time_j = times_of(timestamps_ptr, start, j, length)
                bucket = bucket_of(time_i[:, None] - time_j[None, :], bucket_starts_ptr, BUCKETS)
                scores += look_up(time_ptr + bucket)
            dweights = tl.dot(dy, tl.trans(value), input_precision=PRECISION)
            slope = silu_and_slope(scores, FAST)[1]
            dscores = dweights * slope  # [BLOCK_M, BLOCK_N], 0 in rows behind the last
            if LOCAL:
                dscores = tl.where(age < window, dscores, 0.0)
            total += dscores
            if time_ptr is not None:
                seen = sees(age, window) & (i < length)[:, None]
                histogram += _histogram(dscores, tl.where(seen, bucket, -1), BUCKETS, BLOCK_K)
    if position_ptr is not None:
        _store_diagonals(
            position_partial_ptr + partial * (BLOCK_M + BLOCK_N),
            tl.where(sees(age, max_length), total, 0.0), BLOCK_M, BLOCK_N,
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
