import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from neuroexapt.backend import PersistentKernel, explain, registry
from neuroexapt.backend.candidates import free_launches
from neuroexapt.backend.registry import Backend
from neuroexapt.core.operations import MixedOp
from neuroexapt.errors import BackendUnavailableError


@pytest.fixture
def module() -> MixedOp:
    torch.manual_seed(0)
    return MixedOp(4, 1)


INPUTS = torch.linspace(-1, 1, 2 * 4 * 36).view(2, 4, 6, 6), torch.linspace(0, 1, 8)


def test_on_the_cpu_the_module_runs_unchanged(module: MixedOp) -> None:
    persistent = PersistentKernel(module, INPUTS)
    assert not persistent.captured
    assert persistent.reason == "a CUDA graph needs inputs on a GPU, not on cpu"
    assert persistent.num_launches is None
    assert torch.equal(persistent(*INPUTS), copy.deepcopy(module)(*INPUTS))
    assert list(persistent.parameters()) == list(module.parameters())


def test_it_takes_over_the_mode_of_its_module(module: MixedOp) -> None:
    assert not PersistentKernel(module.eval(), INPUTS).training


def test_a_backend_that_cannot_run_is_refused(module: MixedOp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_probed", lambda spec: Backend("cuda", "ext", False, "no compiler"))
    with pytest.raises(BackendUnavailableError, match="no compiler"):
        PersistentKernel(module, INPUTS, backend="cuda:ext")


def test_where_launches_are_free_kernels_are_chosen_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get_backend", lambda: Backend("cuda", "auto", True, ""))
    monkeypatch.setattr(registry, "probe_tier", lambda tier: "")
    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(1, 4, 4, 4, device="cuda")
    assert explain("max_pool", x, 3, 1).impl == "torch"
    with free_launches():
        assert explain("max_pool", x, 3, 1).impl == "triton"
    assert explain("max_pool", x, 3, 1).impl == "torch"


@pytest.fixture
def on_gpu(module: MixedOp) -> tuple[MixedOp, tuple[Tensor, Tensor]]:
    return module.cuda(), (INPUTS[0].cuda().requires_grad_(), INPUTS[1].cuda().requires_grad_())


def results(module: nn.Module, inputs: tuple[Tensor, ...], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Output and gradients of two passes on different inputs."""
    found = []
    for scale in (1.0, -2.0):
        own = [(scale * x).detach().requires_grad_() for x in inputs]
        y = module(*own)
        gradients = torch.autograd.grad(y.square().sum(), [*own, *parameters])
        found += [x.detach().clone() for x in (y, *gradients)]  # the next pass writes to the same memory
    return found


@pytest.mark.gpu
def test_in_training_forward_and_backward_are_replayed(on_gpu: tuple) -> None:
    module, inputs = on_gpu
    twin = copy.deepcopy(module)
    sample = [x.detach().clone() for x in inputs]
    persistent = PersistentKernel(module, inputs, backend="cuda:torch")
    assert persistent.captured, persistent.reason
    assert persistent.num_launches == 1
    expected = results(twin, inputs, list(twin.parameters()))
    for a, b in zip(results(persistent, inputs, list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)  # two passes are counted, those of the capture are not
    assert all(torch.equal(a, b) for a, b in zip(inputs, sample, strict=True))


@pytest.mark.gpu
def test_in_evaluation_outputs_outlive_the_next_call(on_gpu: tuple) -> None:
    module, inputs = on_gpu
    persistent = PersistentKernel(module.eval(), inputs, backend="cuda:torch")
    assert persistent.captured, persistent.reason
    with torch.no_grad():
        first, second = persistent(*inputs), persistent(-inputs[0], inputs[1])
        assert torch.allclose(first, module(*inputs), atol=1e-5)
        assert torch.allclose(second, module(-inputs[0], inputs[1]), atol=1e-5)


@pytest.mark.gpu
def test_calls_unlike_the_sample_run_the_module_as_it_is(on_gpu: tuple) -> None:
    module, (x, weights) = on_gpu
    persistent = PersistentKernel(module, (x, weights), backend="cuda:torch")
    half = x.detach()[:1]
    assert persistent(half, weights).shape == half.shape
    persistent.eval()
    assert torch.equal(persistent(x, weights), module(x, weights))


@pytest.mark.gpu
def test_a_module_that_waits_for_the_device_runs_as_it_is() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    x = torch.ones(3, device="cuda")
    persistent = PersistentKernel(Waits(), [x])
    assert not persistent.captured
    assert "captur" in persistent.reason
    assert persistent(x).tolist() == [3.0, 3.0, 3.0]
    assert torch.rand(1, device="cuda") < 1
