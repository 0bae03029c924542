"""Attention of HSTU in plain PyTorch: the definition that its kernels are held to.

Legend: B batch, N longest sequence, T rows of jagged input, H heads, d width of a head's queries and keys,
dv of its values, L ≥ N positions that the position table has room for, K time buckets.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.errors import UserError
from neuroexapt.kernels.autocast import keeping_dtypes
from neuroexapt.kernels.ragged import Ragged, checked_length, is_valid, ragged, to_jagged, to_padded

# The width of a time bucket in ln|Δt|, which is HSTU's: buckets grow by a third from each to the next.
BUCKET_WIDTH = 0.301
_LARGEST_BUCKET_START = 2.0**62


@keeping_dtypes
def hstu_hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamps: Tensor | None = None,
    windows: Sequence[int | None] = (None,),
    scale: float | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """``mask ⊙ SiLU(scale · Q Kᵀ + biases) / N · V``, like value; see ``neuroexapt.functional``."""
    check_arguments(
        query, key, value, position_bias, time_bias, timestamps, windows, lengths, offsets, max_length
    )
    layout = ragged(query, lengths, offsets, max_length)
    if offsets is not None:
        query, key, value = (to_padded(x, layout) for x in (query, key, value))
    valid = is_valid(layout, layout.max_length)  # [B, N]
    query, key, value = (x.masked_fill(~valid[..., None, None], 0) for x in (query, key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * default_scale(query, scale)
    if position_bias is not None:
        scores = scores + _position_bias(position_bias, layout.max_length)
    if time_bias is not None and timestamps is not None:
        scores = scores + _time_bias(time_bias, timestamps, layout)
    mask = _visible(windows, query.shape[2], scores) & valid[:, None, :, None]  # [B, H, N, N]
    weights = torch.where(mask, F.silu(scores), 0) / max(layout.max_length, 1)
    output = torch.einsum("bhij,bjhd->bihd", weights.to(value.dtype), value)
    return output if offsets is None else to_jagged(output, layout)


def default_scale(query: Tensor, scale: float | None) -> float:
    """``scale``, by default 1 / √d."""
    return query.shape[-1] ** -0.5 if scale is None else scale


def time_bucket_starts(buckets: int, device: torch.device) -> Tensor:
    """The smallest |Δt| of each bucket, [K] int64: ⌈e^(0.301 · k)⌉.

    Where ⌊ln|Δt| / 0.301⌋ would depend on how a device rounds logarithms, comparing integers does not.
    """
    exponents = torch.arange(buckets, device=device, dtype=torch.float64) * BUCKET_WIDTH
    return exponents.exp().ceil().clamp_max(_LARGEST_BUCKET_START).long()


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    timestamps: Tensor | None,
    windows: Sequence[int | None],
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int | None,
) -> None:
    """Raise ``UserError`` where arguments do not fit together."""
    longest = checked_length(query, lengths, offsets, max_length)
    if query.dim() != (4 if offsets is None else 3) or key.shape != query.shape:
        raise UserError(
            "query and key must both be [B, N, H, d] or, with offsets, [T, H, d], "
            f"not {[*query.shape]} and {[*key.shape]}"
        )
    if value.shape[:-1] != query.shape[:-1]:
        raise UserError(f"value must be {[*query.shape[:-1], 'dv']}, not {[*value.shape]}")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise UserError(
            "query, key and value must have one dtype of floating-point numbers, "
            f"not {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if position_bias is not None and (
        position_bias.dim() != 1 or len(position_bias) % 2 == 0 or len(position_bias) < 2 * longest - 1
    ):
        raise UserError(
            f"position_bias must be [2 L − 1] with L ≥ {longest}, the longest sequence, "
            f"not {[*position_bias.shape]}"
        )
    _check_times(query, time_bias, timestamps)
    if not windows or query.shape[-2] % len(windows):
        raise UserError(f"{query.shape[-2]} heads cannot be split evenly among {len(windows)} windows")
    if any(window is not None and window < 1 for window in windows):
        raise UserError(f"a window is at least 1, or None for the whole history, not {[*windows]}")


def _check_times(query: Tensor, time_bias: Tensor | None, timestamps: Tensor | None) -> None:
    if (time_bias is None) != (timestamps is None):
        raise UserError("time_bias and timestamps come together")
    if time_bias is None or timestamps is None:
        return
    if time_bias.dim() != 1 or not len(time_bias):
        raise UserError(f"time_bias must be [buckets], not {[*time_bias.shape]}")
    if timestamps.shape != query.shape[:-2] or timestamps.is_floating_point():
        raise UserError(
            f"timestamps must be integers of shape {[*query.shape[:-2]]}, one for each position, "
            f"not {timestamps.dtype} {[*timestamps.shape]}"
        )


def _position_bias(table: Tensor, length: int) -> Tensor:
    """[N, N]: table[L − 1 + j − i]."""
    positions = torch.arange(length, device=table.device)
    return table[len(table) // 2 + positions - positions[:, None]]


def _time_bias(table: Tensor, timestamps: Tensor, layout: Ragged) -> Tensor:
    """[B, 1, N, N]: table[bucket(|t_i − t_j|)]."""
    times = timestamps.long()
    times = to_padded(times, layout) if times.dim() == 1 else times
    starts = time_bucket_starts(len(table), times.device)
    return table[torch.bucketize((times[:, :, None] - times[:, None, :]).abs(), starts[1:], right=True)][
        :, None
    ]


def _visible(windows: Sequence[int | None], heads: int, scores: Tensor) -> Tensor:
    """[H, N, N]: which keys a query of each head sees, its own and up to w − 1 before it."""
    length = scores.shape[-1]
    positions = torch.arange(length, device=scores.device)
    age = positions[:, None] - positions
    levels = [(age >= 0) & (age < (window or max(length, 1))) for window in windows]
    return torch.stack(levels).repeat_interleave(heads // len(windows), dim=0)
