"""Adds up what programs have each written of a parameter's gradient: in a fixed order, into its dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuroexapt.kernels.sizes import ceil_div

_ROWS = 512
_COLUMNS = 8


@triton.jit
def add_up_kernel(partials_ptr, sums_ptr, count, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``partials``: [count, size]; a program owns COLUMNS sums."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        pointers = partials_ptr + rows.to(tl.int64)[:, None] * size + columns[None, :]
        sums += tl.load(pointers, mask=(rows < count)[:, None] & (columns < size)[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(sums_ptr + columns, total.to(sums_ptr.dtype.element_ty), mask=columns < size)


def add_up(partials: Tensor, sums: Tensor) -> None:
    """``sums[...] = Σ_p partials[p, ...]``; ``partials``: [P, ...] in fp32, both contiguous."""
    size = sums.numel()
    with torch.cuda.device_of(sums):
        add_up_kernel[ceil_div(size, _COLUMNS),](
            partials, sums, len(partials), size, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
        )
