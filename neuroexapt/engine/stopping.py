"""When a search ends before its last epoch, and which mixing weights it stands for then."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neuroexapt.core.genotypes import AnyGenotype

MOST_SKIPS = 2
"""Skip connections that a normal cell may have (Chen et al., P-DARTS, 2019; a search by DARTS+, Liang et al.,
2019, ends at the second).
"""
WINDOW = 5
"""Epochs over which eigenvalues are averaged, and between the two averages that are compared."""
LEAST_RATIO = 0.75
"""Of the older average over the newer one (Zela et al., "Understanding and Robustifying Differentiable
Architecture Search", ICLR 2020).
"""
COLLAPSED = 0.5
"""Share of skip connections among the operations of a cell from which on a search is called collapsed,"""
PREFERRED = 1.25
"""if α prefers them so much to the mean operation: before it has learned anything, chance decides. So it does
where the strongest operations are preferred less than that.
"""


class Stopping:
    """Watches the epochs of a search by ``criterion`` and stops at ``minutes``.

    ``skips``: once the genotype's normal cell has more than ``MOST_SKIPS`` skip connections; what the search
    stood for an epoch before counts. ``eigenvalue`` (DARTS-ES): once the largest eigenvalue of the validation
    loss's Hessian over α, as a mean of ``WINDOW`` epochs, has grown to more than 1/``LEAST_RATIO`` of what it
    was ``WINDOW`` epochs before; what the search stood for then counts. ``""``: at no time.
    """

    def __init__(self, criterion: str, minutes: float | None) -> None:
        self.reason = ""
        self._criterion, self._minutes = criterion, minutes
        self._eigenvalues: list[float] = []
        self._history: list[dict[str, Tensor]] = []

    def after_epoch(
        self, weights: Mapping[str, Tensor], *, skips: int, eigenvalue: float | None, seconds: float
    ) -> str:
        """The reason to stop after an epoch that left these mixing weights, or ``""``."""
        self._history = [*self._history[-WINDOW:], dict(weights)]
        if eigenvalue is not None:
            self._eigenvalues.append(eigenvalue)
        if self._criterion == "skips" and skips > MOST_SKIPS:
            self._stop(f"{skips} skip connections in the normal cell", epochs_back=1)
        elif self._criterion == "eigenvalue" and self._has_grown():
            self._stop("the largest eigenvalue of the Hessian over α grows", epochs_back=WINDOW)
        elif self.time_is_over(seconds):
            self.reason, self._history = f"{self._minutes:g} minutes are over", []
        return self.reason

    def time_is_over(self, seconds: float) -> bool:
        """Whether a search that has taken ``seconds`` has had its minutes; it need not wait for its epoch."""
        return self._minutes is not None and seconds > 60 * self._minutes

    def _stop(self, reason: str, epochs_back: int) -> None:
        self.reason = reason
        self._history = self._history[max(0, len(self._history) - 1 - epochs_back) :][:1]

    def _has_grown(self) -> bool:
        if len(self._eigenvalues) < 2 * WINDOW:
            return False
        older, newer = self._eigenvalues[-2 * WINDOW : -WINDOW], self._eigenvalues[-WINDOW:]
        return statistics.mean(older) < LEAST_RATIO * statistics.mean(newer)

    @property
    def weights(self) -> dict[str, Tensor] | None:
        """What a search stands for that went too far before it was stopped."""
        return self._history[0] if self.reason and self._history else None

    def state_dict(self) -> dict[str, Any]:
        return {"reason": self.reason, "eigenvalues": self._eigenvalues, "history": self._history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reason, self._eigenvalues = state["reason"], state["eigenvalues"]
        self._history = state["history"]


def preference(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
    """Weight of an edge's strongest operation over that of its mean one, in the mean of all edges; mixing
    weights are [E, K] for each type of cell, and ``kept`` those that were not ruled out.
    """
    means = {cell: w.sum(dim=1) / kept[cell].sum(dim=1) for cell, w in weights.items()}
    return torch.cat([w.amax(dim=1) / means[cell] for cell, w in weights.items()]).mean().item()


def how_sure(preference: float) -> str:
    """Of a genotype that was chosen by α."""
    text = (
        f"α gives an edge's strongest operation {preference:.2f} times the weight of its mean one, where 1 "
        "is no preference"
    )
    if preference >= PREFERRED:
        return f"{text}."
    return (
        f"{text}: the genotype is little more than chance. Search for more epochs, or with a larger "
        "--arch-learning-rate."
    )


def count_skips(genotype: AnyGenotype) -> tuple[int, int]:
    """Skip connections and all operations of the genotype's first type of cells, the normal ones."""
    edges = next(iter(genotype.cells.values())).edges
    return sum(op == "skip_connect" for _, _, op in edges), len(edges)
