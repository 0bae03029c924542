"""Single-path one-shot training (Guo et al., ECCV 2020) and random search with weight sharing (Li, Talwalkar;
UAI 2019).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.core.drawn import strongest
from neuroexapt.engine.bilevel import Batch, BilevelStep, Gradients
from neuroexapt.strategies.darts import Darts


class RandomPaths(Darts):
    """One operation an edge, drawn uniformly for every pass anew. α stays as it is.

    What this learns is weights with which single paths can be compared, so the genotype comes from comparing
    them: from selection by validation. The first paper compares them by an evolutionary search, and the
    second by their best of many random ones.
    """

    paper = "Guo, Zhang, Mu, Heng, Liu, Wei, Sun: Single Path One-Shot Neural Architecture Search, ECCV 2020"
    defaults: ClassVar = {"selection": "shrink", "arch_weight_decay": 0.0}
    single_path = True
    learns_alpha = False

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: random_path(alpha) for cell, alpha in alphas.items()}

    mixing = Darts.relax

    def arch_gradient(self, step: BilevelStep, train: Batch, valid: Batch) -> Gradients:
        found = step.gradients(valid, step.weights[-1:])  # of the classifier, which costs next to nothing
        return found._replace(gradients=tuple(torch.zeros_like(alpha) for alpha in step.alphas))


def random_path(alpha: Tensor) -> Tensor:
    """1 for one candidate of each row, 0 for the others; each is as probable whose α is not −∞."""
    return strongest(torch.rand_like(alpha).masked_fill(alpha == -torch.inf, -1.0))
