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

    Of the sample p of ``gumbel_softmax`` the largest element counts: its weight is 1, the others are 0, and
    all have the gradient of p. τ falls linearly.

    As published, operations that were not drawn do not run: no gradients, no running statistics. A captured
    step launches the same kernels every time; they find out on the device what was drawn. The optimizer sees
    gradients of 0, so momentum and weight decay go on, as in the published code with the PyTorch of its time,
    which filled gradients with zeros.

    The published code lets an edge that drew k put out ``w_k · o_k(x) + Σ_{j≠k} w_j``, and so does this: with
    g, the gradient of its node, w_k has the gradient ``⟨g, o_k(x)⟩`` and the weights that are 0 have ``Σ g``.
    Otherwise ``none``, whose own gradient is 0, would rise on most edges: on average more of what the others
    put out raises the loss, since the weights are trained beside ever changing paths.

    In NAS-Bench-201 the published code steps w before α, and w with Nesterov's momentum.
    """

    paper = "Dong, Yang: Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019"
    defaults: ClassVar = {"epochs": 250}
    defaults_of_space: ClassVar = {"nas-bench-201": {"weight_decay": 5e-4}}
    single_path = True
    schedule = ("temperature", 10.0, 0.1)
    temperature: Tensor

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: self._draw(alpha) for cell, alpha in alphas.items()}

    mixing = Darts.relax

    def _draw(self, alpha: Tensor) -> Tensor:
        p = gumbel_softmax(alpha, self.temperature)
        return strongest(p) + (p - p.detach())
