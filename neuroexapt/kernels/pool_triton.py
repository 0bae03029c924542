"""Average, maximum and global average pooling in Triton, forward and backward.

Shapes: B batch, C channels, H x W picture in, OH x OW picture out, k kernel size; padding ``k // 2``.
Tiles are [BLOCK_C, BLOCK_P]: channels by pixels of one image. Sums are taken in fp32; offsets are 64
bits wide.

Why it is built this way: a pool at 16 channels of 32 x 32 pixels and batch 64 reads and writes 8.4 MB, all of
it in L2, so instructions cost and not bytes. Divisions and bounds are therefore worked out once a
pixel and shared by the tile's channels. Backward gathers: each input pixel asks the k² windows that cover it,
so nothing is added atomically and the same input gives the same bits. The maximum's forward keeps every
window's winner in one byte where a gradient will be asked for, and then need not keep x (PyTorch keeps
eight bytes): deciding it anew for each of the k² pixels that ask would read k⁴ values, and recomputing
the winners first took a third of the time.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.errors import UserError
from neuroexapt.kernels.registration import define, differentiable_once, set_autograd

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNEL_SIZES = (3, 5, 7)


@triton.jit
def tile(channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """This program's image, its channels [BLOCK_C] and its pixels [BLOCK_P]; grid: see ``_grid``."""
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    pixel = tl.program_id(0) % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return image, channel, pixel


@triton.jit
def _at_channels(ptr, image, channel, stride_n, stride_c):
    """Pointers to the channels' planes: [BLOCK_C, 1]."""
    return (ptr + image * stride_n) + (channel.to(tl.int64) * stride_c)[:, None]


@triton.jit
def _in_plane(row, column, stride_h, stride_w):
    """Offsets of pixels in their plane, [1, BLOCK_P], hinted so that neighbouring threads get neighbours.

    The hint only chooses the tile's fastest axis: across the end of a row it is not true, but every access
    is masked pixel by pixel, which keeps Triton from joining two of them.
    """
    return tl.max_contiguous(row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w, 2)[None, :]


@triton.jit
def pixels_inside(first, size, K: tl.constexpr):
    """How many of the K pixels from ``first`` on lie inside ``size``; beyond the picture, 1."""
    return tl.maximum(tl.minimum(first + K, size) - tl.maximum(first, 0), 1)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def pool_fwd_kernel(
    x_ptr, x_n, x_c, x_h, x_w, y_ptr, y_n, y_c, y_h, y_w, winner_ptr, channels, height, width,
    out_height, out_width, K: tl.constexpr, STRIDE: tl.constexpr, MAX: tl.constexpr, WINNER: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y: the windows' average or their maximum (MAX); with WINNER also the number of the maximum's tap."""
    image, channel, pixel = tile(channels, out_height * out_width, BLOCK_C, BLOCK_P)
    row, column = pixel // out_width, pixel % out_width
    top, left = row * STRIDE - K // 2, column * STRIDE - K // 2
    valid = (channel < channels)[:, None] & (row < out_height)[None, :]
    x_tile = _at_channels(x_ptr, image, channel, x_n, x_c) + _in_plane(top, left, x_h, x_w)
    if MAX:
        result = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
    else:
        result = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    if WINNER:
        first_inside = tl.maximum(-top, 0) * K + tl.maximum(-left, 0)
        winner = tl.broadcast_to(first_inside[None, :], [BLOCK_C, BLOCK_P])
    for ky in tl.static_range(K):
        in_row = (top + ky >= 0) & (top + ky < height)
        for kx in tl.static_range(K):
            inside = in_row & (left + kx >= 0) & (left + kx < width)
            value = tl.load(
                x_tile + (tl.cast(x_h, tl.int64) * ky + tl.cast(x_w, tl.int64) * kx),
                mask=valid & inside[None, :],
                other=float("-inf") if MAX else 0.0,
            ).to(tl.float32)
            if WINNER:
                # As in PyTorch: the first of equal values wins, and so does the last NaN.
                winner = tl.where((value > result) | (value != value), ky * K + kx, winner)
            if MAX:
                result = tl.maximum(result, value, propagate_nan=tl.PropagateNan.ALL)
            else:
                result += value
    if not MAX:
        result /= (pixels_inside(top, height, K) * pixels_inside(left, width, K))[None, :].to(tl.float32)
    y_tile = _at_channels(y_ptr, image, channel, y_n, y_c) + _in_plane(row, column, y_h, y_w)
    tl.store(y_tile, result, mask=valid)
    if WINNER:
        winner_tile = _at_channels(winner_ptr, image, channel, y_n, y_c) + _in_plane(row, column, y_h, y_w)
        tl.store(winner_tile, winner.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def pool_bwd_kernel(
    dy_ptr, dy_n, dy_c, dy_h, dy_w, winner_ptr, winner_n, winner_c, winner_h, winner_w,
    dx_ptr, dx_n, dx_c, dx_h, dx_w, channels, height, width, out_height, out_width,
    K: tl.constexpr, STRIDE: tl.constexpr, MAX: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx of the average, or of the maximum from the ``winner`` taps; the tile's pixels are those of dx."""
    image, channel, pixel = tile(channels, height * width, BLOCK_C, BLOCK_P)
    row, column = pixel // width, pixel % width
    valid = (channel < channels)[:, None] & (row < height)[None, :]
    dy_planes = _at_channels(dy_ptr, image, channel, dy_n, dy_c)
    if MAX:
        winner_planes = _at_channels(winner_ptr, image, channel, winner_n, winner_c)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for ky in tl.static_range(K):
        # The window of output pixel row_s / STRIDE covers this row with its tap ky.
        row_s = row + K // 2 - ky
        out_row = row_s // STRIDE
        in_row = (row_s >= 0) & (row_s % STRIDE == 0) & (out_row < out_height)
        for kx in tl.static_range(K):
            column_s = column + K // 2 - kx
            out_column = column_s // STRIDE
            inside = in_row & (column_s >= 0) & (column_s % STRIDE == 0) & (out_column < out_width)
            mask = valid & inside[None, :]
            dy = tl.load(dy_planes + _in_plane(out_row, out_column, dy_h, dy_w), mask=mask, other=0.0).to(
                tl.float32
            )
            if MAX:
                winner = tl.load(
                    winner_planes + _in_plane(out_row, out_column, winner_h, winner_w), mask=mask, other=K * K
                )
                total += tl.where(winner == ky * K + kx, dy, 0.0)
            else:
                rows = pixels_inside(row_s - K // 2, height, K)
                columns = pixels_inside(column_s - K // 2, width, K)
                total += dy * (1.0 / (rows * columns).to(tl.float32))[None, :]
    dx_tile = _at_channels(dx_ptr, image, channel, dx_n, dx_c) + _in_plane(row, column, dx_h, dx_w)
    tl.store(dx_tile, total, mask=valid)


@triton.jit(do_not_specialize=["height", "width"])
def global_avg_pool_fwd_kernel(
    x_ptr, x_n, x_c, x_h, x_w, y_ptr, channels, height, width, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """y [B, C], the mean of each plane. Grid: (B, blocks of C)."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    planes = _at_channels(x_ptr, image, channel, x_n, x_c)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, height * width, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        row, column = pixel // width, pixel % width
        mask = (channel < channels)[:, None] & (row < height)[None, :]
        total += tl.load(planes + _in_plane(row, column, x_h, x_w), mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / (height * width)
    tl.store(y_ptr + image * channels + channel, mean, mask=channel < channels)


def avg_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Average over the window's pixels inside the picture (padding ``k // 2``, not counted).

    Args:
        x: [B, C, H, W] in fp32, fp16 or bf16, any strides; autocast leaves its dtype alone.
        kernel_size: k, one of 3, 5, 7.
        stride: 1 or 2.

    Returns:
        [B, C, ceil(H / stride), ceil(W / stride)] of x's dtype, channels_last where x is.

    Raises:
        UserError: x has not four dimensions, or a value is not among those above.
    """
    _check(x, kernel_size, stride)
    return _avg_pool(x, kernel_size, stride)


def max_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Maximum over the window (padding ``k // 2``); the first maximum takes the gradient, NaN wins.

    Shapes, dtypes and errors are those of ``avg_pool``.
    """
    _check(x, kernel_size, stride)
    keep_winner = x.requires_grad and torch.is_grad_enabled()
    return _max_pool(x, kernel_size, stride, keep_winner)[0]


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over height and width: [B, C, H, W] in fp32, fp16 or bf16, any strides → [B, C, 1, 1]."""
    _check(x)
    return _global_avg_pool(x)


def supports(x: Tensor, kernel_size: int = 3, stride: int = 1) -> Support:
    """Whether the kernels take these arguments."""
    if not x.is_cuda:
        return Support(False, f"Triton kernels need a CUDA tensor, x is on {x.device}")
    if x.dtype not in _DTYPES:
        return Support(False, f"dtype {x.dtype} is not one of fp32, fp16, bf16")
    if x.dim() != 4 or kernel_size not in _KERNEL_SIZES or stride not in (1, 2):
        return Support(False, f"{x.dim()} dimensions, kernel size {kernel_size}, stride {stride}")
    return Support(True)


def _check(x: Tensor, kernel_size: int = 3, stride: int = 1) -> None:
    if x.dim() != 4:
        raise UserError(f"pooling needs x of shape [B, C, H, W], got {list(x.shape)}")
    if kernel_size not in _KERNEL_SIZES or stride not in (1, 2):
        raise UserError(
            "pooling takes kernel sizes 3, 5, 7 and strides 1, 2, "
            f"got kernel size {kernel_size}, stride {stride}"
        )


def _forward_average(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    y = _empty_pooled(x, stride)
    _launch_forward(x, y, None, K=kernel_size, STRIDE=stride, MAX=False, WINNER=False)
    return y


def _backward_average(dy: Tensor, height: int, width: int, kernel_size: int, stride: int) -> Tensor:
    dx = _empty_like_layout(dy, height, width, dy.dtype)
    _launch_backward(dy, None, dx, K=kernel_size, STRIDE=stride, MAX=False)
    return dx


def _forward_maximum(x: Tensor, kernel_size: int, stride: int, keep_winner: bool) -> tuple[Tensor, Tensor]:
    """The maximum and, where wanted, the number of its tap in the window as a byte, else an empty tensor."""
    y, winner = _empty_maximum(x, stride, keep_winner)
    _launch_forward(x, y, winner, K=kernel_size, STRIDE=stride, MAX=True, WINNER=keep_winner)
    return y, winner


def _backward_maximum(
    dy: Tensor, winner: Tensor, height: int, width: int, kernel_size: int, stride: int
) -> Tensor:
    dx = _empty_like_layout(winner, height, width, dy.dtype)
    _launch_backward(dy, winner, dx, K=kernel_size, STRIDE=stride, MAX=True)
    return dx


def _forward_mean(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, channels, 1, 1)
    if y.numel():
        blocks = _blocks(channels, height * width, largest=1024)
        with torch.cuda.device_of(x):
            global_avg_pool_fwd_kernel[batch, -(-channels // blocks["BLOCK_C"])](
                x, *x.stride(), y, channels, height, width, **blocks
            )
    return y


_avg_pool = define(
    "avg_pool(Tensor x, int kernel_size, int stride) -> Tensor",
    _forward_average,
    lambda x, kernel_size, stride: _empty_pooled(x, stride),
)
_avg_pool_backward = define(
    "avg_pool_backward(Tensor dy, int height, int width, int kernel_size, int stride) -> Tensor",
    _backward_average,
    lambda dy, height, width, *_window: _empty_like_layout(dy, height, width, dy.dtype),
)
_max_pool = define(
    "max_pool(Tensor x, int kernel_size, int stride, bool keep_winner) -> (Tensor, Tensor)",
    _forward_maximum,
    lambda x, kernel_size, stride, keep_winner: _empty_maximum(x, stride, keep_winner),
)
_max_pool_backward = define(
    "max_pool_backward"
    "(Tensor dy, Tensor winner, int height, int width, int kernel_size, int stride) -> Tensor",
    _backward_maximum,
    lambda dy, winner, height, width, *_window: _empty_like_layout(winner, height, width, dy.dtype),
)
_global_avg_pool = define(
    "global_avg_pool(Tensor x) -> Tensor", _forward_mean, lambda x: x.new_empty(*x.shape[:2], 1, 1)
)


def _save_shape(ctx, arguments: tuple, _results: Any) -> None:
    ctx.picture = arguments[0].shape[2:]
    ctx.window = arguments[1:3]


def _save_winner(ctx, arguments: tuple, results: tuple[Tensor, Tensor]) -> None:
    _save_shape(ctx, arguments, results)
    ctx.save_for_backward(results[1])


def _differentiate_average(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _avg_pool_backward(dy, *ctx.picture, *ctx.window), None, None


def _differentiate_maximum(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _max_pool_backward(dy, *ctx.saved_tensors, *ctx.picture, *ctx.window), None, None, None


def _differentiate_mean(ctx, dy: Tensor) -> Tensor:
    return (dy / ctx.picture.numel()).expand(-1, -1, *ctx.picture)


set_autograd(_avg_pool, differentiable_once(_avg_pool, _save_shape, _differentiate_average))
set_autograd(_max_pool, differentiable_once(_max_pool, _save_winner, _differentiate_maximum))
set_autograd(_global_avg_pool, differentiable_once(_global_avg_pool, _save_shape, _differentiate_mean))


def _launch_forward(x: Tensor, y: Tensor, winner: Tensor | None, **flags: int) -> None:
    if y.numel():
        grid, blocks = _grid(y.shape)
        with torch.cuda.device_of(x):
            pool_fwd_kernel[grid](
                x, *x.stride(), y, *y.stride(), winner, x.shape[1], *x.shape[2:], *y.shape[2:],
                **flags, **blocks,
            )  # fmt: skip


def _launch_backward(dy: Tensor, winner: Tensor | None, dx: Tensor, **flags: int) -> None:
    if dx.numel():
        grid, blocks = _grid(dx.shape)
        with torch.cuda.device_of(dx):
            pool_bwd_kernel[grid](
                dy, *dy.stride(), winner, *(dy if winner is None else winner).stride(), dx, *dx.stride(),
                dx.shape[1], *dx.shape[2:], *dy.shape[2:], **flags, **blocks,
            )  # fmt: skip


@functools.cache
def _grid(y: torch.Size) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (images x blocks of pixels, blocks of channels) and block sizes for tiles over a tensor."""
    batch, channels, height, width = y
    blocks = _blocks(channels, height * width)
    pixel_blocks = triton.cdiv(height * width, blocks["BLOCK_P"])
    return (batch * pixel_blocks, triton.cdiv(channels, blocks["BLOCK_C"])), blocks


@functools.cache
def _blocks(channels: int, pixels: int, largest: int = 128) -> dict[str, int]:
    """Tiles of four elements a thread: planes of up to ``largest`` pixels whole, then more channels."""
    block_p = min(largest, triton.next_power_of_2(pixels))
    block_c = min(triton.next_power_of_2(channels), 4 * largest // block_p)
    return {"BLOCK_C": block_c, "BLOCK_P": block_p}


def _empty_maximum(x: Tensor, stride: int, keep_winner: bool) -> tuple[Tensor, Tensor]:
    y = _empty_pooled(x, stride)
    return y, torch.empty_like(y, dtype=torch.uint8) if keep_winner else x.new_empty(0, dtype=torch.uint8)


def _empty_pooled(x: Tensor, stride: int) -> Tensor:
    height, width = x.shape[2:]
    return _empty_like_layout(x, (height - 1) // stride + 1, (width - 1) // stride + 1, x.dtype)


def _empty_like_layout(x: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor with x's batch, channels and memory format for another picture size."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*x.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)


register_impl("avg_pool", "triton", avg_pool, supports)
register_impl("max_pool", "triton", max_pool, supports)
register_impl("global_avg_pool", "triton", global_avg_pool, supports)
