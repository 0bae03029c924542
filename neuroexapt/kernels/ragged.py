"""Where the sequences of a batch lie: padded [B, N, …] and jagged [T, …] input as one case.

Kernels see rows: position t of sequence b is row ``starts[b] + t`` for t < ``lengths[b]``. Padded input is
the rows of its first two dimensions, ``starts[b] = b · N``; rows past a sequence's length are never read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroexapt.errors import UserError


@dataclass(frozen=True)
class Ragged:
    """The place of every sequence among the rows.

    ``starts``, ``lengths``: [B] int32 on the rows' device; ``max_length``: what no length exceeds.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int


def ragged(
    x: Tensor, lengths: Tensor | None = None, offsets: Tensor | None = None, max_length: int | None = None
) -> Ragged:
    """The layout of ``x``.

    Args:
        x: [B, N, …] or, with ``offsets``, [T, …].
        lengths: [B], of padded input; None: every sequence is N long. Larger values count as N.
        offsets: [B + 1], 0 to T, where each sequence of jagged input starts and the last one ends.
        max_length: of jagged input. It is not read off ``offsets``, which would wait for the device.

    Raises:
        UserError: both are given, a shape does not fit, or jagged input comes without ``max_length``.
    """
    longest = checked_length(x, lengths, offsets, max_length)
    if offsets is not None:
        offsets = offsets.to(x.device, torch.int32)
        return Ragged(offsets[:-1], offsets.diff(), longest)
    batch = x.shape[0]  # not len(x), which would fix B where the call is exported; so would comparing shapes
    if lengths is None:
        lengths = torch.full((batch,), longest, dtype=torch.int32, device=x.device)
    starts = torch.arange(batch, dtype=torch.int32, device=x.device) * longest
    return Ragged(starts, lengths.to(x.device, torch.int32).clamp(0, longest), longest)


def checked_length(x: Tensor, lengths: Tensor | None, offsets: Tensor | None, max_length: int | None) -> int:
    """What no sequence exceeds, once the arguments of ``ragged`` are known to fit together."""
    if offsets is not None:
        if lengths is not None or max_length is None:
            raise UserError("jagged input takes offsets [B + 1] and max_length, and no lengths")
        return max_length
    if x.dim() < 2:
        raise UserError(f"padded input is [B, N, …], not {[*x.shape]}; give offsets with jagged input")
    batch, length = x.shape[:2]
    if max_length not in (None, length):
        raise UserError(f"padded input of {length} positions has that max_length, not {max_length}")
    if lengths is not None and (lengths.dim() != 1 or lengths.shape[0] != batch):
        raise UserError(f"lengths must have shape [{batch}], one for each sequence, not {[*lengths.shape]}")
    return length


def is_valid(layout: Ragged, length: int) -> Tensor:
    """[B, ``length``]: which positions of padded input belong to a sequence."""
    return torch.arange(length, device=layout.lengths.device) < layout.lengths[:, None]


def to_padded(x: Tensor, layout: Ragged) -> Tensor:
    """Jagged [T, …] as [B, max_length, …], zero at padded positions; differentiable."""
    rows = torch.arange(len(x), dtype=layout.starts.dtype, device=x.device)
    sequence = torch.searchsorted(layout.starts + layout.lengths, rows, right=True)
    places = sequence * layout.max_length + rows - layout.starts[sequence]
    size = layout.starts.shape[0], layout.max_length
    # Not an index with padding at some row: its backward pass would add up all padding there, one by one.
    padded = x.new_zeros(size[0] * size[1], *x.shape[1:]).index_copy(0, places, x)
    return padded.view(*size, *x.shape[1:])


def to_jagged(x: Tensor, layout: Ragged) -> Tensor:
    """Padded [B, N, …] as the rows [T, …] of its valid positions, in order; differentiable."""
    return x[is_valid(layout, x.shape[1])]
