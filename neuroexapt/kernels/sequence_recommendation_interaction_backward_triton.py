"""The backward kernels of ``sequence_recommendation_interaction_triton``, where legend and formulas are."""

import triton
import triton.language as tl

from neuroexapt.kernels.ragged_triton import rows_to_write, sequence_span
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


@triton.jit
def sequence_recommendation_interaction_bwd_summary_kernel(
    items_ptr, decay_ptr, times_ptr, lengths_ptr, offsets_ptr, grad_similarity_ptr, summaries_ptr, max_length,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``summary'`` [B, chunks, D]. Grid: (B, chunks)."""
    sequence, chunk = tl.program_id(0), tl.program_id(1)
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    position = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < length
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        x = items_of(items_ptr, start, position, valid, column, D).to(tl.float32)
        squares += tl.sum(x * x, 1)
    since = times_at(times_ptr, start, position, valid) - origin_of(times_ptr, start, length, chunk, BLOCK_N)
    passed_back = tl.load(grad_similarity_ptr + start + position, mask=valid, other=0.0).to(tl.float32)
    weights = decayed(tl.load(decay_ptr).to(tl.float32), since, valid & (chunk > 0))
    weights *= passed_back * inverse_norms(squares)
    row = (sequence * tl.num_programs(1) + chunk).to(tl.int64)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        x = items_of(items_ptr, start, position, valid, column, D).to(tl.float32)
        tl.store(summaries_ptr + row * D + column, weighted_sum(weights, x), mask=column < D)


@triton.jit
def sequence_recommendation_interaction_after_kernel(
    decay_ptr, times_ptr, lengths_ptr, offsets_ptr, summaries_ptr, after_ptr, chunks, max_length,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``after`` [B, chunks, D]. Grid: (B, blocks of chunks, blocks of columns)."""
    sequence, block = tl.program_id(0), tl.program_id(1)
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    decay = tl.load(decay_ptr).to(tl.float32)
    state = across_chunks(
        summaries_ptr, sequence * chunks, D, times_ptr, start, length, decay,
        chunk, block * CHUNKS, chunks, column, True, D, BLOCK_N,
    )  # fmt: skip
    store_states(after_ptr, state, sequence, chunk, chunks, column, D)


@triton.jit
def sequence_recommendation_interaction_bwd_kernel(
    grad_pools_ptr, grad_similarity_ptr, items_ptr, target_ptr, decay_ptr, times_ptr, lengths_ptr,
    offsets_ptr, exact_ptr, stats_ptr, before_ptr, after_ptr, grad_items_ptr, target_partial_ptr,
    decay_partial_ptr, max_length, window, scale,
    SINGLE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk's items, and its part of the target's [B, chunks, D] and λ's [B, chunks].

    Grid: (B, chunks). Without ``grad_similarity`` only the pools pass anything back. A first walk over the
    columns takes all products, a second one writes; what lies between is one number an item or a pair.
    """
    SIMILARITY: tl.constexpr = grad_similarity_ptr is not None
    sequence, chunk = tl.program_id(0), tl.program_id(1)
    partial = sequence * tl.num_programs(1) + chunk
    start, length = sequence_span(sequence, lengths_ptr, offsets_ptr, max_length)
    position = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < length

    scores = tl.zeros([BLOCK_N], tl.float32)
    grad_attention = tl.zeros([BLOCK_N], tl.float32)
    grad_aged = tl.zeros([BLOCK_N], tl.float32)
    attention_mean, aged_mean, before_after = 0.0, 0.0, 0.0
    squares = tl.zeros([BLOCK_N], tl.float32)
    to_before = tl.zeros([BLOCK_N], tl.float32)
    to_after = tl.zeros([BLOCK_N], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        items = items_of(items_ptr, start, position, valid, column, D)
        x = items.to(tl.float32)
        scores += products_with(x, row_of(target_ptr, sequence, column, D))
        passed_back = row_of(grad_pools_ptr, sequence * 3, column, D)
        grad_attention += products_with(x, passed_back)
        attention_mean += tl.sum(passed_back * row_of(exact_ptr, sequence * 2, column, D), 0)
        passed_back = row_of(grad_pools_ptr, sequence * 3 + 2, column, D)
        grad_aged += products_with(x, passed_back)
        aged_mean += tl.sum(passed_back * row_of(exact_ptr, sequence * 2 + 1, column, D), 0)
        if SIMILARITY:
            squares += tl.sum(x * x, 1)
            products = tl.dot(items, tl.trans(items), products, input_precision=PRECISION)
            if not SINGLE:
                before = row_of(before_ptr, partial, column, D)
                after = row_of(after_ptr, partial, column, D)
                to_before += products_with(x, before)
                to_after += products_with(x, after)
                before_after += tl.sum(before * after, 0)

    time = times_at(times_ptr, start, position, valid)
    decay = tl.load(decay_ptr).to(tl.float32)
    attention_share = tl.where(valid, tl.exp(scores * scale - tl.load(stats_ptr + sequence * 2)), 0.0)
    grad_score = attention_share * (grad_attention - attention_mean) * scale
    recent = valid & (position >= length - window)
    recent_share = tl.where(recent, 1.0 / tl.minimum(tl.maximum(length, 1), window), 0.0)
    age = (times_at(times_ptr, start, length - 1, length > 0) - time).to(tl.float32)
    aged_share = decayed(decay, age, valid) / tl.load(stats_ptr + sequence * 2 + 1)
    grad_decay = -tl.sum(tl.where(valid, age * aged_share * (grad_aged - aged_mean), 0.0), 0)

    if SIMILARITY:
        passed_back = tl.load(grad_similarity_ptr + start + position, mask=valid, other=0.0).to(tl.float32)
        inverse = inverse_norms(squares)
        # One number a pair: the later item's gradient passes back to both.
        is_later = position[:, None] > position[None, :]
        gap = (time[:, None] - time[None, :]).to(tl.float32)
        gap = tl.where(is_later, gap, -gap)
        is_pair = valid[:, None] & valid[None, :] & (position[:, None] != position[None, :])
        weights = decayed(decay, gap, is_pair)
        weights *= tl.where(is_later, passed_back[:, None], passed_back[None, :])
        cosines = products * inverse[:, None] * inverse[None, :]
        along = tl.sum(weights * cosines, 1)  # ⟨ê, dê⟩
        grad_decay -= 0.5 * tl.sum(tl.sum(tl.where(is_pair, gap * weights * cosines, 0.0), 1), 0)
        if not SINGLE:
            is_followed = (chunk + 1) * BLOCK_N < length
            origin = origin_of(times_ptr, start, length, chunk, BLOCK_N)
            next_origin = origin_of(times_ptr, start, length, chunk + 1, BLOCK_N)
            since = (time - origin).to(tl.float32)
            until = (next_origin - time).to(tl.float32)
            across = (next_origin - origin).to(tl.float32)
            from_before = decayed(decay, since, valid & (chunk > 0)) * passed_back
            from_after = decayed(decay, until, valid & is_followed)
            before_part = from_before * inverse * to_before
            after_part = from_after * inverse * to_after
            along += before_part + after_part
            ways = tl.where(valid & (chunk > 0), since * before_part, 0.0)
            ways += tl.where(valid & is_followed, until * after_part, 0.0)
            grad_decay -= tl.sum(ways, 0)
            grad_decay -= across * decayed(decay, across, is_followed & (chunk > 0)) * before_after

    tl.store(decay_partial_ptr + partial, grad_decay)
    written = position < rows_to_write(length, offsets_ptr, max_length)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        items = items_of(items_ptr, start, position, valid, column, D)
        x = items.to(tl.float32)
        part = target_partial_ptr + partial.to(tl.int64) * D + column
        tl.store(part, weighted_sum(grad_score, x), mask=column < D)
        grad_x = attention_share[:, None] * row_of(grad_pools_ptr, sequence * 3, column, D)[None, :]
        grad_x += recent_share[:, None] * row_of(grad_pools_ptr, sequence * 3 + 1, column, D)[None, :]
        grad_x += aged_share[:, None] * row_of(grad_pools_ptr, sequence * 3 + 2, column, D)[None, :]
        grad_x += grad_score[:, None] * row_of(target_ptr, sequence, column, D)[None, :]
        if SIMILARITY:
            unit = x * inverse[:, None]
            grad_unit = tl.dot(weights.to(items.dtype), unit.to(items.dtype), input_precision=PRECISION)
            if not SINGLE:
                grad_unit += from_before[:, None] * row_of(before_ptr, partial, column, D)[None, :]
                grad_unit += from_after[:, None] * row_of(after_ptr, partial, column, D)[None, :]
            grad_x += inverse[:, None] * (grad_unit - along[:, None] * unit)
        tl.store(
            grad_items_ptr + (start + position)[:, None] * D + column[None, :],
            tl.where(valid[:, None], grad_x, 0.0),
            mask=written[:, None] & (column < D)[None, :],
        )


@triton.jit
def sequence_recommendation_interaction_bwd_join_kernel(
    target_partial_ptr, decay_partial_ptr, grad_target_ptr, grad_decay_ptr, batch, chunks,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up what the chunks passed back to their target and, in the last program, to λ. Grid: (B + 1,)."""
    sequence = tl.program_id(0)
    if sequence == batch:
        parts = tl.zeros([BLOCK], tl.float32)
        for first in range(0, batch * chunks, BLOCK):
            index = first + tl.arange(0, BLOCK)
            parts += tl.load(decay_partial_ptr + index, mask=index < batch * chunks, other=0.0)
        tl.store(grad_decay_ptr, tl.sum(parts, 0))
    else:
        for first_column in range(0, D, BLOCK_D):
            column = first_column + tl.arange(0, BLOCK_D)
            total = tl.zeros([BLOCK_D], tl.float32)
            for first in range(0, chunks, CHUNKS):
                chunk = first + tl.arange(0, CHUNKS)
                parts = target_partial_ptr + (sequence.to(tl.int64) * chunks + chunk)[:, None] * D
                inside = (chunk < chunks)[:, None] & (column < D)[None, :]
                total += tl.sum(tl.load(parts + column[None, :], mask=inside, other=0.0), 0)
            tl.store(grad_target_ptr + sequence.to(tl.int64) * D + column, total, mask=column < D)
