"""``sepconv`` in CUDA C++ (``csrc/sepconv.cu``), for fp32 at the shapes of search networks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.cuda_ops.build import extension
from neuroexapt.kernels import sepconv as shared

# Two blocks of this much fit in the 228 KB of a multiprocessor; sm_80 has 164 KB, enough for one.
_SHARED_BYTES = 113 * 1024
_BLOCK_CHANNELS = 16  # kChannels in sepconv.cu
_WANTED_BLOCKS = 256  # about two for each of 132 multiprocessors


@dataclass(frozen=True)
class _Tiles:
    """Floats of shared memory that the kernels lay out for tiles of some number of output rows."""

    channels: int
    out_channels: int
    width: int
    kernel_size: int
    stride: int
    dilation: int

    def forward_floats(self, rows: int) -> int:
        """Of the forward kernel: x with its halo, the depthwise outputs and the pointwise weights."""
        return self.channels * self._channel(rows) + self.out_channels * (self.channels + 4)

    def backward_floats(self, rows: int) -> int:
        """Of the backward kernel: dy; e, x, depthwise outputs and pointwise weights of a block's channels."""
        halo = -(-self._padding // self.stride)
        out_width, rows_of_e = self.width // self.stride, rows + 2 * halo
        e = rows_of_e * (out_width + _round_up_4(2 * halo))
        per_channel = e + self._channel(rows) + self.out_channels
        return self.out_channels * rows_of_e * out_width + _BLOCK_CHANNELS * per_channel

    def _channel(self, rows: int) -> int:
        rows_of_x = (rows - 1) * self.stride + 2 * self._padding + 1
        pitch = self.width + _round_up_4(2 * self._padding)
        return rows_of_x * pitch + rows * (self.width // self.stride)

    @property
    def _padding(self) -> int:
        return self.dilation * (self.kernel_size // 2)


def supports(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
) -> Support:
    """Whether the kernels take these arguments."""
    tensors = shared.autocast(x, depthwise_weight, pointwise_weight)
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return Support(False, "only fp32")
    if not x.is_contiguous():
        return Support(False, "x is not contiguous")
    if depthwise_weight.shape[-1] not in (3, 5) or stride not in (1, 2) or dilation not in (1, 2):
        return Support(
            False, f"kernel size {depthwise_weight.shape[-1]}, stride {stride}, dilation {dilation}"
        )
    channels, out_channels, width = x.shape[1], pointwise_weight.shape[0], x.shape[3]
    if channels % 16 or out_channels % 16 or width % (4 * stride):
        return Support(False, f"{channels} to {out_channels} channels at width {width}")
    tiles = _tiles(x, depthwise_weight, pointwise_weight, stride, dilation)
    if 4 * max(tiles.forward_floats(1), tiles.backward_floats(1)) > _SHARED_BYTES:
        return Support(False, "one row with its halo does not fit in shared memory")
    return Support(True)


def _forward(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    y: Tensor,
    stride: int,
    dilation: int,
    relu: bool,
) -> None:
    floats = _tiles(x, depthwise_weight, pointwise_weight, stride, dilation).forward_floats
    rows = _rows(y.shape[2], y.shape[0], floats)
    tensors = [_dense(tensor) for tensor in (x, depthwise_weight, pointwise_weight)]
    with torch.cuda.device_of(x):
        extension().sepconv_forward(
            _shape(x, depthwise_weight, y, stride, dilation, relu),
            *_addresses(*tensors, y),
            rows,
            4 * floats(rows),
            torch.cuda.current_stream().cuda_stream,
        )


def _backward(
    dy: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    grads: shared.Grads,
    needed: tuple[bool, ...],
    stride: int,
    dilation: int,
    relu: bool,
) -> None:
    floats = _tiles(x, depthwise_weight, pointwise_weight, stride, dilation).backward_floats
    batch, out_channels, out_height, _ = dy.shape
    channels, kernel_size = x.shape[1], depthwise_weight.shape[-1]
    rows = _rows(out_height, batch * channels // _BLOCK_CHANNELS, floats)
    tiles = batch * out_height // rows
    partials = [
        x.new_empty(tiles, size) if need else None
        for need, size in zip(needed[1:], (channels * kernel_size**2, out_channels * channels), strict=True)
    ]
    tensors = [_dense(tensor) for tensor in (dy, x, depthwise_weight, pointwise_weight)]
    wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    with torch.cuda.device_of(x):
        extension().sepconv_backward(
            _shape(x, depthwise_weight, dy, stride, dilation, relu),
            *_addresses(*tensors, *wanted, *partials),
            rows,
            4 * floats(rows),
            torch.cuda.current_stream().cuda_stream,
        )


def _tiles(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, stride: int, dilation: int
) -> _Tiles:
    kernel_size = depthwise_weight.shape[-1]
    return _Tiles(x.shape[1], pointwise_weight.shape[0], x.shape[3], kernel_size, stride, dilation)


def _rows(height: int, blocks_a_row: int, floats: Callable[[int], int]) -> int:
    """Rows of a tile: as many as fit, divide the picture and leave enough blocks for the whole GPU."""
    fitting = [
        rows for rows in range(1, height + 1) if height % rows == 0 and 4 * floats(rows) <= _SHARED_BYTES
    ]
    busy = [rows for rows in fitting if blocks_a_row * (height // rows) >= _WANTED_BLOCKS]
    return max(busy, default=fitting[0])


def _shape(x: Tensor, depthwise_weight: Tensor, y: Tensor, stride: int, dilation: int, relu: bool) -> Any:
    batch, channels, height, width = x.shape
    return extension().SepConvShape(
        batch,
        channels,
        *(y.shape[1], height, width),
        *y.shape[2:],
        depthwise_weight.shape[-1],
        stride,
        dilation,
        relu,
    )


def _dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous and 16-byte aligned, else a copy that is."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _round_up_4(n: int) -> int:
    return -(-n // 4) * 4


sepconv, _ = shared.define_op("ext", _forward, _backward)
register_impl("sepconv", "ext", sepconv, supports)
