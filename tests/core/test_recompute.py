import copy
import gc
from contextvars import ContextVar

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.core.buffers import buffers_copied
from neuroexapt.core.recompute import recomputed
from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.bilevel import Batch
from neuroexapt.spaces import DARTS
from tests.core.bilevel_step import make_step


def make_supernet() -> Supernet:
    torch.manual_seed(0)
    supernet = DARTS.supernet(in_channels=1, num_classes=3, channels=2, layers=3).double()
    for alpha in supernet.arch_parameters():
        nn.init.normal_(alpha)
    return supernet


def make_batches() -> tuple[Batch, Batch]:
    torch.manual_seed(1)
    images, labels = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (2, 4))
    return Batch(images[0], labels[0]), Batch(images[1], labels[1])


def take_step(supernet: Supernet, strategy: str) -> None:
    make_step(supernet, strategy)(*make_batches())


@pytest.mark.parametrize("execution", ["fused", "reference"])
@pytest.mark.parametrize("strategy", ["darts", "darts-2nd"])
def test_steps_are_the_same_bit_for_bit(execution, strategy):
    supernet = make_supernet()
    supernet.set_execution(execution)
    frugal = copy.deepcopy(supernet)
    frugal.set_recompute(True)
    take_step(supernet, strategy)
    take_step(frugal, strategy)
    expected, actual = supernet.state_dict(), frugal.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_a_captured_step_needs_less_memory_and_finds_the_same():
    torch.manual_seed(0)
    supernet = DARTS.supernet(in_channels=3, num_classes=10, channels=16, layers=8).cuda()
    images = torch.randn(16, 3, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (16,), device="cuda")
    gradients, peaks = [], []
    for recompute in (False, True):
        network = copy.deepcopy(supernet)
        network.set_recompute(recompute)

        def differentiate(network: Supernet = network) -> list[Tensor]:
            loss = nn.functional.cross_entropy(network(images), labels)
            return [*torch.autograd.grad(loss, network.arch_parameters())]

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            differentiate()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # of other tests, too
        with torch.cuda.graph(graph, stream=stream):
            found = differentiate()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        graph.replay()
        gradients.append([gradient.clone() for gradient in found])
    for gradient, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(gradient, expected)
    assert peaks[1] < 0.6 * peaks[0]


def kept_bytes(supernet: Supernet) -> int:
    """What autograd keeps of a forward pass, each tensor counted once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = supernet(make_batches()[0].inputs).sum()
    parameters = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
    assert loss.requires_grad
    return sum(size for storage, size in kept.items() if storage not in parameters)


def test_cells_keep_only_what_enters_them():
    supernet = make_supernet()
    everything = kept_bytes(supernet)
    supernet.set_recompute(True)
    assert kept_bytes(supernet) < everything / 5


def test_evaluation_without_gradients_runs_once():
    supernet = make_supernet()
    supernet.set_recompute(True)
    calls = []
    supernet.cells[0].inputs.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        supernet(make_batches()[0].inputs)
    assert len(calls) == 1


def test_runs_again_with_the_context_variables_of_the_first_run():
    variable = ContextVar("variable", default="default")
    seen = []

    def square(x: Tensor) -> Tensor:
        seen.append(variable.get())
        return x * x

    token = variable.set("chosen")
    y = recomputed(nn.Identity(), square, torch.ones(1, requires_grad=True))
    variable.reset(token)
    y.backward()
    assert seen == ["chosen", "chosen"]


def test_buffers_are_kept_though_their_module_changes_them():
    bn = nn.BatchNorm2d(2)
    before = copy.deepcopy(bn.state_dict())
    with buffers_copied(bn):
        bn(torch.randn(2, 2, 3, 3))
        assert bn.num_batches_tracked == 1
    assert all(torch.equal(bn.state_dict()[name], value) for name, value in before.items())
