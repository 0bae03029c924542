"""How strengths and temperatures change over a search."""

from typing import ClassVar

import torch

from neuroexapt.core.supernet import Supernet
from neuroexapt.strategies.darts import Darts


class Scheduled(Darts):
    """DARTS with a number that changes linearly over the epochs, in the buffer that ``schedule`` names."""

    schedule: ClassVar[tuple[str, float, float]]
    """The buffer's name, and its values in the first and in the last epoch."""

    def __init__(self) -> None:
        super().__init__()
        name, start, _ = self.schedule
        self.register_buffer(name, torch.tensor(start))

    def start_epoch(self, supernet: Supernet, epoch: int, epochs: int) -> bool:
        name, start, end = self.schedule
        self.get_buffer(name).fill_(start + (end - start) * epoch / max(1, epochs - 1))
        return False
