"""GDAS: Searching for a Robust Neural Architecture in Four GPU Hours (Dong, Yang; CVPR 2019)."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from neuroexapt.core.drawn import strongest
from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.gumbel import gumbel_softmax
from neuroexapt.strategies.schedule import Scheduled


class Gdas(Scheduled):
    """One operation an edge, drawn for every pass anew with the probabilities softmax(α).

    Of the sample p of ``gumbel_softmax`` the largest element counts: its weight is 1 and has the gradient of
    p, the others are 0 and have none. τ falls linearly.

    As published, operations that were not drawn do not run: no gradients, no running statistics. A captured
    step launches the same kernels every time; they find out on the device what was drawn. The optimizer sees
    gradients of 0, so momentum and weight decay go on, as in the published code with the PyTorch of its time,
    which filled gradients with zeros.
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
        drawn = strongest(p)
        return drawn + drawn * (p - p.detach())
