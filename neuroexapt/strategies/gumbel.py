"""Samples of a categorical distribution that can be differentiated, and searches that draw them."""

from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.core.supernet import Supernet
from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.schedule import linear


def gumbel_softmax(alpha: Tensor, temperature: Tensor) -> Tensor:
    """``softmax((log softmax(α) + g) / τ)`` over the last dimension, g of the Gumbel distribution.

    The largest element is k with probability softmax(α)_k; the sample comes close to a corner as τ falls.

    Source: Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017; Maddison, Mnih,
    Teh, "The Concrete Distribution", ICLR 2017.
    """
    noise = -torch.empty_like(alpha).exponential_().log()
    return ((alpha.log_softmax(dim=-1) + noise) / temperature).softmax(dim=-1)


class Annealed(Darts):
    """A search whose samples have a temperature τ that falls linearly; it is validated without them."""

    temperatures: ClassVar[tuple[float, float]]
    """τ of the first and of the last epoch."""
    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(self.temperatures[0]))

    def start_epoch(self, supernet: Supernet, epoch: int, epochs: int) -> bool:
        self.temperature.fill_(linear(*self.temperatures, epoch, epochs))
        return False

    mixing = Darts.relax
