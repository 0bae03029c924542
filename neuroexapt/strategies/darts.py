"""DARTS: Differentiable Architecture Search (Liu, Simonyan, Yang; ICLR 2019)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from neuroexapt.engine.bilevel import ArchGradient, Batch, BilevelStep, Strategy

FINITE_DIFFERENCE_RADIUS = 1e-2
"""r of the paper: ε = r / ‖∇_w' L_val‖."""


class Darts(Strategy):
    """First order: ∇_α L_val(w, α) at the current w, with softmax mixing weights."""

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: torch.softmax(alpha, dim=-1) for cell, alpha in alphas.items()}

    def arch_gradient(self, step: BilevelStep, train: Batch, valid: Batch) -> ArchGradient:
        loss, logits = step.loss(valid)
        return ArchGradient(torch.autograd.grad(loss, step.alphas), loss.detach(), logits.detach())


class SecondOrderDarts(Darts):
    """Second order: ∇_α L_val(w', α), with w' one SGD step ahead on the training batch.

    ``w' = w − η (∇_w L_train + wd · w + momentum · buffer)`` and, by finite differences (eq. 8 of the paper),
    ``∇_α L_val(w', α) − η · (∇_α L_train(w⁺, α) − ∇_α L_train(w⁻, α)) / 2ε`` with ``w± = w ± ε ∇_w' L_val``.
    As in the published code, the three passes on the training batch count for BatchNorm's running statistics
    and the pass at w' does not.
    """

    def arch_gradient(self, step: BilevelStep, train: Batch, valid: Batch) -> ArchGradient:
        weights, alphas = step.weights, step.alphas
        saved = [weight.detach().clone() for weight in weights]
        eta = step.weight_optimizer.param_groups[0]["lr"]
        direction = _sgd_direction(step, torch.autograd.grad(step.loss(train)[0], weights))

        _assign(weights, torch._foreach_sub(saved, torch._foreach_mul(direction, eta)))
        with step.running_statistics_kept():
            loss, logits = step.loss(valid)
            gradients = torch.autograd.grad(loss, [*alphas, *weights])
        at_unrolled, vector = gradients[: len(alphas)], gradients[len(alphas) :]

        epsilon = FINITE_DIFFERENCE_RADIUS / torch.nn.utils.get_total_norm(vector)
        offset = torch._foreach_mul(vector, epsilon)
        _assign(weights, torch._foreach_add(saved, offset))
        plus = torch.autograd.grad(step.loss(train)[0], alphas)
        _assign(weights, torch._foreach_sub(saved, offset))
        minus = torch.autograd.grad(step.loss(train)[0], alphas)
        _assign(weights, saved)

        implicit = [(p - m) / (2 * epsilon) for p, m in zip(plus, minus, strict=True)]
        total = tuple(g - eta * h for g, h in zip(at_unrolled, implicit, strict=True))
        return ArchGradient(total, loss.detach(), logits.detach())


def _sgd_direction(step: BilevelStep, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """What SGD would subtract, over η: gradient + weight decay + momentum buffer."""
    group = step.weight_optimizer.param_groups[0]
    direction = []
    for weight, gradient in zip(step.weights, gradients, strict=True):
        gradient = gradient + group["weight_decay"] * weight.detach()
        buffer = step.weight_optimizer.state[weight].get("momentum_buffer")
        if buffer is not None:
            gradient = gradient + group["momentum"] * buffer
        direction.append(gradient)
    return direction


@torch.no_grad()
def _assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(targets), list(values))
