"""``sepconv`` in CUDA C++ (``csrc/sepconv.cu``), for fp32 at the shapes of search networks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.cuda_ops.build import extension
from neuroexapt.kernels import sepconv as shared

# Two blocks of this much fit in the 228 KB of a multiprocessor; sm_80 has 164 KB, enough for one.
_SHARED_BYTES = 113 * 1024
_BLOCK_CHANNELS = 16  # kChannels in sepconv.cu
_WANTED_BLOCKS = 256  # about two for each of 132 multiprocessors


class _Tiles(NamedTuple):
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


def _takes(call: shared.Call, dtypes: set[torch.dtype]) -> Support:
    if dtypes != {torch.float32}:
        return Support(False, "only fp32")
    if not call.x.is_contiguous():
        return Support(False, "x is not contiguous")
    if call.kernel_size not in (3, 5) or call.stride not in (1, 2) or call.dilation not in (1, 2):
        return Support(
            False, f"kernel size {call.kernel_size}, stride {call.stride}, dilation {call.dilation}"
        )
    tiles = _tiles(call)
    if tiles.channels % 16 or tiles.out_channels % 16 or tiles.width % (4 * tiles.stride):
        return Support(False, f"{tiles.channels} to {tiles.out_channels} channels at width {tiles.width}")
    if 4 * max(tiles.forward_floats(1), tiles.backward_floats(1)) > _SHARED_BYTES:
        return Support(False, "one row with its halo does not fit in shared memory")
    return Support(True)


def _forward(call: shared.Call, y: Tensor) -> None:
    floats = _tiles(call).forward_floats
    rows = _rows(y.shape[2], y.shape[0], floats)
    with torch.cuda.device_of(y):
        extension().sepconv_forward(
            _shape(call, y),
            *_addresses(*map(_dense, call[:3]), y),
            rows,
            4 * floats(rows),
            torch.cuda.current_stream().cuda_stream,
        )


def _backward(call: shared.Call, dy: Tensor, grads: shared.Grads, needed: list[bool]) -> None:
    floats = _tiles(call).backward_floats
    batch, out_channels, out_height, _ = dy.shape
    channels = call.x.shape[1]
    rows = _rows(out_height, batch * channels // _BLOCK_CHANNELS, floats)
    tiles = batch * out_height // rows
    partials = [
        dy.new_empty(tiles, size) if need else None
        for need, size in zip(
            needed[1:], (channels * call.kernel_size**2, out_channels * channels), strict=True
        )
    ]
    wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    with torch.cuda.device_of(dy):
        extension().sepconv_backward(
            _shape(call, dy),
            *_addresses(*map(_dense, (dy, *call[:3])), *wanted, *partials),
            rows,
            4 * floats(rows),
            torch.cuda.current_stream().cuda_stream,
        )


def _tiles(call: shared.Call) -> _Tiles:
    return _Tiles(
        call.x.shape[1],
        call.pointwise_weight.shape[0],
        call.x.shape[3],
        call.kernel_size,
        call.stride,
        call.dilation,
    )


@functools.cache
def _rows(height: int, blocks_a_row: int, floats: Callable[[int], int]) -> int:
    """Rows of a tile: as many as fit, divide the picture and leave enough blocks for the whole GPU."""
    fitting = [
        rows for rows in range(1, height + 1) if height % rows == 0 and 4 * floats(rows) <= _SHARED_BYTES
    ]
    busy = [rows for rows in fitting if blocks_a_row * (height // rows) >= _WANTED_BLOCKS]
    return max(busy, default=fitting[0])


def _shape(call: shared.Call, y: Tensor) -> Any:
    batch, channels, height, width = call.x.shape
    return extension().SepConvShape(
        *(batch, channels, y.shape[1], height, width),
        *y.shape[2:],
        call.kernel_size,
        *call[3:],
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
supports = shared.supports_if(_takes)
register_impl("sepconv", "ext", sepconv, supports)
