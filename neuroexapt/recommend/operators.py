"""The operators that have weights, as modules of one width; causal, zero at padded positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt import functional


class AttentionLayerNorm(nn.Module):
    """``LN(x + Drop(W_o · attention(W_q x, W_k x, W_v x)))``, [B, N, D] → [B, N, D].

    Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", 2018.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3 * self.num_heads, -1)).chunk(3, dim=-2)
        return functional.fused_attention_layernorm(
            x,
            query,
            key,
            value,
            self.out.weight,
            self.out.bias,
            self.norm.weight,
            self.norm.bias,
            dropout=self.dropout if self.training else 0.0,
            eps=self.norm.eps,
            lengths=lengths,
        )


class SequenceFusion(nn.Module):
    """Means over several windows, chosen between and gated at each position: [B, N, D] → [B, N, D]."""

    def __init__(self, width: int, windows: tuple[int, ...] = (1, 3, 7, 15)) -> None:
        super().__init__()
        self.windows = windows
        self.scale = nn.Linear(width, len(windows), bias=False)
        self.gate = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return functional.hierarchical_sequence_fusion(
            x,
            self.scale.weight,
            self.gate.weight,
            self.gate.bias,
            self.out.weight,
            self.norm.weight,
            self.norm.bias,
            windows=self.windows,
            eps=self.norm.eps,
            lengths=lengths,
        )


class InterestPools(nn.Module):
    """Pools [B, 3, D] of a history and the similarity [B, N] of its items, with a learned rate of decay."""

    def __init__(self) -> None:
        super().__init__()
        self.raw_decay = nn.Parameter(torch.tensor(-2.0))

    def forward(
        self, items: Tensor, target: Tensor, timestamps: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decay = F.softplus(self.raw_decay)
        return functional.sequence_recommendation_interaction(
            items, target, decay, timestamps=timestamps, lengths=lengths
        )
