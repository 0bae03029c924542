"""The separable convolutions of a fused cell in Triton: several, of one kernel size, in a launch.

Shapes: as in ``sepconv_triton``, from whose tiles these kernels are made; C channels in and out. Every
picture is contiguous. What differs among the jobs of a launch (the second or third axis of its grid) comes in
tuples. NORMED: the convolutions are of (x − mean) · rstd with ``stats`` [C, 2]. Their outputs' gradient is
dz = A · g + B · z + D with ``coefs`` [C, 4], formed where it is read.

Sizes of pictures are constants: divisions by them become cheap, and a program needs a third to two thirds of
the registers. What is written counts as unaligned, lest a thread get neighbouring pixels, see
``sepconv_triton``.
"""

import triton
import triton.language as tl

from neuroexapt.kernels.moments_triton import store_moments
from neuroexapt.kernels.node_triton import pick, pick_integer
from neuroexapt.kernels.sepconv_triton import depthwise_tile, pixel_of, pixel_offsets

_UNALIGNED = ["z_ptr", "e_ptr", "dx_ptr"]


@triton.jit
def _input_stats(stats, job, channel, C: tl.constexpr, NORMED: tl.constexpr):
    """mean and rstd of a job's input, [BLOCK_C]; 0 and 1 where it is not normalised."""
    if NORMED:
        stats_ptr = pick(stats, job) + 2 * channel
        mean = tl.load(stats_ptr, mask=channel < C, other=0.0)
        rstd = tl.load(stats_ptr + 1, mask=channel < C, other=0.0)
    else:
        mean = tl.zeros([channel.shape[0]], tl.float32)
        rstd = tl.full([channel.shape[0]], 1.0, tl.float32)
    return mean, rstd


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=_UNALIGNED)
def cell_conv_fwd_kernel(
    xs, x_strides, stats, depthwise, pointwise, z_ptr, partials_ptr,
    pixels, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, NORMED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of a job's z [jobs, B, C, OH, OW], and its (mean, M2) into [jobs, tiles, 2, C].

    Grid: (tiles of pixels, jobs).
    """
    tile, job = tl.program_id(0), tl.program_id(1)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    out_channel = tl.arange(0, BLOCK_O)
    x_ptr, x_n = pick(xs, job), pick_integer(x_strides, job)
    dw_ptr, pw_ptr = pick(depthwise, job), pick(pointwise, job)
    total = tl.zeros([BLOCK_O, BLOCK_P], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mean, rstd = _input_stats(stats, job, channel, C, NORMED)
        depthwise_out = depthwise_tile(
            x_ptr, x_n, height * width, width, 1, dw_ptr, channel, pixel, C, pixels,
            height, width, out_height, out_width, K, STRIDE, DILATION, True, mean, NORMED,
        )  # fmt: skip
        weight = tl.load(
            pw_ptr + out_channel[:, None] * C + channel[None, :],
            mask=(out_channel < C)[:, None] & (channel < C)[None, :],
            other=0.0,
        )  # [BLOCK_O, BLOCK_C]
        total = tl.dot(weight, depthwise_out * rstd[:, None], total, input_precision=PRECISION)
    image, row, column = pixel_of(pixel, out_height, out_width)
    plane = tl.cast(out_height * out_width, tl.int64)
    valid = (out_channel < C)[:, None] & (pixel < pixels)[None, :]
    z_tile = z_ptr + job.to(tl.int64) * pixels * C + out_channel[:, None] * plane
    z_tile += pixel_offsets(image, row, column, C * plane, out_width, 1)[None, :]
    tl.store(z_tile, total, mask=valid)
    count = tl.minimum(pixels - tile * BLOCK_P, BLOCK_P)
    partial_ptr = partials_ptr + (job * tl.num_programs(0) + tile).to(tl.int64) * (2 * C)
    store_moments(partial_ptr, out_channel, total, valid, count, C)


@triton.jit
def _gradient_tile(
    g_ptr, g_n, z_ptr, coef_ptr, channel, pixel, pixels, out_height, out_width, C: tl.constexpr
):
    """dz = A · g + B · z + D at ``channel`` x ``pixel``, 0 outside: [BLOCK_O, BLOCK_P]."""
    image, row, column = pixel_of(pixel, out_height, out_width)
    plane = tl.cast(out_height * out_width, tl.int64)
    valid = (channel < C)[:, None] & (pixel < pixels)[None, :]
    in_picture = channel[:, None] * plane
    g_tile = g_ptr + (in_picture + pixel_offsets(image, row, column, g_n, out_width, 1)[None, :])
    z_tile = z_ptr + (in_picture + pixel_offsets(image, row, column, C * plane, out_width, 1)[None, :])
    g = tl.load(g_tile, mask=valid, other=0.0).to(tl.float32)
    z = tl.load(z_tile, mask=valid, other=0.0).to(tl.float32)
    a = tl.load(coef_ptr + 4 * channel, mask=channel < C, other=0.0)
    b = tl.load(coef_ptr + 4 * channel + 1, mask=channel < C, other=0.0)
    d = tl.load(coef_ptr + 4 * channel + 2, mask=channel < C, other=0.0)
    return tl.where(valid, a[:, None] * g + b[:, None] * z + d[:, None], 0.0)


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=_UNALIGNED)
def cell_conv_bwd_pointwise_kernel(
    gs, g_strides, zs, coefs, xs, x_strides, stats, depthwise, pointwise, e_ptr, partials_ptr,
    pixels, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, NORMED: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``e = W_pwᵀ · dz`` [jobs, B, C, OH, OW], and parts of ``dW_pw = dz · dᵀ`` [jobs, splits, C, C].

    Grid: (splits of the pixels, blocks of C, jobs).
    """
    split, splits, job = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_channel = tl.arange(0, BLOCK_O)
    g_ptr, g_n = pick(gs, job), pick_integer(g_strides, job)
    z_ptr, coef_ptr = pick(zs, job), pick(coefs, job)
    plane = tl.cast(out_height * out_width, tl.int64)
    e_job = e_ptr + job.to(tl.int64) * pixels * C + channel[:, None] * plane
    weight = tl.load(
        pick(pointwise, job) + channel[:, None] + out_channel[None, :] * C,
        mask=(channel < C)[:, None] & (out_channel < C)[None, :],
        other=0.0,
    )  # [BLOCK_C, BLOCK_O]
    if NEED_WEIGHTS:
        x_ptr, x_n, dw_ptr = pick(xs, job), pick_integer(x_strides, job), pick(depthwise, job)
        mean, rstd = _input_stats(stats, job, channel, C, NORMED)
        weight_grad = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for tile in range(split, tl.cdiv(pixels, BLOCK_P), splits):
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        dz = _gradient_tile(g_ptr, g_n, z_ptr, coef_ptr, out_channel, pixel, pixels, out_height, out_width, C)
        if NEED_WEIGHTS:
            depthwise_out = depthwise_tile(
                x_ptr, x_n, height * width, width, 1, dw_ptr, channel, pixel, C, pixels,
                height, width, out_height, out_width, K, STRIDE, DILATION, True, mean, NORMED,
            )  # fmt: skip
            depthwise_out *= rstd[:, None]
            weight_grad = tl.dot(dz, tl.trans(depthwise_out), weight_grad, input_precision=PRECISION)
        e = tl.dot(weight, dz, input_precision=PRECISION)
        image, row, column = pixel_of(pixel, out_height, out_width)
        tl.store(
            e_job + pixel_offsets(image, row, column, C * plane, out_width, 1)[None, :],
            e,
            mask=(channel < C)[:, None] & (pixel < pixels)[None, :],
        )
    if NEED_WEIGHTS:
        tl.store(
            partials_ptr
            + ((job * splits + split).to(tl.int64) * C + out_channel)[:, None] * C
            + channel[None, :],
            weight_grad,
            mask=(out_channel < C)[:, None] & (channel < C)[None, :],
        )


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=_UNALIGNED)
def cell_conv_bwd_depthwise_kernel(
    e_ptr, xs, x_strides, stats, depthwise, dx_ptr, partials_ptr, dots_ptr,
    pixels, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, NORMED: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs [jobs, B, C, H, W] and parts of ``dW_dw`` [jobs, tiles, C, k²] from e.

    With NORMED the gradients u are of the normalised inputs, and parts of Σ u · (x − mean) and of Σ u go into
    ``dots`` [jobs, tiles, 2, C]. ``pixels`` counts input pixels. Grid: (tiles, blocks of C, jobs). Each
    shifted e is loaded once for both gradients. A program is one warp, so that sums over a tile's pixels
    need no shared memory, and has few channels, so that a thread's pixels share what it loads of weights.
    """
    tile, tiles, job = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < C
    valid = in_channels[:, None] & (pixel < pixels)[None, :]
    x_ptr, x_n, dw_ptr = pick(xs, job), pick_integer(x_strides, job), pick(depthwise, job)
    mean, rstd = _input_stats(stats, job, channel, C, NORMED)
    PAD: tl.constexpr = DILATION * (K // 2)
    image, row, column = pixel_of(pixel, height, width)
    plane, out_plane = tl.cast(height * width, tl.int64), tl.cast(out_height * out_width, tl.int64)
    in_picture = channel[:, None] * plane
    x_tile = x_ptr + (in_picture + pixel_offsets(image, row, column, x_n, width, 1)[None, :])
    x = tl.load(x_tile, mask=valid, other=0.0).to(tl.float32) - mean[:, None]
    active = tl.where(valid, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
    images = pixels // (height * width)
    e_tile = e_ptr + (job.to(tl.int64) * images * C + channel)[:, None] * out_plane
    part = (job * tiles + tile).to(tl.int64)
    partial = partials_ptr + (part * C + channel) * (K * K)
    dx = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    e_center = e_tile + pixel_offsets(image, row, column, C * out_plane, out_width, 1)[None, :]
    for ky in range(K):
        # Output pixel (row_s / STRIDE, column_s / STRIDE) reads input pixel (row, column) through the tap.
        row_s = row + (PAD - ky * DILATION)
        in_rows = (pixel < pixels) & (row_s >= 0) & (row_s < out_height * STRIDE) & (row_s % STRIDE == 0)
        e_row = e_center + (PAD - ky * DILATION) * out_width
        for kx in tl.static_range(K):
            column_s = column + (PAD - kx * DILATION)
            inside = in_rows & (column_s >= 0) & (column_s < out_width * STRIDE) & (column_s % STRIDE == 0)
            if STRIDE == 1:  # columns at distances that are known when compiling
                e_pixel = e_row + (PAD - kx * DILATION)
            else:
                e_pixel = (
                    e_tile
                    + pixel_offsets(image, row_s // STRIDE, column_s // STRIDE, C * out_plane, out_width, 1)[
                        None, :
                    ]
                )
            e = tl.load(e_pixel, mask=in_channels[:, None] & inside[None, :], other=0.0).to(tl.float32)
            tap = ky * K + kx
            dx += e * tl.load(dw_ptr + channel * (K * K) + tap, mask=in_channels, other=0.0)[:, None]
            if NEED_WEIGHTS:
                tl.store(partial + tap, tl.sum(e * active, 1) * rstd, mask=in_channels)
    dx = tl.where((x <= 0) | (pixel >= pixels)[None, :], 0.0, dx)
    dx_tile = dx_ptr + job.to(tl.int64) * pixels * C + in_picture
    tl.store(dx_tile + pixel_offsets(image, row, column, C * plane, width, 1)[None, :], dx, mask=valid)
    if NORMED:
        dot = dots_ptr + part * (2 * C) + channel
        tl.store(dot, tl.sum(dx * x, 1), mask=in_channels)
        tl.store(dot + C, tl.sum(dx, 1), mask=in_channels)
