"""The separable convolutions of a fused cell in Triton: several, of one kernel size, in a launch.

Shapes: as in ``sepconv_triton``, from whose tiles these kernels are made; C channels in and out. Every
picture is contiguous. What differs among the jobs of a launch (the second or third axis of its grid) comes in
tuples; bit j of ``dilations`` says whether job j has dilation 2. NORMED: the convolutions are of
(x − mean) · rstd with ``stats`` [C, 2]. Their outputs' gradient is dz = A · g + B · z + D with ``coefs``
[C, 4], formed where it is read.

Dilations are no constants of a kernel, so that a search network needs a fifth of the compilations.
"""

import triton
import triton.language as tl

from neuroexapt.kernels.moments_triton import store_moments
from neuroexapt.kernels.node_triton import pick, pick_integer
from neuroexapt.kernels.sepconv_triton import depthwise_tile, pixel_of, pixel_offsets

_SIZES = ["pixels", "height", "width", "out_height", "out_width", "dilations"]


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


@triton.jit(do_not_specialize=_SIZES)
def cell_conv_fwd_kernel(
    xs, x_strides, stats, depthwise, pointwise, z_ptr, partials_ptr, dilations,
    pixels, height, width, out_height, out_width,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of a job's z [jobs, B, C, OH, OW], and its (mean, M2) into [jobs, tiles, 2, C].

    Grid: (tiles of pixels, jobs).
    """
    tile, job = tl.program_id(0), tl.program_id(1)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    out_channel = tl.arange(0, BLOCK_O)
    x_ptr, x_n = pick(xs, job), pick_integer(x_strides, job)
    dw_ptr, pw_ptr = pick(depthwise, job), pick(pointwise, job)
    dilation = 1 + (dilations >> job & 1)
    total = tl.zeros([BLOCK_O, BLOCK_P], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mean, rstd = _input_stats(stats, job, channel, C, NORMED)
        depthwise_out = depthwise_tile(
            x_ptr, x_n, height * width, width, 1, dw_ptr, channel, pixel, C, pixels,
            height, width, out_height, out_width, K, STRIDE, dilation, True, mean, NORMED,
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


@triton.jit(do_not_specialize=_SIZES)
def cell_conv_bwd_pointwise_kernel(
    gs, g_strides, zs, coefs, xs, x_strides, stats, depthwise, pointwise, e_ptr, partials_ptr, dilations,
    pixels, height, width, out_height, out_width,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr,
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
        dilation = 1 + (dilations >> job & 1)
        mean, rstd = _input_stats(stats, job, channel, C, NORMED)
        weight_grad = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for tile in range(split, tl.cdiv(pixels, BLOCK_P), splits):
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        dz = _gradient_tile(g_ptr, g_n, z_ptr, coef_ptr, out_channel, pixel, pixels, out_height, out_width, C)
        if NEED_WEIGHTS:
            depthwise_out = depthwise_tile(
                x_ptr, x_n, height * width, width, 1, dw_ptr, channel, pixel, C, pixels,
                height, width, out_height, out_width, K, STRIDE, dilation, True, mean, NORMED,
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


@triton.jit(do_not_specialize=_SIZES)
def cell_conv_bwd_depthwise_kernel(
    e_ptr, xs, x_strides, stats, depthwise, dx_ptr, partials_ptr, dots_ptr, dilations,
    pixels, height, width, out_height, out_width,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs [jobs, B, C, H, W] and parts of ``dW_dw`` [jobs, splits, C, k²] from e.

    With NORMED the gradients u are of the normalised inputs, and parts of Σ u · (x − mean) and of Σ u go into
    ``dots`` [jobs, splits, 2, C]. ``pixels`` counts input pixels. Grid: (C, splits of the pixels, jobs).
    As in ``sepconv_bwd_depthwise_kernel`` a thread holds one pixel and every tap.
    """
    channel, job = tl.program_id(0), tl.program_id(2)
    split, splits = tl.program_id(1), tl.num_programs(1)
    x_ptr, x_n, dw_ptr = pick(xs, job), pick_integer(x_strides, job), pick(depthwise, job)
    dilation = 1 + (dilations >> job & 1)
    padding = dilation * (K // 2)
    tap = tl.arange(0, TAPS)
    shift_row, shift_column = padding - tap // K * dilation, padding - tap % K * dilation
    weight = tl.load(dw_ptr + channel * (K * K) + tap, mask=tap < K * K, other=0.0)
    mean, rstd = 0.0, 1.0
    if NORMED:
        stats_ptr = pick(stats, job) + 2 * channel
        mean, rstd = tl.load(stats_ptr), tl.load(stats_ptr + 1)
    plane = tl.cast(height * width, tl.int64)
    out_plane = out_height * out_width
    images = pixels // (height * width)
    e_job = e_ptr + (job.to(tl.int64) * images * C + channel) * out_plane
    dx_job = dx_ptr + job.to(tl.int64) * pixels * C
    products = tl.zeros([TAPS, BLOCK_P], tl.float32)
    dots = tl.zeros([BLOCK_P], tl.float32)
    sums = tl.zeros([BLOCK_P], tl.float32)
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
        e_image = e_job + image.to(tl.int64) * C * out_plane
        e_pixel = e_image[None, :] + (row_s // STRIDE * out_width + column_s // STRIDE)
        e = tl.load(
            tl.max_contiguous(e_pixel, [1, 2]),
            mask=inside & on_grid & (tap < K * K)[:, None] & valid[None, :],
            other=0.0,
        ).to(tl.float32)  # [TAPS, BLOCK_P]
        in_picture = channel * plane
        x = tl.load(
            x_ptr + (in_picture + pixel_offsets(image, row, column, x_n, width, 1)), mask=valid, other=0.0
        )
        x = x.to(tl.float32) - mean
        if NEED_WEIGHTS:
            products += e * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)[None, :]
        dx = tl.where((x <= 0) | (pixel >= pixels), 0.0, tl.sum(e * weight[:, None], 0))
        if NORMED:
            dots += dx * x
            sums += dx
        tl.store(
            dx_job + (in_picture + pixel_offsets(image, row, column, C * plane, width, 1)), dx, mask=valid
        )
    part = (job * splits + split).to(tl.int64)
    if NEED_WEIGHTS:
        partial = partials_ptr + (part * C + channel) * (K * K) + tap
        tl.store(partial, tl.sum(products, 1) * rstd, mask=tap < K * K)
    if NORMED:
        dot = dots_ptr + part * (2 * C) + channel
        tl.store(dot, tl.sum(dots, 0))
        tl.store(dot + C, tl.sum(sums, 0))
