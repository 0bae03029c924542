"""Rows of features inside kernels: their tiles, and LayerNorm without its weights, both ways.

Shapes: BM rows a tile, D features, padded to DP.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, rows, columns, width, mask):
    """A tile [rows, columns] of a row-major matrix, zero where ``mask`` [rows] or the width end."""
    pointers = ptr + rows[:, None] * width + columns[None, :]
    return tl.load(pointers, mask=mask[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def normalised(z, D: tl.constexpr, DP: tl.constexpr, eps):
    """z [BM, DP] with mean 0 and variance 1 over its D features, and the inverse deviation [BM]."""
    z = z - (tl.sum(z, axis=1) / D)[:, None]
    z = tl.where(tl.arange(0, DP)[None, :] < D, z, 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(z * z, axis=1) / D + eps)
    return z * rstd[:, None], rstd


@triton.jit
def before_normalised(dz, z, rstd, D: tl.constexpr, DP: tl.constexpr):
    """The gradient of what ``normalised`` made z of, from that of z: [BM, DP]."""
    dz -= (tl.sum(dz, axis=1) / D)[:, None] + z * (tl.sum(dz * z, axis=1) / D)[:, None]
    return tl.where(tl.arange(0, DP)[None, :] < D, dz * rstd[:, None], 0.0)
