"""SNAS: Stochastic Neural Architecture Search (Xie, Zheng, Liu, Lin; ICLR 2019)."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.gumbel import gumbel_softmax
from neuroexapt.strategies.schedule import Scheduled


class Snas(Scheduled):
    """Mixing weights drawn for every pass anew: ``gumbel_softmax`` of α, all of it, with its gradient.

    The paper learns α and w on the same pictures; here α has those of its own, as for every strategy. τ, and
    the epochs for NAS-Bench-201, are those of DrNAS's code for SNAS, whose own is not public.
    """

    paper = "Xie, Zheng, Liu, Lin: SNAS: Stochastic Neural Architecture Search, ICLR 2019"
    defaults_of_space: ClassVar = {"nas-bench-201": {"epochs": 100}}
    schedule = ("temperature", 10.0, 1.0)
    temperature: Tensor

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: gumbel_softmax(alpha, self.temperature) for cell, alpha in alphas.items()}

    mixing = Darts.relax
