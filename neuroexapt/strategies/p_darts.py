"""P-DARTS: Progressive Differentiable Architecture Search (Chen, Xie, Wu, Tian; ICCV 2019)."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from neuroexapt.core.supernet import DartsSupernet, Supernet
from neuroexapt.strategies.darts import Darts
from neuroexapt.strategies.pruning import keep_strongest

DEPTHS = (5 / 17, 11 / 17, 1.0)
"""Share of the layers that each stage has: 5, 11 and 17 of 17."""
SMALLEST_DEPTH = 3
KEPT = (1.0, 5 / 8, 3 / 8)
"""Share of the candidates that each stage begins with: 8, 5 and 3 of 8."""
DROP_RATES = (0.0, 0.4, 0.7)
"""Probability of dropping a skip connection at the start of each stage, by the paper; the command that comes
with the published code has 0.1 in the first.
"""
HELD = 0.4
"""Share of each stage in which α stays as it is, in whole epochs: 10 of 25."""
DECAY = 5.0
"""Of the drop rate while α learns, a stage: exp(−0.2) an epoch of 25."""


class PDarts(Darts):
    """Three stages, each deeper and with fewer candidates; skip connections are dropped at random, less and
    less. Each stage starts with new weights, α at 0 and the full learning rate of w, which falls within the
    stage; ``layers`` is the depth of the last.

    While α is held, in the first part of a stage, the drop rate falls linearly as if to 0 at the stage's end;
    then it starts anew and falls exponentially.

    The published search drops single elements of a skip connection's output instead of all of it, and leaves
    the normal cell two skip connections at most. Networks of other spaces than cells in DARTS' stack keep
    their depth and weights.
    """

    paper = "Chen, Xie, Wu, Tian: Progressive Differentiable Architecture Search, ICCV 2019"
    defaults: ClassVar = {
        "epochs": 75,
        "batch_size": 96,
        "learning_rate_min": 0.0,
        "arch_learning_rate": 6e-4,
    }
    defaults_of_space: ClassVar = {name: {"layers": 17} for name in ("darts", "s1", "s2", "s3", "s4")}
    against_collapse = True
    drop_rate: Tensor
    stage: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drop_rate", torch.tensor(DROP_RATES[0]))
        self.register_buffer("stage", torch.tensor(0))
        self._skips: dict[str, int] = {}
        self._layers = 0
        self._stage_of_network = 0

    def shape(self, supernet: Supernet) -> None:
        names = {cell: supernet.primitives_of(cell) for cell in supernet.alphas}
        self._skips = {
            cell: of_cell.index("skip_connect")
            for cell, of_cell in names.items()
            if "skip_connect" in of_cell
        }
        if isinstance(supernet, DartsSupernet):
            self._build_stage(supernet)

    def _build_stage(self, supernet: DartsSupernet) -> None:
        stage = int(self.stage)
        self._layers = max(self._layers, len(supernet.cells))
        depth = max(SMALLEST_DEPTH, round(DEPTHS[stage] * self._layers))
        if (stage, depth) != (self._stage_of_network, len(supernet.cells)):
            supernet.rebuild(depth)
        self._stage_of_network = stage

    def start_epoch(self, supernet: Supernet, epoch: int, epochs: int) -> bool:
        stage, position, length = _stage(epoch, epochs)
        learning = position - int(HELD * length)
        falls_to = 1 - position / length if learning < 0 else math.exp(-DECAY * learning / length)
        self.drop_rate.fill_(DROP_RATES[stage] * falls_to)
        self.stage.fill_(stage)
        changed = keep_strongest(
            supernet, self.mixing(supernet.choices()), lambda count: max(2, round(KEPT[stage] * count))
        )
        if changed:
            with torch.no_grad():
                for alpha in supernet.alphas.values():
                    alpha.zero_()
        return changed

    def holds_alpha(self, epoch: int, epochs: int) -> bool:
        _, position, length = _stage(epoch, epochs)
        return position < int(HELD * length)

    def annealing(self, epoch: int, epochs: int) -> tuple[int, int]:
        _, position, length = _stage(epoch, epochs)
        return position, length

    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {cell: self._dropped(cell, weights) for cell, weights in super().relax(alphas).items()}

    mixing = Darts.relax

    def _dropped(self, cell: str, weights: Tensor) -> Tensor:
        """Each skip connection with weight 0 at probability ``drop_rate``, else with so much more."""
        if cell not in self._skips:
            return weights
        kept = torch.rand_like(weights[:, 0]) >= self.drop_rate
        scale = torch.ones_like(weights)
        scale[:, self._skips[cell]] = kept / (1 - self.drop_rate)
        return weights * scale


def _stage(epoch: int, epochs: int) -> tuple[int, int, int]:
    """The stage that an epoch is in, the epoch's place there, and the length of the stage."""
    stage = epoch * len(KEPT) // epochs
    first, end = (math.ceil(i * epochs / len(KEPT)) for i in (stage, stage + 1))
    return stage, epoch - first, end - first
