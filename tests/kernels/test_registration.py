"""An operator with two results, registered as the kernels are, computed by PyTorch."""

import pytest
import torch
from torch import Tensor

from neuroexapt.kernels.registration import define, differentiable_once, set_autograd


def _run(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * factor, x.sign()


def _save(ctx, arguments: tuple, _results: tuple[Tensor, Tensor]) -> None:
    ctx.factor = arguments[1]


op = define("scaled(Tensor x, float factor) -> (Tensor, Tensor)", _run, _run)
set_autograd(op, differentiable_once(op, _save, lambda ctx, dy: (dy * ctx.factor, None)))


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([1.0, -2.0], requires_grad=True)


def test_only_the_first_result_has_a_gradient(x):
    y, sign = op(x, 3.0)
    assert y.requires_grad
    assert not sign.requires_grad
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [3.0, 3.0]


def test_differentiating_twice_raises(x):
    y, _ = op(x, 3.0)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_compiles_into_one_graph(x):
    compiled = torch.compile(lambda x: op(x, 3.0)[0].square(), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert x.grad.tolist() == [18.0, -36.0]
