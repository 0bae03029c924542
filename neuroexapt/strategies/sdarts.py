"""SDARTS: Stabilizing Differentiable Architecture Search via Perturbation-based Regularization (Chen, Hsieh;
ICML 2020).
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.core.drawn import strongest
from neuroexapt.engine.bilevel import Batch, BilevelStep, Gradients
from neuroexapt.strategies.schedule import Scheduled

ATTACK_STEPS = 7


class Smoothed(Scheduled):
    """DARTS whose weights learn at mixing weights up to ε away from softmax(α), so that the loss is smooth
    there. α is learned at softmax(α) itself. ε grows linearly.
    """

    paper = (
        "Chen, Hsieh: Stabilizing Differentiable Architecture Search via Perturbation-based Regularization, "
        "ICML 2020"
    )
    against_collapse = True
    defaults_of_space: ClassVar = {"nas-bench-201": {"epochs": 100}}
    schedule = ("radius", 0.03, 0.3)
    radius: Tensor

    def weight_gradient(self, step: BilevelStep, train: Batch) -> Gradients:
        with torch.no_grad():
            weights = self.relax(step.supernet.choices())
            perturbed = self.perturb(step, train, list(weights.values()))
        return step.gradients(train, step.weights, dict(zip(weights, perturbed, strict=True)))

    @abstractmethod
    def perturb(self, step: BilevelStep, train: Batch, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Mixing weights, one [E, K] for each cell type, at most ε away from ``weights`` in any element."""

    def _noisy(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Candidates that were ruled out, which have weight 0, keep it."""
        return [_on_simplex(w + (w > 0) * self.radius * (2 * torch.rand_like(w) - 1)) for w in weights]


class RandomlySmoothed(Smoothed):
    """SDARTS-RS: uniform noise in ±ε."""

    def perturb(self, step: BilevelStep, train: Batch, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._noisy(weights)


class AdversariallySmoothed(Smoothed):
    """SDARTS-ADV: the mixing weights within ±ε for which the training loss is largest.

    Seven steps of projected gradient ascent from a random start, with the network in evaluation mode.
    """

    def perturb(self, step: BilevelStep, train: Batch, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        step.supernet.eval()
        worst = self._attack(step, train, weights)
        step.supernet.train()
        return worst

    def _attack(self, step: BilevelStep, train: Batch, weights: Sequence[Tensor]) -> list[Tensor]:
        names, found = list(step.supernet.alphas), self._noisy(weights)

        def loss(at: Sequence[Tensor]) -> Tensor:
            output = step.supernet(train.inputs, dict(zip(names, at, strict=True)))
            return step.task.loss(output, train.labels)

        for _ in range(ATTACK_STEPS):
            at = [w.requires_grad_() for w in found]
            gradients = step.gradients(train, at, dict(zip(names, at, strict=True))).gradients
            moved = [
                w.detach() + 2 * self.radius / ATTACK_STEPS * gradient.sign()
                for w, gradient in zip(at, gradients, strict=True)
            ]
            found = [
                _on_simplex(w + (m - w).clamp(-self.radius, self.radius))
                for w, m in zip(weights, moved, strict=True)
            ]
        is_worse = loss(found) >= loss(weights)
        return [torch.where(is_worse, f, w) for f, w in zip(found, weights, strict=True)]


def _on_simplex(weights: Tensor) -> Tensor:
    """Rows clamped to 0..1 and divided by their sums; where all were negative, the largest becomes 1."""
    largest = strongest(weights)
    clamped = weights.clamp(0, 1)
    total = clamped.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, clamped / total, largest)
