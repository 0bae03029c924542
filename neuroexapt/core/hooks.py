"""The hooks of a module, which want it to be called."""

from typing import Any

from torch import nn


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Those around its passes. PyTorch fills these dictionaries, but never replaces them."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
