import copy
import itertools
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.engine.bilevel import Batch, BilevelStep, Strategy, _laid_out_like
from neuroexapt.spaces import CellSpace
from neuroexapt.strategies import Darts, SecondOrderDarts, darts

SPACE = CellSpace("small", ("none", "skip_connect", "sep_conv_3x3", "avg_pool_3x3"))
LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-2


def make_step(strategy: Strategy) -> tuple[BilevelStep, Batch, Batch]:
    """In fp64, with evaluation-mode statistics so that the loss is a fixed function of w and α, after one SGD
    step so that momentum is not zero."""
    torch.manual_seed(0)
    supernet = SPACE.supernet(in_channels=2, num_classes=3, channels=2, layers=3).double()
    train, valid = (
        Batch(torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(2)
    )
    step = BilevelStep(
        supernet,
        strategy,
        torch.optim.SGD(supernet.weights(), LR, momentum=MOMENTUM, weight_decay=DECAY),
        torch.optim.Adam(supernet.arch_parameters(), 1e-2),
        grad_clip=5.0,
    )
    step(train, None)
    supernet.eval()
    return step, train, valid


def exact_unrolled_gradient(step: BilevelStep, train: Batch, valid: Batch) -> tuple[Tensor, ...]:
    """∇_α L_val(w − η (∇_w L_train(w, α) + wd w + momentum buffer), α), differentiated through."""
    names = [name for name, _ in step.supernet.named_weights()]
    buffers = [step.weight_optimizer.state[w]["momentum_buffer"] for w in step.weights]

    def loss_at(weights: list[Tensor], batch: Batch) -> Tensor:
        values = dict(zip(names, weights, strict=True))
        return F.cross_entropy(torch.func.functional_call(step.supernet, values, batch.inputs), batch.labels)

    weights = [w.detach().clone().requires_grad_() for w in step.weights]
    gradients = torch.autograd.grad(loss_at(weights, train), weights, create_graph=True)
    unrolled = [
        w - LR * (g + DECAY * w + MOMENTUM * b) for w, g, b in zip(weights, gradients, buffers, strict=True)
    ]
    return torch.autograd.grad(loss_at(unrolled, valid), step.alphas)


# ∇_α L_train jumps where a ReLU of the network flips, and a jump J inside ±ε adds J / 2ε to the difference
# quotient. The published radius meets some; one a thousand times smaller meets none and shows the algebra.
@pytest.mark.parametrize(("radius", "tolerance"), [(1e-2, 5e-2), (1e-5, 1e-9)])
def test_second_order_gradient_equals_the_exact_unrolled_one(
    radius: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert darts.FINITE_DIFFERENCE_RADIUS == 1e-2
    monkeypatch.setattr(darts, "FINITE_DIFFERENCE_RADIUS", radius)
    step, train, valid = make_step(SecondOrderDarts())
    exact = exact_unrolled_gradient(step, train, valid)
    approximate = step.strategy.arch_gradient(step, train, valid).gradients
    first_order = Darts().arch_gradient(step, train, valid).gradients
    for e, a, f in zip(exact, approximate, first_order, strict=True):
        assert (a - e).norm() < tolerance * e.norm()
        assert (f - e).norm() > 0.1 * e.norm(), "the case must tell the orders apart"


def test_second_order_leaves_weights_and_gradients_alone() -> None:
    step, train, valid = make_step(SecondOrderDarts())
    before = [w.detach().clone() for w in step.weights]
    step.strategy.arch_gradient(step, train, valid)
    assert all(torch.equal(w, b) for w, b in zip(step.weights, before, strict=True))
    assert all(p.grad is None for p in step.supernet.parameters())


def test_second_order_counts_the_training_passes_in_the_running_statistics() -> None:
    """Three passes on the training batch count, the pass at the unrolled weights does not."""
    step, train, valid = make_step(SecondOrderDarts())
    step.supernet.train()
    counts = [b for name, b in step.supernet.named_buffers() if name.endswith("num_batches_tracked")]
    before = counts[0].item()
    step.strategy.arch_gradient(step, train, valid)
    assert all(count.item() == before + 3 for count in counts)


def test_first_order_gradient_is_that_of_the_validation_loss() -> None:
    step, train, valid = make_step(Darts())
    F.cross_entropy(step.supernet(valid.inputs), valid.labels).backward()
    gradients = step.strategy.arch_gradient(step, train, valid).gradients
    for alpha, gradient in zip(step.alphas, gradients, strict=True):
        assert alpha.grad is not None
        assert torch.allclose(gradient, alpha.grad, rtol=1e-10)


@pytest.mark.parametrize("strategy", [Darts(), SecondOrderDarts()])
def test_step_equals_the_two_optimizers_in_turn(strategy: Strategy) -> None:
    step, train, valid = make_step(strategy)
    twin = copy.deepcopy(step)
    twin.supernet.train()
    for p, g in zip(twin.alphas, twin.strategy.arch_gradient(twin, train, valid).gradients, strict=True):
        p.grad = g
    twin.arch_optimizer.step()
    loss = F.cross_entropy(twin.supernet(train.inputs), train.labels)
    for p, g in zip(twin.weights, torch.autograd.grad(loss, twin.weights), strict=True):
        p.grad = g
    torch.nn.utils.clip_grad_norm_(twin.weights, 5.0)
    twin.weight_optimizer.step()

    metrics = step(train, valid)
    assert metrics.train_loss == loss
    for p, q in zip(step.supernet.parameters(), twin.supernet.parameters(), strict=True):
        assert torch.equal(p, q)


def test_warm_up_step_leaves_alphas_alone() -> None:
    step, train, _ = make_step(Darts())
    alphas = [a.detach().clone() for a in step.alphas]
    weights = [w.detach().clone() for w in step.weights]
    metrics = step(train, None)
    assert metrics.arch_loss.isnan()
    assert all(torch.equal(a, b) for a, b in zip(step.alphas, alphas, strict=True))
    assert not any(torch.equal(w, b) for w, b in itertools.islice(zip(step.weights, weights, strict=True), 3))


def test_gradients_are_clipped() -> None:
    step, train, _ = make_step(Darts())
    step.grad_clip = 1e-6
    step.weight_optimizer = torch.optim.SGD(step.weights, 1.0)
    before = [w.detach().clone() for w in step.weights]
    step(train, None)
    change = [w.detach() - b for w, b in zip(step.weights, before, strict=True)]
    assert torch.nn.utils.get_total_norm(change) < 1.01e-6


class Recorder(torch.autograd.Function):
    """A convolution's stand-in: notes which gradients its backward is asked for."""

    asked: ClassVar[list[tuple[bool, ...]]] = []

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        Recorder.asked.append(ctx.needs_input_grad)
        ctx.save_for_backward(x, weight)
        return x * weight.mean()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight.mean(), (gradient * x).sum().expand_as(weight) / weight.numel()


@pytest.mark.parametrize(
    ("strategy", "of_weights"),
    [(Darts(), [False, True]), (SecondOrderDarts(), [True, True, False, False, True])],
)
def test_operations_are_asked_for_the_gradients_of_each_pass_alone(
    strategy: Strategy, of_weights: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second order differentiates w for the unrolled weights and both w and α there."""
    step, train, valid = make_step(strategy)
    forward = step.supernet.forward

    def recording(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return Recorder.apply(forward(x, weights), step.supernet.classifier.weight)

    monkeypatch.setattr(Recorder, "asked", [])
    monkeypatch.setattr(step.supernet, "forward", recording)
    step(train, valid)
    assert [weight for _, weight in Recorder.asked] == of_weights
    assert all(p.requires_grad for p in step.supernet.parameters())


def test_a_step_that_fails_leaves_every_parameter_trainable() -> None:
    step, train, valid = make_step(Darts())
    step.supernet.forward = lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(train, valid)
    assert all(p.requires_grad for p in step.supernet.parameters())


@pytest.mark.parametrize("shape", [(4, 4, 1, 1), (4, 1, 3, 3), (2, 3, 3, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_take_the_layout_of_their_parameter(shape: tuple[int, ...], layout: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(shape).to(memory_format=layout))
    values = torch.randn(shape)
    for gradient in (values, values.to(memory_format=torch.channels_last), values.mT.contiguous().mT):
        laid_out = _laid_out_like(parameter, gradient)
        assert laid_out.stride() == parameter.stride()
        assert torch.equal(laid_out, values)
