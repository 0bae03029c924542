"""Tensors as the launchers of ``csrc`` take them: addresses and strides; and the stream to launch on."""

import torch
from torch import Tensor


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


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream
