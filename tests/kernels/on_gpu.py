"""What every kernel must keep on a GPU: the same bits again, in a CUDA graph and under torch.compile."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.kernels.held_to_reference import results_and_gradients

Op = Callable[..., Tensor]
_RUNS = 20


def assert_deterministic(op: Op, inputs: Sequence[Tensor]) -> None:
    expected = results_and_gradients(op, inputs, inputs[0].dtype)
    for _ in range(_RUNS):
        for actual, wanted in zip(results_and_gradients(op, inputs, inputs[0].dtype), expected, strict=True):
            assert torch.equal(actual, wanted)


def assert_runs_compiled_and_captured(op: Op, inputs: Sequence[Tensor]) -> None:
    expected = results_and_gradients(op, inputs, inputs[0].dtype)
    compiled = results_and_gradients(torch.compile(op, fullgraph=True), inputs, inputs[0].dtype)
    torch.testing.assert_close(compiled, expected)
    leaves = [x.detach().requires_grad_() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.autograd.grad(op(*leaves).sum(), leaves)  # compiles the kernels
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            y = op(*leaves)
            captured = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        graph.replay()
    torch.cuda.synchronize()
    y = op(*leaves)
    torch.testing.assert_close(captured, [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
