"""How much memory a device has and how much of it is in use."""

from dataclasses import dataclass

import torch

from neuroexapt.backend.registry import get_backend


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes; None where the device cannot tell.

    ``allocated`` and ``reserved`` are PyTorch's own, ``peak`` is the most it had allocated so far.
    """

    total: int | None
    free: int | None
    allocated: int | None
    reserved: int | None
    peak: int | None


def get_memory_info(device: torch.device | str | None = None) -> MemoryInfo:
    """The memory of ``device``, by default of the backend in force."""
    device = torch.device(device) if device is not None else get_backend().torch_device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return MemoryInfo(
            total,
            free,
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
            torch.cuda.max_memory_allocated(device),
        )
    if device.type == "mps":
        total, allocated = torch.mps.recommended_max_memory(), torch.mps.current_allocated_memory()
        return MemoryInfo(total, None, allocated, torch.mps.driver_allocated_memory(), None)
    return MemoryInfo(None, None, None, None, None)
