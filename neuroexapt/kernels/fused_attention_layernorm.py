"""The definition of ``fused_attention_layernorm``, in plain PyTorch, and what it asks of its arguments.

B sequences, N positions, D features, H heads of d features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.errors import UserError
from neuroexapt.kernels.ragged import check_features, is_valid, ragged, to_jagged, to_padded


def fused_attention_layernorm(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    dropout: float = 0.0,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """``neuroexapt.functional.fused_attention_layernorm`` for weights of x's dtype."""
    layout = ragged(x, lengths, offsets, max_length)
    tensors = [x, query, key, value]
    if offsets is not None:
        tensors = [to_padded(tensor, layout) for tensor in tensors]
    is_padding = ~is_valid(layout, tensors[0].shape[1])  # [B, N]
    padded, *heads = (
        tensor.masked_fill(is_padding[(...,) + (None,) * (tensor.dim() - 2)], 0) for tensor in tensors
    )
    attended = causal_attention(*heads).flatten(-2)  # [B, N, H·d]
    projected = F.linear(attended, out_weight, out_bias)
    y = F.layer_norm(padded + F.dropout(projected, dropout), x.shape[-1:], norm_weight, norm_bias, eps)
    y = y.to(x.dtype).masked_fill(is_padding[..., None], 0)
    return y if offsets is None else to_jagged(y, layout)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(QKᵀ / √d + M) V`` of each head, M = −∞ at later positions: [B, N, H, d] each."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5  # [B, H, N, N]
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    shares = torch.softmax(scores.masked_fill(is_later, float("-inf")), dim=-1).to(value.dtype)
    return (shares @ value).transpose(1, 2)


def check(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dropout: float,
    offsets: Tensor | None,
) -> None:
    """Raise ``UserError`` where shapes or options do not fit together."""
    check_features("x", x, offsets)
    if query.dim() != x.dim() + 1 or query.shape[:-2] != x.shape[:-1]:
        raise UserError(f"query must be [{', '.join(map(str, x.shape[:-1]))}, H, d], not {[*query.shape]}")
    if not query.shape == key.shape == value.shape:
        shapes = ", ".join(str([*tensor.shape]) for tensor in (query, key, value))
        raise UserError(f"query, key and value must have one shape, not {shapes}")
    width, inner = x.shape[-1], query.shape[-2:].numel()
    if out_weight.shape != (width, inner):
        raise UserError(f"out_weight must have shape {[width, inner]}, [D, H · d], not {[*out_weight.shape]}")
    vectors = {"out_bias": out_bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor in vectors.items():
        if tensor.shape != (width,):
            raise UserError(f"{name} must have shape [{width}], not {[*tensor.shape]}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be at least 0 and below 1, not {dropout}")
