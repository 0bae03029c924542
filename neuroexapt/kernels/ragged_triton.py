"""``neuroexapt.kernels.ragged`` inside kernels: where the sequence of a program lies.

Neither starts nor clamped lengths are computed beforehand: each of these small tensors would be a launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.kernels.ragged import checked_length


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


def place_of(
    x: Tensor, lengths: Tensor | None, offsets: Tensor | None, max_length: int | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Lengths and offsets on the device of x, and what no sequence exceeds; refuses what ``ragged`` does."""
    longest = checked_length(x, lengths, offsets, max_length)
    lengths, offsets = (None if tensor is None else tensor.to(x.device) for tensor in (lengths, offsets))
    return lengths, offsets, longest


def sequence_count(x: Tensor, offsets: Tensor | None) -> int:
    """How many sequences x holds, [B, N, …] or, with ``offsets``, [T, …]."""
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


def input_precision() -> str:
    """Of fp32 products: one TF32 product where PyTorch's matrix products may be, else three (fp32 grade)."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
