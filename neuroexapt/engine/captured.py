"""A step replayed as one CUDA graph: its thousands of launches for the price of one."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuroexapt.backend.candidates import free_launches
from neuroexapt.backend.capture import try_to_capture
from neuroexapt.core.hooks import hooks_of

logger = logging.getLogger(__name__)

Step = Callable[..., Tensor]
"""Takes tensors and returns one. Whatever else it reads or changes (weights, buffers, states of optimizers,
learning rates) is tensors on the device that stay where they are.
"""


def capture(step: Step, device: torch.device, network: nn.Module | None = None) -> Step:
    """``step`` with the same results, on a GPU launched as one graph unless ``network`` has hooks."""
    return CapturedStep(step, network) if device.type == "cuda" else step


class CapturedStep:
    """Runs a step as a CUDA graph, one for all calls whose inputs have the same shapes and dtypes.

    The first such call runs the step as it is: a step like any other and at once the warm-up, which compiles
    kernels, fills caches and creates the states of optimizers. The second call captures, which computes
    nothing, and replays; so there is no state to put back. A step that cannot be captured goes on as it is,
    and ``reason`` says why: it waits for the device, or hooks on ``network`` want to be called. Hooks that
    come after the capture are not.
    """

    def __init__(self, step: Step, network: nn.Module | None = None) -> None:
        self.reason = ""
        self._step = step
        self._network = network
        self._graphs: dict[tuple, _Graph | None] = {}
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if self.reason or key not in self._graphs:
            self._graphs[key] = None
            return self._run(inputs)
        graph = self._graphs[key] or self._try_to_capture(inputs)
        if graph is None:
            return self._run(inputs)
        self._graphs[key] = graph
        return graph.replay(inputs)

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """As it is, on the stream of the capture, since some libraries keep a workspace a stream."""
        launches = contextlib.nullcontext() if self.reason else free_launches()
        with launches, _beside(self._stream):
            return self._step(*inputs)

    def _try_to_capture(self, inputs: tuple[Tensor, ...]) -> "_Graph | None":
        graph = None
        self.reason = _hooks_of(self._network) if self._network is not None else ""
        if not self.reason:
            graph, self.reason = try_to_capture(
                lambda: _capture(self._step, inputs, self._stream, self._pool)
            )
        if self.reason:
            logger.warning("launching every kernel by itself, which is slower: %s", self.reason)
        return graph


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for target, source in zip(self.inputs, inputs, strict=True):
            target.copy_(source)
        self.graph.replay()
        return self.output.clone()


def _capture(step: Step, inputs: tuple[Tensor, ...], stream: torch.cuda.Stream, pool: Any) -> _Graph:
    graph, own_inputs = torch.cuda.CUDAGraph(), tuple(x.clone() for x in inputs)
    # Other threads, such as those that load data, may use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = step(*own_inputs)
    return _Graph(graph, own_inputs, output)


def _hooks_of(network: nn.Module) -> str:
    """Which module has hooks, empty if none does."""
    for name, module in network.named_modules():
        if any(hooks_of(module)):
            return f"a graph would not call the hooks of {name or 'the network'}"
    return ""


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on ``stream``, after what was launched before it and before what comes after it."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
