import copy

import pytest
import torch
import torch.nn.functional as F

from neuroexapt.backend import dispatch_report, reset_dispatch_report
from neuroexapt.core.supernet import Supernet, reduction_layers
from neuroexapt.errors import UserError
from neuroexapt.spaces import DARTS
from tests.core.published import PublishedNetwork

LAYERS = 4


def make_supernet() -> Supernet:
    torch.manual_seed(0)
    supernet = DARTS.supernet(in_channels=3, num_classes=5, channels=4, layers=LAYERS).double()
    for alpha in supernet.arch_parameters():
        alpha.data = torch.randn_like(alpha)
    # Running statistics away from their initial values, so that evaluation mode tests something.
    supernet.train()(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    return supernet


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_published_network(training: bool) -> None:
    supernet = make_supernet().train(training)
    twin = copy.deepcopy(supernet)
    ours = ("alphas.", "candidates.")
    tensors = [v for k, v in twin.state_dict(keep_vars=True).items() if not k.startswith(ours)]
    published = PublishedNetwork(tensors, LAYERS, training)
    x, y = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])

    loss = F.cross_entropy(supernet(x), y)
    loss.backward()
    expected = F.cross_entropy(published(x, *twin.alphas.values()), y)
    expected.backward()

    assert relative_error(loss, expected) < 1e-10
    for (name, p), q in zip(supernet.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert relative_error(p.grad, q.grad) < 1e-10, name
    assert sum(q.grad.norm() > 0 for q in twin.parameters()) > 0.95 * len(list(twin.parameters()))
    for (name, p), q in zip(supernet.named_buffers(), twin.buffers(), strict=True):
        assert relative_error(p.double(), q.double()) < 1e-10, name


@pytest.mark.parametrize("size", [(9, 9), (15, 10), (4, 4), (28, 28)])
def test_takes_odd_and_small_pictures(size: tuple[int, int]) -> None:
    supernet = DARTS.supernet(in_channels=1, num_classes=3, channels=2, layers=3)
    logits = supernet(torch.randn(4, 1, *size))
    logits.sum().backward()
    assert logits.shape == (4, 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in supernet.parameters())


def test_the_reference_execution_reaches_the_edges() -> None:
    supernet = DARTS.supernet(in_channels=1, num_classes=3, channels=2, layers=3)
    x = torch.randn(16, 1, 8, 8)
    for execution, fused in (("reference", 0), ("fused", 3)):
        supernet.set_execution(execution)
        reset_dispatch_report()
        supernet(x)
        cells = [count for decision, count in dispatch_report().items() if decision.op == "cell"]
        assert sum(cells) == fused


@pytest.mark.parametrize("execution", ["fused", "reference"])
def test_bf16_is_for_what_is_kept_alone(execution: str) -> None:
    supernet, x = make_supernet().float(), torch.randn(16, 3, 8, 8)
    supernet.set_execution(execution)
    seen: set[torch.dtype] = set()
    for cell in supernet.cells:
        cell.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    found = {}
    for precision in ("fp32", "bf16"):
        supernet.set_precision(precision)
        logits = supernet(x)
        gradients = torch.autograd.grad(logits.square().mean(), list(supernet.parameters()))
        assert {logits.dtype, *(gradient.dtype for gradient in gradients)} == {torch.float32}
        assert {buffer.dtype for buffer in supernet.buffers() if buffer.is_floating_point()} == {
            torch.float32
        }
        found[precision] = logits, torch.cat([gradient.flatten() for gradient in gradients])
    assert seen == {torch.float32, torch.bfloat16}
    for got, wanted in zip(found["bf16"], found["fp32"], strict=True):
        assert 1e-4 < relative_error(got, wanted) < 0.5


def test_knows_two_precisions() -> None:
    with pytest.raises(UserError, match="fp32, bf16"):
        make_supernet().set_precision("fp16")


def test_weights_and_alphas_are_apart_and_complete() -> None:
    supernet = DARTS.supernet(in_channels=3, num_classes=10, channels=4, layers=3)
    weights, alphas = supernet.weights(), supernet.arch_parameters()
    assert {id(p) for p in weights} | {id(p) for p in alphas} == {id(p) for p in supernet.parameters()}
    assert not {id(p) for p in weights} & {id(p) for p in alphas}
    assert [tuple(a.shape) for a in alphas] == [(14, 8), (14, 8)]


def test_published_size() -> None:
    """1.93 M weights in 1,399 tensors at 8 cells of 16 channels."""
    supernet = DARTS.supernet(in_channels=3, num_classes=10, channels=16, layers=8)
    assert sum(w.numel() for w in supernet.weights()) == 1_930_618
    assert len(supernet.weights()) == 1_399


def test_reductions_sit_at_the_thirds() -> None:
    assert reduction_layers(8) == {2, 5}
    assert reduction_layers(20) == {6, 13}
    with pytest.raises(UserError, match="at least 3"):
        reduction_layers(2)
