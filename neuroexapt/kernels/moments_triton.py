"""Means and sums of squared deviations (M2) of tiles, for BatchNorm: exact also where the mean is large."""

import triton
import triton.language as tl


@triton.jit
def store_moments(partial_ptr, channel, values, valid, count, channels):
    """(mean, M2) of a tile, [2, channels]; ``values``, ``valid``: [BLOCK_C, BLOCK_P], 0 where not valid."""
    mean = tl.sum(values, 1) / count
    deviation = tl.where(valid, values - mean[:, None], 0.0)
    tl.store(partial_ptr + channel, mean, mask=channel < channels)
    tl.store(partial_ptr + channels + channel, tl.sum(deviation * deviation, 1), mask=channel < channels)


@triton.jit
def merge_moments(partials_ptr, channel, channels, pixels, tiles, tile_pixels, BLOCK_T: tl.constexpr):
    """Merge [tiles, 2, channels] in fixed order (Chan et al., 1979) → mean and M2 of each ``channel``."""
    count = 0.0
    mean = tl.zeros([channel.shape[0]], tl.float32)
    m2 = tl.zeros([channel.shape[0]], tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        valid = (tile < tiles)[:, None] & (channel < channels)[None, :]
        partial = partials_ptr + tile.to(tl.int64)[:, None] * (2 * channels) + channel[None, :]
        tile_mean = tl.load(partial, mask=valid, other=0.0)  # [BLOCK_T, BLOCK_C]
        tile_m2 = tl.load(partial + channels, mask=valid, other=0.0)
        weight = tl.maximum(tl.minimum(pixels - tile * tile_pixels, tile_pixels), 0).to(tl.float32)[:, None]
        group_count = tl.minimum(pixels - first * tile_pixels, BLOCK_T * tile_pixels).to(tl.float32)
        group_mean = tl.sum(tile_mean * weight, 0) / group_count
        deviation = tile_mean - group_mean[None, :]
        group_m2 = tl.sum(tile_m2 + weight * deviation * deviation, 0)
        delta = group_mean - mean
        merged = count + group_count
        mean += delta * (group_count / merged)
        m2 += group_m2 + delta * delta * (count * group_count / merged)
        count = merged
    return mean, m2
