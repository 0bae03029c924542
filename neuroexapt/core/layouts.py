"""Two ways to hold pictures and to run many candidates on them at once.

Both keep the channels of N merged candidates in dimension 1, [·, N · C, …]. ``Pictures`` is PyTorch's own
layout, with grouped convolutions. ``SmallPlanes`` puts the pictures of a batch last and makes matrix products
of all convolutions.
"""

import enum
import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.core.operations import Pool, SepConvBlock

SMALL_PLANE = 64
"""Most pixels for which products with banded matrices pay off: their cost grows with the square."""


class Merging(enum.Enum):
    """Which convolutions run together."""

    NONE = enum.auto()
    KINDS = enum.auto()
    """Those of one kernel size and dilation."""
    FAMILIES = enum.auto()
    """Those of one dilation."""


class Layout(Protocol):
    """How a state is held on its way to its nodes. Blocks that run together have one stride."""

    merging: Merging

    def enter(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in this layout."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """[B, C, H, W] again."""
        ...

    def pool(self, x: Tensor, pool: Pool) -> Tensor:
        """``pool(x)``."""
        ...

    def convolve_one(self, x: Tensor, blocks: Sequence[SepConvBlock]) -> Tensor:
        """Depthwise and pointwise convolutions of the one ``x`` of C channels by N blocks → N · C_out."""
        ...

    def convolve_each(self, x: Tensor, blocks: Sequence[SepConvBlock]) -> Tensor:
        """The same where ``x`` has N · C channels, C for each block."""
        ...


def choose_layout(x: Tensor) -> Layout:
    """The layout for states like ``x``; products also want a batch that makes up for their matrices."""
    batch, _, height, width = x.shape
    if height * width <= min(SMALL_PLANE, 4 * batch):
        return SmallPlanes()
    # Grouped convolutions save launches on a GPU; on the CPU they take longer than one by one.
    return Pictures(Merging.NONE if x.device.type == "cpu" else Merging.KINDS)


class Pictures:
    """[B, N · C, H, W] and grouped convolutions."""

    def __init__(self, merging: Merging) -> None:
        self.merging = merging

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x

    def pool(self, x: Tensor, pool: Pool) -> Tensor:
        return pool(x)

    def convolve_one(self, x: Tensor, blocks: Sequence[SepConvBlock]) -> Tensor:
        # Copies of x are faster than a depthwise convolution with several outputs a channel.
        return self.convolve_each(x.repeat(1, len(blocks), 1, 1) if len(blocks) > 1 else x, blocks)

    def convolve_each(self, x: Tensor, blocks: Sequence[SepConvBlock]) -> Tensor:
        kernels = _depthwise_kernels(blocks).flatten(0, 1)
        stride, dilation = blocks[0].stride, blocks[0].dilation
        padding = dilation * (kernels.shape[-1] // 2)
        y = F.conv2d(x, kernels, None, stride, padding, dilation, groups=x.shape[1])
        if len(blocks) == 1:
            return F.conv2d(y, blocks[0].pointwise.weight)
        # As products, since grouped convolutions are slow: [N, C_out, C] · [B, N, C, P']
        z = _pointwise_matrices(blocks) @ y.unflatten(1, (len(blocks), -1)).flatten(3)
        return z.flatten(1, 2).unflatten(-1, y.shape[2:])


class SmallPlanes:
    """[1, N · C, H, W, B]: a depthwise convolution is a product with a banded matrix for each channel.

    That matrix has a row for each output and a column for each input pixel and is linear in the kernel. An
    Inf or NaN in one pixel spreads over its whole plane.
    """

    merging = Merging.FAMILIES

    def enter(self, x: Tensor) -> Tensor:
        return x.permute(1, 2, 3, 0).contiguous().unsqueeze(0)

    def leave(self, x: Tensor) -> Tensor:
        return x.squeeze(0).permute(3, 0, 1, 2)

    def pool(self, x: Tensor, pool: Pool) -> Tensor:
        # To PyTorch these are C pictures of B channels in channels-last order, of which its pools are fast.
        return pool(x.squeeze(0).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous().unsqueeze(0)

    def convolve_one(self, x: Tensor, blocks: Sequence[SepConvBlock]) -> Tensor:
        _, channels, height, width, batch = x.shape
        bands = _bands(_depthwise_kernels(blocks).transpose(0, 1), blocks[0], height, width)
        # [C, N · P', P] · [C, P, B]
        y = torch.bmm(bands.flatten(1, 2), x.view(channels, height * width, batch))
        return _pointwise(y.view(channels, len(blocks), -1).transpose(0, 1), x, blocks)

    def convolve_each(self, x: Tensor, blocks: Sequence[SepConvBlock]) -> Tensor:
        _, merged_channels, height, width, batch = x.shape
        bands = _bands(_depthwise_kernels(blocks).flatten(0, 1), blocks[0], height, width)
        # [N · C, P', P] · [N · C, P, B]
        y = torch.bmm(bands, x.view(merged_channels, height * width, batch))
        return _pointwise(y.view(len(blocks), merged_channels // len(blocks), -1), x, blocks)


def _depthwise_kernels(blocks: Sequence[SepConvBlock]) -> Tensor:
    """[N, C, 1, k, k], all padded to the largest k."""
    weights = [block.depthwise.weight for block in blocks]
    largest = max(weight.shape[-1] for weight in weights)
    kernels = []
    for size, same_size in itertools.groupby(weights, key=lambda weight: weight.shape[-1]):
        stacked = torch.stack(list(same_size))
        kernels.append(stacked if size == largest else F.pad(stacked, [(largest - size) // 2] * 4))
    return torch.cat(kernels) if len(kernels) > 1 else kernels[0]


def _bands(kernels: Tensor, block: SepConvBlock, height: int, width: int) -> Tensor:
    """[…, 1, k, k] → […, P', P]: the matrices that convolve planes of P pixels into planes of P'."""
    places = _places(
        kernels.shape[-1], block.dilation, block.stride, height, width, kernels.dtype, kernels.device
    )
    return (kernels.flatten(-3) @ places).unflatten(-1, (-1, height * width))


@functools.lru_cache(maxsize=256)
def _places(
    size: int, dilation: int, stride: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[k², P' · P]: ones where the elements of a kernel stand in its matrix.

    A convolution of all pictures with one bright pixel by all kernels with one element tells which.
    """
    with torch.inference_mode(False), torch.no_grad():
        pictures = torch.eye(height * width).view(-1, 1, height, width)
        kernels = torch.eye(size * size).view(-1, 1, size, size)
        y = F.conv2d(pictures, kernels, None, stride, dilation * (size // 2), dilation)
        return y.flatten(2).permute(1, 2, 0).flatten(1).to(device, dtype)


def _pointwise(y: Tensor, x: Tensor, blocks: Sequence[SepConvBlock]) -> Tensor:
    """[N, C, P' · B] → [1, N · C_out, H', W', B] where ``x``, of which ``y`` was made, is [1, ·, H, W, B]."""
    height, width, batch = x.shape[2:]
    stride = blocks[0].stride
    z = torch.bmm(_pointwise_matrices(blocks), y)
    return z.view(1, -1, -(-height // stride), -(-width // stride), batch)


def _pointwise_matrices(blocks: Sequence[SepConvBlock]) -> Tensor:
    """[N, C_out, C]."""
    return torch.stack([block.pointwise.weight.flatten(1) for block in blocks])
