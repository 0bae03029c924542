"""``fused_attention_layernorm`` in Triton: causal attention, then one kernel for the rest, each way.

Shapes: R rows (B·N, or T of jagged input), D features, padded to DP; INNER = H·d features of all heads; a
program owns BM rows.

Why it is built this way:

- Projection, dropout, residual and LayerNorm are one kernel: a row's D sums stay in registers until they are
  normalised (wide rows, which would leave room for one program a multiprocessor, PyTorch projects). Forward
  reads attended rows and x, writes y and ``z = x + Drop(W_o a + b_o)``; backward reads z and dy and writes
  dx, the projection's gradient and, through ``W_o``, that of the attended rows. Mean and deviation are
  cheaper to take again from z, which is read anyway, than to keep.
- The dropout mask is never stored: forward and backward draw it from a Philox generator. Its seed is a tensor
  on the device, drawn by PyTorch's generator, so that a CUDA graph draws a new one each replay; the place in
  its stream is the element's place.
- W_o's gradient is one product over all rows; those of biases and norm are one partial sum a program, added
  up in a fixed order.
- Long sequences without padding use PyTorch's scaled_dot_product_attention, whose hand-written kernels keep
  Hopper's tensor cores busier than these; of others, it would compute the padding too. Which of them is left
  to PyTorch: asking for an order may change it for good, since PyTorch sets its own at the first call of all.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.kernels.causal_attention_triton import causal_attention
from neuroexapt.kernels.partial_sums_triton import add_up
from neuroexapt.kernels.ragged_triton import input_precision, place_of, sequence_count
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd
from neuroexapt.kernels.rows_triton import before_normalised, load_rows, normalised
from neuroexapt.kernels.sizes import MOST_PROGRAMS, ceil_div

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_WIDTH = 2048
# Up to this width the projection is done in the kernels, several of which then fit on a multiprocessor.
_NARROW = 128
_MAX_HEAD = 256
# From this length on PyTorch's attention is the faster one.
_LONG = 512


@triton.jit
def _valid_rows(rows, count, lengths, max_length):
    """Which rows hold an item: all below ``count`` unless ``lengths`` says that padding follows."""
    valid = rows < count
    if lengths is not None:
        length = tl.load(lengths + rows // max_length, mask=valid, other=0)
        valid = valid & (rows % max_length < length)
    return valid


@triton.jit
def _drop(values, seed_ptr, rows, columns, dropout, D: tl.constexpr):
    """Zero with probability ``dropout``, else scaled up to keep the mean."""
    draws = tl.rand(tl.load(seed_ptr), rows[:, None] * D + columns[None, :])
    return tl.where(draws < dropout, 0.0, values / (1 - dropout))


@triton.jit
def project_add_norm_fwd_kernel(
    x_ptr, attended_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, z_ptr,
    seed_ptr, lengths, count, max_length, dropout, eps,
    D: tl.constexpr, DP: tl.constexpr, INNER: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    NARROW: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y and, with KEEP, z [R, D]. Unless NARROW, the attended rows [R, D] come projected."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = _valid_rows(rows, count, lengths, max_length)
    columns = tl.arange(0, DP)
    if NARROW:
        z = tl.zeros([BM, DP], tl.float32)
        for chunk in range(0, INNER, BK):
            inner = chunk + tl.arange(0, BK)
            attended = load_rows(attended_ptr, rows, inner, INNER, valid)  # [BM, BK]
            weight = load_rows(weight_ptr, columns, inner, INNER, columns < D)  # [DP, BK]
            z = tl.dot(attended, tl.trans(weight), z, input_precision=PRECISION)
    else:
        z = load_rows(attended_ptr, rows, columns, D, valid).to(tl.float32)
    x = load_rows(x_ptr, rows, columns, D, valid).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    z += bias[None, :]
    if seed_ptr is not None:
        z = _drop(z, seed_ptr, rows, columns, dropout, D)
    z += x
    places = rows[:, None] * D + columns[None, :]
    mask = (rows < count)[:, None] & (columns < D)[None, :]
    if KEEP:
        tl.store(z_ptr + places, z.to(z_ptr.dtype.element_ty), mask=valid[:, None] & mask)
    z, _ = normalised(z, D, DP, eps)
    y = tl.where(valid[:, None], z * norm_weight[None, :] + norm_bias[None, :], 0.0)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def project_add_norm_bwd_kernel(
    dy_ptr, z_ptr, weight_ptr, norm_weight_ptr, dx_ptr, dprojected_ptr, dattended_ptr, partial_ptr,
    seed_ptr, lengths, count, max_length, dropout, eps,
    D: tl.constexpr, DP: tl.constexpr, INNER: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, NARROW: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, dprojected [R, D] (dx itself without dropout) and, if NARROW, dattended [R, INNER].

    ``partial``: [programs, 3, D], the share of a program's TILE rows in the gradients of norm weight, norm
    bias and bias.
    """
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    columns = tl.arange(0, DP)
    norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    dnorm_weight = tl.zeros([DP], tl.float32)
    dnorm_bias = tl.zeros([DP], tl.float32)
    dbias = tl.zeros([DP], tl.float32)
    for block in tl.range(0, TILE, BM, num_stages=STAGES):
        rows = tl.program_id(0).to(tl.int64) * TILE + block + tl.arange(0, BM)
        valid = _valid_rows(rows, count, lengths, max_length)
        dy = load_rows(dy_ptr, rows, columns, D, valid).to(tl.float32)
        z, rstd = normalised(load_rows(z_ptr, rows, columns, D, valid).to(tl.float32), D, DP, eps)
        dnorm_weight += tl.sum(dy * z, axis=0)
        dnorm_bias += tl.sum(dy, axis=0)
        dz = before_normalised(dy * norm_weight[None, :], z, rstd, D, DP)
        places = rows[:, None] * D + columns[None, :]
        mask = (rows < count)[:, None] & (columns < D)[None, :]
        tl.store(dx_ptr + places, dz.to(dtype), mask=mask)
        if seed_ptr is not None:
            dz = _drop(dz, seed_ptr, rows, columns, dropout, D)
            tl.store(dprojected_ptr + places, dz.to(dtype), mask=mask)
        dbias += tl.sum(dz, axis=0)
        if NARROW:
            dprojected = dz.to(dtype)
            for chunk in range(0, INNER, BK):
                inner = chunk + tl.arange(0, BK)
                weight = load_rows(weight_ptr, columns, inner, INNER, columns < D)  # [DP, BK]
                dattended = tl.dot(dprojected, weight, input_precision=PRECISION).to(dtype)
                inner_mask = (rows < count)[:, None] & (inner < INNER)[None, :]
                tl.store(dattended_ptr + rows[:, None] * INNER + inner[None, :], dattended, mask=inner_mask)
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * D + columns
    tl.store(partial_ptr, dnorm_weight, mask=columns < D)
    tl.store(partial_ptr + D, dnorm_bias, mask=columns < D)
    tl.store(partial_ptr + 2 * D, dbias, mask=columns < D)


@functools.cache
def _blocks(width: int, inner: int, itemsize: int) -> dict[str, int]:
    """Rows and inner features a tile, warps and stages."""
    padded = max(16, triton.next_power_of_2(width))
    is_narrow, is_fp32 = width <= _NARROW, itemsize == 4
    rows = (16 if padded > 128 else 32) if is_fp32 else (32 if padded <= 64 else 64)
    return {
        "D": width,
        "DP": padded,
        "INNER": inner,
        "BM": rows if is_narrow else 2048 // padded,
        "BK": min(max(16, triton.next_power_of_2(inner)), 32 if is_fp32 else 64),
        "NARROW": is_narrow,
        "num_warps": 8 if is_narrow and padded > 64 else 4,
        "num_stages": 2,
    }


@functools.cache
def _backward_blocks(width: int, inner: int, itemsize: int) -> dict[str, int]:
    """The same and a program's rows. Wide ones fill its warps, so each warp adds up columns of its own."""
    blocks = _blocks(width, inner, itemsize)
    if blocks["NARROW"]:
        return blocks | {"TILE": blocks["BM"], "STAGES": 1}
    return blocks | {"TILE": 16, "BM": 4, "STAGES": 2, "num_warps": blocks["DP"] // 256}


def _empty_results(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    keep = arguments[-1]
    return x.new_empty(x.shape), x.new_empty(x.shape if keep else 0)


def _forward(
    x: Tensor,
    attended: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y, z = _empty_results(x, keep)
    rows = x.shape[:-1].numel()
    if rows:
        blocks = _blocks(*weight.shape, x.itemsize)
        if not blocks["NARROW"]:
            attended = F.linear(attended, weight)
            z = attended if keep else z  # in its place, so memory is written once
        inputs = x, attended, weight, bias, norm_weight, norm_bias
        with torch.cuda.device_of(x):
            project_add_norm_fwd_kernel[ceil_div(rows, blocks["BM"]),](
                *(tensor.contiguous() for tensor in inputs), y, z, seed, lengths, rows, x.shape[-2],
                dropout, eps, KEEP=keep, PRECISION=input_precision(), **blocks,
            )  # fmt: skip
    return y, z


def _empty_gradients(
    dy: Tensor, z: Tensor, weight: Tensor, norm_weight: Tensor, seed: Tensor | None, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dattended = z.new_empty(z.shape), z.new_empty(*z.shape[:-1], weight.shape[1])
    dprojected = z.new_empty(0 if seed is None else z.shape)
    return dx, dprojected, dattended, z.new_empty(3, z.shape[-1])


def _backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    seed: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dprojected (empty where that is dx), dattended, and the sums of three vectors' gradients."""
    dx, dprojected, dattended, sums = _empty_gradients(dy, z, weight, norm_weight, seed)
    rows = z.shape[:-1].numel()
    if not rows:
        return dx, dprojected, dattended, sums.zero_()
    blocks = _backward_blocks(*weight.shape, z.itemsize)
    programs = ceil_div(rows, blocks["TILE"])
    partials = sums.new_empty(programs, *sums.shape, dtype=torch.float32)
    with torch.cuda.device_of(z):
        project_add_norm_bwd_kernel[programs,](
            dy.contiguous(), z, weight.contiguous(), norm_weight.contiguous(), dx, dprojected, dattended,
            partials, seed, lengths, rows, z.shape[-2], dropout, eps, PRECISION=input_precision(), **blocks,
        )  # fmt: skip
        add_up(partials, sums)
        if not blocks["NARROW"]:
            projected = dx if seed is None else dprojected
            torch.mm(projected.flatten(0, -2), weight, out=dattended.view(rows, -1))
    return dx, dprojected, dattended, sums


def _save(ctx, arguments: tuple, results: tuple[Tensor, Tensor]) -> None:
    _, attended, weight, _, norm_weight, _, seed, lengths, *options, _ = arguments
    ctx.save_for_backward(attended, results[1], weight, norm_weight, seed, lengths)
    ctx.options = options


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    attended, z, weight, norm_weight, seed, lengths = ctx.saved_tensors
    dx, dprojected, dattended, sums = _backward_op(dy, z, weight, norm_weight, seed, lengths, *ctx.options)
    dprojected = dx if seed is None else dprojected
    dweight = dprojected.flatten(0, -2).T @ attended.flatten(0, -2)
    dnorm_weight, dnorm_bias, dbias = sums
    return dx, dattended, dweight, dbias, dnorm_weight, dnorm_bias, *[None] * 5


_OPTIONS = "Tensor? seed, Tensor? lengths, float dropout, float eps"
_op = define(
    "project_add_norm_triton(Tensor x, Tensor attended, Tensor weight, Tensor bias, Tensor norm_weight, "
    f"Tensor norm_bias, {_OPTIONS}, bool keep) -> (Tensor, Tensor)",
    _forward,
    _empty_results,
)
_backward_op = define(
    "project_add_norm_triton_backward(Tensor dy, Tensor z, Tensor weight, Tensor norm_weight, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)
set_autograd(_op, differentiable_once(_op, _save, _differentiate))


def project_add_norm(
    *tensors: Tensor, seed: Tensor | None, lengths: Tensor | None, dropout: float, eps: float
) -> Tensor:
    """``LN(x + Drop(W a + b))`` of x [.., D], a [.., H·d], W, b, and LayerNorm's weight and bias.

    Args:
        tensors: the six, x and a of two or three dimensions.
        seed: [], int64, of the dropout mask; None where nothing is dropped.
        lengths: [B], of padded x [B, N, D].
        dropout: the probability of an element of W a + b to be dropped.
        eps: added to LayerNorm's variance.
    """
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _op(*tensors, seed, lengths, dropout, eps, keep)[0]


def fused_attention_layernorm(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *weights: Tensor,
    dropout: float = 0.0,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """``neuroexapt.functional.fused_attention_layernorm``, differentiable once.

    The same input gives the same bits, but for gradients of long sequences without padding, whose attention
    is PyTorch's.
    """
    lengths, offsets, max_length = place_of(x, lengths, offsets, max_length)
    if lengths is None and offsets is None and max_length >= _LONG:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    else:
        attended = causal_attention(query, key, value, lengths, offsets, max_length)
    seed = torch.randint(2**62, (), device=x.device) if dropout else None
    return project_add_norm(
        x, attended.flatten(-2), *weights, seed=seed, lengths=lengths, dropout=dropout, eps=eps
    )


def supports(
    x: Tensor, query: Tensor, *others: Tensor, offsets: Tensor | None = None, **options: object
) -> Support:
    """Whether the kernels take these arguments."""
    tensors = query, *others
    if any(tensor.dtype != x.dtype for tensor in tensors) or x.dtype not in _DTYPES:
        return Support(False, "dtypes other than one of fp32, fp16, bf16 for all")
    if any(tensor.device != x.device for tensor in tensors):
        return Support(False, "operands on several devices")
    if x.shape[-1] > _MAX_WIDTH or query.shape[-1] > _MAX_HEAD:
        return Support(False, f"more than {_MAX_WIDTH} features, or more than {_MAX_HEAD} in a head")
    if sequence_count(query, offsets) * query.shape[-2] > MOST_PROGRAMS:
        return Support(False, f"more than {MOST_PROGRAMS} heads in all sequences")
    return Support(True)


register_impl("fused_attention_layernorm", "triton", fused_attention_layernorm, supports)
