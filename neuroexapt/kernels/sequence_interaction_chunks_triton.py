"""What the kernels of ``sequence_recommendation_interaction_triton`` have in common, whose symbols these are:
items and times of a chunk, decay, and what one chunk is to others.
"""

import triton
import triton.language as tl

from neuroexapt.kernels.sequence_recommendation_interaction import EPSILON

_EPSILON = tl.constexpr(EPSILON)
CHUNKS = tl.constexpr(16)  # whose sums a program reads at once


@triton.jit
def times_at(times_ptr, start, position, is_read):
    """τ at positions of a sequence, in its own dtype; the positions themselves where there are no times."""
    return position if times_ptr is None else tl.load(times_ptr + start + position, mask=is_read, other=0)


@triton.jit
def decayed(decay, age, counts):
    """e^{−λ · age} where it counts, else 0."""
    return tl.where(counts, tl.exp(-decay * age.to(tl.float32)), 0.0)


@triton.jit
def row_of(ptr, row, column, D: tl.constexpr):
    """Columns of a row of [rows, D] in fp32: [BLOCK_D]."""
    return tl.load(ptr + row.to(tl.int64) * D + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def items_of(items_ptr, start, position, valid, column, D: tl.constexpr):
    """Columns of the chunk's items, 0 outside of the sequence: [BLOCK_N, BLOCK_D]."""
    pointers = items_ptr + (start + position)[:, None] * D + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def inverse_norms(squares):
    return tl.rsqrt(squares + _EPSILON)


@triton.jit
def weighted_sum(weights, x):
    """Σ_t weights_t · x_t: [BLOCK_D]."""
    return tl.sum(weights[:, None] * x, 0)


@triton.jit
def products_with(x, row):
    """⟨x_t, row⟩ over the columns at hand: [BLOCK_N]."""
    return tl.sum(x * row[None, :], 1)


@triton.jit
def origin_of(times_ptr, start, length, chunk, BLOCK_N: tl.constexpr):
    """ρ of a chunk; of the first one, and where no item is before, what nobody uses."""
    return times_at(times_ptr, start, chunk * BLOCK_N - 1, (chunk > 0) & (chunk * BLOCK_N <= length))


@triton.jit
def across_chunks(
    summaries_ptr, first_row, row_stride, times_ptr, start, length, decay, chunk, first, end, column,
    AFTER: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What is before chunks, or AFTER them, of the summaries of others: [CHUNKS, BLOCK_D].

    The others are among ``first`` to ``end``. A chunk without items has nothing before it.
    """
    state = tl.zeros([CHUNKS, column.shape[0]], tl.float32)
    for block in range(first, end, CHUNKS):
        other = block + tl.arange(0, CHUNKS)
        is_other = other * BLOCK_N < length
        if AFTER:
            origin = origin_of(times_ptr, start, length, chunk + 1, BLOCK_N)
            gap = origin_of(times_ptr, start, length, other, BLOCK_N)[None, :] - origin[:, None]
            counts = (other[None, :] > chunk[:, None]) & is_other[None, :]
        else:
            origin = origin_of(times_ptr, start, length, chunk, BLOCK_N)
            gap = origin[:, None] - origin_of(times_ptr, start, length, other + 1, BLOCK_N)[None, :]
            counts = (other[None, :] < chunk[:, None]) & (chunk * BLOCK_N < length)[:, None]
        summaries = tl.load(
            summaries_ptr + (first_row + other).to(tl.int64)[:, None] * row_stride + column[None, :],
            mask=is_other[:, None] & (column < D)[None, :],
            other=0.0,
        )
        state = tl.dot(decayed(decay, gap, counts), summaries, state, input_precision="tf32x3")
    return state


@triton.jit
def store_states(states_ptr, state, sequence, chunk, chunks, column, D: tl.constexpr):
    row = (sequence * chunks + chunk).to(tl.int64)[:, None]
    tl.store(
        states_ptr + row * D + column[None, :], state, mask=(chunk < chunks)[:, None] & (column < D)[None, :]
    )
