"""The differentiable ops of the search spaces, each run by the best implementation for the call.

This is the only module that asks the backend what runs; ``neuroexapt.backend.dispatch_report`` tells
what did. Every implementation computes what ``neuroexapt.kernels.reference`` defines. All ops take
fp32, fp16 and bf16 (and, in plain PyTorch, fp64), any memory format and any strides; results follow
the first operand's dtype and memory format. Under autocast operands keep their dtype unless the op
says otherwise; weights and logits are best left in fp32. The GPU kernels sum in fp32 and can be
differentiated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neuroexapt.backend.dispatch import dispatch, explain
from neuroexapt.errors import UserError
from neuroexapt.kernels.autocast import autocast_dtype
from neuroexapt.kernels.fused_attention_layernorm import check as _check_attention
from neuroexapt.kernels.hierarchical_sequence_fusion import check as _check_fusion

if TYPE_CHECKING:
    from neuroexapt.core.plan import CellPlan


def softmax_sum(xs: Sequence[Tensor], logits: Tensor) -> Tensor:
    """``y = Σ_k softmax(logits)_k · xs[k]``: the relaxed choice among K candidates.

    Args:
        xs: K tensors of one shape; a stacked tensor [K, …] counts as K tensors.
        logits: [K], before the softmax, which is taken in at least fp32.

    Raises:
        UserError: the shapes differ, or ``logits`` is not [K].

    Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", 2019, equation 2.
    """
    return dispatch("softmax_sum", _operands(xs, logits, "logits"), logits)


def weighted_sum(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``y = Σ_k weights[k] · xs[k]``; the weights are used as they are, with no softmax.

    Args:
        xs: K tensors of one shape; a stacked tensor [K, …] counts as K tensors.
        weights: [K].

    Raises:
        UserError: the shapes differ, or ``weights`` is not [K].
    """
    return dispatch("weighted_sum", _operands(xs, weights, "weights"), weights)


def sepconv(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """relu → depthwise → pointwise convolution, without bias, padded by ``dilation · (k // 2)``.

    Args:
        x: [B, C, H, W].
        depthwise_weight: [C, 1, k, k], k odd.
        pointwise_weight: [C_out, C, 1, 1].

    Returns:
        [B, C_out, ⌈H / stride⌉, ⌈W / stride⌉]; where autocast is enabled, all are cast to its dtype.

    Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017.
    """
    _check_window(depthwise_weight.shape[-1])
    return dispatch(
        "sepconv", x, depthwise_weight, pointwise_weight, stride=stride, dilation=dilation, relu=relu
    )


def avg_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Average over each window's pixels inside the picture (padding ``k // 2``, not counted).

    ``x``: [B, C, H, W] → [B, C, ⌈H / stride⌉, ⌈W / stride⌉]; ``kernel_size`` must be odd.
    """
    _check_window(kernel_size)
    return dispatch("avg_pool", x, kernel_size, stride)


def max_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Maximum over each window (padding ``k // 2``); the first maximum takes the gradient, NaN wins.

    ``x``: [B, C, H, W] → [B, C, ⌈H / stride⌉, ⌈W / stride⌉]; ``kernel_size`` must be odd.
    """
    _check_window(kernel_size)
    return dispatch("max_pool", x, kernel_size, stride)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over height and width: [B, C, H, W] → [B, C, 1, 1]."""
    return dispatch("global_avg_pool", x)


def relu_conv_bn(x: Tensor, op: nn.Sequential) -> Tensor:
    """``op(x)`` of relu, convolution and BatchNorm; in training mode its running statistics are updated.

    ``x``: [B, C, H, W] → [B, C_out, H', W'].
    """
    return dispatch("relu_conv_bn", x, op)


def factorized_reduce(x: Tensor, op: nn.Module) -> Tensor:
    """``op(x)`` of a ``FactorizedReduce``; in training mode its running statistics are updated.

    ``x``: [B, C, H, W] → [B, C_out, ⌈H / 2⌉, ⌈W / 2⌉].
    """
    return dispatch("factorized_reduce", x, op)


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
    """HSTU's attention, without a softmax, over the whole history and local windows at several levels.

        y_i = 1/N · Σ_j SiLU(scale · ⟨q_i, k_j⟩ + p[L − 1 + j − i] + t[bucket(τ_i − τ_j)]) · v_j

    over the positions j ≤ i that i's head sees, in each head. N is ``max_length``, whatever a sequence's own
    length. ``bucket(Δ) = min(⌊ln(max(1, |Δ|)) / 0.301⌋, K − 1)``, found by comparing integers. The kernels
    look both tables up as they go and write nothing of the size N x N; gradients are deterministic. In bf16
    they take SiLU from the hardware's tanh (error 5·10⁻⁴), in fp32 products are of fp32 grade, or TF32
    where PyTorch's own may be.

    Args:
        query: [B, N, H, d] or, jagged, [T, H, d].
        key: like query.
        value: [B, N, H, dv] or [T, H, dv], of the same dtype.
        position_bias: p, [2L − 1] with L ≥ N, for all heads; best left in fp32, as the next.
        time_bias: t, [K], for all heads; needs ``timestamps``.
        timestamps: τ, [B, N] or [T] integers, in any unit and order.
        windows: one entry a level, None for the whole history, else how many of the last positions are seen,
            the query's own among them. The heads are split evenly among levels, in order.
        scale: 1 / √d by default.
        lengths: [B], of padded input, valid positions first; None: all full. What lies behind is never read.
        offsets: [B + 1], from 0 to T: where each sequence of jagged input starts and the last one ends.
        max_length: of jagged input, what no sequence exceeds.

    Returns:
        Like value, 0 at padded positions.

    Raises:
        UserError: shapes or dtypes do not fit together.

    Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for
    Generative Recommendations", ICML 2024; of its unit this is ``A(X) V(X)``.
    """
    return dispatch(
        "hstu_hierarchical_attention",
        query,
        key,
        value,
        position_bias=position_bias,
        time_bias=time_bias,
        timestamps=timestamps,
        windows=windows,
        scale=scale,
        lengths=lengths,
        offsets=offsets,
        max_length=max_length,
    )


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
    """``y = LayerNorm(x + Drop(W_o · softmax(QKᵀ / √d + M) V + b_o))``: causal attention and what follows.

    M is 0 where the key's position is at most the query's and −∞ elsewhere; the heads' results are joined
    before W_o. The kernels write neither scores nor dropout masks to memory.

    Args:
        x: [B, N, D] or, jagged, [T, D].
        query: Q, [B, N, H, d] or [T, H, d].
        key: K, of query's shape.
        value: V, of query's shape.
        out_weight: W_o, [D, H · d].
        out_bias: b_o, [D].
        norm_weight: [D].
        norm_bias: [D].
        dropout: probability with which an element of the projection is dropped and others are scaled up; give
            0 outside of training. Implementations draw different masks.
        eps: added to LayerNorm's variance.
        lengths: [B], of padded input, valid items first; None: all full. What lies behind is never read.
        offsets: [B + 1], from 0 to T: where each sequence of jagged input starts and the last one ends.
        max_length: of jagged input, what no sequence exceeds.

    Returns:
        Like x, 0 at padded positions; y_t depends on no later position. The other tensors are cast to x's
        dtype; where autocast is enabled, all are cast to its dtype.

    Raises:
        UserError: shapes do not fit together, x holds integers, or ``dropout`` is no probability below 1.

    Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", 2018.
    """
    tensors = x, query, key, value, out_weight, out_bias, norm_weight, norm_bias
    _check_attention(*tensors, dropout, offsets)
    return dispatch(
        "fused_attention_layernorm",
        *_in_one_dtype(*tensors),
        dropout=dropout,
        eps=eps,
        lengths=lengths,
        offsets=offsets,
        max_length=max_length,
    )


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
    """Means over several windows of the past, weighed position by position and gated into x.

    At position t of a sequence, with the windows w_1 … w_K, the scales E and the temperature τ:

        m^k = mean of x_s over max(0, t − w_k + 1) ≤ s ≤ t
        α   = softmax_k(⟨x_t, E_k⟩ / τ)
        f   = Σ_k α_k · m^k
        y   = LayerNorm(x_t + σ(W_g [x_t; f] + b_g) ⊙ W_o f)

    Args:
        x: [B, N, D] or, jagged, [T, D].
        scale_weight: E, [K, D].
        gate_weight: W_g, [D, 2D], its first D columns for x.
        gate_bias: b_g, [D].
        out_weight: W_o, [D, D].
        norm_weight: [D].
        norm_bias: [D].
        windows: K lengths of at least 1.
        temperature: τ > 0.
        eps: added to LayerNorm's variance.
        lengths: [B], of padded input, valid items first; None: all full. What lies behind is never read.
        offsets: [B + 1], from 0 to T: where each sequence of jagged input starts and the last one ends.
        max_length: of jagged input, what no sequence exceeds.

    Returns:
        Like x, 0 at padded positions; y_t depends on no later position. Weights are cast to x's dtype;
        where autocast is enabled, x and weights are cast to its dtype.

    Raises:
        UserError: shapes do not fit together, x holds integers, a window is empty, or the temperature is
            not above 0.

    Source: windows of several lengths after Tang and Wang, "Caser", 2018; gating after Ma et al.,
    "Hierarchical Gating Networks for Sequential Recommendation", 2019.
    """
    weights = scale_weight, gate_weight, gate_bias, out_weight, norm_weight, norm_bias
    _check_fusion(x, *weights, windows, temperature, offsets)
    return dispatch(
        "hierarchical_sequence_fusion",
        *_in_one_dtype(x, *weights),
        windows=tuple(windows),
        temperature=temperature,
        eps=eps,
        lengths=lengths,
        offsets=offsets,
        max_length=max_length,
    )


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
    """Three summaries of a user's items, and how much each item resembles those before it.

    Of a sequence of n items e_t at times τ_t, with the target v, the rate λ and ê = e / √(‖e‖² + 10⁻⁶):

        attention   Σ_t softmax_t(⟨e_t, v⟩ / √D) · e_t
        short term  mean of the last min(W, n) items
        long term   Σ_t w_t · e_t / Σ_t w_t,  w_t = e^{−λ(τ_n − τ_t)}
        similarity  s_t = Σ_{j<t} e^{−λ(τ_t − τ_j)} · ⟨ê_t, ê_j⟩

    The weights of each pool sum to 1. The pools of an empty sequence are 0. s_t depends on no later item. The
    kernel keeps the running state of s_t, D numbers, where the reference writes all pairs.

    Args:
        items: [B, N, D] or, jagged, [T, D].
        target: [B, D], of the items' dtype. A linear layer before it makes the attention bilinear.
        decay: λ ≥ 0, of shape [], in one over the unit of the timestamps; best left in fp32.
        timestamps: [B, N] or [T], not decreasing within a sequence, without gradient; differences of integers
            are exact. None: τ_t = t.
        window: W, at least 1.
        lengths: [B], of padded input, valid items first; None: all full. What lies behind is never read.
        offsets: [B + 1], from 0 to T: where each sequence of jagged input starts and the last one ends.
        max_length: of jagged input, what no sequence exceeds.

    Returns:
        The pools [B, 3, D], in the order above, and the similarity [B, N] or [T], 0 at padded positions.

    Raises:
        UserError: shapes do not fit together, items are integers, or the window is empty.

    Source: attention after Zhou et al., "Deep Interest Network", 2018, whose activation unit is a small
    network and not normalised; short-term memory after Liu et al., "STAMP", 2018, which has the last item
    alone; decay with time after Yu et al., "SLi-Rec", 2019, where it is a gate inside an LSTM.
    """
    return dispatch(
        "sequence_recommendation_interaction",
        items,
        target,
        decay,
        timestamps=timestamps,
        window=window,
        lengths=lengths,
        offsets=offsets,
        max_length=max_length,
    )


def interaction_operator(dense: Tensor, fields: Tensor | None = None) -> Tensor:
    """``R = [x ; ⟨t_i, t_j⟩ for j < i]``: a sample's dense vector, and the products of all its vectors.

    ``T = [x; e_1 … e_F]``; the pairs come row by row, (1, 0), (2, 0), (2, 1), …, with x as vector 0.

    Args:
        dense: x, [B, D]; without ``fields``, all vectors of a sample in one tensor, [B, F + 1, D].
        fields: e, [B, F, D].

    Returns:
        [B, D + F · (F + 1) / 2].

    Raises:
        UserError: the shapes do not fit together.

    Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation
    Systems", 2019.
    """
    return dispatch("interaction_operator", dense, fields)


def cell(plan: CellPlan, states: Sequence[Tensor], weights: Tensor, *, drawn_only: bool = False) -> Tensor:
    """``node_j = Σ_{i<j} MixedOp_ij(state_i, weights_ij)`` by plan; the output joins ``plan.outputs``.

    Running statistics of the plan's BatchNorms are updated in training mode.

    With ``drawn_only`` the candidates whose weight is 0 do not run, as where single paths are sampled: their
    running statistics stay, the gradients of their parameters are 0, and those of their weights ``Σ g`` of
    their node, as if each put out the constant 1. Which they are, kernels find out on the device.

    Args:
        plan: what ``neuroexapt.core.plan.plan_cell`` made of a search cell.
        states: the cell's inputs [B, C, H, W], of its own width; bf16 under autocast to it, beside fp32
            parameters and weights, which kernels take as well.
        weights: [E, K], a row an edge, used as they are.

    Returns:
        [B, len(plan.outputs) · C, ⌈H / stride⌉, ⌈W / stride⌉].
    """
    return dispatch("cell", _plan_for(states[0], plan), states, weights, drawn_only=drawn_only)


def cell_is_fused(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> bool:
    """Whether ``cell`` gains from the plan of a single edge.

    In plain PyTorch it was measured to on the CPU, where states are small planes in large batches: 1.4 to 2.9
    times as fast, others 0.8 to 1.1. On a GPU without kernels for the plan, operations may have their own.
    """
    x = states[0]
    if x.device != weights.device:
        return False
    if x.device.type == "cpu":
        are_small = len(x) >= 16 and x.shape[-2:].numel() <= 64
        return are_small and x.dtype == weights.dtype and x.dtype in (torch.float32, torch.float64)
    return explain("cell", _plan_for(x, plan), states, weights).impl != "torch"


def _plan_for(x: Tensor, plan: CellPlan) -> CellPlan:
    """In plain PyTorch, what is merged can be of any size."""
    return plan.for_kernels if x.is_cuda else plan


def _in_one_dtype(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """All of them in autocast's dtype where it is enabled, else in x's."""
    dtype = autocast_dtype(x.device) or x.dtype
    return tuple(tensor.to(dtype) for tensor in (x, *weights))


def _operands(xs: Sequence[Tensor], scores: Tensor, name: str) -> list[Tensor]:
    xs = list(xs)
    if not xs:
        raise UserError("a sum over no tensors has no shape; give at least one")
    if scores.shape != (len(xs),):
        raise UserError(f"{name} must have shape [{len(xs)}], one for each tensor, not {[*scores.shape]}")
    for x in xs:
        if x.shape != xs[0].shape:
            raise UserError(f"the tensors must have one shape, not {[*xs[0].shape]} and {[*x.shape]}")
    return xs


def _check_window(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise UserError(f"kernel_size must be odd, not {kernel_size}")
