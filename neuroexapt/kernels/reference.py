"""The definition of every differentiable op of the search spaces, in plain PyTorch.

Each kernel is held to these functions, forward and in every gradient. Shapes: B batch, C channels,
H, W height and width, K kernel size or number of candidates.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.kernels.fused_attention_layernorm import (
    fused_attention_layernorm as fused_attention_layernorm,
)
from neuroexapt.kernels.hierarchical_sequence_fusion import (
    hierarchical_sequence_fusion as hierarchical_sequence_fusion,
)
from neuroexapt.kernels.hstu_hierarchical_attention import (
    hstu_hierarchical_attention as hstu_hierarchical_attention,
)
from neuroexapt.kernels.interaction_operator import interaction_operator as interaction_operator
from neuroexapt.kernels.sequence_recommendation_interaction import (
    sequence_recommendation_interaction as sequence_recommendation_interaction,
)


def weighted_sum(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``y = Σ_k weights[k] · xs[k]``; ``xs``: K tensors of one shape, ``weights``: [K]."""
    total = weights[0] * xs[0]
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        total = total + weight * x
    return total.to(xs[0].dtype)


def softmax_sum(xs: Sequence[Tensor], logits: Tensor) -> Tensor:
    """``y = Σ_k softmax(logits)[k] · xs[k]``; the softmax is taken in at least fp32, exactly once."""
    at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
    return weighted_sum(xs, torch.softmax(logits.to(at_least_fp32), dim=0))


def sepconv(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """relu → depthwise → pointwise convolution, no bias, padding ``dilation · (k // 2)``.

    ``x``: [B, C, H, W], ``depthwise_weight``: [C, 1, k, k], ``pointwise_weight``: [C_out, C, 1, 1]
    → [B, C_out, ceil(H / stride), ceil(W / stride)].
    """
    if relu:
        x = F.relu(x)
    padding = dilation * (depthwise_weight.shape[-1] // 2)
    x = F.conv2d(x, depthwise_weight, stride=stride, padding=padding, dilation=dilation, groups=x.shape[1])
    return F.conv2d(x, pointwise_weight)


def avg_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Average over the window's pixels inside the picture (padding ``k // 2``, not counted)."""
    if x.is_cuda:
        # PyTorch's backward is wrong there for channels-last inputs with padding (pytorch issue 188344).
        x = x.contiguous()
    return F.avg_pool2d(x, kernel_size, stride, padding=kernel_size // 2, count_include_pad=False)


def max_pool(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Maximum over the window (padding ``k // 2``); the first maximum takes the gradient, NaN wins."""
    return F.max_pool2d(x, kernel_size, stride, padding=kernel_size // 2)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over height and width: [B, C, H, W] → [B, C, 1, 1]."""
    return F.adaptive_avg_pool2d(x, 1)


def relu_conv_bn(x: Tensor, op: nn.Sequential) -> Tensor:
    """``op(x)``."""
    return op(x)


def factorized_reduce(x: Tensor, op: Any) -> Tensor:
    """``op(x)``."""
    return op.bn(op.convolve(x))
