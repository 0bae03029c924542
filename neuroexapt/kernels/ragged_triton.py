"""``neuroexapt.kernels.ragged`` inside kernels: where the sequence of a program lies.

Neither starts nor clamped lengths are computed beforehand: each of these small tensors would be a launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sequence_span(sequence, lengths, offsets, max_length):
    """First row (64 bits) and length of a sequence; what is None of ``lengths`` and ``offsets`` says how."""
    if offsets is not None:
        start = tl.load(offsets + sequence).to(tl.int64)
        length = tl.load(offsets + sequence + 1).to(tl.int64) - start
        return start, length.to(tl.int32)
    start = sequence.to(tl.int64) * max_length
    if lengths is not None:
        length = tl.load(lengths + sequence).to(tl.int64)
        return start, tl.minimum(tl.maximum(length, 0), max_length).to(tl.int32)
    return start, tl.cast(max_length, tl.int32)


@triton.jit
def rows_to_write(length, offsets, max_length):
    """Up to which position a sequence's results are written: padding, where there is some, is zeroed."""
    if offsets is not None:
        return length
    return tl.cast(max_length, tl.int32)


def sequences_of(x: Tensor, offsets: Tensor | None, max_length: int | None) -> tuple[int, int]:
    """Number and greatest length of the sequences in x, [B, N, …] or, with ``offsets``, [T, …]."""
    if offsets is None:
        return x.shape[0], x.shape[1]
    assert max_length is not None
    return len(offsets) - 1, max_length


def input_precision() -> str:
    """Of fp32 products: one TF32 product where PyTorch's matrix products may be, else three (fp32 grade)."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def ceil_div(a: int, b: int) -> int:
    """``triton.cdiv``, which takes 5 µs outside of kernels."""
    return -(-a // b)
