"""What ops make of ``torch.autocast``: they cast all operands, or leave all as they are."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast wants on ``device``, None where it is not enabled."""
    is_enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_enabled else None


def keeping_dtypes(definition: Callable[P, R]) -> Callable[P, R]:
    """``definition`` with products in its operands' dtypes under autocast too, as its kernels take them."""

    @functools.wraps(definition)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor))
        if autocast_dtype(device) is None:
            return definition(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return definition(*args, **kwargs)

    return run
