"""What a fused cell computes beside its convolutions, in Triton: node sums, pools, statistics, coefficients.

Shapes: B pictures of C channels and ``plane`` pixels, of which every one is contiguous; ``pixels`` are all of
a batch, B · plane. Tiles are [BLOCK_C, BLOCK_P], channels by pixels. Of ``stats`` [C, 2] the columns are mean
and 1 / sqrt(variance + eps), of ``coef`` [C, 4] the first three A, B and D of dz = A · g + B · z + D.

Several tensors come as a tuple; a program that needs number i of them picks its address. Terms of a node are
numbered by ``codes``, 2 · e + n for one with entry e of the mixing weights and, if n is 1, a BatchNorm.
"""

import triton
import triton.language as tl

from neuroexapt.kernels.moments_triton import merge_moments, store_moments
from neuroexapt.kernels.pool_triton import pixels_inside, tile


@triton.jit
def pick(tensors, i):
    """The pointer of tensor number ``i`` of a tuple."""
    address = tensors[0].to(tl.int64)
    for k in tl.static_range(1, len(tensors)):
        address = tl.where(i == k, tensors[k].to(tl.int64), address)
    return address.to(tl.pointer_type(tensors[0].dtype.element_ty))


@triton.jit
def pick_integer(values, i):
    """Number ``i`` of a tuple of integers."""
    value = tl.cast(values[0], tl.int64)
    for k in tl.static_range(1, len(values)):
        value = tl.where(i == k, tl.cast(values[k], tl.int64), value)
    return value


@triton.jit
def _flat_tile(channels, plane, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Channels [BLOCK_C], pixels of the batch [BLOCK_P], their images, and their places in a plane."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, pixel, (pixel // plane).to(tl.int64), pixel % plane


@triton.jit(do_not_specialize=["pixels"])
def node_moments_kernel(
    z_ptr, z_n, partials_ptr, channels, pixels, plane, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """(mean, M2) of every tile: [tiles, 2, C]. Grid: (tiles, blocks of channels)."""
    channel, pixel, image, place = _flat_tile(channels, plane, BLOCK_C, BLOCK_P)
    valid = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    z_tile = z_ptr + (image * z_n + place)[None, :] + (channel.to(tl.int64) * plane)[:, None]
    z = tl.load(z_tile, mask=valid, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - tl.program_id(0) * BLOCK_P, BLOCK_P)
    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * (2 * channels)
    store_moments(partial_ptr, channel, z, valid, count, channels)


@triton.jit
def _window_tile(
    x_ptr, channel, row, column, valid, height, width,
    STRIDE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr,
):  # fmt: skip
    """Maximum, number of its tap, and average of 3x3 windows around (row, column) · STRIDE.

    ``x_ptr``: to pictures, one for all pixels or one for each, [1, BLOCK_P].
    """
    top, left = row * STRIDE - 1, column * STRIDE - 1
    corner = tl.max_contiguous(top * width + left, 2)
    x_tile = x_ptr + ((channel * (height * width))[:, None] + corner[None, :])
    maximum = tl.full(valid.shape, float("-inf"), tl.float32)
    total = tl.zeros(valid.shape, tl.float32)
    first_inside = tl.maximum(-top, 0) * 3 + tl.maximum(-left, 0)
    winner = tl.broadcast_to(first_inside[None, :], valid.shape)
    for ky in tl.static_range(3):
        in_row = (top + ky >= 0) & (top + ky < height)
        for kx in tl.static_range(3):
            inside = valid & (in_row & (left + kx >= 0) & (left + kx < width))[None, :]
            value = tl.load(x_tile + (ky * width + kx), mask=inside, other=float("-inf")).to(tl.float32)
            if AVG:
                total += tl.where(inside, value, 0.0)
            if MAX:
                # As in PyTorch: the first of equal values wins, and so does the last NaN.
                winner = tl.where((value > maximum) | (value != value), ky * 3 + kx, winner)
                maximum = tl.maximum(maximum, value, propagate_nan=tl.PropagateNan.ALL)
    count = (pixels_inside(top, height, 3) * pixels_inside(left, width, 3)).to(tl.float32)
    return maximum, winner, total / count[None, :]


@triton.jit(do_not_specialize=["pixels"])
def node_pool_kernel(
    x_ptr, x_n, max_ptr, max_partials_ptr, avg_ptr, avg_partials_ptr, channels, pixels,
    height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    STRIDE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Both pools of a state, and (mean, M2) of every tile. Grid as of ``node_moments_kernel``."""
    channel, pixel, image, place = _flat_tile(channels, out_height * out_width, BLOCK_C, BLOCK_P)
    valid = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    maximum, _, average = _window_tile(
        x_ptr + (image * x_n)[None, :], channel, place // out_width, place % out_width, valid, height, width,
        STRIDE, MAX, AVG,
    )  # fmt: skip
    plane = out_height * out_width
    offsets = (image * channels * plane + place)[None, :] + (channel * plane)[:, None]
    count = tl.minimum(pixels - tl.program_id(0) * BLOCK_P, BLOCK_P)
    partial = tl.program_id(0).to(tl.int64) * (2 * channels)
    if MAX:
        tl.store(max_ptr + offsets, maximum, mask=valid)
        store_moments(
            max_partials_ptr + partial, channel, tl.where(valid, maximum, 0.0), valid, count, channels
        )
    if AVG:
        tl.store(avg_ptr + offsets, average, mask=valid)
        store_moments(
            avg_partials_ptr + partial, channel, tl.where(valid, average, 0.0), valid, count, channels
        )


@triton.jit(do_not_specialize=["pixels"])
def node_statistics_kernel(
    partials, tile_pixels, running_means, running_vars, counts, stats_ptr, pixels, channels,
    eps, momentum, TRAINING: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``stats`` [jobs, C, 2] of the batch, which enters the running statistics, or of those.

    Grid: (jobs, blocks of channels).
    """
    job = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    mean_ptr, var_ptr = (pick(running_means, job) + channel, pick(running_vars, job) + channel)
    running_mean = tl.load(mean_ptr, mask=inside, other=0.0)
    running_var = tl.load(var_ptr, mask=inside, other=0.0)
    if TRAINING:
        size = pick_integer(tile_pixels, job).to(tl.int32)
        mean, m2 = merge_moments(
            pick(partials, job), channel, channels, pixels, tl.cdiv(pixels, size), size, BLOCK_T
        )
        var = m2 / pixels
        tl.store(mean_ptr, running_mean + momentum * (mean - running_mean), mask=inside)
        tl.store(var_ptr, running_var + momentum * (m2 / (pixels - 1) - running_var), mask=inside)
        if tl.program_id(1) == 0:
            count_ptr = pick(counts, job)
            tl.store(count_ptr, tl.load(count_ptr) + 1)
    else:
        mean, var = running_mean, running_var
    stats = stats_ptr + (job * channels + channel) * 2
    tl.store(stats, mean, mask=inside)
    tl.store(stats + 1, 1.0 / tl.sqrt(var + eps), mask=inside)


@triton.jit
def node_sum_kernel(
    zs, z_strides, stats, codes, weights_ptr, y_ptr, y_n, channels, plane,
    WEIGHTED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = Σ_k w_k · (z_k − mean_k) · rstd_k; w is 1 where WEIGHTED lacks bit k. Grid: see ``tile``."""
    image, channel, pixel = tile(channels, plane, BLOCK_C, BLOCK_P)
    in_channels = channel < channels
    valid = in_channels[:, None] & (pixel < plane)[None, :]
    offsets = (channel.to(tl.int64) * plane)[:, None] + pixel[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for k in tl.static_range(len(zs)):
        z = tl.load(zs[k] + image * z_strides[k] + offsets, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(stats[k] + 2 * channel, mask=in_channels, other=0.0)
        scale = tl.load(stats[k] + 2 * channel + 1, mask=in_channels, other=0.0)
        if WEIGHTED >> k & 1:
            scale *= tl.load(weights_ptr + codes[k] // 2)
        total += scale[:, None] * (z - mean[:, None])
    tl.store(y_ptr + image * y_n + offsets, total, mask=valid)


@triton.jit(do_not_specialize=["pixels"])
def node_dots_kernel(
    g_ptr, g_n, zs, z_strides, stats, dots_ptr, channels, pixels, plane,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Parts of Σ g · (z_k − mean_k) and of Σ g, for ROWS terms each: [terms, parts, 2, C].

    Grid: (C, parts, blocks of terms).
    """
    channel, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    addresses = tl.zeros([ROWS], tl.int64)
    strides = tl.zeros([ROWS], tl.int64)
    stats_addresses = tl.zeros([ROWS], tl.int64)
    for k in tl.static_range(len(zs)):
        addresses = tl.where(row == k, zs[k].to(tl.int64), addresses)
        strides = tl.where(row == k, tl.cast(z_strides[k], tl.int64), strides)
        stats_addresses = tl.where(row == k, stats[k].to(tl.int64), stats_addresses)
    is_term = row < len(zs)
    stats_rows = stats_addresses.to(tl.pointer_type(tl.float32)) + 2 * channel
    mean = tl.load(stats_rows, mask=is_term, other=0.0)
    z_rows = addresses.to(tl.pointer_type(g_ptr.dtype.element_ty))
    if ALIGNED:  # without the hints, accesses through computed addresses would be one element wide
        z_rows = tl.multiple_of(z_rows, 16)
        strides = tl.multiple_of(strides, 16)
    dots = tl.zeros([ROWS, BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    plane_offset = channel.to(tl.int64) * plane
    for first in range(part * BLOCK, pixels, parts * BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        image, place = (pixel // plane).to(tl.int64), plane_offset + pixel % plane
        inside = pixel < pixels
        g = tl.load(g_ptr + image * g_n + place, mask=inside, other=0.0).to(tl.float32)
        z_tile = z_rows[:, None] + (image[None, :] * strides[:, None] + place[None, :])
        z = tl.load(z_tile, mask=is_term[:, None] & inside[None, :], other=0.0).to(tl.float32)
        dots += g[None, :] * (z - mean[:, None])
        sums += g
    partial = dots_ptr + (row.to(tl.int64) * parts + part) * (2 * channels) + channel
    tl.store(partial, tl.sum(dots, 1), mask=is_term)
    tl.store(partial + channels, tl.zeros([ROWS], tl.float32) + tl.sum(sums, 0), mask=is_term)


@triton.jit(do_not_specialize=["pixels", "parts"])
def node_coefficients_kernel(
    dots_ptr, stats, codes, weights_ptr, grad_weights_ptr, coef_ptr, pixels, parts, channels,
    WEIGHTED: tl.constexpr, NEED_WEIGHTS: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``coef`` [jobs, C, 4] and the gradients of the mixing weights from the parts. Grid: (jobs,)."""
    job = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < channels
    dots = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_T):
        part = first + tl.arange(0, BLOCK_T)
        partial = dots_ptr + (job * parts + part).to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        dots += tl.load(partial, mask=mask, other=0.0)
        sums += tl.load(partial + channels, mask=mask, other=0.0)
    dot, g_sum = tl.sum(dots, 0), tl.sum(sums, 0)
    stats_ptr = pick(stats, job) + 2 * channel
    mean = tl.load(stats_ptr, mask=inside, other=0.0)
    rstd = tl.load(stats_ptr + 1, mask=inside, other=0.0)
    code = pick_integer(codes, job)
    a = rstd
    if WEIGHTED:
        a *= tl.load(weights_ptr + code // 2)
    if NEED_WEIGHTS:
        tl.store(grad_weights_ptr + code // 2, tl.sum(rstd * dot, 0))
    coef = coef_ptr + (job * channels + channel) * 4
    b = tl.zeros([BLOCK_C], tl.float32)
    d = tl.zeros([BLOCK_C], tl.float32)
    if TRAINING:
        normed = code % 2 == 1
        b = tl.where(normed, -a * rstd * rstd * dot / pixels, 0.0)
        d = tl.where(normed, -a * g_sum / pixels, 0.0) - b * mean
    tl.store(coef, a, mask=inside)
    tl.store(coef + 1, b, mask=inside)
    tl.store(coef + 2, d, mask=inside)


@triton.jit
def node_window_gradients_kernel(
    x_ptr, x_n, gs, g_strides, max_coefs, avg_coefs, max_ptr, winner_ptr, avg_ptr, channels,
    height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    STRIDE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of a state's pooled pictures, summed over the nodes that they enter: Σ A · g + B · z + D.

    And the numbers of the taps that have the maxima. Grid: see ``tile``.
    """
    image, channel, pixel = tile(channels, out_height * out_width, BLOCK_C, BLOCK_P)
    in_channels = channel < channels
    valid = in_channels[:, None] & (pixel < out_height * out_width)[None, :]
    maximum, winner, average = _window_tile(
        x_ptr + image * x_n, channel, pixel // out_width, pixel % out_width, valid, height, width, STRIDE,
        MAX, AVG,
    )  # fmt: skip
    in_picture = (channel * (out_height * out_width))[:, None] + pixel[None, :]
    of_max = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    of_avg = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for k in tl.static_range(len(gs)):
        g = tl.load(gs[k] + image * g_strides[k] + in_picture, mask=valid, other=0.0).to(tl.float32)
        if MAX:
            of_max += _affine(max_coefs[k], channel, in_channels, g, maximum)
        if AVG:
            of_avg += _affine(avg_coefs[k], channel, in_channels, g, average)
    offset = image * channels * (out_height * out_width)
    if MAX:
        tl.store(max_ptr + offset + in_picture, of_max, mask=valid)
        tl.store(winner_ptr + offset + in_picture, winner.to(tl.uint8), mask=valid)
    if AVG:
        tl.store(avg_ptr + offset + in_picture, of_avg, mask=valid)


@triton.jit
def _affine(coef_ptr, channel, in_channels, g, z):
    """A · g + B · z + D, [BLOCK_C, BLOCK_P]."""
    a = tl.load(coef_ptr + 4 * channel, mask=in_channels, other=0.0)
    b = tl.load(coef_ptr + 4 * channel + 1, mask=in_channels, other=0.0)
    d = tl.load(coef_ptr + 4 * channel + 2, mask=in_channels, other=0.0)
    return a[:, None] * g + b[:, None] * z + d[:, None]


@triton.jit(do_not_specialize=["pixels"])
def node_affine_kernel(
    g_ptr, g_n, z_ptr, z_n, coef_ptr, dz_ptr, channels, pixels, plane,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dz = A · g + B · z + D. Grid as of ``node_moments_kernel``."""
    channel, pixel, image, place = _flat_tile(channels, plane, BLOCK_C, BLOCK_P)
    in_channels = channel < channels
    valid = in_channels[:, None] & (pixel < pixels)[None, :]
    in_plane = (channel.to(tl.int64) * plane)[:, None] + place[None, :]
    g = tl.load(g_ptr + (image * g_n)[None, :] + in_plane, mask=valid, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + (image * z_n)[None, :] + in_plane, mask=valid, other=0.0).to(tl.float32)
    dz = _affine(coef_ptr, channel, in_channels, g, z)
    tl.store(dz_ptr + (image * channels * plane)[None, :] + in_plane, dz, mask=valid)


@triton.jit
def node_state_gradient_kernel(
    addends, addend_strides, gs, g_strides, codes, weights_ptr, max_ptr, winner_ptr, avg_ptr, dx_ptr,
    channels, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    STRIDE: tl.constexpr, MAX: tl.constexpr, AVG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = Σ addends + Σ_k w_k · g_k + what windows over a pixel pass back to it. Grid: see ``tile``."""
    image, channel, pixel = tile(channels, height * width, BLOCK_C, BLOCK_P)
    row, column = pixel // width, pixel % width
    valid = (channel < channels)[:, None] & (pixel < height * width)[None, :]
    in_picture = (channel * (height * width))[:, None] + pixel[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    if addends is not None:
        for k in tl.static_range(len(addends)):
            at = addends[k] + image * addend_strides[k] + in_picture
            total += tl.load(at, mask=valid, other=0.0).to(tl.float32)
    if gs is not None:
        for k in tl.static_range(len(gs)):
            g = tl.load(gs[k] + image * g_strides[k] + in_picture, mask=valid, other=0.0).to(tl.float32)
            total += tl.load(weights_ptr + codes[k] // 2) * g
    if MAX or AVG:
        windows = image * channels * (out_height * out_width)
        planes = (channel * (out_height * out_width))[:, None]
        for ky in tl.static_range(3):
            # The window of output pixel row_s / STRIDE covers this row with its tap ky.
            row_s = row + 1 - ky
            in_row = (row_s >= 0) & (row_s % STRIDE == 0) & (row_s // STRIDE < out_height)
            for kx in tl.static_range(3):
                column_s = column + 1 - kx
                in_column = (column_s >= 0) & (column_s % STRIDE == 0) & (column_s // STRIDE < out_width)
                inside = valid & (in_row & in_column)[None, :]
                window = tl.max_contiguous(row_s // STRIDE * out_width + column_s // STRIDE, 2)
                at = planes + window[None, :]
                if STRIDE == 1:  # at a distance that is known when compiling
                    at = in_picture + ((1 - ky) * width + (1 - kx))
                if MAX:
                    winner = tl.load(winner_ptr + windows + at, mask=inside, other=9)
                    of_max = tl.load(max_ptr + windows + at, mask=inside, other=0.0).to(tl.float32)
                    total += tl.where(winner == ky * 3 + kx, of_max, 0.0)
                if AVG:
                    of_avg = tl.load(avg_ptr + windows + at, mask=inside, other=0.0).to(tl.float32)
                    count = pixels_inside(row_s - 1, height, 3) * pixels_inside(column_s - 1, width, 3)
                    total += of_avg * (1.0 / count.to(tl.float32))[None, :]
    tl.store(dx_ptr + image * channels * (height * width) + in_picture, total, mask=valid)
