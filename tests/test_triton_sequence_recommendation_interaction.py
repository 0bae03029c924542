"""The kernels of pools and decayed self-similarity on a GPU: dtypes, sizes, layouts, capture, compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuroexapt import functional
from neuroexapt.backend import explain, use_backend
from neuroexapt.kernels import sequence_recommendation_interaction as definition
from tests.kernels.held_to_reference import TOLERANCE, largest_error, random_tensors, results_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
# Batch, longest sequence, width: one chunk, several, more than 16, and widths of several tiles.
SHAPES = [(128, 50, 64), (16, 200, 64), (3, 1, 8), (2, 64, 33), (3, 65, 300), (2, 1100, 256), (1, 2100, 16)]


def inputs(batch: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        *random_tensors((batch, length, width), (batch, width), dtype=dtype),
        torch.tensor(0.05, device="cuda"),
    ]


def places(batch: int, length: int) -> dict[str, Any]:
    """Sequences of all lengths, an empty and a full one among them, a minute to a day between two items."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    lengths[0], lengths[-1] = 0, length
    days = torch.rand(batch, length, generator=generator).cumsum(1)
    return {"lengths": lengths.cuda(), "timestamps": days.cuda(), "window": 7}


def as_jagged(items: Tensor, padded: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    lengths = padded["lengths"]
    valid = torch.arange(items.shape[1], device="cuda") < lengths[:, None]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = {"offsets": offsets, "max_length": items.shape[1], "timestamps": padded["timestamps"][valid]}
    return items[valid], rows | {"window": padded["window"]}


def by_kernel(*tensors: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    with use_backend("cuda:triton"):
        assert explain("sequence_recommendation_interaction", *tensors, **arguments).impl == "triton"
        return functional.sequence_recommendation_interaction(*tensors, **arguments)


def error_of(tensors: list[Tensor], arguments: dict[str, Any]) -> float:
    def with_arguments(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *leaves: op(*leaves, **arguments)

    exact = definition.sequence_recommendation_interaction
    return largest_error(with_arguments(exact), with_arguments(by_kernel), tensors)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype, nan_filled_empty):
    tensors = inputs(*shape, dtype)
    assert error_of(tensors, {}) < TOLERANCE[dtype]
    assert error_of(tensors, places(*shape[:2])) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(128, 50, 64), (5, 300, 48)])
def test_jagged_matches_the_definition(shape, nan_filled_empty):
    items, target, decay = inputs(*shape)
    padded = places(*shape[:2])
    rows, arguments = as_jagged(items, padded)
    assert error_of([rows, target, decay], arguments) < 2e-5
    pools, similarity = by_kernel(items, target, decay, **padded)
    of_rows = by_kernel(rows, target, decay, **arguments)
    valid = torch.arange(shape[1], device="cuda") < padded["lengths"][:, None]
    assert torch.equal(of_rows[0], pools)
    assert torch.equal(of_rows[1], similarity[valid])
    assert not similarity[~valid].any()


def test_seconds_since_1970_lose_nothing():
    tensors = inputs(4, 300, 32)
    arguments = places(4, 300)
    seconds = (arguments["timestamps"] * 86400).long()
    tensors[2] = tensors[2] / 86400
    assert error_of(tensors, arguments | {"timestamps": seconds + 1_700_000_000}) < 2e-5


def test_is_causal_and_blind_to_padding():
    items, target, decay = inputs(3, 200, 64, torch.bfloat16)
    lengths = torch.tensor([200, 77, 0], device="cuda")
    _, similarity = by_kernel(items, target, decay, lengths=lengths)
    for t in (1, 63, 64, 130):
        changed = items.clone()
        changed[:, t:] = float("nan") if t > 77 else 3.0
        cut = lengths.clamp(max=t) if t > 77 else lengths
        assert torch.equal(by_kernel(changed, target, decay, lengths=cut)[1][:, :t], similarity[:, :t])


def test_twenty_runs_give_the_same_bits():
    tensors, arguments = inputs(16, 500, 64), places(16, 500)

    def run() -> list[Tensor]:
        return results_and_gradients(lambda *leaves: by_kernel(*leaves, **arguments), tensors, torch.float32)

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_runs_compiled_and_captured():
    arguments, tensors = places(8, 150), inputs(8, 150, 32)

    def step(op: Callable[..., Any]) -> list[Tensor]:
        # Leaves of its own: autograd runs a leaf's backward on the stream where it first met the leaf.
        leaves = [x.detach().requires_grad_() for x in tensors]
        pools, similarity = op(*leaves, **arguments)
        gradients = torch.autograd.grad(pools.sum() + similarity.square().sum(), leaves)
        return [pools.detach(), similarity.detach(), *gradients]

    expected = step(by_kernel)
    with use_backend("cuda:triton"):
        compiled = step(torch.compile(functional.sequence_recommendation_interaction, fullgraph=True))
    for got, wanted in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step(by_kernel)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = step(by_kernel)
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
