"""DARTS: Differentiable Architecture Search (Liu, Simonyan, Yang; ICLR 2019)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from neuroexapt.core.buffers import buffers_copied, copy_tensors
from neuroexapt.engine.bilevel import Batch, BilevelStep, Gradients, Strategy

FINITE_DIFFERENCE_RADIUS = 1e-2
"""r of the paper: ε = r / ‖∇_w' L_val‖."""


class Darts(Strategy):
    """First order: ∇_α L_val(w, α) at the current w, with softmax mixing weights."""

    paper = "Liu, Simonyan, Yang: DARTS: Differentiable Architecture Search, ICLR 2019"

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: torch.softmax(alpha, dim=-1) for cell, alpha in alphas.items()}

    def arch_gradient(self, step: BilevelStep, train: Batch, valid: Batch) -> Gradients:
        return step.gradients(valid, step.alphas)


class SecondOrderDarts(Darts):
    """Second order: ∇_α L_val(w', α), with w' one SGD step ahead on the training batch.

    ``w' = w − η (∇_w L_train + wd · w + momentum · buffer)`` and, by finite differences (eq. 8 of the paper),
    ``∇_α L_val(w', α) − η · (∇_α L_train(w⁺, α) − ∇_α L_train(w⁻, α)) / 2ε`` with ``w± = w ± ε ∇_w' L_val``.
    As in the published code, the three passes on the training batch count for BatchNorm's running statistics
    and the pass at w' does not.
    """

    @torch.no_grad()
    def arch_gradient(self, step: BilevelStep, train: Batch, valid: Batch) -> Gradients:
        weights, alphas = step.weights, step.alphas
        saved = [torch.empty_like(weight) for weight in weights]
        copy_tensors(saved, weights)
        eta = step.weight_optimizer.param_groups[0]["lr"]
        direction = _sgd_direction(step, step.gradients(train, weights).gradients)

        copy_tensors(weights, torch._foreach_sub(saved, torch._foreach_mul(direction, eta)))
        with buffers_copied(step.supernet):
            unrolled = step.gradients(valid, [*alphas, *weights])
        at_unrolled, vector = unrolled.gradients[: len(alphas)], unrolled.gradients[len(alphas) :]

        epsilon = FINITE_DIFFERENCE_RADIUS / torch.nn.utils.get_total_norm(vector)
        offset = torch._foreach_mul(vector, epsilon)
        copy_tensors(weights, torch._foreach_add(saved, offset))
        plus = step.gradients(train, alphas).gradients
        copy_tensors(weights, torch._foreach_sub(saved, offset))
        minus = step.gradients(train, alphas).gradients
        copy_tensors(weights, saved)

        implicit = [(p - m) / (2 * epsilon) for p, m in zip(plus, minus, strict=True)]
        total = tuple(g - eta * h for g, h in zip(at_unrolled, implicit, strict=True))
        return unrolled._replace(gradients=total)


def _sgd_direction(step: BilevelStep, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What SGD would subtract, over η: gradient + weight decay + momentum buffer."""
    group, state = step.weight_optimizer.param_groups[0], step.weight_optimizer.state
    direction = torch._foreach_add(gradients, tuple(step.weights), alpha=group["weight_decay"])
    states = [state.get(weight, {}) for weight in step.weights]
    buffers = [of_weight["momentum_buffer"] for of_weight in states if "momentum_buffer" in of_weight]
    if buffers:  # there are none before the first step
        torch._foreach_add_(direction, buffers, alpha=group["momentum"])
    return direction
