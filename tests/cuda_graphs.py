"""What a captured step must keep: a replay has the bits of the launches one by one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_replays_the_same_bits(step: Callable[[], Sequence[Tensor]]) -> None:
    """``step`` as it is, then captured in a CUDA graph and replayed."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()  # the other stream waits for nothing by itself, not even for the step's inputs
    # One stream for warm-up and capture: autograd runs a leaf's backward where it first met the leaf.
    with torch.cuda.stream(torch.cuda.Stream()):
        expected = step()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = step()
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got, wanted) for got, wanted in zip(captured, expected, strict=True))
