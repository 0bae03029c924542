"""The candidate operations of the vision search spaces and the MixedOp that blends them.

Definitions follow DARTS (Liu et al., ICLR 2019): every operation maps [B, C, H, W] to
[B, C, ceil(H / stride), ceil(W / stride)]. Add your own with one line, ``OPS["name"] = factory``; a factory
takes ``(channels, stride, affine)`` and returns a module of that shape contract.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from neuroexapt import functional
from neuroexapt.core.drawn import add_constants, part, run_drawn
from neuroexapt.errors import UserError

if TYPE_CHECKING:
    from neuroexapt.core.plan import CellPlan

OpFactory = Callable[[int, int, bool], nn.Module]

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class Zero(nn.Module):
    """No connection: zeros like its input, subsampled by ``stride``. The input gets no gradient."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])


class Noise(nn.Module):
    """Standard normal noise in the place of the picture, which gets no gradient (Zela et al., ICLR 2020).

    Cells that recompute draw it anew in their backward pass.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])


class Identity(nn.Module):
    """Skip connection at stride 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def shift_by_one(x: Tensor) -> Tensor:
    """``x`` from its second row and column on; odd heights and widths keep their size, padded by zeros."""
    height, width = x.shape[-2:]
    shifted = x[:, :, 1:, 1:]
    return F.pad(shifted, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else shifted


def two_grids(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every second pixel of ``x`` and of ``shift_by_one(x)``: what a factorized reduction reads.

    Convolutions of stride 2 would read the same, but their weight gradient by oneDNN corrupts memory for
    large channels-last pictures of less than 16 channels.
    """
    return x[:, :, ::2, ::2], shift_by_one(x)[:, :, ::2, ::2]


class FactorizedReduce(nn.Module):
    """Skip connection at stride 2: two 1x1 convolutions on grids shifted by one pixel, side by side.

    Odd heights and widths are padded at the bottom and right for the shifted grid, so that the output is
    [B, channels_out, ceil(H / 2), ceil(W / 2)] for any picture.
    """

    def __init__(self, channels_in: int, channels_out: int, affine: bool = True) -> None:
        super().__init__()
        if channels_out % 2:
            raise UserError(
                f"FactorizedReduce makes two halves of its output: {channels_out} channels are odd, "
                "use an even number"
            )
        self.conv_1 = nn.Conv2d(channels_in, channels_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(channels_in, channels_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return functional.factorized_reduce(x, self)

    def convolve(self, x: Tensor) -> Tensor:
        """All but the batch normalisation."""
        first, second = two_grids(F.relu(x))
        return torch.cat([F.conv2d(first, self.conv_1.weight), F.conv2d(second, self.conv_2.weight)], dim=1)


class ReLUConvBN(nn.Module):
    """relu → convolution → batch normalisation."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(channels_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_conv_bn(x, self.op)


def convolve_joined(active: Tensor, ops: Sequence[ReLUConvBN]) -> Tensor:
    """The convolutions of ``ops``, which have one geometry, as one; ``active``: after the relu.

    [B, C, H, W] → [B, Σ C_out, H', W'].
    """
    convs: list[Any] = [op.op[1] for op in ops]
    weight = torch.cat([conv.weight for conv in convs])
    return F.conv2d(active, weight, None, convs[0].stride, convs[0].padding)


class SepConvBlock(nn.Module):
    """relu → depthwise → pointwise convolution → batch normalisation; the first three are one op."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int,
        dilation: int,
        affine: bool,
    ) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.depthwise = nn.Conv2d(channels_in, channels_in, kernel_size, groups=channels_in, bias=False)
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.convolve(x))

    def convolve(self, x: Tensor) -> Tensor:
        """All but the batch normalisation."""
        return functional.sepconv(
            x, self.depthwise.weight, self.pointwise.weight, stride=self.stride, dilation=self.dilation
        )


class DilConv(SepConvBlock):
    """relu → dilated depthwise → pointwise convolution → batch normalisation."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        stride: int,
        dilation: int = 2,
        affine: bool = True,
    ) -> None:
        super().__init__(channels_in, channels_out, kernel_size, stride, dilation, affine)


class SepConv(nn.Module):
    """(relu → depthwise → pointwise convolution → batch normalisation) twice, the stride in the first."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel_size: int, stride: int, affine: bool = True
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            SepConvBlock(channels_in, channels_in, kernel_size, stride, 1, affine),
            SepConvBlock(channels_in, channels_out, kernel_size, 1, 1, affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)

    def convolve(self, x: Tensor) -> Tensor:
        """All but the last batch normalisation."""
        first, second = self.op
        assert isinstance(second, SepConvBlock)
        return second.convolve(first(x))


class FactorizedConv(nn.Module):
    """relu → 1xk → kx1 convolution → batch normalisation (``conv_7x1_1x7`` of NASNet and AmoebaNet)."""

    def __init__(self, channels: int, kernel_size: int, stride: int, affine: bool = True) -> None:
        super().__init__()
        k, pad = kernel_size, kernel_size // 2
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, (1, k), stride=(1, stride), padding=(0, pad), bias=False),
            nn.Conv2d(channels, channels, (k, 1), stride=(stride, 1), padding=(pad, 0), bias=False),
            nn.BatchNorm2d(channels, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Pool(nn.Module):
    """``avg`` (padding not counted) or ``max`` pooling with padding ``kernel_size // 2``."""

    def __init__(self, kind: str, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kind, self.kernel_size, self.stride = kind, kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        pool = functional.avg_pool if self.kind == "avg" else functional.max_pool
        return pool(x, self.kernel_size, self.stride)

    def extra_repr(self) -> str:
        return f"{self.kind}, kernel_size={self.kernel_size}, stride={self.stride}"


OPS: dict[str, OpFactory] = {
    "none": lambda channels, stride, affine: Zero(stride),
    "avg_pool_3x3": lambda channels, stride, affine: Pool("avg", 3, stride),
    "max_pool_3x3": lambda channels, stride, affine: Pool("max", 3, stride),
    "skip_connect": lambda channels, stride, affine: (
        Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)
    ),
    "sep_conv_3x3": lambda channels, stride, affine: SepConv(channels, channels, 3, stride, affine),
    "sep_conv_5x5": lambda channels, stride, affine: SepConv(channels, channels, 5, stride, affine),
    "sep_conv_7x7": lambda channels, stride, affine: SepConv(channels, channels, 7, stride, affine),
    "dil_conv_3x3": lambda channels, stride, affine: DilConv(channels, channels, 3, stride, 2, affine),
    "dil_conv_5x5": lambda channels, stride, affine: DilConv(channels, channels, 5, stride, 2, affine),
    "nor_conv_1x1": lambda channels, stride, affine: ReLUConvBN(channels, channels, 1, stride, 0, affine),
    "nor_conv_3x3": lambda channels, stride, affine: ReLUConvBN(channels, channels, 3, stride, 1, affine),
    "noise": lambda channels, stride, affine: Noise(stride),
    "conv_7x1_1x7": lambda channels, stride, affine: FactorizedConv(channels, 7, stride, affine),
}


def make_op(name: str, channels: int, stride: int, affine: bool) -> nn.Module:
    """Build the operation that ``OPS`` registers under ``name``; an unknown name is a UserError."""
    if name not in OPS:
        close = difflib.get_close_matches(name, OPS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(OPS)}"
        raise UserError(f"unknown operation {name!r}: {hint}")
    return OPS[name](channels, stride, affine)


class MixedOp(nn.Module):
    """``y = Σ_k weights[k] · op_k(x)`` over the candidate operations of one edge.

    ``x``: [B, C, H, W], ``weights``: [K] in the order of ``primitives``, already relaxed (softmax is the
    strategy's business). With ``norm_pools`` a BatchNorm without affine parameters follows each pool, as in
    DARTS.
    ``none`` contributes exactly nothing, so an Inf or NaN in ``x`` does not spread through it.

    A ``fused`` edge runs as a search cell of its own, which can be differentiated once. Others run one
    operation after the other, as do edges that carry hooks and those under torch.compile; switch whenever
    you like. With ``drawn_only`` operations of weight 0 do not run, see ``functional.cell``.

    Raises:
        UserError: an operation is unknown or listed twice, or ``weights`` is not [K].
    """

    fused = True
    drawn_only = False
    _plan: CellPlan | None = None

    def __init__(
        self, channels: int, stride: int, primitives: Sequence[str] = PRIMITIVES, norm_pools: bool = True
    ) -> None:
        super().__init__()
        if len(set(primitives)) != len(primitives):
            raise UserError(f"an edge lists an operation twice: {', '.join(primitives)}")
        self.channels, self.stride = channels, stride
        self.primitives = tuple(primitives)
        self.norm_pools = norm_pools
        self.ops = nn.ModuleList()
        for name in primitives:
            op = make_op(name, channels, stride, affine=False)
            if norm_pools and isinstance(op, Pool):
                op = nn.Sequential(op, nn.BatchNorm2d(channels, affine=False))
            self.ops.append(op)

    def candidate(self, primitive: str) -> nn.Module:
        """The operation of that name."""
        return self.ops[self.primitives.index(primitive)]

    @property
    def plan(self) -> CellPlan:
        """The plan of the edge as it is now."""
        if self._plan is None or not self._plan.fits([self], self.training):
            # Both import this module; the first registers how plans run in plain PyTorch.
            from neuroexapt.core import merged  # noqa: F401
            from neuroexapt.core.plan import plan_edge

            self._plan = plan_edge(self)
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make plans of their own."""
        return {**super().__getstate__(), "_plan": None}

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if weights.shape != (len(self.ops),):
            raise UserError(f"weights must have shape [{len(self.ops)}], not {[*weights.shape]}")
        if self.fused and not torch.compiler.is_compiling():
            plan, call = self.plan, ([x], weights[None])
            # An edge that its plan holds as a whole would call itself.
            if not plan.nodes[0].edges and functional.cell_is_fused(plan, *call):
                return functional.cell(plan, *call, drawn_only=self.drawn_only)
        return self._mix(weights, lambda op: op(x), lambda: Zero(self.stride)(x))

    def _mix(
        self, weights: Tensor, run: Callable[[nn.Module], Tensor], zeros: Callable[[], Tensor]
    ) -> Tensor:
        """``Σ_k weights[k] · run(op_k)``, or ``zeros()`` where there is nothing to add up."""
        active = {k: op for k, op in enumerate(self.ops) if not isinstance(op, Zero)}
        if not self.drawn_only:
            return self._add_up({k: run(op) for k, op in active.items()}, weights, zeros)
        outputs = run_drawn(active, weights, run)
        (weights,), constant = part(weights[None])
        return add_constants(self._add_up(outputs, weights, zeros), constant.unbind())

    def _add_up(self, outputs: Mapping[int, Tensor], weights: Tensor, zeros: Callable[[], Tensor]) -> Tensor:
        if not outputs:
            return zeros()
        if len(outputs) < len(self.ops):
            weights = torch.stack([weights[k] for k in outputs])
        return functional.weighted_sum(list(outputs.values()), weights)
