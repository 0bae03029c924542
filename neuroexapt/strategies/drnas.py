"""DrNAS: Dirichlet Neural Architecture Search (Chen, Wang, Cheng, Tang, Hsieh; ICLR 2021)."""

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Dirichlet

from neuroexapt.core.supernet import Supernet
from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.pruning import keep_strongest

SMALLEST = 1e-6
"""Concentration of a candidate that was ruled out: all its samples are practically 0."""
HELD_EPOCHS, HELD_SHARE = 10, 0.4
"""α stays as it is for so many epochs at the start of each half, in short searches for so much of it."""


class DrNas(Darts):
    """Mixing weights drawn from Dirichlet(elu(α) + 1) for every pass anew, differentiated through the sample.

    α is kept close to 0, where the distribution is uniform, by its weight decay, as in the published code;
    the paper's other distance, the Kullback-Leibler divergence, is off there by default. The published search
    for CIFAR-10 in the space of DARTS is the progressive one, in a network of 20 cells and 36 channels that
    partial channels make fit; here all channels are used, in the network of the other strategies.
    """

    paper = "Chen, Wang, Cheng, Tang, Hsieh: DrNAS: Dirichlet Neural Architecture Search, ICLR 2021"
    against_collapse = True
    defaults_of_space: ClassVar = {
        "darts": {"arch_learning_rate": 6e-4, "learning_rate": 0.1, "learning_rate_min": 0.0},
        "nas-bench-201": {"epochs": 100},
    }

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Checking the arguments would wait for the device.
        return {
            cell: Dirichlet(concentration(alpha), validate_args=False).rsample()
            for cell, alpha in alphas.items()
        }

    def mixing(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of the distribution."""
        return {cell: F.normalize(concentration(alpha), p=1, dim=-1) for cell, alpha in alphas.items()}


class ProgressiveDrNas(DrNas):
    """DrNAS that rules out the weaker half of the candidates of every edge after half of the epochs. In the
    first epochs of each half α is held.

    The published one leaves 4 of 8 candidates, and 3 of the 5 of NAS-Bench-201, as here, and widens partial
    channels at the same time, which are not used here.
    """

    def start_epoch(self, supernet: Supernet, epoch: int, epochs: int) -> bool:
        if epoch < _half(epochs):
            return False
        return keep_strongest(supernet, self.mixing(supernet.choices()), lambda count: (count + 1) // 2)

    def holds_alpha(self, epoch: int, epochs: int) -> bool:
        half = _half(epochs)
        return epoch % half < min(HELD_EPOCHS, int(HELD_SHARE * half))


def _half(epochs: int) -> int:
    """The larger one."""
    return (epochs + 1) // 2


def concentration(alpha: Tensor) -> Tensor:
    """``elu(α) + 1``, above 0 even where α is −∞, since a distribution has to have it so."""
    return (F.elu(alpha) + 1).clamp_min(SMALLEST)
