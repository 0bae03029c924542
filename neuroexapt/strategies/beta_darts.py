"""β-DARTS: Beta-Decay Regularization for Differentiable Architecture Search (Ye et al.; CVPR 2022)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.strategies.schedule import Scheduled


class BetaDarts(Scheduled):
    """DARTS whose loss of α counts ``λ · mean_e logsumexp_k(α_ek)``, summed over the cell types.

    The gradient of that is λ · softmax(α) / E: it lowers each α by its own share, so that the shares stay
    close to each other. λ grows linearly.
    """

    paper = (
        "Ye, Li, Li, Chen, Fan, Ouyang: β-DARTS: Beta-Decay Regularization for Differentiable Architecture "
        "Search, CVPR 2022"
    )
    against_collapse = True
    defaults_of_space: ClassVar = {"nas-bench-201": {"epochs": 100}}
    schedule = ("strength", 0.0, 50.0)
    strength: Tensor

    def penalty(self, alphas: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        means = [alpha.logsumexp(dim=-1).mean() for alpha in alphas.values()]
        return self.strength * torch.stack(means).sum()
