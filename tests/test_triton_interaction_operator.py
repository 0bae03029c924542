"""The dot interaction's kernels on a GPU: dtypes, layouts, sizes, capture and compilation."""

import pytest
import torch
from torch import Tensor

from neuroexapt import functional
from neuroexapt.backend import explain, use_backend
from neuroexapt.kernels import interaction_operator as definition
from tests.kernels.held_to_reference import TOLERANCE, largest_error, random_tensors, results_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
# Batch, fields and width: one and several samples a program, one and several tiles of the width.
SHAPES = [(1024, 26, 64), (301, 50, 128), (33, 5, 16), (7, 127, 300), (5, 1, 1), (3, 15, 513), (2, 0, 8)]


def by_kernel(*tensors: Tensor) -> Tensor:
    with use_backend("cuda:triton"):
        assert explain("interaction_operator", *tensors).impl == "triton"
        return functional.interaction_operator(*tensors)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "fields", "width"), SHAPES)
def test_matches_the_definition(batch, fields, width, dtype, nan_filled_empty):
    inputs = random_tensors((batch, width), (batch, fields, width), dtype=dtype)
    assert largest_error(definition.interaction_operator, by_kernel, inputs) < TOLERANCE[dtype]
    together = [torch.cat([inputs[0][:, None], inputs[1]], dim=1)]
    assert largest_error(definition.interaction_operator, by_kernel, together) < TOLERANCE[dtype]


def test_takes_strided_operands_and_expanded_gradients():
    wide, fields = random_tensors((6, 40), (4, 6, 16))
    inputs = [wide[:, 3:19].requires_grad_(), fields.transpose(0, 1).requires_grad_()]
    assert largest_error(definition.interaction_operator, by_kernel, inputs) < 2e-5
    gradients = torch.autograd.grad(by_kernel(*inputs).sum(), inputs)
    expected = torch.autograd.grad(definition.interaction_operator(*inputs).sum(), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_tf32_only_where_matrix_products_may():
    inputs = random_tensors((256, 64), (256, 26, 64))
    assert largest_error(definition.interaction_operator, by_kernel, inputs) < 2e-6
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert 1e-5 < largest_error(definition.interaction_operator, by_kernel, inputs) < 2e-3


def test_runs_compiled_and_captured():
    inputs = [x.requires_grad_() for x in random_tensors((64, 32), (64, 9, 32))]

    def step(op) -> list[Tensor]:
        return results_and_gradients(op, inputs, torch.float32)

    expected = step(by_kernel)
    with use_backend("cuda:triton"):
        compiled = step(torch.compile(functional.interaction_operator, fullgraph=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = by_kernel(*inputs)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            y = by_kernel(*inputs)
            captured = [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))
    torch.testing.assert_close(captured[0], expected[0], rtol=0, atol=0)
    gradients = torch.autograd.grad(by_kernel(*inputs).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(captured[1:], gradients, strict=True))
