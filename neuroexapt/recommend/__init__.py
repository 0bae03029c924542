"""Sequence recommenders: their operators' manager, the controller that executes them, and their server."""

import importlib
from typing import Any

_HOMES = {
    "IntegratedController": "controller",
    "TritonOperatorManager": "manager",
    "create_integrated_controller": "controller",
    "create_triton_operator_manager": "manager",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import on first use, since controller and manager stand on what uses this package's other modules."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
