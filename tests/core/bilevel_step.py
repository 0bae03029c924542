"""A bilevel step with settings that let every part of it show."""

import torch

from neuroexapt.core.supernet import Supernet
from neuroexapt.engine.bilevel import BilevelStep
from neuroexapt.strategies import get_strategy


def make_step(supernet: Supernet, strategy: str) -> BilevelStep:
    return BilevelStep(
        supernet,
        get_strategy(strategy),
        torch.optim.SGD(supernet.weights(), 0.1, momentum=0.9),
        torch.optim.Adam(supernet.arch_parameters(), 0.01),
        grad_clip=5.0,
    )
