"""Two ways to hold pictures and to convolve them for many candidates at once.

Both keep what the merged channels of N candidates hold in dimension 1, [·, N · C, …], so that BatchNorm and
sums over candidates are the same for both. ``Pictures`` is PyTorch's own layout, with grouped convolutions.
``SmallPlanes`` puts the pictures of a batch last and makes matrix products of all convolutions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.core.operations import Pool, SepConvBlock

SMALL_PLANE = 64
"""Most pixels of a plane for which products with banded matrices pay off, on a CPU of AVX-512.

At 8 x 8 pixels all depthwise convolutions that leave a state took 0.7 ms forward and 1.6 ms backward as
products, and 0.4 and 8.8 ms as grouped convolutions. The products' cost grows with the square of the pixels.
"""

Kind = Sequence[SepConvBlock]
"""Blocks of one kernel size, dilation and stride."""


class Layout(Protocol):
    """How a cell holds its states."""

    @staticmethod
    def enter(x: Tensor) -> Tensor:
        """[B, C, H, W] in this layout."""

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """[B, C, H, W] again."""

    @staticmethod
    def convolve_one(x: Tensor, kinds: Sequence[Kind]) -> Tensor:
        """Depthwise and pointwise convolution of one ``x`` of C channels by each of N blocks → N · C_out."""

    @staticmethod
    def convolve_each(x: Tensor, kinds: Sequence[Kind]) -> Tensor:
        """The same where ``x`` has N · C channels, C for each block."""


def choose_layout(x: Tensor) -> type[Layout]:
    """The layout for a cell whose inputs are like ``x``."""
    height, width = x.shape[-2:]
    return SmallPlanes if height * width <= SMALL_PLANE else Pictures


class Pictures:
    """[B, N · C, H, W] and grouped convolutions."""

    @staticmethod
    def enter(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def convolve_one(x: Tensor, kinds: Sequence[Kind]) -> Tensor:
        # Copies of x are faster than a depthwise convolution with several outputs a channel.
        return _grouped_convolutions([x.repeat(1, len(blocks), 1, 1) for blocks in kinds], kinds)

    @staticmethod
    def convolve_each(x: Tensor, kinds: Sequence[Kind]) -> Tensor:
        channels = [sum(block.depthwise.in_channels for block in blocks) for blocks in kinds]
        return _grouped_convolutions(x.split(channels, dim=1), kinds)


def _grouped_convolutions(xs: Sequence[Tensor], kinds: Sequence[Kind]) -> Tensor:
    """[B, n_k · C, H, W] for the n_k blocks of each kind."""
    depthwise = [_grouped_depthwise(x, blocks) for x, blocks in zip(xs, kinds, strict=True)]
    pointwise = [block.pointwise.weight for blocks in kinds for block in blocks]
    return F.conv2d(torch.cat(depthwise, dim=1), torch.cat(pointwise), groups=len(pointwise))


def _grouped_depthwise(x: Tensor, blocks: Kind) -> Tensor:
    weight = torch.cat([block.depthwise.weight for block in blocks])
    stride, dilation = blocks[0].stride, blocks[0].dilation
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])


class SmallPlanes:
    """[1, N · C, H, W, B]: a depthwise convolution is a product with a banded matrix a channel.

    That matrix holds a row for each output and a column for each input pixel and is linear in the kernel. An
    Inf or NaN in one pixel spreads over its whole plane.
    """

    @staticmethod
    def enter(x: Tensor) -> Tensor:
        return x.permute(1, 2, 3, 0).contiguous().unsqueeze(0)

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        return x.squeeze(0).permute(3, 0, 1, 2)

    @staticmethod
    def convolve_one(x: Tensor, kinds: Sequence[Kind]) -> Tensor:
        _, channels, height, width, batch = x.shape
        bands = [_bands(_depthwise_weights(blocks, 1), blocks[0], height, width) for blocks in kinds]
        # [C, N, P', P] · [C, P, B]
        y = torch.bmm(torch.cat(bands, dim=1).flatten(1, 2), x.view(channels, height * width, batch))
        blocks = [block for kind in kinds for block in kind]
        y = y.view(channels, len(blocks), -1).transpose(0, 1)
        return _pointwise(y, blocks, height, width, batch)

    @staticmethod
    def convolve_each(x: Tensor, kinds: Sequence[Kind]) -> Tensor:
        _, merged_channels, height, width, batch = x.shape
        bands = [_bands(_depthwise_weights(blocks, 0), blocks[0], height, width) for blocks in kinds]
        # [N · C, P', P] · [N · C, P, B]
        y = torch.bmm(torch.cat(bands).flatten(0, 1), x.view(merged_channels, height * width, batch))
        blocks = [block for kind in kinds for block in kind]
        return _pointwise(
            y.view(len(blocks), merged_channels // len(blocks), -1), blocks, height, width, batch
        )


def _depthwise_weights(blocks: Kind, dim: int) -> Tensor:
    """[N, C, k²] or, along ``dim`` 1, [C, N, k²]."""
    return torch.stack([block.depthwise.weight.flatten(1) for block in blocks], dim)


def _bands(kernels: Tensor, block: SepConvBlock, height: int, width: int) -> Tensor:
    """[..., k²] → [..., P', P]: the matrix that convolves a plane of P pixels into one of P'."""
    size = block.depthwise.kernel_size[0]
    places = _places(size, block.dilation, block.stride, height, width, kernels.dtype, kernels.device)
    return (kernels @ places).unflatten(-1, (-1, height * width))


@functools.lru_cache(maxsize=256)
def _places(
    size: int, dilation: int, stride: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[k², P' · P]: ones where a kernel's elements stand in the matrix of ``_bands``."""
    # [P, P', k²]: a depthwise convolution of every unit picture with every unit kernel is what they mean.
    with torch.inference_mode(False), torch.no_grad():
        pixels, elements = height * width, size * size
        pictures = torch.eye(pixels).view(pixels, 1, height, width)
        kernels = torch.eye(elements).view(elements, 1, size, size)
        y = F.conv2d(pictures, kernels, None, stride, dilation * (size // 2), dilation)
        return y.flatten(2).permute(1, 2, 0).flatten(1).to(device, dtype)


def _pointwise(y: Tensor, blocks: Kind, height: int, width: int, batch: int) -> Tensor:
    """[N, C, P' · B] → [1, N · C_out, H', W', B]."""
    stride = blocks[0].stride
    weights = torch.stack([block.pointwise.weight.flatten(1) for block in blocks])
    z = torch.bmm(weights, y)
    return z.view(1, -1, -(-height // stride), -(-width // stride), batch)
