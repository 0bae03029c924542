"""The candidate operations of recommenders, and the heads that make a query of a history.

An operation maps states [B, N, D] to such, causally: what it gives at a position depends on that position and
those before it alone, and is zero where a history has ended. A head maps states to one query [B, D].
Legend: B histories, N positions, D width, H attention heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from neuroexapt import functional
from neuroexapt.core.operations import MixedOp, Zero
from neuroexapt.errors import UserError

TIME_BUCKETS = 64
"""Of differences of times in seconds; they grow by a third, so these reach seven years."""
SECONDS_A_DAY = 86_400
POOLED = 5
"""Newest items that count as the short term."""
CROSSED = 8
"""Newest items whose products the dot interaction takes."""


@dataclass(frozen=True)
class SequenceSize:
    """What all operations of a network share. ``dropout`` is that of what an operation, or a head, adds to
    its input: before the sum, and before the norm of the sum where there is one.
    """

    width: int
    max_length: int
    has_times: bool = False
    heads: int = 2
    dropout: float = 0.0


class Places(NamedTuple):
    """Where histories end and when things happened: ``lengths`` [B], ``times`` [B, N] int64 in seconds."""

    lengths: Tensor
    times: Tensor | None

    @classmethod
    def all_of(cls, x: Tensor) -> "Places":
        """Those of full histories without times."""
        return cls(torch.full((len(x),), x.shape[1], device=x.device), None)

    def clear_rest(self, x: Tensor) -> Tensor:
        """``x`` [B, N, D] with zeros after the end of each history."""
        is_rest = torch.arange(x.shape[1], device=x.device) >= self.lengths[:, None]
        return x.masked_fill(is_rest[..., None], 0)


class SequenceOperation(nn.Module):
    """Called with states [B, N, D] and, unless all histories are full, with their places."""

    def forward(self, x: Tensor, places: Places | None = None) -> Tensor:
        return self.run(x, places or Places.all_of(x))

    def run(self, x: Tensor, places: Places) -> Tensor:
        raise NotImplementedError


class Skip(SequenceOperation):
    def run(self, x: Tensor, places: Places) -> Tensor:
        return x


class HstuUnit(SequenceOperation):
    """``U, V, Q, K = split(SiLU(W_1 LN(x)))``, ``y = x + Drop(W_2 (LN(A V) ⊙ U))`` with HSTU's attention A
    over the last ``window`` positions (None: all).

    Source: Zhai et al., "Actions Speak Louder than Words", ICML 2024.
    """

    def __init__(self, size: SequenceSize, window: int | None = None) -> None:
        super().__init__()
        self.heads, self.window, self.dropout = size.heads, window, size.dropout
        self.norm = nn.LayerNorm(size.width)
        self.project_in = nn.Linear(size.width, 4 * size.width)
        self.position_bias = nn.Parameter(torch.zeros(2 * size.max_length - 1))
        self.time_bias = nn.Parameter(torch.zeros(TIME_BUCKETS)) if size.has_times else None
        self.attention_norm = nn.LayerNorm(size.width)
        self.project_out = nn.Linear(size.width, size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        gate, value, query, key = F.silu(self.project_in(self.norm(x))).chunk(4, dim=-1)
        is_timed = self.time_bias is not None and places.times is not None
        attended = functional.hstu_hierarchical_attention(
            *(part.unflatten(-1, (self.heads, -1)) for part in (query, key, value)),
            position_bias=self.position_bias,
            time_bias=self.time_bias if is_timed else None,
            timestamps=places.times if is_timed else None,
            windows=(self.window,),
            lengths=places.lengths,
        ).flatten(2)
        change = self.project_out(self.attention_norm(attended) * gate)
        return places.clear_rest(x + F.dropout(change, self.dropout, self.training))


class AttentionLayerNorm(SequenceOperation):
    """``LN(x + Drop(W_o softmax(Q Kᵀ / √d + M) V))``, SASRec's attention (Kang, McAuley, ICDM 2018)."""

    def __init__(self, size: SequenceSize) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, size.dropout
        self.project_in = nn.Linear(size.width, 3 * size.width)
        self.project_out = nn.Linear(size.width, size.width)
        self.norm = nn.LayerNorm(size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        projected = self.project_in(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in projected)
        return functional.fused_attention_layernorm(
            x,
            query,
            key,
            value,
            self.project_out.weight,
            self.project_out.bias,
            self.norm.weight,
            self.norm.bias,
            dropout=self.dropout if self.training else 0.0,
            lengths=places.lengths,
        )


class HierarchicalFusion(SequenceOperation):
    """Means over several windows, weighed position by position and gated into x (see ``functional``).

    The features of ``W_o f`` that are dropped are the same for a whole batch: that takes rows off W_o and
    needs nothing of the kernels, which make the sum and its norm in one go.
    """

    def __init__(self, size: SequenceSize, windows: Sequence[int]) -> None:
        super().__init__()
        self.windows, self.dropout = tuple(windows), size.dropout
        self.scales = nn.Linear(size.width, len(windows), bias=False)
        self.gate = nn.Linear(2 * size.width, size.width)
        self.project_out = nn.Linear(size.width, size.width, bias=False)
        self.norm = nn.LayerNorm(size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        return functional.hierarchical_sequence_fusion(
            x,
            self.scales.weight,
            self.gate.weight,
            self.gate.bias,
            F.dropout1d(self.project_out.weight, self.dropout, self.training),  # whole rows of [D, D]
            self.norm.weight,
            self.norm.bias,
            windows=self.windows,
            lengths=places.lengths,
        )


class GatedConv(SequenceOperation):
    """``a, b = split(W_1 LN(x))``, ``y = x + Drop(W_2 (conv(a) ⊙ σ(b)))`` with a causal depthwise
    convolution.
    """

    def __init__(self, size: SequenceSize, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size, self.dropout = kernel_size, size.dropout
        self.norm = nn.LayerNorm(size.width)
        self.project_in = nn.Linear(size.width, 2 * size.width)
        self.conv = nn.Conv1d(size.width, size.width, kernel_size, groups=size.width)
        self.project_out = nn.Linear(size.width, size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        signal, gate = self.project_in(self.norm(x)).chunk(2, dim=-1)
        convolved = self.conv(F.pad(signal.mT, (self.kernel_size - 1, 0))).mT
        change = self.project_out(convolved * gate.sigmoid())
        return places.clear_rest(x + F.dropout(change, self.dropout, self.training))


class SwiGlu(SequenceOperation):
    """``a, b = split(W_1 LN(x))``, ``y = x + Drop(W_2 (SiLU(a) ⊙ b))`` (Shazeer, "GLU Variants", 2020)."""

    def __init__(self, size: SequenceSize) -> None:
        super().__init__()
        self.dropout = size.dropout
        self.norm = nn.LayerNorm(size.width)
        self.project_in = nn.Linear(size.width, 4 * size.width)
        self.project_out = nn.Linear(2 * size.width, size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        a, b = self.project_in(self.norm(x)).chunk(2, dim=-1)
        change = self.project_out(F.silu(a) * b)
        return places.clear_rest(x + F.dropout(change, self.dropout, self.training))


class Last(SequenceOperation):
    """The state at each history's last position [B, D]; zero for an empty history."""

    def run(self, x: Tensor, places: Places) -> Tensor:
        return newest(x, places, 1)[:, 0]


class ShortLong(SequenceOperation):
    """The last state, and what a linear layer makes of short-term, long-term and attention pools."""

    def __init__(self, size: SequenceSize) -> None:
        super().__init__()
        self.dropout = size.dropout
        self.target = nn.Linear(size.width, size.width)
        self.log_decay = nn.Parameter(torch.tensor(-3.0))
        self.project_out = nn.Linear(3 * size.width, size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        last = newest(x, places, 1)[:, 0]
        pools, _ = functional.sequence_recommendation_interaction(
            x,
            self.target(last),
            self.log_decay.exp(),
            timestamps=None if places.times is None else places.times / SECONDS_A_DAY,
            window=POOLED,
            lengths=places.lengths,
        )
        return last + F.dropout(self.project_out(pools.flatten(1)), self.dropout, self.training)


class DotInteraction(SequenceOperation):
    """The last state, and what a linear layer makes of the products of the newest ones."""

    def __init__(self, size: SequenceSize) -> None:
        super().__init__()
        self.dropout = size.dropout
        self.project_out = nn.Linear(size.width + CROSSED * (CROSSED - 1) // 2, size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        states = newest(x, places, CROSSED)
        change = self.project_out(functional.interaction_operator(states))
        return states[:, 0] + F.dropout(change, self.dropout, self.training)


class MlpConcat(SequenceOperation):
    """The last state, and what two layers make of it and of the mean of all."""

    def __init__(self, size: SequenceSize) -> None:
        super().__init__()
        self.dropout = size.dropout
        self.project_in = nn.Linear(2 * size.width, size.width)
        self.project_out = nn.Linear(size.width, size.width)

    def run(self, x: Tensor, places: Places) -> Tensor:
        last = newest(x, places, 1)[:, 0]
        mean = x.sum(dim=1) / places.lengths.clamp_min(1)[:, None]
        change = self.project_out(F.silu(self.project_in(torch.cat([last, mean], dim=1))))
        return last + F.dropout(change, self.dropout, self.training)


def newest(x: Tensor, places: Places, count: int) -> Tensor:
    """The last ``count`` states of each history, the last one first: [B, count, D], zero where there are
    fewer.
    """
    positions = places.lengths[:, None] - 1 - torch.arange(count, device=x.device)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, positions.clamp_min(0)].masked_fill((positions < 0)[..., None], 0)


OperationFactory = Callable[[SequenceSize], nn.Module]

SEQUENCE_OPS: dict[str, OperationFactory] = {
    "none": lambda size: Zero(1),
    "skip_connect": lambda size: Skip(),
    "hstu_2h": HstuUnit,
    "hstu_local_32": lambda size: HstuUnit(size, window=32),
    "attn_ln_2h": AttentionLayerNorm,
    "hier_fusion_1_3_7_15": lambda size: HierarchicalFusion(size, (1, 3, 7, 15)),
    "gated_conv_7": lambda size: GatedConv(size, 7),
    "ffn_swiglu": SwiGlu,
}
"""Candidates of an edge."""

HEADS: dict[str, OperationFactory] = {
    "last": lambda size: Last(),
    "short_long": ShortLong,
    "dot_interaction": DotInteraction,
    "mlp_concat": MlpConcat,
}
"""Candidates of the head."""


def make_sequence_op(name: str, size: SequenceSize, known: Mapping[str, OperationFactory]) -> nn.Module:
    if name not in known:
        raise UserError(f"unknown operation {name!r} of a recommender; known are {', '.join(known)}")
    return known[name](size)


class SequenceMixedOp(MixedOp):
    """``Σ_k weights[k] · op_k(x)`` over the candidates of an edge, or of the head."""

    stride = 1

    def __init__(
        self, size: SequenceSize, primitives: Sequence[str], known: Mapping[str, OperationFactory]
    ) -> None:
        nn.Module.__init__(self)
        self.primitives = tuple(primitives)
        self.ops = nn.ModuleList(make_sequence_op(name, size, known) for name in primitives)

    def forward(self, x: Tensor, weights: Tensor, places: Places | None = None) -> Tensor:
        places = places or Places.all_of(x)
        return self._mix(weights, lambda op: op(x, places), lambda: torch.zeros_like(x))
