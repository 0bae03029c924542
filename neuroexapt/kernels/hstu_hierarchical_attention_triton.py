"""Attention of HSTU in Triton, forward and backward: tiles of scores live in registers and nowhere else.

Shapes: B batch, N longest sequence, H heads, D width of a head's queries and keys, DV of its values, K time
buckets. Rows are those of ``neuroexapt.kernels.ragged``. Tiles are [BLOCK_M queries, BLOCK_N keys]. Sums are
taken in fp32 whatever the dtype; the offset of a sequence's first row is 64 bits wide.

    s = scale · q kᵀ + biases,  a = s σ(s),  y = a v / N
    da = dy vᵀ,  ds = da · (σ + a (1 − σ)) / N,  dq = scale · ds k,  dk = scale · dsᵀ q,  dv = aᵀ dy / N

Without a softmax no row waits for another: there are no statistics to save, and 1 / N and the scale of the
gradients are factors of whole sums.

- Backward is three loops: along keys for dq, along queries for dk and dv, and for the tables along diagonals
  of tiles (``hstu_bias_gradient_triton``). Each recomputes its scores, 9 products instead of 5, but owns what
  it writes: no atomics, the same bits every time.
- A sigmoid from exp and a quotient takes the multifunction unit twice, at D = 64 longer than both products
  of the forward pass; in bf16 the hardware's tanh does it in one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.kernels import hstu_hierarchical_attention as definition
from neuroexapt.kernels.hstu_bias_gradient_triton import hstu_bwd_bias_kernel, hstu_bwd_bias_reduce_kernel
from neuroexapt.kernels.hstu_tiles_triton import (
    load_head,
    place_in_table,
    sees,
    silu,
    silu_and_slope,
    store_head,
    times_of,
    window_of,
    with_biases,
)
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
    window = window_of(head, max_length, HEADS, WINDOWS)
    key_base = key_ptr + start * key_row + head * key_head
    value_base = value_ptr + start * value_row + head * value_head
    i = first + tl.arange(0, BLOCK_M)
    query = load_head(
        query_ptr + start * query_row + head * query_head, i, query_row, length, D, BLOCK_D, False
    )
    row = place_in_table(first, max_length, BLOCK_M, EVEN_M)
    time_i = times_of(timestamps_ptr, start, i, length)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    bounds = _key_bounds(first, length, window, PHASED, LOCAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(3):
        if phase == 2 or (PHASED and (phase == 1 or LOCAL)):
            for first_key in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                j = first_key + tl.arange(0, BLOCK_N)
                key = load_head(key_base, j, key_row, length, D, BLOCK_D, phase == 1)
                value = load_head(value_base, j, value_row, length, DV, BLOCK_DV, phase == 1)
                time_j = times_of(timestamps_ptr, start, j, length)
                column = place_in_table(first_key, max_length, BLOCK_N, EVEN_N)
                scores = with_biases(
                    tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale,
                    position_ptr, centre + first_key - first, -row[:, None], column[None, :],
                    time_i[:, None] - time_j[None, :], time_ptr, bucket_starts_ptr, BUCKETS,
                )  # fmt: skip
                weights = silu(scores, FAST)  # [BLOCK_M, BLOCK_N]
                if phase != 1:
                    weights = tl.where(sees(i[:, None] - j[None, :], window), weights, 0.0)
                total = tl.dot(weights.to(value.dtype), value, total, input_precision=PRECISION)
    output_base = output_ptr + (start * HEADS + head) * DV
    total = tl.where((i < length)[:, None], total / max_length, 0.0)
    store_head(output_base, i, limit, total, DV, BLOCK_DV, HEADS)


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
    window = window_of(head, max_length, HEADS, WINDOWS)
    key_base = key_ptr + start * key_row + head * key_head
    value_base = value_ptr + start * value_row + head * value_head
    i = first + tl.arange(0, BLOCK_M)
    query = load_head(
        query_ptr + start * query_row + head * query_head, i, query_row, length, D, BLOCK_D, False
    )
    dy = load_head(dy_ptr + start * dy_row + head * dy_head, i, dy_row, length, DV, BLOCK_DV, False)
    row = place_in_table(first, max_length, BLOCK_M, EVEN_M)
    time_i = times_of(timestamps_ptr, start, i, length)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bounds = _key_bounds(first, length, window, PHASED, LOCAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(3):
        if phase == 2 or (PHASED and (phase == 1 or LOCAL)):
            for first_key in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                j = first_key + tl.arange(0, BLOCK_N)
                key = load_head(key_base, j, key_row, length, D, BLOCK_D, phase == 1)
                value = load_head(value_base, j, value_row, length, DV, BLOCK_DV, phase == 1)
                time_j = times_of(timestamps_ptr, start, j, length)
                column = place_in_table(first_key, max_length, BLOCK_N, EVEN_N)
                scores = with_biases(
                    tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale,
                    position_ptr, centre + first_key - first, -row[:, None], column[None, :],
                    time_i[:, None] - time_j[None, :], time_ptr, bucket_starts_ptr, BUCKETS,
                )  # fmt: skip
                dweights = tl.dot(dy, tl.trans(value), input_precision=PRECISION)
                slope = silu_and_slope(scores, FAST)[1]
                dscores = dweights * slope  # [BLOCK_M, BLOCK_N]
                if phase != 1:
                    dscores = tl.where(sees(i[:, None] - j[None, :], window), dscores, 0.0)
                total = tl.dot(dscores.to(key.dtype), key, total, input_precision=PRECISION)
    dquery_base = dquery_ptr + (start * HEADS + head) * D
    store_head(dquery_base, i, limit, total * (scale / max_length), D, BLOCK_D, HEADS)


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
    window = window_of(head, max_length, HEADS, WINDOWS)
    query_base = query_ptr + start * query_row + head * query_head
    dy_base = dy_ptr + start * dy_row + head * dy_head
    j = first + tl.arange(0, BLOCK_N)
    key = load_head(key_ptr + start * key_row + head * key_head, j, key_row, length, D, BLOCK_D, False)
    value = load_head(
        value_ptr + start * value_row + head * value_head, j, value_row, length, DV, BLOCK_DV, False
    )
    column = place_in_table(first, max_length, BLOCK_N, EVEN_N)
    time_j = times_of(timestamps_ptr, start, j, length)
    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    bounds = _query_bounds(first, length, window, PHASED, LOCAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(3):
        if (PHASED and phase < 2) or (phase == 2 and (LOCAL or not PHASED)):
            for first_query in range(bounds[phase], bounds[phase + 1], BLOCK_M):
                i = first_query + tl.arange(0, BLOCK_M)
                query = load_head(query_base, i, query_row, length, D, BLOCK_D, False)
                dy = load_head(dy_base, i, dy_row, length, DV, BLOCK_DV, False)
                time_i = times_of(timestamps_ptr, start, i, length)
                row = place_in_table(first_query, max_length, BLOCK_M, EVEN_M)
                scores = with_biases(
                    tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale,
                    position_ptr, centre + first - first_query, column[:, None], -row[None, :],
                    time_i[None, :] - time_j[:, None], time_ptr, bucket_starts_ptr, BUCKETS,
                )  # fmt: skip
                dweights = tl.dot(value, tl.trans(dy), input_precision=PRECISION)
                weights, slope = silu_and_slope(scores, FAST)
                dscores = dweights * slope  # [BLOCK_N, BLOCK_M]
                if phase != 1:
                    seen = sees(i[None, :] - j[:, None], window)
                    weights, dscores = tl.where(seen, weights, 0.0), tl.where(seen, dscores, 0.0)
                dvalue = tl.dot(weights.to(dy.dtype), dy, dvalue, input_precision=PRECISION)
                dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision=PRECISION)
    base = start * HEADS + head
    store_head(dkey_ptr + base * D, j, limit, dkey * (scale / max_length), D, BLOCK_D, HEADS)
    store_head(dvalue_ptr + base * DV, j, limit, dvalue / max_length, DV, BLOCK_DV, HEADS)


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
