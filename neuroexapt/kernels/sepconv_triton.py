"""Separable convolution in Triton: relu → depthwise → pointwise, forward and backward.

Shapes: B batch, C channels in, O channels out, H x W picture in, OH x OW picture out, k kernel size,
P = B·OH·OW output pixels. Tiles are [BLOCK_O or BLOCK_C, BLOCK_P]: channels by flat output pixels.
Sums are taken in fp32 whatever the dtype; offsets are 64 bits wide.

Why it is built this way (B = 64; C = 16, 32, 64 at 32, 16, 8 pixels; k = 5; fp32):

- x holds 4.2, 2.1, 1.0 MB: it stays in L2, and the 2·C·(k² + O) FLOP a pixel are below 2 µs of a Hopper
  chip. What costs is the k² loads an element that Triton cannot share between threads (26 M loads
  at C = 16, about 5 µs), the launches, and in PyTorch the depthwise weight gradient (50 µs).
- Forward is one launch: a tile of depthwise outputs goes from registers into the pointwise product.
- Backward is three. ``bwd_pointwise`` recomputes the depthwise tile for ``dW_pw = dy · dᵀ`` and writes
  ``e = W_pwᵀ · dy``, which needs a halo of its neighbours and therefore a trip through L2.
  ``bwd_depthwise`` loads each shifted ``e`` once for both ``dx`` and ``dW_dw``; a thread owns one pixel and
  keeps all k² taps in registers, so that nothing is summed across threads until its last tile.
  ``bwd_reduce`` adds the partial weight gradients. Their number depends on shapes alone and the order of
  addition is fixed: the same input gives the same bits.
- Only the inputs are saved. Recomputing the depthwise output costs one more forward stage and
  saves a tensor as large as x.
- fp32 products run on the tensor cores: as three TF32 products (error near 2e-7), or one (2.5e-4) where
  PyTorch's own convolutions may do that. An IEEE ``tl.dot`` spills at 64 channels.

A thread's loads coalesce across its warp because the flat pixel is the fastest tile axis. Picture sizes
are not specialised: told that a width is a multiple of 16, Triton gives a thread four neighbouring pixels,
and the shifted loads, never aligned, then touch four times as many cache lines.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.kernels import sepconv as shared
from neuroexapt.kernels.moments_triton import merge_moments, store_moments
from neuroexapt.kernels.registration import define
from neuroexapt.kernels.sizes import ceil_div

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REDUCE = {"BLOCK_S": 128, "BLOCK": 8}


@triton.jit
def pixel_of(index, height, width):
    """Flat pixel index → (image, row, column)."""
    row = index // width
    return row // height, row % height, index % width


@triton.jit
def pixel_offsets(image, row, column, stride_n, stride_h, stride_w):
    """Offsets of pixels, [BLOCK_P], hinted so that neighbouring threads of a tile get neighbouring pixels.

    The hint only chooses the tile's fastest axis: across the end of a row it is not true, but every access
    is masked pixel by pixel, which keeps Triton from joining two of them.
    """
    offsets = image.to(tl.int64) * stride_n + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    return tl.max_contiguous(offsets, 2)


@triton.jit
def depthwise_tile(
    x_ptr, x_n, x_c, x_h, x_w, dw_ptr, channel, pixel, channels, pixels, height, width, out_height, out_width,
    K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, RELU: tl.constexpr,
    mean=None, NORMED: tl.constexpr = False,
):  # fmt: skip
    """Depthwise outputs at ``channel`` x ``pixel`` in fp32, zero outside: [BLOCK_C, BLOCK_P].

    NORMED: of relu(x - mean), ``mean``: [BLOCK_C].
    """
    PAD: tl.constexpr = DILATION * (K // 2)
    image, out_row, out_column = pixel_of(pixel, out_height, out_width)
    top, left = out_row * STRIDE - PAD, out_column * STRIDE - PAD
    corner = pixel_offsets(image, top, left, x_n, x_h, x_w)
    x_tile = x_ptr + channel.to(tl.int64)[:, None] * x_c + corner[None, :]  # [BLOCK_C, BLOCK_P]
    row_step, column_step = tl.cast(x_h, tl.int64) * DILATION, x_w * DILATION
    in_channels = channel < channels
    total = tl.zeros([channel.shape[0], pixel.shape[0]], tl.float32)
    for ky in range(K):
        row = top + ky * DILATION
        x_row = x_tile + ky * row_step  # apart from the columns, whose distances are known when compiling
        in_rows = (pixel < pixels) & (row >= 0) & (row < height)
        for kx in tl.static_range(K):
            column = left + kx * DILATION
            inside = in_rows & (column >= 0) & (column < width)
            value = tl.load(
                x_row + kx * column_step,
                mask=in_channels[:, None] & inside[None, :],
                other=float("-inf") if NORMED else 0.0,
            ).to(tl.float32)
            if NORMED:
                value -= mean[:, None]
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            weight = tl.load(dw_ptr + channel * (K * K) + (ky * K + kx), mask=in_channels, other=0.0)
            total += value * weight.to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def sepconv_fwd_kernel(
    x_ptr, x_n, x_c, x_h, x_w, dw_ptr, pw_ptr, y_ptr, y_n, y_c, y_h, y_w, stats_ptr,
    pixels, height, width, out_height, out_width,
    C: tl.constexpr, C_OUT: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    RELU: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of y, and with STATS its (mean, M2) over the tile's pixels into stats [tiles, 2, O].

    Grid: (tiles of pixels, blocks of output channels).
    """
    tile = tl.program_id(0)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    out_channel = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O, BLOCK_P], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        depthwise = depthwise_tile(
            x_ptr, x_n, x_c, x_h, x_w, dw_ptr, channel, pixel, C, pixels,
            height, width, out_height, out_width, K, STRIDE, DILATION, RELU,
        )  # fmt: skip
        weight = tl.load(
            pw_ptr + out_channel[:, None] * C + channel[None, :],
            mask=(out_channel < C_OUT)[:, None] & (channel < C)[None, :],
            other=0.0,
        )  # [BLOCK_O, BLOCK_C]
        total = tl.dot(weight, depthwise.to(weight.dtype), total, input_precision=PRECISION)

    image, row, column = pixel_of(pixel, out_height, out_width)
    y_tile = (
        y_ptr
        + out_channel.to(tl.int64)[:, None] * y_c
        + pixel_offsets(image, row, column, y_n, y_h, y_w)[None, :]
    )
    valid = (out_channel < C_OUT)[:, None] & (pixel < pixels)[None, :]
    tl.store(y_tile, total, mask=valid)
    if STATS:
        count = tl.minimum(pixels - tile * BLOCK_P, BLOCK_P)
        store_moments(stats_ptr + tile.to(tl.int64) * (2 * C_OUT), out_channel, total, valid, count, C_OUT)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def sepconv_stats_kernel(
    stats_ptr, mean_ptr, var_ptr, pixels, tiles,
    C_OUT: tl.constexpr, TILE_PIXELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Merge the tiles' (mean, M2) → mean and biased variance, [O]."""
    out_channel = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    mean, m2 = merge_moments(stats_ptr, out_channel, C_OUT, pixels, tiles, TILE_PIXELS, BLOCK_T)
    tl.store(mean_ptr + out_channel, mean, mask=out_channel < C_OUT)
    tl.store(var_ptr + out_channel, m2 / pixels, mask=out_channel < C_OUT)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def sepconv_bwd_pointwise_kernel(
    dy_ptr, dy_n, dy_c, dy_h, dy_w, x_ptr, x_n, x_c, x_h, x_w, dw_ptr, pw_ptr, e_ptr, partial_ptr,
    pixels, height, width, out_height, out_width,
    C: tl.constexpr, C_OUT: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    RELU: tl.constexpr, NEED_E: tl.constexpr, NEED_PW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``e = W_pwᵀ · dy`` [B, C, OH, OW], and partial sums of ``dW_pw = dy · dᵀ`` [splits, O, C].

    Grid: (splits of the pixels, blocks of C, blocks of O); the programs of the first block of O write e.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_channel = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    weight_grad = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for tile in range(split, tl.cdiv(pixels, BLOCK_P), splits):
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        image, row, column = pixel_of(pixel, out_height, out_width)
        dy_pixel = dy_ptr + pixel_offsets(image, row, column, dy_n, dy_h, dy_w)[None, :]
        if NEED_PW:
            dy = tl.load(
                dy_pixel + out_channel.to(tl.int64)[:, None] * dy_c,
                mask=(out_channel < C_OUT)[:, None] & (pixel < pixels)[None, :],
                other=0.0,
            )  # [BLOCK_O, BLOCK_P]
            depthwise = depthwise_tile(
                x_ptr, x_n, x_c, x_h, x_w, dw_ptr, channel, pixel, C, pixels,
                height, width, out_height, out_width, K, STRIDE, DILATION, RELU,
            )  # fmt: skip
            weight_grad = tl.dot(dy, tl.trans(depthwise.to(dy.dtype)), weight_grad, input_precision=PRECISION)
        if NEED_E and tl.program_id(2) == 0:
            e = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
            for first in range(0, C_OUT, BLOCK_O):
                o = first + tl.arange(0, BLOCK_O)
                weight = tl.load(
                    pw_ptr + channel[:, None] + o[None, :] * C,
                    mask=(channel < C)[:, None] & (o < C_OUT)[None, :],
                    other=0.0,
                )  # [BLOCK_C, BLOCK_O]
                dy = tl.load(
                    dy_pixel + o.to(tl.int64)[:, None] * dy_c,
                    mask=(o < C_OUT)[:, None] & (pixel < pixels)[None, :],
                    other=0.0,
                )  # [BLOCK_O, BLOCK_P]
                e = tl.dot(weight, dy, e, input_precision=PRECISION)
            plane = tl.cast(out_height * out_width, tl.int64)
            e_tile = e_ptr + pixel_offsets(image, row, column, C * plane, out_width, 1)[None, :]
            e_tile += channel[:, None] * plane
            tl.store(e_tile, e, mask=(channel < C)[:, None] & (pixel < pixels)[None, :])
    if NEED_PW:
        tl.store(
            partial_ptr + (split.to(tl.int64) * C_OUT + out_channel)[:, None] * C + channel[None, :],
            weight_grad,
            mask=(out_channel < C_OUT)[:, None] & (channel < C)[None, :],
        )


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def sepconv_bwd_depthwise_kernel(
    e_ptr, x_ptr, x_n, x_c, x_h, x_w, dw_ptr, dx_ptr, dx_n, dx_c, dx_h, dx_w, partial_ptr,
    pixels, height, width, out_height, out_width,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, RELU: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``dx`` and partial sums of ``dW_dw`` [splits, C, k²] from e; ``pixels`` counts input pixels here.

    Grid: (C, splits of the pixels). TAPS is k² rounded up to a power of two, and BLOCK_P the number of
    threads: each thread holds one pixel and every tap, so sums over taps stay inside it.
    """
    PAD: tl.constexpr = DILATION * (K // 2)
    channel = tl.program_id(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    tap = tl.arange(0, TAPS)
    shift_row, shift_column = PAD - tap // K * DILATION, PAD - tap % K * DILATION
    weight = tl.load(dw_ptr + channel * (K * K) + tap, mask=tap < K * K, other=0.0).to(tl.float32)
    products = tl.zeros([TAPS, BLOCK_P], tl.float32)
    for tile in range(split, tl.cdiv(pixels, BLOCK_P), splits):
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        valid = pixel < pixels
        image, row, column = pixel_of(pixel, height, width)
        # Output pixel (row_s / STRIDE, column_s / STRIDE) reads input pixel (row, column) through the tap.
        row_s = row[None, :] + shift_row[:, None]
        column_s = column[None, :] + shift_column[:, None]
        inside = (
            (row_s >= 0) & (row_s < out_height * STRIDE) & (column_s >= 0) & (column_s < out_width * STRIDE)
        )
        on_grid = (row_s % STRIDE == 0) & (column_s % STRIDE == 0)
        plane = e_ptr + (image.to(tl.int64) * C + channel) * (out_height * out_width)
        e_pixel = plane[None, :] + (row_s // STRIDE * out_width + column_s // STRIDE)
        e = tl.load(
            tl.max_contiguous(e_pixel, [1, 2]),
            mask=inside & on_grid & (tap < K * K)[:, None] & valid[None, :],
            other=0.0,
        ).to(tl.float32)  # [TAPS, BLOCK_P]
        channel_offset = channel.to(tl.int64)
        x = tl.load(
            x_ptr + channel_offset * x_c + pixel_offsets(image, row, column, x_n, x_h, x_w),
            mask=valid,
            other=0.0,
        ).to(tl.float32)
        if NEED_DW:
            if RELU:
                products += e * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)[None, :]
            else:
                products += e * x[None, :]
        if NEED_DX:
            dx = tl.sum(e * weight[:, None], 0)
            if RELU:
                dx = tl.where(x <= 0, 0.0, dx)
            tl.store(
                dx_ptr + channel_offset * dx_c + pixel_offsets(image, row, column, dx_n, dx_h, dx_w),
                dx,
                mask=valid,
            )
    if NEED_DW:
        partial = partial_ptr + (split.to(tl.int64) * C + channel) * (K * K) + tap
        tl.store(partial, tl.sum(products, 1), mask=tap < K * K)


@triton.jit
def _sum_partials(
    partial_ptr, out_ptr, block, splits, SIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):
    """``out[i] = Σ_split partial[split, i]`` for the i of one block, in an order that SIZE and splits fix."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        total += tl.load(
            partial_ptr + split.to(tl.int64)[:, None] * SIZE + i[None, :],
            mask=(split < splits)[:, None] & (i < SIZE)[None, :],
            other=0.0,
        )
    tl.store(out_ptr + i, tl.sum(total, 0), mask=i < SIZE)


@triton.jit(do_not_specialize=["pw_splits", "dw_splits"])
def sepconv_bwd_reduce_kernel(
    pw_partial_ptr, pw_grad_ptr, pw_splits, dw_partial_ptr, dw_grad_ptr, dw_splits,
    PW_SIZE: tl.constexpr, DW_SIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both weight gradients from their partial sums; a SIZE of zero leaves that gradient out."""
    PW_BLOCKS: tl.constexpr = (PW_SIZE + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    if block < PW_BLOCKS:
        _sum_partials(pw_partial_ptr, pw_grad_ptr, block, pw_splits, PW_SIZE, BLOCK_S, BLOCK)
    else:
        _sum_partials(dw_partial_ptr, dw_grad_ptr, block - PW_BLOCKS, dw_splits, DW_SIZE, BLOCK_S, BLOCK)


def _forward(call: shared.Call, y: Tensor, stats: Tensor | None = None) -> None:
    x, depthwise_weight, pointwise_weight, stride, dilation, relu = call
    grid, blocks = _forward_plan(y.shape, x.shape[1])
    with torch.cuda.device_of(x):
        sepconv_fwd_kernel[grid](
            x, *x.stride(), depthwise_weight.contiguous(), pointwise_weight.contiguous(), y, *y.stride(),
            stats, _pixels(y.shape), *x.shape[2:], *y.shape[2:], C=x.shape[1], C_OUT=y.shape[1],
            K=call.kernel_size, STRIDE=stride, DILATION=dilation, RELU=relu,
            STATS=stats is not None, PRECISION=_precision(), **blocks,
        )  # fmt: skip


def _backward(call: shared.Call, dy: Tensor, grads: shared.Grads, needed: list[bool]) -> None:
    x, stride, dilation, relu = call.x, call.stride, call.dilation, call.relu
    dx, depthwise_grad, pointwise_grad = grads
    need_dx, need_dw, need_pw = needed
    depthwise_weight, pointwise_weight = (weight.contiguous() for weight in call[1:3])
    channels, out_channels, kernel_size = x.shape[1], dy.shape[1], call.kernel_size
    shape = (*x.shape[2:], *dy.shape[2:])
    conv = {"C": channels, "K": kernel_size, "STRIDE": stride, "DILATION": dilation, "RELU": relu}
    pw_splits, pw_grid, pw_blocks = _backward_pointwise_plan(dy.shape, channels)
    dw_splits, dw_grid, dw_blocks = _backward_depthwise_plan(x.shape, kernel_size)
    need_e = need_dx or need_dw
    e = x.new_empty(dy.shape[0], channels, *dy.shape[2:]) if need_e else x.new_empty(0)
    pw_partial = x.new_empty(pw_splits if need_pw else 0, out_channels, channels, dtype=torch.float32)
    dw_partial = x.new_empty(dw_splits if need_dw else 0, channels, kernel_size**2, dtype=torch.float32)
    with torch.cuda.device_of(x):
        sepconv_bwd_pointwise_kernel[pw_grid](
            dy, *dy.stride(), x, *x.stride(), depthwise_weight, pointwise_weight, e, pw_partial,
            _pixels(dy.shape), *shape, C_OUT=out_channels, NEED_E=need_e, NEED_PW=need_pw,
            PRECISION=_precision(), **conv, **pw_blocks,
        )  # fmt: skip
        if need_e:
            sepconv_bwd_depthwise_kernel[dw_grid](
                e, x, *x.stride(), depthwise_weight, dx, *(dx if need_dx else x).stride(), dw_partial,
                _pixels(x.shape), *shape, NEED_DX=need_dx, NEED_DW=need_dw, **conv, **dw_blocks,
            )  # fmt: skip
        sizes = pointwise_grad.numel(), depthwise_grad.numel()
        if any(sizes):
            sepconv_bwd_reduce_kernel[sum(ceil_div(size, _REDUCE["BLOCK"]) for size in sizes),](
                pw_partial, pointwise_grad, pw_splits, dw_partial, depthwise_grad, dw_splits,
                PW_SIZE=sizes[0], DW_SIZE=sizes[1], **_REDUCE,
            )  # fmt: skip


def _forward_with_stats(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    call = shared.Call(*arguments)
    y, mean, var = _empty_with_stats(*arguments)
    pixels, out_channels = _pixels(y.shape), y.shape[1]
    (tiles, _), blocks = _forward_plan(y.shape, call.x.shape[1])
    stats = y.new_empty(tiles, 2, out_channels, dtype=torch.float32)
    _forward(call, y, stats)
    with torch.cuda.device_of(y):
        sepconv_stats_kernel[ceil_div(out_channels, 16),](
            stats, mean, var, pixels, tiles, C_OUT=out_channels, TILE_PIXELS=blocks["BLOCK_P"],
            BLOCK_T=128, BLOCK_O=16,
        )  # fmt: skip
    return y, mean, var


def _empty_with_stats(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    y = shared.Call(*arguments).empty_output()
    mean, var = (y.new_empty(y.shape[1], dtype=torch.float32) for _ in range(2))
    return y, mean, var


sepconv, _backward_op = shared.define_op("triton", _forward, _backward)
_with_stats_op = define(
    f"sepconv_with_stats({shared.ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _forward_with_stats,
    _empty_with_stats,
)
shared.differentiate(_with_stats_op, _backward_op)


def sepconv_with_stats(
    *tensors: Any, stride: int = 1, dilation: int = 1, relu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """``sepconv`` and, from the same pass, the batch statistics that a BatchNorm after it needs.

    Args:
        tensors: x, depthwise_weight and pointwise_weight, and the options, as ``sepconv`` takes them.

    Returns:
        y as ``sepconv`` gives it, and the mean and the biased variance of each of its channels over
        batch, height and width: [O] in fp32, taken before y is rounded to its dtype, exact also where
        the mean is large (Chan et al., 1979). They carry no gradient: BatchNorm's backward formula
        already accounts for them.
    """
    x, depthwise_weight, pointwise_weight = tensors
    inputs = shared.checked(x, depthwise_weight, pointwise_weight, stride, dilation)
    return _with_stats_op(*inputs, stride, dilation, relu)


def _takes(call: shared.Call, dtypes: set[torch.dtype]) -> Support:
    x, stride, dilation = call.x, call.stride, call.dilation
    if not x.is_cuda:
        return Support(False, f"Triton kernels need a CUDA tensor, x is on {x.device}")
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return Support(False, f"dtypes {sorted(map(str, dtypes))} are not one of fp32, fp16, bf16")
    if call.kernel_size not in shared.KERNEL_SIZES or stride not in (1, 2) or dilation not in (1, 2):
        return Support(False, f"kernel size {call.kernel_size}, stride {stride}, dilation {dilation}")
    if _pixels(x.shape) >= 2**30:
        return Support(False, "2^30 pixels or more in a batch")
    return Support(True)


def _pixels(shape: torch.Size) -> int:
    return shape[0] * shape[2] * shape[3]


def _precision() -> str:
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if convolutions.fp32_precision == "tf32" else "tf32x3"


@functools.cache
def _forward_plan(y: torch.Size, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and blocks, measured best or near it at 16, 32 and 64 channels: up to 64 channels at once."""
    blocks = {
        "BLOCK_C": min(max(16, triton.next_power_of_2(channels)), 64),
        "BLOCK_O": _out_block(y[1]),
        "BLOCK_P": _pixel_block(_pixels(y), largest=64),
        "num_warps": 4,
        "num_stages": 1,
    }
    return (ceil_div(_pixels(y), blocks["BLOCK_P"]), ceil_div(y[1], blocks["BLOCK_O"])), blocks


@functools.cache
def _backward_pointwise_plan(
    dy: torch.Size, channels: int
) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Number of splits, grid and blocks; other blocks or warps were measured up to three times slower."""
    block_o = _out_block(dy[1])
    blocks = {
        "BLOCK_C": 16,
        "BLOCK_O": block_o,
        "BLOCK_P": _pixel_block(_pixels(dy), largest=32),  # 64 would spill beside the sums of dW_pw
        "num_warps": 2 if block_o <= 32 else 4,
        "num_stages": 1,
    }
    c_blocks, o_blocks = ceil_div(channels, blocks["BLOCK_C"]), ceil_div(dy[1], block_o)
    splits = _splits(ceil_div(_pixels(dy), blocks["BLOCK_P"]), c_blocks * o_blocks)
    return splits, (splits, c_blocks, o_blocks), blocks


@functools.cache
def _backward_depthwise_plan(x: torch.Size, kernel_size: int) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Number of splits, grid and blocks."""
    num_warps = 4
    block_p = 32 * num_warps
    splits = _splits(ceil_div(_pixels(x), block_p), x[1])
    blocks = {"TAPS": triton.next_power_of_2(kernel_size**2), "BLOCK_P": block_p, "num_warps": num_warps}
    return splits, (x[1], splits), blocks


def _pixel_block(pixels: int, largest: int) -> int:
    """``largest``, halved while that leaves most of 132 multiprocessors without a program."""
    block = largest
    while block > 16 and pixels // block < 128:
        block //= 2
    return block


def _out_block(out_channels: int) -> int:
    """A power of two; ``tl.dot`` needs 16, and more than 128 sums by 64 pixels do not fit in registers."""
    return min(max(16, triton.next_power_of_2(out_channels)), 128)


def _splits(tiles: int, blocks: int) -> int:
    """Into how many parts the tiles go so that about 512 programs run; it depends on shapes alone."""
    return max(1, min(tiles, 512 // blocks))


supports = shared.supports_if(_takes)
register_impl("sepconv", "triton", sepconv, supports)
