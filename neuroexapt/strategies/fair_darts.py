"""FairDARTS: Eliminating Unfair Advantages in Differentiable Architecture Search (Chu et al.; ECCV 2020)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.core.supernet import Supernet
from neuroexapt.strategies.darts import Darts

ZERO_ONE_STRENGTH = 10.0
"""w of the paper."""


class FairDarts(Darts):
    """Operations do not compete: mixing weights σ(α), which ``−w · mean (σ(α) − ½)²`` drives to 0 or 1.

    The published rule keeps every operation above a threshold; here the space's own rule takes the largest,
    so that the networks of all strategies can be compared. The published space has no ``none``, on which
    the loss does not depend: the penalty leaves it at ½, where it stands for an edge without a better one.
    Adam's β₁ for α is 0.9 in the published code, 0.5 here.
    """

    paper = (
        "Chu, Zhou, Zhang, Li: Fair DARTS: Eliminating Unfair Advantages in Differentiable Architecture "
        "Search, ECCV 2020"
    )
    against_collapse = True
    defaults: ClassVar = {"batch_size": 128, "learning_rate": 0.005, "arch_learning_rate": 3e-3}

    def __init__(self) -> None:
        super().__init__()
        self._operations: dict[str, list[int]] = {}

    def shape(self, supernet: Supernet) -> None:
        self._operations = {
            cell: [k for k, name in enumerate(supernet.primitives_of(cell)) if name != "none"]
            for cell in supernet.alphas
        }

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: alpha.sigmoid() for cell, alpha in alphas.items()}

    def penalty(self, alphas: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        shares = torch.cat([w[:, k] for cell, w in weights.items() for k in self._operations[cell]])
        return -ZERO_ONE_STRENGTH * (shares - 0.5).square().mean()
