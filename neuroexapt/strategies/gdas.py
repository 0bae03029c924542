"""GDAS: Searching for a Robust Neural Architecture in Four GPU Hours (Dong, Yang; CVPR 2019)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.gumbel import gumbel_softmax
from neuroexapt.strategies.schedule import Scheduled


class Gdas(Scheduled):
    """One operation an edge, drawn for every pass anew with the probabilities softmax(α).

    Of the sample p of ``gumbel_softmax`` the largest element counts: its weight is 1 and has the gradient of
    p, the others are 0 and have none. τ falls linearly.

    All operations run here, those that were not drawn with weight 0, so that every step launches the same
    kernels, as a CUDA graph wants it. From the published ones they differ in the running statistics of their
    BatchNorms.
    """

    paper = "Dong, Yang: Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019"
    defaults: ClassVar = {"epochs": 250}
    single_path = True
    schedule = ("temperature", 10.0, 0.1)
    temperature: Tensor

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: self._draw(alpha) for cell, alpha in alphas.items()}

    mixing = Darts.relax

    def _draw(self, alpha: Tensor) -> Tensor:
        p = gumbel_softmax(alpha, self.temperature)
        drawn = torch.zeros_like(p).scatter_(-1, p.argmax(dim=-1, keepdim=True), 1.0)
        return drawn + drawn * (p - p.detach())
