import pytest
import torch
from torch import nn

from neuroexapt.engine import curvature
from neuroexapt.engine.curvature import largest_eigenvalue
from tests.strategies.small import make_phase


def test_of_a_quadratic_it_is_the_largest_eigenvalue() -> None:
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    hessian = q @ torch.diag(torch.tensor([5.0, 2, 1, 0.5, -1, -7], dtype=torch.float64)) @ q.T
    parameters = [nn.Parameter(torch.randn(2, 2, dtype=torch.float64)), nn.Parameter(torch.randn(2).double())]
    before = [p.detach().clone() for p in parameters]
    found = largest_eigenvalue(lambda: hessian @ torch.cat([p.flatten() for p in parameters]), parameters)
    assert found == pytest.approx(5)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_a_searchs_is_that_of_the_exact_hessian(small_space: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a radius within which no ReLU flips: at a flip the gradient jumps."""
    monkeypatch.setattr(curvature, "RADIUS", 1e-5)
    phase = make_phase(stop="eigenvalue")
    phase.supernet.double()
    images, labels = next(iter(phase.valid_loader.forever(0)))
    monkeypatch.setattr(phase.valid_loader, "forever", lambda step: iter([(images.double(), labels)]))
    alphas = phase.supernet.arch_parameters()
    statistics = [buffer.clone() for buffer in phase.supernet.buffers()]
    found = phase._curvature(0)["eigenvalue"]
    assert all(torch.equal(a, b) for a, b in zip(phase.supernet.buffers(), statistics, strict=True))

    phase.supernet.set_execution("reference")
    loss = nn.functional.cross_entropy(phase.supernet(images.double()), labels)
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss, alphas, create_graph=True)])
    rows = [torch.autograd.grad(g, alphas, retain_graph=True) for g in gradients]
    hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert found == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=0.01)
