"""Pools and decayed self-similarity of item sequences in plain PyTorch: the definition of their kernel.

Legend: B batch, N longest sequence, D width; T rows of jagged input.
"""

import torch
from torch import Tensor

from neuroexapt.errors import UserError
from neuroexapt.kernels.autocast import keeping_dtypes
from neuroexapt.kernels.ragged import (
    Ragged,
    check_features,
    checked_length,
    is_valid,
    ragged,
    to_jagged,
    to_padded,
)

# Under the root of ê = e / √(‖e‖² + EPSILON), so that an item of zeros has a finite gradient.
EPSILON = 1e-6


@keeping_dtypes
def sequence_recommendation_interaction(
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    *,
    timestamps: Tensor | None = None,
    window: int = 5,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Three pools [B, 3, D] and the similarity of each item to those before; see ``neuroexapt.functional``.

    The similarity is taken pair by pair, [B, N, N].
    """
    check_arguments(items, target, decay, timestamps, window, lengths, offsets, max_length)
    layout = ragged(items, lengths, offsets, max_length)
    at_least_fp32 = torch.promote_types(items.dtype, torch.float32)
    padded = to_padded(items, layout) if offsets is not None else items
    valid = is_valid(layout, layout.max_length)  # [B, N]
    x = padded.to(at_least_fp32).masked_fill(~valid[..., None], 0)
    times = _padded_times(timestamps, layout, x)
    decay = decay.to(at_least_fp32)
    weights = torch.stack(
        [
            _attention_weights(x, target.to(at_least_fp32), valid),
            _recent_weights(valid, layout, window).to(at_least_fp32),
            _decayed_weights(times, decay, valid, layout),
        ],
        dim=1,
    )  # [B, 3, N]
    similarity = _similarity(x, times, decay, valid)
    if offsets is not None:
        similarity = to_jagged(similarity, layout)
    return (weights @ x).to(items.dtype), similarity.to(items.dtype)


def check_arguments(
    items: Tensor,
    target: Tensor,
    decay: Tensor,
    timestamps: Tensor | None,
    window: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    max_length: int | None,
) -> None:
    """Raise ``UserError`` where arguments do not fit together."""
    check_features("items", items, offsets)
    checked_length(items, lengths, offsets, max_length)
    batch = items.shape[0] if offsets is None else offsets.shape[0] - 1
    if not _has_shape(target, batch, items.shape[-1]):
        raise UserError(f"target must be {[batch, items.shape[-1]]}, a row a sequence, not {[*target.shape]}")
    if decay.dim():
        raise UserError(f"decay is one rate, a tensor of shape [], not {[*decay.shape]}")
    if timestamps is not None and not _has_shape(timestamps, *items.shape[:-1]):
        raise UserError(
            f"timestamps must be {[*items.shape[:-1]]}, one for each item, not {[*timestamps.shape]}"
        )
    if window < 1:
        raise UserError(f"window must be at least 1, not {window}")


def _has_shape(x: Tensor, *sizes: int) -> bool:
    """Size by size: comparing shapes would fix B where the call is exported."""
    return x.dim() == len(sizes) and all(a == b for a, b in zip(x.shape, sizes, strict=True))


def _padded_times(timestamps: Tensor | None, layout: Ragged, x: Tensor) -> Tensor:
    """[B, N] in the timestamps' own dtype, in which differences of integers are exact; 0 at padding."""
    if timestamps is None:
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    if timestamps.dim() == 1:
        return to_padded(timestamps, layout)
    return timestamps.masked_fill(~is_valid(layout, x.shape[1]), 0)


def _attention_weights(x: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """softmax_t(⟨e_t, v⟩ / √D) over the valid positions, 0 elsewhere: [B, N]."""
    scores = torch.einsum("bnd,bd->bn", x, target) / x.shape[-1] ** 0.5
    # The smallest number, not −∞: a softmax over no position would be NaN.
    scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=1) * valid


def _recent_weights(valid: Tensor, layout: Ragged, window: int) -> Tensor:
    """1 / min(W, n) at the last W valid positions: [B, N]."""
    lengths = layout.lengths[:, None]
    recent = valid & (torch.arange(valid.shape[1], device=valid.device) >= lengths - window)
    return recent / lengths.clamp(1, window)


def _decayed_weights(times: Tensor, decay: Tensor, valid: Tensor, layout: Ragged) -> Tensor:
    """e^{−λ(τ_n − τ_t)} over its sum: [B, N]. The sum is at least the last item's 1."""
    if not times.shape[1]:
        return times.to(decay.dtype)
    last = times.gather(1, (layout.lengths.long() - 1).clamp_min(0)[:, None])
    age = (last - times).masked_fill(~valid, 0).to(decay.dtype)
    weights = torch.exp(-decay * age) * valid
    return weights / weights.sum(1, keepdim=True).clamp_min(1)


def _similarity(x: Tensor, times: Tensor, decay: Tensor, valid: Tensor) -> Tensor:
    """Σ_{j<t} e^{−λ(τ_t − τ_j)} ⟨ê_t, ê_j⟩: [B, N]."""
    unit = x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
    is_pair = (valid[:, :, None] & valid[:, None, :]).tril(-1)
    gaps = (times[:, :, None] - times[:, None, :]).masked_fill(~is_pair, 0).to(decay.dtype)
    return (unit @ unit.mT * torch.exp(-decay * gaps) * is_pair).sum(-1)
