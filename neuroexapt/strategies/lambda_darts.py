"""Λ-DARTS: Mitigating Performance Collapse by Harmonizing Operation Selection among Cells (Movahedi et al.;
ICLR 2023).
"""

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.bilevel import Batch, BilevelStep, Gradients
from neuroexapt.strategies.schedule import Scheduled

FINITE_DIFFERENCE_RADIUS = 1e-4
"""ε₀ of the published code: ε = ε₀ / ‖Δ‖."""

TINY = 1e-12
"""Keeps ε finite where no cell has a second one of its type."""


class LambdaDarts(Scheduled):
    """DARTS whose weights learn to let all cells of a type ask for the same change of α.

    With g_l the gradient of the training loss with respect to the mixing weights of cell l, the loss of w is
    ``L − λ · Λ``, where Λ is the mean cosine between the g of two cells, added up over the cell types. With
    ``Δ_l = ∂Λ/∂g_l``, ``∇_w Λ = ∇_w Σ_l Δ_l · g_l`` is a finite difference over mixing weights β:
    ``(∇_w L(β + εΔ) − ∇_w L(β − εΔ)) / 2ε``. λ grows linearly.

    The published code leaves reduction cells alone. Its command for NAS-Bench-201 has λ grow to 0.25; here it
    grows to the code's default.
    """

    paper = (
        "Movahedi, Adabinejad, Imani, Keshavarz, Dehghani, Shakery, Araabi: Λ-DARTS: Mitigating Performance "
        "Collapse by Harmonizing Operation Selection among Cells, ICLR 2023"
    )
    against_collapse = True
    defaults_of_space: ClassVar = {"nas-bench-201": {"epochs": 100, "arch_learning_rate": 1e-4}}
    schedule = ("strength", 0.0, 0.125)
    strength: Tensor

    def shape(self, supernet: Supernet) -> None:
        supernet.require_cells("lambda-darts")

    @torch.no_grad()
    def weight_gradient(self, step: BilevelStep, train: Batch) -> Gradients:
        weights, names = step.weights, list(step.supernet.alphas)
        shared = self.relax(step.supernet.choices())
        counts = Counter(map(step.supernet.cell_type, step.supernet.search_cells()))
        at = [shared[name].expand(counts[name], -1, -1).clone().requires_grad_() for name in names]

        plain = step.gradients(train, [*weights, *at], dict(zip(names, at, strict=True)))
        gradients, of_cells = plain.gradients[: len(weights)], plain.gradients[len(weights) :]
        directions = [harmonizing_direction(g) for g in of_cells]
        epsilon = FINITE_DIFFERENCE_RADIUS / torch.nn.utils.get_total_norm(directions).clamp_min(TINY)

        def gradients_at(sign: int) -> tuple[Tensor, ...]:
            moved = [w.detach() + sign * epsilon * d for w, d in zip(at, directions, strict=True)]
            return step.gradients(train, weights, dict(zip(names, moved, strict=True))).gradients

        change = torch._foreach_sub(gradients_at(1), gradients_at(-1))
        scaled = torch._foreach_mul(change, self.strength / (2 * epsilon))
        return plain._replace(gradients=tuple(torch._foreach_sub(gradients, scaled)))


def harmonizing_direction(gradients: Tensor) -> Tensor:
    """∂Λ/∂g of ``gradients`` [N, E, K] of N cells; nothing to harmonise where there is one."""
    count = len(gradients)
    if count == 1:
        return torch.zeros_like(gradients)
    g = gradients.flatten(1)
    norms = g.norm(dim=1, keepdim=True)
    u = g / norms
    total = u.sum(dim=0)
    along = (u @ total)[:, None] * u
    return ((total - along) / (norms * (count * (count - 1) / 2))).view_as(gradients)
