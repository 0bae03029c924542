"""What HSTU's kernels have in common: rows of a head, windows, biases, and SiLU with its slope.

Tiles are [BLOCK_M queries, BLOCK_N keys], see ``hstu_hierarchical_attention_triton``.
"""

import math

import triton
import triton.language as tl

from neuroexapt.kernels.hstu_hierarchical_attention import BUCKET_WIDTH

_BUCKETS_PER_LOG2 = tl.constexpr(math.log(2) / BUCKET_WIDTH)
# Far above the error of log2 in fp32, far below one bucket.
_BUCKET_MARGIN = tl.constexpr(2.0**-10)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_head(base, row, stride, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INSIDE: tl.constexpr):
    """Rows of a matrix, zero from ``length`` on, which none is where INSIDE: [rows, BLOCK]."""
    column = tl.arange(0, BLOCK)
    pointers = base + row[:, None] * stride + column[None, :]
    if INSIDE and WIDTH == BLOCK:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(row < length)[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_head(base, row, limit, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """Rows of a contiguous result [rows, HEADS, WIDTH], at one head."""
    column = tl.arange(0, BLOCK)
    tl.store(
        base + row[:, None] * (HEADS * WIDTH) + column[None, :],
        values.to(base.dtype.element_ty),
        mask=(row < limit)[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit
def window_of(head, max_length, HEADS: tl.constexpr, WINDOWS: tl.constexpr):
    """How many positions a head sees; a WINDOW of 0 is the whole history."""
    window = tl.cast(max_length, tl.int32)
    for level in tl.static_range(len(WINDOWS)):
        if WINDOWS[level] > 0:
            window = tl.where(head // (HEADS // len(WINDOWS)) == level, WINDOWS[level], window)
    return window


@triton.jit
def times_of(timestamps_ptr, start, position, length):
    if timestamps_ptr is not None:
        times = tl.load(timestamps_ptr + start + position, mask=position < length, other=0).to(tl.int64)
    else:
        times = position
    return times


@triton.jit
def look_up(pointers, WIDE: tl.constexpr = False):
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
def place_in_table(first, max_length, BLOCK: tl.constexpr, EVEN: tl.constexpr):
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
def bucket_of(gap, bucket_starts_ptr, BUCKETS: tl.constexpr):
    """The bucket of each difference of timestamps."""
    gap = tl.maximum(tl.abs(gap), 1)
    guess = (_log2(gap.to(tl.float32)) * _BUCKETS_PER_LOG2 + _BUCKET_MARGIN).to(tl.int32)
    guess = tl.minimum(guess, BUCKETS - 1)  # the bucket or the next
    return guess - (gap < look_up(bucket_starts_ptr + guess, WIDE=True)).to(tl.int32)


@triton.jit
def with_biases(
    scores, position_ptr, corner, row, column, gap, time_ptr, bucket_starts_ptr, BUCKETS: tl.constexpr
):
    """A tile of scores plus the position table from ``corner`` on and what the time table has for ``gap``."""
    if position_ptr is not None:
        scores += look_up(position_ptr + corner + row + column)
    if time_ptr is not None:
        scores += look_up(time_ptr + bucket_of(gap, bucket_starts_ptr, BUCKETS))
    return scores


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def silu(scores, FAST: tl.constexpr):
    if FAST:
        half = 0.5 * scores
        result = half * _tanh(half) + half
    else:
        result = scores * tl.sigmoid(scores)
    return result


@triton.jit
def silu_and_slope(scores, FAST: tl.constexpr):
    """SiLU and its derivative."""
    sigmoid = 0.5 * _tanh(0.5 * scores) + 0.5 if FAST else tl.sigmoid(scores)
    silu = scores * sigmoid
    return silu, sigmoid + (silu - silu * sigmoid)


@triton.jit
def sees(age, window):
    """Whether 0 ≤ i − j < window, in one comparison: as an unsigned number what is negative is large."""
    return age.to(tl.uint32) < tl.cast(window, tl.uint32)
