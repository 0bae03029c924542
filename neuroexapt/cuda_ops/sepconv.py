"""``sepconv`` in CUDA C++ (``csrc/sepconv.cu``), for fp32 at the shapes of search networks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuroexapt.backend import Support, register_impl
from neuroexapt.cuda_ops.arguments import (
    addresses,
    current_stream,
    dense,
    dense_pictures,
    shared_bytes,
    strided,
)
from neuroexapt.cuda_ops.build import extension
from neuroexapt.kernels import sepconv as shared

# Two blocks of the first fit in the 228 KB of a multiprocessor of an H100. Other GPUs have less, but for a
# block, since sm_80, at least the second.
_SHARED_BYTES, _LEAST_SHARED_BYTES = 113 * 1024, 99 * 1024
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


def takes(call: shared.Call, dtypes: set[torch.dtype]) -> Support:
    """Whether the kernels take a call with tensors of these dtypes."""
    if call.kernel_size not in (3, 5) or call.stride not in (1, 2) or call.dilation not in (1, 2):
        return Support(
            False, f"kernel size {call.kernel_size}, stride {call.stride}, dilation {call.dilation}"
        )
    return fits(call, dtypes)


def fits(call: shared.Call, dtypes: set[torch.dtype]) -> Support:
    """The part of ``takes`` that depends on shapes and dtypes."""
    if dtypes != {torch.float32}:
        return Support(False, "only fp32")
    if not call.x.is_contiguous():
        return Support(False, "x is not contiguous")
    tiles = _tiles(call)
    if tiles.channels % 16 or tiles.out_channels % 16 or tiles.width % (4 * tiles.stride):
        return Support(False, f"{tiles.channels} to {tiles.out_channels} channels at width {tiles.width}")
    if 4 * max(tiles.forward_floats(1), tiles.backward_floats(1)) > _room(call.x.device):
        return Support(False, "one row with its halo does not fit in shared memory")
    return Support(True)


class Source(NamedTuple):
    """Where the gradient of y starts: A · g + B · z + D by ``coef`` [O, 4], or g itself without one."""

    g: Tensor
    z: Tensor | None = None
    coef: Tensor | None = None


class Results(NamedTuple):
    """Where to put the gradients; a partial one is [tiles, …], its sum over the tiles the gradient."""

    dx: Tensor | None
    depthwise: Tensor | None
    pointwise: Tensor | None
    depthwise_partial: Tensor | None
    pointwise_partial: Tensor | None


def launch_forward(calls: Sequence[shared.Call], ys: Sequence[Tensor]) -> None:
    """Fill the results of calls of one shape, together."""
    kernels, tiles = extension(), _tiles(calls[0])
    rows = _rows(ys[0], len(calls) * ys[0].shape[0], tiles, _Tiles.forward_floats)
    operands = [tuple(map(dense, call[:3])) for call in calls]
    jobs = [
        kernels.SepConvJob(*addresses(*three, y), y.stride(0)) for three, y in zip(operands, ys, strict=True)
    ]
    kernels.sepconv_forward(
        _shape(calls[0], ys[0]), jobs, rows, 4 * tiles.forward_floats(rows), current_stream()
    )


def launch_backward(
    calls: Sequence[shared.Call], sources: Sequence[Source], results: Sequence[Results]
) -> None:
    """Fill the gradients of calls of one shape that want the same ones, together."""
    kernels, rows = extension(), _backward_rows(calls, sources[0].g)
    operands = [tuple(map(dense, call[:3])) for call in calls]
    gs = [dense_pictures(source.g) for source in sources]
    jobs = [
        kernels.SepConvGradJob(*strided(g), *strided(source.z), *addresses(source.coef, *three, *where))
        for g, source, three, where in zip(gs, sources, operands, results, strict=True)
    ]
    shared_memory = 4 * _tiles(calls[0]).backward_floats(rows)
    kernels.sepconv_backward(_shape(calls[0], gs[0]), jobs, rows, shared_memory, current_stream())


def partials(
    calls: Sequence[shared.Call], g: Tensor, wanted: tuple[bool, bool]
) -> list[tuple[Tensor | None, ...]]:
    """Empty partial gradients of each call's depthwise and pointwise weight."""
    tiles = g.shape[0] * g.shape[2] // _backward_rows(calls, g)
    return [
        tuple(
            weight.new_empty(tiles, weight.numel()) if want else None
            for weight, want in zip(call[1:3], wanted, strict=True)
        )
        for call in calls
    ]


def _forward(call: shared.Call, y: Tensor) -> None:
    with torch.cuda.device_of(y):
        launch_forward([call], [y])


def _backward(call: shared.Call, dy: Tensor, grads: shared.Grads, needed: list[bool]) -> None:
    wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    with torch.cuda.device_of(dy):
        (partial,) = partials([call], dy, (needed[1], needed[2]))
        launch_backward([call], [Source(dy)], [Results._make((*wanted, *partial))])


def _backward_rows(calls: Sequence[shared.Call], g: Tensor) -> int:
    blocks_a_row = len(calls) * g.shape[0] * calls[0].x.shape[1] // _BLOCK_CHANNELS
    return _rows(g, blocks_a_row, _tiles(calls[0]), _Tiles.backward_floats)


def _tiles(call: shared.Call) -> _Tiles:
    return _Tiles(
        call.x.shape[1],
        call.pointwise_weight.shape[0],
        call.x.shape[3],
        call.kernel_size,
        call.stride,
        call.dilation,
    )


def _rows(y: Tensor, blocks_a_row: int, tiles: _Tiles, floats: Callable[[_Tiles, int], int]) -> int:
    """Of a tile of y."""
    return _best_rows(y.shape[2], blocks_a_row, _room(y.device), tiles, floats)


def _room(device: torch.device) -> int:
    """Bytes of shared memory for a block; torch.compile, which cannot trace the question, gets the least."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return _LEAST_SHARED_BYTES
    return min(_SHARED_BYTES, shared_bytes(device))


@functools.cache
def _best_rows(
    height: int, blocks_a_row: int, room: int, tiles: _Tiles, floats: Callable[[_Tiles, int], int]
) -> int:
    """As many as fit, divide the picture and leave enough blocks for the whole GPU."""
    fitting = [
        rows for rows in range(1, height + 1) if height % rows == 0 and 4 * floats(tiles, rows) <= room
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


def _round_up_4(n: int) -> int:
    return -(-n // 4) * 4


sepconv, _ = shared.define_op("ext", _forward, _backward)
supports = shared.supports_if(takes)
register_impl("sepconv", "ext", sepconv, supports)
