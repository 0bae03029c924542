"""Where an operation runs, and why: devices, tiers, dispatch decisions and tuning."""

from neuroexapt.backend.dispatch import Decision, dispatch_report, explain, reset_dispatch_report
from neuroexapt.backend.kernel_graph import KernelGraph, KernelNode, new_kernel_graph
from neuroexapt.backend.measure import BackendResult, OpCheck, Timing, benchmark_backends, check_backend
from neuroexapt.backend.memory import MemoryInfo, get_memory_info
from neuroexapt.backend.optimizer import BackendOptimizer, auto_configure_backend
from neuroexapt.backend.persistent import PersistentKernel
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
from neuroexapt.backend.tuning import Crossover, TuningConfig

__all__ = [
    "Backend",
    "BackendOptimizer",
    "BackendResult",
    "Crossover",
    "Decision",
    "KernelGraph",
    "KernelNode",
    "MemoryInfo",
    "OpCheck",
    "PersistentKernel",
    "Support",
    "Timing",
    "TuningConfig",
    "auto_configure_backend",
    "benchmark_backends",
    "check_backend",
    "dispatch_report",
    "explain",
    "get_available_backends",
    "get_backend",
    "get_memory_info",
    "list_backends",
    "new_kernel_graph",
    "register_impl",
    "reset_dispatch_report",
    "resolve",
    "set_backend",
    "use_backend",
]
