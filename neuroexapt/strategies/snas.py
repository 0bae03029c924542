"""SNAS: Stochastic Neural Architecture Search (Xie, Zheng, Liu, Lin; ICLR 2019)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from neuroexapt.core.supernet import Supernet
from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.gumbel import gumbel_softmax
from neuroexapt.strategies.schedule import linear

TEMPERATURES = (10.0, 1.0)
"""τ of the first and of the last epoch, as in DrNAS's code for SNAS, whose own is not public."""


class Snas(Darts):
    """Mixing weights drawn for every pass anew: ``gumbel_softmax`` of α, all of it, with its gradient.

    The paper learns α and w on the same pictures; here α has those of its own, as for every strategy.
    """

    paper = "Xie, Zheng, Liu, Lin: SNAS: Stochastic Neural Architecture Search, ICLR 2019"
    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(TEMPERATURES[0]))

    def start_epoch(self, supernet: Supernet, epoch: int, epochs: int) -> bool:
        self.temperature.fill_(linear(*TEMPERATURES, epoch, epochs))
        return False

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: gumbel_softmax(alpha, self.temperature) for cell, alpha in alphas.items()}

    mixing = Darts.relax
