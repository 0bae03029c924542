"""The definition of ``hierarchical_sequence_fusion``, in plain PyTorch, and what it asks of its arguments.

B sequences, N positions, D features, K windows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.errors import UserError
from neuroexapt.kernels.ragged import check_features, is_valid, ragged, to_jagged, to_padded


def hierarchical_sequence_fusion(
    x: Tensor,
    scale_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    out_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    windows: Sequence[int] = (1, 3, 7, 15),
    temperature: float = 1.0,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """``neuroexapt.functional.hierarchical_sequence_fusion`` for weights of x's dtype."""
    layout = ragged(x, lengths, offsets, max_length)
    padded = x if offsets is None else to_padded(x, layout)
    is_padding = ~is_valid(layout, padded.shape[1])[..., None]
    padded = padded.masked_fill(is_padding, 0)  # [B, N, D]
    shares = torch.softmax(F.linear(padded, scale_weight) / temperature, dim=-1)  # [B, N, K]
    means = torch.stack([causal_mean(padded, window) for window in windows], dim=-2)  # [B, N, K, D]
    fused = (shares.to(x.dtype)[..., None] * means).sum(-2)
    gate = torch.sigmoid(F.linear(torch.cat([padded, fused], dim=-1), gate_weight, gate_bias))
    y = F.layer_norm(padded + gate * F.linear(fused, out_weight), x.shape[-1:], norm_weight, norm_bias, eps)
    y = y.to(x.dtype).masked_fill(is_padding, 0)
    return y if offsets is None else to_jagged(y, layout)


def causal_mean(x: Tensor, window: int) -> Tensor:
    """Mean over each position and the ``window − 1`` before it, as far as there are any: [B, N, D]."""
    if not x.numel():
        return x
    padded_in_front = F.pad(x.transpose(1, 2), (window - 1, 0))
    means = F.avg_pool1d(padded_in_front, window, stride=1).transpose(1, 2)
    places = torch.arange(1, x.shape[1] + 1, device=x.device).clamp(max=window)
    return means * (window / places).to(x.dtype)[:, None]


def check(
    x: Tensor,
    scale_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    out_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    windows: Sequence[int],
    temperature: float,
    offsets: Tensor | None,
) -> None:
    """Raise ``UserError`` where shapes or options do not fit together."""
    check_features("x", x, offsets)
    width = x.shape[-1]
    expected = {
        "scale_weight": (scale_weight, (len(windows), width)),
        "gate_weight": (gate_weight, (width, 2 * width)),
        "gate_bias": (gate_bias, (width,)),
        "out_weight": (out_weight, (width, width)),
        "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise UserError(
                f"{name} must have shape {[*shape]} for {len(windows)} windows over x of {width} features, "
                f"not {[*tensor.shape]}"
            )
    if not windows or min(windows) < 1:
        raise UserError(f"windows must be one or more lengths of at least 1, not {tuple(windows)}")
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature}")
