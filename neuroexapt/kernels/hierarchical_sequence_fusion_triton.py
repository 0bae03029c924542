"""``hierarchical_sequence_fusion`` in Triton: one kernel forward, two backward.

Shapes: B sequences of up to N positions, R rows (B·N, or T of jagged input), D features, padded to DP;
K windows, padded to KP; a program owns BM positions of one sequence and sees HALO ≥ max(windows) − 1
positions before them (backward, after them).

Why it is built this way:

- A mixture of causal means is a product with a band matrix: ``f = C·x`` with
  ``C[t, s] = Σ_k α_k[t] · [0 ≤ t − s < w_k] / min(t + 1, w_k)``. C is made in registers from K shares,
  so the K means never exist, each x is read once however wide the windows are, and the sums run on the
  tensor cores. Backward is the transposed band, ``dx = Cᵀ·df``, and the gradient of a share is a sum over its
  band of ``df·xᵀ``.
- Narrow rows go through the products too without leaving the kernel: one forward, two backward. Wider ones
  would leave no registers, or read the weights from L2 once for every few rows; between their kernels stand
  PyTorch's products.
- For a backward pass f and the branches are kept: they cost 12.9 GFLOP to recompute at R = 32,768, D = 256,
  more time than writing and reading them takes.
- Backward first goes through LayerNorm, gate and products (rows alone), then through the band, which needs
  the next rows' df. Weight gradients are one product over all rows, ``[dg | do]ᵀ·[x | f]``; every other
  parameter's are one partial sum a program, added up in a fixed order.
- Products of fp32 are three TF32 products (fp32 grade), one where PyTorch's matrix products may be.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.kernels.partial_sums_triton import add_up
from neuroexapt.kernels.ragged_triton import (
    input_precision,
    place_of,
    rows_to_write,
    sequence_count,
    sequence_span,
)
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd
from neuroexapt.kernels.rows_triton import before_normalised, load_rows, normalised
from neuroexapt.kernels.sizes import MOST_PROGRAMS, ceil_div

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_WINDOW = 129
_MAX_WINDOWS = 16
_MAX_WIDTH = 2048
# Up to this width the products are done in the kernels, whose rows' sums then fit in registers.
_NARROW = 128


@triton.jit
def _shares(scores, K: tl.constexpr, KP: tl.constexpr):
    """Softmax over the first K of KP columns: [BM, KP]."""
    scores = tl.where(tl.arange(0, KP)[None, :] < K, scores, -float("inf"))
    exponentials = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def _column(matrix, k, KP: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, KP)[None, :] == k, matrix, 0.0), axis=1)


@triton.jit
def _band(shares, t, s, WINDOWS: tl.constexpr, KP: tl.constexpr):
    """C[t, s], the weight of position s in the mixture of means at position t."""
    distance = t[:, None] - s[None, :]
    band = tl.zeros(distance.shape, tl.float32)
    for k in tl.static_range(len(WINDOWS)):
        weight = _column(shares, k, KP) / tl.minimum(t + 1, WINDOWS[k]).to(tl.float32)
        band += tl.where((distance >= 0) & (distance < WINDOWS[k]), weight[:, None], 0.0)
    return band


@triton.jit
def _gated(x, gate, out, norm_weight_ptr, norm_bias_ptr, eps, D: tl.constexpr, DP: tl.constexpr):
    """LayerNorm(x + σ(gate) ⊙ out): [BM, DP] in fp32."""
    columns = tl.arange(0, DP)
    z, _ = normalised(x.to(tl.float32) + tl.sigmoid(gate.to(tl.float32)) * out.to(tl.float32), D, DP, eps)
    norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    return z * norm_weight[None, :] + norm_bias[None, :]


@triton.jit
def hierarchical_sequence_fusion_fwd_kernel(
    x_ptr, scale_ptr, gate_weight_ptr, gate_bias_ptr, out_weight_ptr, norm_weight_ptr, norm_bias_ptr,
    y_ptr, inputs_ptr, branches_ptr, plane, shares_ptr, lengths, offsets, max_length, temperature, eps,
    D: tl.constexpr, DP: tl.constexpr, WINDOWS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, HALO: tl.constexpr, NARROW: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With KEEP, inputs [R, 2D] = [x | f] and shares [R, KP]; if NARROW, y and, with KEEP, the branches.

    ``branches``: [2, R, D], the gate before its sigmoid and W_o f, ``plane`` elements apart.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    K: tl.constexpr = len(WINDOWS)
    start, length = sequence_span(tl.program_id(1), lengths, offsets, max_length)
    first = tl.program_id(0) * BM
    if first >= rows_to_write(length, offsets, max_length):
        return
    t = first + tl.arange(0, BM)
    before = first - HALO + tl.arange(0, HALO)
    valid = t < length
    written = t < rows_to_write(length, offsets, max_length)
    columns = tl.arange(0, DP)
    scales = tl.arange(0, KP)

    scores = tl.zeros([BM, KP], tl.float32)
    for chunk in range(0, D, BK):
        features = chunk + tl.arange(0, BK)
        x = load_rows(x_ptr, start + t, features, D, valid)  # [BM, BK]
        scale = load_rows(scale_ptr, scales, features, D, scales < K)  # [KP, BK]
        scores = tl.dot(x, tl.trans(scale), scores, input_precision=PRECISION)
    shares = _shares(scores / temperature, K, KP)
    band = _band(shares, t, t, WINDOWS, KP).to(dtype)  # [BM, BM]
    band_before = _band(shares, t, before, WINDOWS, KP).to(dtype)  # [BM, HALO]

    if NARROW:
        gate = tl.zeros([BM, DP], tl.float32)
        out = tl.zeros([BM, DP], tl.float32)
    for chunk in range(0, D, BK):
        features = chunk + tl.arange(0, BK)
        x = load_rows(x_ptr, start + t, features, D, valid)
        x_before = load_rows(x_ptr, start + before, features, D, (before >= 0) & (before < length))
        f = tl.dot(band_before, x_before, input_precision=PRECISION)
        f = tl.dot(band, x, f, input_precision=PRECISION).to(dtype)  # [BM, BK]
        if KEEP:
            kept = inputs_ptr + (start + t)[:, None] * (2 * D) + features[None, :]
            mask = written[:, None] & (features < D)[None, :]
            tl.store(kept, x, mask=mask)
            tl.store(kept + D, tl.where(valid[:, None], f, 0.0).to(dtype), mask=mask)
        if NARROW:
            mask = (columns < D)[:, None] & (features < D)[None, :]
            gate_weight = gate_weight_ptr + columns[:, None] * (2 * D) + features[None, :]
            weight = tl.load(gate_weight, mask=mask, other=0.0)  # [DP, BK]
            gate = tl.dot(x, tl.trans(weight), gate, input_precision=PRECISION)
            weight = tl.load(gate_weight + D, mask=mask, other=0.0)
            gate = tl.dot(f, tl.trans(weight), gate, input_precision=PRECISION)
            weight = tl.load(out_weight_ptr + columns[:, None] * D + features[None, :], mask=mask, other=0.0)
            out = tl.dot(f, tl.trans(weight), out, input_precision=PRECISION)

    rows = start + t
    if KEEP:
        kept = tl.where(valid[:, None], shares, 0.0)
        tl.store(shares_ptr + rows[:, None] * KP + scales[None, :], kept, mask=written[:, None])
    if NARROW:
        gate += tl.load(gate_bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        gate, out = gate.to(dtype), out.to(dtype)
        mask = written[:, None] & (columns < D)[None, :]
        if KEEP:
            branches = branches_ptr + rows[:, None] * D + columns[None, :]
            tl.store(branches, gate, mask=mask)
            tl.store(branches + plane, out, mask=mask)
        x = load_rows(x_ptr, rows, columns, D, valid)
        y = _gated(x, gate, out, norm_weight_ptr, norm_bias_ptr, eps, D, DP)
        y = tl.where(valid[:, None], y, 0.0).to(dtype)
        tl.store(y_ptr + rows[:, None] * D + columns[None, :], y, mask=mask)


@triton.jit
def hierarchical_sequence_fusion_fwd_gate_kernel(
    x_ptr, branches_ptr, plane, norm_weight_ptr, norm_bias_ptr, y_ptr, lengths, offsets, max_length, eps,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y from x and the branches."""
    start, length = sequence_span(tl.program_id(1), lengths, offsets, max_length)
    first = tl.program_id(0) * BM
    if first >= rows_to_write(length, offsets, max_length):
        return
    t = first + tl.arange(0, BM)
    valid = t < length
    rows = start + t
    columns = tl.arange(0, DP)
    x = load_rows(x_ptr, rows, columns, D, valid)
    gate = load_rows(branches_ptr, rows, columns, D, valid)
    out = load_rows(branches_ptr + plane, rows, columns, D, valid)
    y = tl.where(valid[:, None], _gated(x, gate, out, norm_weight_ptr, norm_bias_ptr, eps, D, DP), 0.0)
    mask = (t < rows_to_write(length, offsets, max_length))[:, None] & (columns < D)[None, :]
    tl.store(y_ptr + rows[:, None] * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hierarchical_sequence_fusion_bwd_gate_kernel(
    dy_ptr, x_ptr, branches_ptr, plane, gate_weight_ptr, out_weight_ptr, norm_weight_ptr,
    dx_ptr, df_ptr, dbranches_ptr, partial_ptr, lengths, offsets, max_length, eps,
    D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through LayerNorm and gate: dbranches [R, 2D] = [dg | do], and what reaches x past the branches.

    If NARROW, also through the branches: dx holds what reaches x on every way but f's, and df [R, D] that.
    ``partial``: [programs, 3 + K, D]; its first rows are the share of a program's TILE rows in the gradients
    of the norm's weight and bias and of the gate's bias.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    start, length = sequence_span(tl.program_id(1), lengths, offsets, max_length)
    if tl.program_id(0) * TILE >= rows_to_write(length, offsets, max_length):
        return
    columns = tl.arange(0, DP)
    norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    dnorm_weight = tl.zeros([DP], tl.float32)
    dnorm_bias = tl.zeros([DP], tl.float32)
    dgate_bias = tl.zeros([DP], tl.float32)
    for first in range(tl.program_id(0) * TILE, (tl.program_id(0) + 1) * TILE, BM):
        t = first + tl.arange(0, BM)
        rows, valid = start + t, t < length
        mask = (t < rows_to_write(length, offsets, max_length))[:, None] & (columns < D)[None, :]
        dy = load_rows(dy_ptr, rows, columns, D, valid).to(tl.float32)
        x = load_rows(x_ptr, rows, columns, D, valid).to(tl.float32)
        gate = tl.sigmoid(load_rows(branches_ptr, rows, columns, D, valid).to(tl.float32))
        out = load_rows(branches_ptr + plane, rows, columns, D, valid).to(tl.float32)
        z, rstd = normalised(x + gate * out, D, DP, eps)
        dnorm_weight += tl.sum(dy * z, axis=0)
        dnorm_bias += tl.sum(dy, axis=0)
        dz = before_normalised(dy * norm_weight[None, :], z, rstd, D, DP)  # 0 at padded positions, as dy
        dgate = dz * out * gate * (1 - gate)
        dgate_bias += tl.sum(dgate, axis=0)
        dbranches = dbranches_ptr + rows[:, None] * (2 * D) + columns[None, :]
        tl.store(dbranches, dgate.to(dtype), mask=mask)
        tl.store(dbranches + D, (dz * gate).to(dtype), mask=mask)
        dx = dz
        if NARROW:
            tl.debug_barrier()  # other threads of the program read these back
            df = tl.zeros([BM, DP], tl.float32)
            for chunk in range(0, D, BK):
                features = chunk + tl.arange(0, BK)
                chunk_mask = valid[:, None] & (features < D)[None, :]
                read_back = dbranches_ptr + rows[:, None] * (2 * D) + features[None, :]
                gate_chunk = tl.load(read_back, mask=chunk_mask, other=0.0)  # [BM, BK]
                out_chunk = tl.load(read_back + D, mask=chunk_mask, other=0.0)
                weight_mask = (features < D)[:, None] & (columns < D)[None, :]
                gate_weight = gate_weight_ptr + features[:, None] * (2 * D) + columns[None, :]
                weight = tl.load(gate_weight, mask=weight_mask, other=0.0)  # [BK, DP]
                dx = tl.dot(gate_chunk, weight, dx, input_precision=PRECISION)
                weight = tl.load(gate_weight + D, mask=weight_mask, other=0.0)
                df = tl.dot(gate_chunk, weight, df, input_precision=PRECISION)
                out_weight = out_weight_ptr + features[:, None] * D + columns[None, :]
                weight = tl.load(out_weight, mask=weight_mask, other=0.0)
                df = tl.dot(out_chunk, weight, df, input_precision=PRECISION)
            tl.store(df_ptr + rows[:, None] * D + columns[None, :], df.to(dtype), mask=mask)
        tl.store(dx_ptr + rows[:, None] * D + columns[None, :], dx.to(dtype), mask=mask)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    partial_ptr += program * (3 + K) * D + columns
    tl.store(partial_ptr, dnorm_weight, mask=columns < D)
    tl.store(partial_ptr + D, dnorm_bias, mask=columns < D)
    tl.store(partial_ptr + 2 * D, dgate_bias, mask=columns < D)


@triton.jit
def hierarchical_sequence_fusion_bwd_band_kernel(
    x_ptr, df_ptr, shares_ptr, scale_ptr, dx_ptr, partial_ptr, lengths, offsets, max_length, temperature,
    D: tl.constexpr, WINDOWS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    HALO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dx what reaches x through the means and their shares.

    ``partial``: as in the kernel above; its last K rows are this program's shares of the scales' gradient.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    K: tl.constexpr = len(WINDOWS)
    start, length = sequence_span(tl.program_id(1), lengths, offsets, max_length)
    first = tl.program_id(0) * BM
    if first >= length:
        return
    t = first + tl.arange(0, BM)
    before = first - HALO + tl.arange(0, HALO)
    after = first + BM + tl.arange(0, HALO)
    valid, before_valid, after_valid = t < length, (before >= 0) & (before < length), after < length
    scales = tl.arange(0, KP)
    partial_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (3 + K) * D

    # How much each pair of positions would gain from a larger weight in C.
    gain = tl.zeros([BM, BM], tl.float32)
    gain_before = tl.zeros([BM, HALO], tl.float32)
    for chunk in range(0, D, BK):
        features = chunk + tl.arange(0, BK)
        df = load_rows(df_ptr, start + t, features, D, valid)
        x = load_rows(x_ptr, start + t, features, D, valid)
        x_before = load_rows(x_ptr, start + before, features, D, before_valid)
        gain = tl.dot(df, tl.trans(x), gain, input_precision=PRECISION)
        gain_before = tl.dot(df, tl.trans(x_before), gain_before, input_precision=PRECISION)
    shares = load_rows(shares_ptr, start + t, scales, KP, valid)
    dshares = tl.zeros([BM, KP], tl.float32)
    for k in tl.static_range(K):
        inside = (t[:, None] - t[None, :] >= 0) & (t[:, None] - t[None, :] < WINDOWS[k])
        dshare = tl.sum(tl.where(inside, gain, 0.0), axis=1)
        dshare += tl.sum(tl.where(t[:, None] - before[None, :] < WINDOWS[k], gain_before, 0.0), axis=1)
        dshare /= tl.minimum(t + 1, WINDOWS[k]).to(tl.float32)
        dshares = tl.where(scales[None, :] == k, dshare[:, None], dshares)
    dscores = shares * (dshares - tl.sum(shares * dshares, axis=1)[:, None]) / temperature
    dscores = dscores.to(dtype)

    band = tl.trans(_band(shares, t, t, WINDOWS, KP)).to(dtype)
    shares_after = load_rows(shares_ptr, start + after, scales, KP, after_valid)
    band_after = tl.trans(_band(shares_after, after, t, WINDOWS, KP)).to(dtype)  # [BM, HALO]
    for chunk in range(0, D, BK):
        features = chunk + tl.arange(0, BK)
        df = load_rows(df_ptr, start + t, features, D, valid)
        df_after = load_rows(df_ptr, start + after, features, D, after_valid)
        scale = load_rows(scale_ptr, scales, features, D, scales < K)  # [KP, BK]
        x = load_rows(x_ptr, start + t, features, D, valid)
        dx = load_rows(dx_ptr, start + t, features, D, valid).to(tl.float32)
        dx = tl.dot(band, df, dx, input_precision=PRECISION)
        dx = tl.dot(band_after, df_after, dx, input_precision=PRECISION)
        dx = tl.dot(dscores, scale, dx, input_precision=PRECISION)
        mask = valid[:, None] & (features < D)[None, :]
        tl.store(dx_ptr + (start + t)[:, None] * D + features[None, :], dx.to(dtype), mask=mask)
        dscale = tl.dot(tl.trans(dscores), x, input_precision=PRECISION)  # [KP, BK]
        mask = (scales < K)[:, None] & (features < D)[None, :]
        tl.store(partial_ptr + (3 + scales)[:, None] * D + features[None, :], dscale, mask=mask)


@functools.cache
def _blocks(width: int, itemsize: int) -> dict[str, int]:
    """Of the kernels with products in them: rows and features a tile, warps and stages."""
    padded = _padded(width)
    return {
        "D": width,
        "BM": 32 if itemsize == 4 else 64,
        "BK": min(padded, 32 if itemsize == 4 else 64),
        "num_warps": 8 if 64 < padded <= _NARROW else 4,
        "num_stages": 2,
    }


@functools.cache
def _row_blocks(width: int) -> dict[str, int]:
    """Of the kernels that only see whole rows, in registers: 16 elements of each tensor a thread."""
    padded = _padded(width)
    return {"D": width, "DP": padded, "BM": min(16, 4096 // padded), "num_warps": 8}


@functools.cache
def _halo(windows: tuple[int, ...]) -> int:
    return max(16, triton.next_power_of_2(max(windows) - 1))


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _padded_count(windows: Sequence[int]) -> int:
    return max(16, triton.next_power_of_2(len(windows)))


def _empty_results(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, windows, _, _, keep = arguments
    rows, width = math.prod(x.shape[:-1]) if keep else 0, x.shape[-1]
    inputs, branches = x.new_empty(rows, 2 * width), x.new_empty(2, rows, width)
    shares = x.new_empty(rows, _padded_count(windows), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), inputs, branches, shares


def _forward(
    x: Tensor,
    scale_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    out_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
    windows: list[int],
    temperature: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = y, inputs, branches, shares = _empty_results(x, windows, temperature, eps, keep)
    if not x.numel():
        return results
    width = x.shape[-1]
    is_narrow = width <= _NARROW
    if not is_narrow and not keep:
        _, inputs, branches, shares = _empty_results(x, windows, temperature, eps, True)
    sequences = sequence_count(x, offsets)
    x, place, plane = x.contiguous(), (lengths, offsets, max_length), branches[0].numel()
    weights = scale_weight, gate_weight, gate_bias, out_weight, norm_weight, norm_bias
    blocks, row_blocks = _blocks(width, x.itemsize), _row_blocks(width)
    with torch.cuda.device_of(x):
        hierarchical_sequence_fusion_fwd_kernel[ceil_div(max_length, blocks["BM"]), sequences](
            x, *(weight.contiguous() for weight in weights), y, inputs, branches, plane, shares, *place,
            temperature, eps, DP=_padded(width), WINDOWS=tuple(windows), KP=_padded_count(windows),
            HALO=_halo(tuple(windows)), NARROW=is_narrow, KEEP=keep or not is_narrow,
            PRECISION=input_precision(), **blocks,
        )  # fmt: skip
        if not is_narrow:
            torch.addmm(gate_bias, inputs, gate_weight.T, out=branches[0])
            torch.mm(inputs[:, width:], out_weight.T, out=branches[1])
            hierarchical_sequence_fusion_fwd_gate_kernel[ceil_div(max_length, row_blocks["BM"]), sequences](
                x, branches, plane, norm_weight.contiguous(), norm_bias.contiguous(), y, *place, eps,
                **row_blocks,
            )  # fmt: skip
    return results


def _empty_gradients(dy: Tensor, x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    *_, windows, _, _ = arguments
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(rows, 2 * width), x.new_empty(3 + len(windows), width)


def _backward(
    dy: Tensor,
    x: Tensor,
    scale_weight: Tensor,
    gate_weight: Tensor,
    out_weight: Tensor,
    norm_weight: Tensor,
    branches: Tensor,
    shares: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
    windows: list[int],
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, [dg | do] [R, 2D], and the gradients of norm weight and bias, gate bias and scales [3 + K, D]."""
    dx, dbranches, sums = _empty_gradients(dy, x, windows, temperature, eps)
    if not x.numel():
        return dx, dbranches, sums.zero_()
    width = x.shape[-1]
    is_narrow = width <= _NARROW
    sequences = sequence_count(x, offsets)
    blocks = _blocks(width, x.itemsize)
    row_blocks = blocks | ({"DP": _padded(width)} if is_narrow else _row_blocks(width))
    grid = ceil_div(max_length, blocks["BM"]), sequences
    x, df, place = x.contiguous(), torch.empty_like(dx), (lengths, offsets, max_length)
    partials = sums.new_empty(grid[0] * grid[1], *sums.shape, dtype=torch.float32)
    if lengths is not None or offsets is not None:
        partials.zero_()  # programs behind the end of a sequence write none
    with torch.cuda.device_of(x):
        hierarchical_sequence_fusion_bwd_gate_kernel[grid](
            dy.contiguous(), x, branches, branches[0].numel(), gate_weight.contiguous(),
            out_weight.contiguous(), norm_weight.contiguous(), dx, df, dbranches, partials, *place, eps,
            K=len(windows), TILE=blocks["BM"], NARROW=is_narrow, PRECISION=input_precision(), **row_blocks,
        )  # fmt: skip
        if not is_narrow:
            of_f = torch.cat([gate_weight[:, width:], out_weight])
            torch.mm(dbranches, of_f, out=df.view(-1, width))
            dx.view(-1, width).addmm_(dbranches[:, :width], gate_weight[:, :width])
        hierarchical_sequence_fusion_bwd_band_kernel[grid](
            x, df, shares, scale_weight.contiguous(), dx, partials, *place, temperature,
            WINDOWS=tuple(windows), KP=_padded_count(windows), HALO=_halo(tuple(windows)),
            PRECISION=input_precision(), **blocks,
        )  # fmt: skip
        add_up(partials, sums)
    return dx, dbranches, sums


def _save(ctx, arguments: tuple, results: tuple[Tensor, ...]) -> None:
    x, scale_weight, gate_weight, _, out_weight, norm_weight, _, lengths, offsets, *options, _ = arguments
    weights = scale_weight, gate_weight, out_weight, norm_weight
    ctx.save_for_backward(x, *weights, *results[1:], lengths, offsets)
    ctx.options = options


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, *weights, inputs, branches, shares, lengths, offsets = ctx.saved_tensors
    dx, dbranches, sums = _backward_op(dy, x, *weights, branches, shares, lengths, offsets, *ctx.options)
    # Its first D rows concern the gate; of the others, those of x are no gradient.
    products = dbranches.T @ inputs  # [2D, 2D]
    width = x.shape[-1]
    dgate_weight, dout_weight = products[:width], products[width:, width:]
    dnorm_weight, dnorm_bias, dgate_bias = sums[:3]
    gradients = dx, sums[3:], dgate_weight, dgate_bias, dout_weight, dnorm_weight, dnorm_bias
    return *gradients, *[None] * 7


_PLACE = "Tensor? lengths, Tensor? offsets, SymInt max_length"
_OPTIONS = "int[] windows, float temperature, float eps"
_op = define(
    "hierarchical_sequence_fusion_triton(Tensor x, Tensor scale_weight, Tensor gate_weight, "
    "Tensor gate_bias, Tensor out_weight, Tensor norm_weight, Tensor norm_bias, "
    f"{_PLACE}, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_results,
)
_backward_op = define(
    "hierarchical_sequence_fusion_triton_backward(Tensor dy, Tensor x, Tensor scale_weight, "
    "Tensor gate_weight, Tensor out_weight, Tensor norm_weight, Tensor branches, Tensor shares, "
    f"{_PLACE}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)
set_autograd(_op, differentiable_once(_op, _save, _differentiate))


def hierarchical_sequence_fusion(
    *tensors: Tensor,
    windows: Sequence[int] = (1, 3, 7, 15),
    temperature: float = 1.0,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """``neuroexapt.functional.hierarchical_sequence_fusion``; differentiable once, deterministic."""
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    place = place_of(tensors[0], lengths, offsets, max_length)
    return _op(*tensors, *place, list(windows), temperature, eps, keep)[0]


def supports(
    x: Tensor,
    *weights: Tensor,
    windows: Sequence[int] = (1, 3, 7, 15),
    offsets: Tensor | None = None,
    **options: object,
) -> Support:
    """Whether the kernels take these arguments."""
    if any(weight.dtype != x.dtype for weight in weights) or x.dtype not in _DTYPES:
        return Support(False, "dtypes other than one of fp32, fp16, bf16 for all")
    if any(weight.device != x.device for weight in weights):
        return Support(False, "operands on several devices")
    if x.shape[-1] > _MAX_WIDTH:
        return Support(False, f"more than {_MAX_WIDTH} features")
    if len(windows) > _MAX_WINDOWS or max(windows) > _MAX_WINDOW:
        return Support(False, f"more than {_MAX_WINDOWS} windows, or one over {_MAX_WINDOW} positions")
    if sequence_count(x, offsets) > MOST_PROGRAMS:
        return Support(False, f"more than {MOST_PROGRAMS} sequences")
    return Support(True)


register_impl("hierarchical_sequence_fusion", "triton", hierarchical_sequence_fusion, supports)
