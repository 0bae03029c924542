"""Where an operation runs, and why: devices, tiers, dispatch decisions and tuning."""

from neuroexapt.backend.registry import (
    Backend,
    Support,
    get_available_backends,
    get_backend,
    list_backends,
    register_impl,
    resolve,
    set_backend,
    use_backend,
)

__all__ = [
    "Backend",
    "Support",
    "get_available_backends",
    "get_backend",
    "list_backends",
    "register_impl",
    "resolve",
    "set_backend",
    "use_backend",
]
