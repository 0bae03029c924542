"""What the functions that compute a fused cell take: ``cell_kernels``, and others that do the same.

Legend: B pictures of C channels, fp32 or bf16, and all else fp32; ``z``: [B, C, H, W], an input of a
BatchNorm; ``stats``: [C, 2], mean and 1 / sqrt(variance + eps); ``moments``: [parts, C, 3], partial {count,
mean, sum of squared deviations}; ``coef``: [C, 4], {A, B, D, 0} with dz = A · g + B · z + D. Only an input's
first dimension may be strided; weights are 16-byte aligned.

``mixing``: the mixing weight [] of a candidate that runs only if that is not 0, None of one that runs in any
case. What a candidate that does not run would have written holds anything, and no kernel reads it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Conv(NamedTuple):
    """W_pw · (W_dw ⋆ relu(x)), or of relu((x − mean) · rstd) where ``stats`` are given, at stride 1 only."""

    x: Tensor
    stats: Tensor | None
    depthwise: Tensor
    pointwise: Tensor
    dilation: int
    stride: int = 1
    mixing: Tensor | None = None


class ConvGrad(NamedTuple):
    """What the gradient of ``conv``, whose output is ``z``, starts from: dz = A · g + B · z + D."""

    conv: Conv
    z: Tensor
    g: Tensor
    coef: Tensor


class ReduceGrad(NamedTuple):
    """What the gradient of a factorized reduction starts from, as in ``ConvGrad``."""

    weights: tuple[Tensor, Tensor]
    z: Tensor
    g: Tensor
    coef: Tensor


class DenseGrad(NamedTuple):
    """What the gradient of a dense convolution starts from, as in ``ConvGrad``."""

    weight: Tensor
    z: Tensor
    g: Tensor
    coef: Tensor
    mixing: Tensor | None = None


class Partials(NamedTuple):
    """Partial weight gradients, [parts, …] for the depthwise and the pointwise weight of each convolution, or
    for the weights of both halves of each factorized reduction."""

    depthwise: list[Tensor]
    pointwise: list[Tensor]


class Pooling(NamedTuple):
    """A pool of ``kind`` "max" or "avg"."""

    kind: str
    stride: int


class Summand(NamedTuple):
    """weights[entry] · (z − mean) · rstd, or of z itself without ``stats``; entry None: weight 1.

    Gradients form ``pooling`` of z, where it is given, once more instead of z itself: pools are not kept. An
    edge has no more than one of a kind.
    """

    z: Tensor
    stats: Tensor | None
    entry: tuple[int, int] | None
    pooling: Pooling | None = None


class PoolGrad(NamedTuple):
    """What a state gets back from one node: through its pools and, with weights[identity], as it is."""

    g: Tensor
    max_coef: Tensor | None
    avg_coef: Tensor | None
    identity: tuple[int, int] | None


class StateGrad(NamedTuple):
    """What the gradient of the state ``x`` adds up: what its pools and identities pass back, and addends.

    ``means_only``: whether its pools, if there are any, are averages without statistics.
    """

    x: Tensor
    pools: Sequence[PoolGrad]
    addends: Sequence[Tensor]
    means_only: bool = False


def products_are_exact() -> bool:
    """Whether products are to be of fp32 grade, as those of PyTorch's own convolutions are, or of TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
