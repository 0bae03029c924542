"""Pools and decayed self-similarity of item sequences in Triton, without a number for each pair of items.

Legend: B sequences of up to N items e_t at times τ_t, D width, λ the decay; a chunk is BLOCK_N neighbouring
items, one program's work; inverse_t = 1 / √(‖e_t‖² + ε), so ê_t = inverse_t · e_t.

The similarity is linear attention with decay, s_t = ⟨ê_t, h_t⟩ of h_t = Σ_{j<t} e^{−λ(τ_t−τ_j)} ê_j.
Inside a chunk it is a product of the chunk with itself on the tensor cores; what lies before chunk c is one
vector, the state at its origin ρ_c, the time of the last item before it:

    summary_c = Σ_{j in c} e^{−λ(ρ_{c+1} − τ_j)} ê_j,  before_c = Σ_{b<c} e^{−λ(ρ_c − ρ_{b+1})} summary_b
    s_t = Σ_{j<t in c} e^{−λ(τ_t−τ_j)} ⟨ê_t, ê_j⟩ + e^{−λ(τ_t − ρ_c)} ⟨ê_t, before_c⟩

The gradient g of s runs the same way from behind, and e^{−λ(ρ_{c+1} − τ_j)} after_c of it reaches ê_j:

    summary'_c = Σ_{u in c} g_u e^{−λ(τ_u − ρ_c)} ê_u,  after_c = Σ_{a>c} e^{−λ(ρ_a − ρ_{c+1})} summary'_a

The time between two items is the way to the end of the one's chunk, across chunks, and from the origin of the
other's, so λ's gradient is a sum over chunks too. No exponent is positive where times do not decrease.

A batch of short sequences is one chunk each and one launch forward. Of longer ones, every chunk is summed up
by itself, the attention's softmax with a maximum of its own, then joined: 8 sequences of 4,096 items are 512
programs. Items are read twice forward and twice backward, the second time from L2. Sums are fp32 and have one
order; differences of times are taken in their own dtype.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.kernels.ragged_triton import (
    input_precision,
    place_of,
    rows_to_write,
    sequence_span,
)
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd
from neuroexapt.kernels.sequence_interaction_chunks_triton import (
    CHUNKS,
    across_chunks,
    decayed,
    inverse_norms,
    items_of,
    origin_of,
    products_with,
    row_of,
    store_states,
    times_at,
    weighted_sum,
)
from neuroexapt.kernels.sequence_recommendation_interaction import check_arguments
from neuroexapt.kernels.sequence_recommendation_interaction_backward_triton import (
    sequence_recommendation_interaction_after_kernel,
    sequence_recommendation_interaction_bwd_join_kernel,
    sequence_recommendation_interaction_bwd_kernel,
    sequence_recommendation_interaction_bwd_summary_kernel,
)
from neuroexapt.kernels.sizes import ceil_div

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK_LENGTH = 64


@triton.jit
def _similarity_within(products, inverse, time, decay, position):
    """Σ_{j<t} e^{−λ(τ_t−τ_j)} ⟨ê_t, ê_j⟩ over the chunk's own items, of products ⟨e_t, e_j⟩: [BLOCK_N]."""
    weights = decayed(decay, time[:, None] - time[None, :], position[:, None] > position[None, :])
    return inverse * tl.sum(products * weights * inverse[None, :], 1)


@triton.jit
def _store_pools(
    sequence, length, window, attention, recent, aged, total, aged_total, pools_ptr, exact_ptr, column,
    D: tl.constexpr,
):  # fmt: skip
    """Normalise and write columns of a sequence's three pools; the two that backward needs also in fp32.

    Both totals hold a 1 unless the sequence is empty.
    """
    attention, aged = attention / tl.maximum(total, 1.0), aged / tl.maximum(aged_total, 1.0)
    pool = pools_ptr + sequence.to(tl.int64) * 3 * D + column
    tl.store(pool, attention, mask=column < D)
    tl.store(pool + D, recent / tl.minimum(tl.maximum(length, 1), window), mask=column < D)
    tl.store(pool + 2 * D, aged, mask=column < D)
    exact = exact_ptr + sequence.to(tl.int64) * 2 * D + column
    tl.store(exact, attention, mask=column < D)
    tl.store(exact + D, aged, mask=column < D)


@triton.jit
def _store_stats(sequence, largest, total, aged_total, stats_ptr):
    """The attention's log-sum-exp and the sum of the decayed weights."""
    tl.store(stats_ptr + sequence * 2, largest + tl.log(tl.maximum(total, 1.0)))
    tl.store(stats_ptr + sequence * 2 + 1, tl.maximum(aged_total, 1.0))


@triton.jit
def sequence_recommendation_interaction_fwd_kernel(
    items_ptr, target_ptr, decay_ptr, times_ptr, lengths_ptr, offsets_ptr,
    pools_ptr, similarity_ptr, exact_ptr, stats_ptr, sums_ptr, totals_ptr, max_length, window, scale,
    SINGLE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SINGLE: all results of a sequence of one chunk. Else a chunk's sums, to be joined.

    Grid: (B, chunks). ``sums``: [B, chunks, 4, D], those of the pools and the summary; ``totals``:
    [B, chunks, 3], the largest score, and the sums of the attention's and the decayed weights.
    """
    sequence, chunk = tl.program_id(0), tl.program_id(1)
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    position = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < length
    time = times_at(times_ptr, start, position, valid)
    decay = tl.load(decay_ptr).to(tl.float32)

    squares = tl.zeros([BLOCK_N], tl.float32)
    scores = tl.zeros([BLOCK_N], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        items = items_of(items_ptr, start, position, valid, column, D)
        x = items.to(tl.float32)
        squares += tl.sum(x * x, 1)
        scores += products_with(x, row_of(target_ptr, sequence, column, D))
        if SINGLE:
            products = tl.dot(items, tl.trans(items), products, input_precision=PRECISION)

    scores = tl.where(valid, scores * scale, -float("inf"))
    largest = tl.max(scores, 0)
    attention_weights = tl.where(valid, tl.exp(scores - largest), 0.0)
    recent_weights = (valid & (position >= length - window)).to(tl.float32)
    aged_weights = decayed(decay, times_at(times_ptr, start, length - 1, length > 0) - time, valid)
    total, aged_total = tl.sum(attention_weights, 0), tl.sum(aged_weights, 0)
    inverse = inverse_norms(squares)
    row = sequence * tl.num_programs(1) + chunk
    if SINGLE:
        _store_stats(sequence, largest, total, aged_total, stats_ptr)
        similarity = _similarity_within(products, inverse, time, decay, position)
        written = position < rows_to_write(length, offsets_ptr, max_length)
        tl.store(similarity_ptr + start + position, tl.where(valid, similarity, 0.0), mask=written)
    else:
        tl.store(totals_ptr + row * 3, largest)
        tl.store(totals_ptr + row * 3 + 1, total)
        tl.store(totals_ptr + row * 3 + 2, aged_total)
        is_followed = (chunk + 1) * BLOCK_N < length
        until = origin_of(times_ptr, start, length, chunk + 1, BLOCK_N) - time
        summary_weights = decayed(decay, until, valid & is_followed) * inverse

    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        x = items_of(items_ptr, start, position, valid, column, D).to(tl.float32)
        attention = weighted_sum(attention_weights, x)
        recent = weighted_sum(recent_weights, x)
        aged = weighted_sum(aged_weights, x)
        if SINGLE:
            _store_pools(
                sequence, length, window, attention, recent, aged, total, aged_total,
                pools_ptr, exact_ptr, column, D,
            )  # fmt: skip
        else:
            sums = sums_ptr + row.to(tl.int64) * 4 * D + column
            tl.store(sums, attention, mask=column < D)
            tl.store(sums + D, recent, mask=column < D)
            tl.store(sums + 2 * D, aged, mask=column < D)
            tl.store(sums + 3 * D, weighted_sum(summary_weights, x), mask=column < D)


@triton.jit
def sequence_recommendation_interaction_join_kernel(
    decay_ptr, times_ptr, lengths_ptr, offsets_ptr, pools_ptr, exact_ptr, stats_ptr, sums_ptr, totals_ptr,
    before_ptr, chunks, max_length, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What is before each of CHUNKS chunks, and with the first ones the pools, of some columns.

    Grid: (B, blocks of chunks, blocks of columns). ``before``: [B, chunks, D].
    """
    sequence, block = tl.program_id(0), tl.program_id(1)
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    decay = tl.load(decay_ptr).to(tl.float32)
    state = across_chunks(
        sums_ptr + 3 * D, sequence * chunks, 4 * D, times_ptr, start, length, decay,
        chunk, 0, (block + 1) * CHUNKS, column, False, D, BLOCK_N,
    )  # fmt: skip
    store_states(before_ptr, state, sequence, chunk, chunks, column, D)
    if block == 0:
        largest = -float("inf")
        total, aged_total = 0.0, 0.0
        attention = tl.zeros([BLOCK_D], tl.float32)
        recent = tl.zeros([BLOCK_D], tl.float32)
        aged = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, chunks, CHUNKS):
            other = first + tl.arange(0, CHUNKS)
            counts = other < chunks
            row = sequence * chunks + other
            totals = totals_ptr + row * 3
            scores = tl.load(totals, mask=counts, other=-float("inf"))
            larger = tl.maximum(largest, tl.max(scores, 0))
            # A chunk, or all so far, without an item has −∞ for its largest score.
            rescale = tl.where(scores == -float("inf"), 0.0, tl.exp(scores - larger))
            shrink = tl.where(largest == -float("inf"), 0.0, tl.exp(largest - larger))
            total = total * shrink + tl.sum(rescale * tl.load(totals + 1, mask=counts, other=0.0), 0)
            aged_total += tl.sum(tl.load(totals + 2, mask=counts, other=0.0), 0)
            sums = sums_ptr + row.to(tl.int64)[:, None] * 4 * D + column[None, :]
            inside = counts[:, None] & (column < D)[None, :]
            attention = attention * shrink + weighted_sum(rescale, tl.load(sums, mask=inside, other=0.0))
            recent += tl.sum(tl.load(sums + D, mask=inside, other=0.0), 0)
            aged += tl.sum(tl.load(sums + 2 * D, mask=inside, other=0.0), 0)
            largest = larger
        _store_pools(
            sequence,
            length,
            window,
            attention,
            recent,
            aged,
            total,
            aged_total,
            pools_ptr,
            exact_ptr,
            column,
            D,
        )
        if tl.program_id(2) == 0:
            _store_stats(sequence, largest, total, aged_total, stats_ptr)


@triton.jit
def sequence_recommendation_interaction_similarity_kernel(
    items_ptr, decay_ptr, times_ptr, lengths_ptr, offsets_ptr, before_ptr, similarity_ptr, max_length,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The similarity of a chunk's items to all before them. Grid: (B, chunks)."""
    sequence, chunk = tl.program_id(0), tl.program_id(1)
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    position = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < length
    time = times_at(times_ptr, start, position, valid)
    decay = tl.load(decay_ptr).to(tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    to_before = tl.zeros([BLOCK_N], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        items = items_of(items_ptr, start, position, valid, column, D)
        x = items.to(tl.float32)
        squares += tl.sum(x * x, 1)
        to_before += products_with(x, row_of(before_ptr, sequence * tl.num_programs(1) + chunk, column, D))
        products = tl.dot(items, tl.trans(items), products, input_precision=PRECISION)
    inverse = inverse_norms(squares)
    since = time - origin_of(times_ptr, start, length, chunk, BLOCK_N)
    similarity = decayed(decay, since, valid & (chunk > 0)) * inverse * to_before
    similarity += _similarity_within(products, inverse, time, decay, position)
    written = position < rows_to_write(length, offsets_ptr, max_length)
    tl.store(similarity_ptr + start + position, tl.where(valid, similarity, 0.0), mask=written)


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Grads = tuple[Tensor, Tensor, Tensor]


def _forward(
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    timestamps: Tensor | None,
    window: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    longest: int,
) -> _Results:
    results = _empty_results(items, target, decay, timestamps, window, lengths, offsets, longest)
    pools, similarity, exact, stats, before = results
    batch, width = target.shape
    chunks, blocks = _chunks(longest), _blocks(width)
    sums = stats.new_empty(before.shape[0], before.shape[1], 4, width)
    totals = stats.new_empty(before.shape[0], before.shape[1], 3)
    items, target, timestamps = items.contiguous(), target.contiguous(), _dense(timestamps)
    place = decay, timestamps, lengths, offsets
    with torch.cuda.device_of(items):
        sequence_recommendation_interaction_fwd_kernel[batch, chunks](
            items, target, *place, pools, similarity, exact, stats, sums, totals,
            longest, window, width**-0.5, SINGLE=chunks == 1, PRECISION=input_precision(), **blocks,
        )  # fmt: skip
        if chunks > 1:
            sequence_recommendation_interaction_join_kernel[_state_grid(batch, chunks, blocks)](
                *place, pools, exact, stats, sums, totals, before, chunks, longest, window, **blocks
            )
            sequence_recommendation_interaction_similarity_kernel[batch, chunks](
                items, *place, before, similarity, longest, PRECISION=input_precision(), **blocks
            )
    return results


def _empty_results(
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    timestamps: Tensor | None,
    window: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    longest: int,
) -> _Results:
    """Pools, similarity, two pools in fp32, (log-sum-exp, sum of decayed weights), and ``before``."""
    batch, width = target.shape
    chunks = _chunks(longest)
    fp32 = functools.partial(items.new_empty, dtype=torch.float32)
    return (
        items.new_empty(batch, 3, width),
        items.new_empty(items.shape[:-1]),
        fp32(batch, 2, width),
        fp32(batch, 2),
        fp32(batch, chunks if chunks > 1 else 0, width),
    )


def _backward(
    grad_pools: Tensor,
    grad_similarity: Tensor | None,
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    timestamps: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    exact: Tensor,
    stats: Tensor,
    before: Tensor,
    window: int,
    longest: int,
) -> _Grads:
    batch, width = target.shape
    chunks, blocks = _chunks(longest), _blocks(width)
    grads = _empty_grads(grad_pools, grad_similarity, items, target, decay)
    target_partial, decay_partial = stats.new_empty(batch, chunks, width), stats.new_empty(batch, chunks)
    summaries, after = torch.empty_like(before), torch.empty_like(before)
    items, target, timestamps = items.contiguous(), target.contiguous(), _dense(timestamps)
    grad_pools, grad_similarity = grad_pools.contiguous(), _dense(grad_similarity)
    place = decay, timestamps, lengths, offsets
    with torch.cuda.device_of(items):
        if chunks > 1 and grad_similarity is not None:
            sequence_recommendation_interaction_bwd_summary_kernel[batch, chunks](
                items, *place, grad_similarity, summaries, longest, **blocks
            )
            sequence_recommendation_interaction_after_kernel[_state_grid(batch, chunks, blocks)](
                *place, summaries, after, chunks, longest, **blocks
            )
        sequence_recommendation_interaction_bwd_kernel[batch, chunks](
            grad_pools, grad_similarity, items, target, *place, exact, stats, before, after,
            grads[0], target_partial, decay_partial, longest, window, width**-0.5,
            SINGLE=chunks == 1, PRECISION=input_precision(),
            **blocks | {"num_warps": 2 * blocks["num_warps"]},
        )  # fmt: skip
        sequence_recommendation_interaction_bwd_join_kernel[batch + 1,](
            target_partial, decay_partial, *grads[1:], batch, chunks,
            D=width, BLOCK=1024, BLOCK_D=blocks["BLOCK_D"],
        )  # fmt: skip
    return grads


def _empty_grads(
    grad_pools: Tensor,
    grad_similarity: Tensor | None,
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    *_arguments: Any,
) -> _Grads:
    return (
        torch.empty_like(items, memory_format=torch.contiguous_format),
        torch.empty_like(target, memory_format=torch.contiguous_format),
        torch.empty_like(decay),
    )


def _chunks(longest: int) -> int:
    return ceil_div(longest, _CHUNK_LENGTH)


def _blocks(width: int) -> dict[str, int]:
    """The kernels' constants."""
    block_d = min(64, max(16, triton.next_power_of_2(width)))
    return {"D": width, "BLOCK_N": _CHUNK_LENGTH, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1}


def _state_grid(batch: int, chunks: int, blocks: dict[str, int]) -> tuple[int, int, int]:
    return batch, ceil_div(chunks, CHUNKS.value), ceil_div(blocks["D"], blocks["BLOCK_D"])


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _save(ctx, arguments: tuple, results: _Results) -> None:
    items, target, decay, timestamps, ctx.window, lengths, offsets, ctx.longest = arguments
    ctx.save_for_backward(items, target, decay, timestamps, lengths, offsets, *results[2:])


def _differentiate(ctx, grad_pools: Tensor | None, grad_similarity: Tensor | None) -> tuple[Any, ...]:
    items, target, *others = ctx.saved_tensors
    if grad_pools is None:
        grad_pools = items.new_zeros(len(target), 3, items.shape[-1])
    grads = _backward_op(grad_pools, grad_similarity, items, target, *others, ctx.window, ctx.longest)
    needed = ctx.needs_input_grad[:3]
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *5 * (None,)


_op = define(
    "sequence_recommendation_interaction(Tensor items, Tensor target, Tensor decay, Tensor? timestamps, "
    "int window, Tensor? lengths, Tensor? offsets, SymInt longest) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_results,
)
_backward_op = define(
    "sequence_recommendation_interaction_backward(Tensor grad_pools, Tensor? grad_similarity, Tensor items, "
    "Tensor target, Tensor decay, Tensor? timestamps, Tensor? lengths, Tensor? offsets, Tensor exact, "
    "Tensor stats, Tensor before, int window, SymInt longest) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_grads,
)
set_autograd(_op, differentiable_once(_op, _save, _differentiate, differentiable=2))


def sequence_recommendation_interaction(
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    *,
    timestamps: Tensor | None = None,
    window: int = 5,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``neuroexapt.functional`` defines, with sums in fp32. Differentiable once."""
    check_arguments(items, target, decay, timestamps, window, lengths, offsets, max_length)
    lengths, offsets, longest = place_of(items, lengths, offsets, max_length)
    return _op(items, target, decay, timestamps, window, lengths, offsets, longest)[:2]


def supports(
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    *,
    timestamps: Tensor | None = None,
    window: int = 5,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Support:
    """Whether the kernels take these arguments."""
    if items.dtype not in _DTYPES or target.dtype != items.dtype or decay.dtype not in _DTYPES:
        return Support(False, f"dtypes {items.dtype}, {target.dtype} and {decay.dtype}")
    others = target, decay, timestamps
    if any(tensor is not None and tensor.device != items.device for tensor in others):
        return Support(False, "operands on several devices")
    if items.numel() == 0:
        return Support(False, "empty operands")
    return Support(True)


register_impl("sequence_recommendation_interaction", "triton", sequence_recommendation_interaction, supports)
