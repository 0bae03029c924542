"""The execution plan of a module as data: which operations a forward pass runs, and what runs them."""

import bisect
import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from neuroexapt.backend.dispatch import Decision, observed
from neuroexapt.backend.registry import chosen_spec, use_backend

# As the profiler names the calls that start a kernel, a copy or a fill.
_LAUNCH = re.compile("LaunchKernel|MemcpyAsync|MemsetAsync")


@dataclass(frozen=True)
class KernelNode:
    """One operation of a forward pass.

    ``module``: the innermost module that runs it; ``op``: an op of ``neuroexapt.functional`` or of PyTorch;
    ``implementation``: the tier; ``shapes``: of its results; ``bytes``: of its operands and results together;
    ``launches``: kernels, copies and fills that it starts on a GPU, None on other devices.
    """

    module: str
    op: str
    implementation: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    launches: int | None

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        return f"{self.module}: {self.op} [{self.implementation}] {shapes}"


@dataclass(frozen=True)
class KernelGraph:
    """The operations of a forward pass in the order in which they run."""

    nodes: tuple[KernelNode, ...]

    @property
    def launches(self) -> int | None:
        """What a pass starts on a GPU, None on other devices."""
        counts = [node.launches for node in self.nodes if node.launches is not None]
        return sum(counts) if len(counts) == len(self.nodes) else None

    def to_json(self) -> str:
        """``{"launches": …, "bytes": …, "nodes": [{"module": …, "op": …, …}, …]}``."""
        total = {"launches": self.launches, "bytes": sum(node.bytes for node in self.nodes)}
        return json.dumps({**total, "nodes": [asdict(node) for node in self.nodes]}, indent=2)

    def diff(self, other: "KernelGraph") -> tuple[str, ...]:
        """Nodes of this graph alone, marked ``-``, and of ``other`` alone, marked ``+``; empty if equal."""
        lines = difflib.ndiff([str(node) for node in self.nodes], [str(node) for node in other.nodes])
        return tuple(line for line in lines if line[0] in "-+")


def new_kernel_graph(
    module: nn.Module, sample_inputs: Sequence[Any], backend: str | None = None
) -> KernelGraph:
    """What ``module(*sample_inputs)`` runs on ``backend`` (None: the one in force), by running it once.

    Gradients are not traced, and the module's buffers are left as they were.

    Raises:
        UserError: ``backend`` is no backend's name.
        BackendUnavailableError: it is one, but cannot run here.
    """
    with use_backend(backend or chosen_spec()), buffers_kept(module), torch.no_grad():
        module(*sample_inputs)  # what is compiled or measured once is not part of the plan
        recorder = _Recorder()
        with _profiled(sample_inputs) as profile, recorder.modules, observed(recorder.run), recorder:
            module(*sample_inputs)
    launches = _count_launches(profile, len(recorder.nodes))
    return KernelGraph(
        tuple(KernelNode(*node, count) for node, count in zip(recorder.nodes, launches, strict=True))
    )


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves the module's buffers, such as running statistics, as they were."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)


class _Recorder(TorchDispatchMode):
    """Notes every op of ``neuroexapt.functional`` as a whole and every operation of PyTorch beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = ModuleTracker()
        self.nodes: list[tuple[str, str, str, tuple[tuple[int, ...], ...], int]] = []
        self._inside_an_op = False

    def run(self, decision: Decision, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Stand in for the dispatch of an op."""
        if self._inside_an_op:
            return run(*args, **kwargs)
        self._inside_an_op = True
        try:
            return self._record(decision.op, decision.impl, run, args, kwargs)
        finally:
            self._inside_an_op = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        computes = not (func.is_view or func.namespace == "profiler" or str(func).startswith("aten.empty"))
        if self._inside_an_op or not computes:
            return func(*args, **(kwargs or {}))
        return self._record(str(func.overloadpacket), "torch", func, args, kwargs or {})

    def _record(
        self, op: str, implementation: str, run: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        with torch.profiler.record_function(_label(len(self.nodes))):
            result = run(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        module = max(self.modules.parents - {"Global"}, key=len)
        moved = sum(tensor.nbytes for tensor in operands + results)
        self.nodes.append((module, op, implementation, tuple(tuple(r.shape) for r in results), moved))
        return result


def _label(node: int) -> str:
    return f"neuroexapt node {node}"


def _profiled(sample_inputs: Sequence[Any]) -> Any:
    """The profiler where there are launches to count."""
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(list(sample_inputs)))
    if not on_gpu:
        return contextlib.nullcontext()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    return torch.profiler.profile(activities=activities, acc_events=True)  # else it warns


def _count_launches(profile: Any, nodes: int) -> list[int | None]:
    if profile is None:
        return [None] * nodes
    # Not profile.events(), which takes minutes to make a tree of what is a list.
    events = profile.profiler.kineto_results.events()
    launched = sorted(event.start_ns() for event in events if _LAUNCH.search(event.name()))
    begun = {event.name(): event for event in events if event.device_type() == DeviceType.CPU}
    return [_count_within(launched, begun[_label(node)]) for node in range(nodes)]


def _count_within(times: list[int], event: Any) -> int:
    end = event.start_ns() + event.duration_ns()
    return bisect.bisect(times, end) - bisect.bisect(times, event.start_ns())
