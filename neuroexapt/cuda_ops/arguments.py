"""Tensors as the launchers of ``csrc`` take them: addresses and strides; and where to launch."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from neuroexapt.cuda_ops.branch import kept


def addresses(*tensors: Tensor | None) -> list[int]:
    """0 stands for a tensor that is not there."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def strided(x: Tensor | None) -> tuple[int, int]:
    """Address and distance of two pictures, in elements."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous and 16-byte aligned, else a copy that is."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def dense_pictures(x: Tensor) -> Tensor:
    """x itself where each picture is contiguous and 16-byte aligned, else a copy that is."""
    if x[0].is_contiguous() and x.stride(0) % 4 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def allocate(like: Tensor, count: int, *shape: int) -> list[Tensor]:
    """Contiguous tensors in one piece of memory, which the branch keeps whose block this is."""
    return list(kept(like.new_empty(count, *shape)).unbind())


def allocate_fp32(like: Tensor, count: int, *shape: int) -> list[Tensor]:
    return list(kept(like.new_empty(count, *shape, dtype=torch.float32)).unbind())


def allocate_like(x: Tensor, count: int) -> list[Tensor]:
    """Of x's shape."""
    return allocate(x, count, *x.shape)


def stored_in_bf16(pictures: Tensor) -> bool:
    return pictures.dtype == torch.bfloat16


def dtype_refusals(pictures: Sequence[Tensor], others: Iterable[Tensor]) -> Iterator[str]:
    """What keeps kernels from taking dtypes: pictures may be stored in bf16, all else is fp32.

    Under autocast pictures must have its dtype already, since PyTorch would cast them.
    """
    stored = {x.dtype for x in pictures}
    if stored not in ({torch.float32}, {torch.bfloat16}) or any(x.dtype != torch.float32 for x in others):
        yield "only fp32, or pictures in bf16 beside weights and statistics in fp32"
    if torch.is_autocast_enabled("cuda") and stored != {torch.get_autocast_dtype("cuda")}:
        yield "autocast is on"


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """How much shared memory a block may have: 227 KB on H100 and H200, 163 on A100, 99 on most others."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream
