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

    ``starts``, ``lengths``: [B] int32 on the rows' device; ``max_length``: what no length exceeds; ``rows``:
    how many there are, those of padding included.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int
    rows: int


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
        return Ragged(offsets[:-1], offsets.diff(), longest, x.shape[0])
    batch = x.shape[0]  # not len(x), which would fix B where the call is exported; so would comparing shapes
    if lengths is None:
        lengths = torch.full((batch,), longest, dtype=torch.int32, device=x.device)
    starts = torch.arange(batch, dtype=torch.int32, device=x.device) * longest
    return Ragged(starts, lengths.to(x.device, torch.int32).clamp(0, longest), longest, batch * longest)


def checked_length(x: Tensor, lengths: Tensor | None, offsets: Tensor | None, max_length: int | None) -> int:
    """What no sequence exceeds, once the arguments of ``ragged`` are known to fit together."""
    if offsets is not None:
        if lengths is not None or max_length is None:
            raise UserError("jagged input takes offsets [B + 1] and max_length, and no lengths")
        if offsets.dim() != 1 or offsets.shape[0] == 0:
            raise UserError(f"offsets must have shape [B + 1], from 0 to T, not {[*offsets.shape]}")
        return max_length
    if x.dim() < 2:
        raise UserError(f"padded input is [B, N, …], not {[*x.shape]}; give offsets with jagged input")
    batch, length = x.shape[:2]
    if max_length not in (None, length):
        raise UserError(f"padded input of {length} positions has that max_length, not {max_length}")
    if lengths is not None and (lengths.dim() != 1 or lengths.shape[0] != batch):
        raise UserError(f"lengths must have shape [{batch}], one for each sequence, not {[*lengths.shape]}")
    return length


def check_features(name: str, x: Tensor, offsets: Tensor | None) -> None:
    """Raise ``UserError`` unless x holds a vector for each position."""
    if x.dim() != (3 if offsets is None else 2) or not x.is_floating_point():
        raise UserError(
            f"{name} must be [B, N, D] or, with offsets, [T, D], of floating-point numbers, "
            f"not {[*x.shape]} of {x.dtype}"
        )


def is_valid(layout: Ragged, length: int) -> Tensor:
    """[B, ``length``]: which positions of padded input belong to a sequence."""
    return torch.arange(length, device=layout.lengths.device) < layout.lengths[:, None]


def to_padded(x: Tensor, layout: Ragged) -> Tensor:
    """Jagged [T, …] as [B, max_length, …], zero at padded positions; differentiable."""
    size = layout.starts.shape[0], layout.max_length
    # Not an index with padding at some row: its backward pass would add up all padding there, one by one.
    padded = x.new_zeros(size[0] * size[1], *x.shape[1:]).index_copy(0, _places(layout), x)
    return padded.view(*size, *x.shape[1:])


def to_jagged(x: Tensor, layout: Ragged) -> Tensor:
    """Padded [B, max_length, …] as the rows [T, …] of jagged input's layout; differentiable."""
    # Not an index with a mask, whose result has a size that the device would have to be asked for.
    return x.flatten(0, 1).index_select(0, _places(layout))


def _places(layout: Ragged) -> Tensor:
    """[T]: of jagged input's rows, where they are among the B · max_length of padded input."""
    rows = torch.arange(layout.rows, dtype=layout.starts.dtype, device=layout.starts.device)
    sequence = torch.searchsorted(layout.starts + layout.lengths, rows, right=True)
    return sequence * layout.max_length + rows - layout.starts[sequence]
