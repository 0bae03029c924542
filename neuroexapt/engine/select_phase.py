"""Choosing the genotype by validation instead of by α, after a search."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.engine.captured import capture
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.phase import Phase
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.engine.training import evaluate_figures
from neuroexapt.strategies.random_paths import random_path

LEARNING_RATE_SHARE = 0.1
"""Of the search's first learning rate, while the weights adapt to what was ruled out."""
PATHS = 300
"""Drawn in every round of shrinking."""

Weights = dict[str, Tensor]


class SelectPhase(Phase):
    """Rules out candidates of a searched network until every edge has one, then ranks the edges.

    An epoch is one of the search at a small learning rate, and a decision. The last one's is the ranking: an
    edge is as strong as validation accuracy falls without it.
    """

    name = "select"

    def __init__(self, search: SearchPhase, config: SearchConfig) -> None:
        self.search = search
        self.edges = [(cell, row) for cell, w in search.mixing_weights().items() for row in range(len(w))]
        self.epochs = self.count_decisions() + 1
        self.steps_per_epoch, self.device = search.steps_per_epoch, search.device
        self._config = config
        self._strengths: Weights = {}
        self._make_score()

    @abstractmethod
    def count_decisions(self) -> int: ...

    @abstractmethod
    def decide(self, number: int) -> dict[str, Any]:
        """Rule something out; what to record of it."""

    def metric_names(self, epoch: int) -> Sequence[str]:
        return self.search.metric_names(self.search.epochs)

    def parameters(self) -> list[nn.Parameter]:
        return self.search.parameters()

    def steps(self, epoch: int, start: int) -> Iterator[Tensor]:
        learning_rate = LEARNING_RATE_SHARE * self._config.learning_rate
        return self.search.steps_at(self.search.epochs + epoch, start, learning_rate)

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.search.supernet.train()
        if epoch + 1 == self.epochs:
            self._strengths = self._rank_edges()
            return {"genotype": self.genotype().to_dict()}
        record = self.decide(epoch)
        self.search.reshape()
        self._make_score()
        return record

    def genotype(self) -> AnyGenotype:
        return self.search.choose(self._selected())

    def _selected(self) -> Weights:
        weights = self.search.mixing_weights()
        return {cell: w * (1 + self._strengths[cell])[:, None] for cell, w in weights.items()}

    def _rank_edges(self) -> Weights:
        weights = self.search.mixing_weights()
        everything = self.accuracy_at(weights)
        strengths = {cell: w.new_zeros(len(w)) for cell, w in weights.items()}
        for cell, edge in self.edges:
            without = self.accuracy_at(_without(weights, cell, (edge,)))
            strengths[cell][edge] = max(0.0, everything - without)
        return strengths

    def candidates(self, cell: str, edge: int) -> list[int]:
        """Those that are left of an edge and may be chosen."""
        kept = self.search.supernet.kept(cell)[edge].tolist()
        space = self.search.space
        return [
            k
            for k, p in enumerate(space.primitives_of(cell))
            if kept[k] and (p != "none" or space.may_choose_none)
        ]

    def keep(self, cell: str, edge: int, chosen: Sequence[int]) -> None:
        """Rule out the other candidates of an edge."""
        kept = torch.ones_like(self.search.supernet.kept(cell))
        kept[edge] = False
        kept[edge, list(chosen)] = True
        self.search.supernet.keep(cell, kept)

    def accuracy_at(self, weights: Weights) -> float:
        """On all validation data, by the statistics of each batch."""

        def score_batch(inputs: Tensor, labels: Tensor) -> Tensor:
            return self._score(inputs, labels, *weights.values())

        return evaluate_figures(score_batch, self.search.space.task, self.search.valid_loader)["accuracy"]

    def _make_score(self) -> None:
        """Captured anew whenever the network has changed."""
        cells = list(self.search.mixing_weights())

        def score_at(inputs: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
            return self.search.score_part(inputs, labels, dict(zip(cells, weights, strict=True)))

        self._score = capture(score_at, self.device, self.search.supernet)

    def state_dict(self) -> dict[str, Any]:
        state = {"search": self.search.state_dict(), "strengths": self._strengths}
        return state | ({"genotype": self.genotype().to_dict()} if self._strengths else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.search.load_state_dict(state["search"])
        self._strengths = {cell: strength.to(self.device) for cell, strength in state["strengths"].items()}
        self._make_score()


class Perturbation(SelectPhase):
    """DARTS-PT: edge by edge, in random order, the candidate without which accuracy falls most is chosen.

    Source: Wang, Cheng, Chen, Tang, Hsieh, "Rethinking Architecture Selection in Differentiable NAS", ICLR
    2021. The published code decides for a normal and a reduction edge at a time and trains five epochs before
    the next decision, at a learning rate that falls from the same start; then it takes edges away node by
    node, with training between.
    """

    def count_decisions(self) -> int:
        return len(self.edges)

    def decide(self, number: int) -> dict[str, Any]:
        order = torch.randperm(len(self.edges), generator=torch.Generator().manual_seed(self._config.seed))
        cell, edge = self.edges[order[number]]
        weights = self.search.mixing_weights()
        without = {
            k: self.accuracy_at(_without(weights, cell, (edge, k))) for k in self.candidates(cell, edge)
        }
        chosen = min(without, key=without.__getitem__)
        self.keep(cell, edge, [chosen])
        return {"cell": cell, "edge": edge, "chosen": chosen, "valid_accuracy_without": without[chosen]}


class Shrinking(SelectPhase):
    """Round by round every edge loses the candidate whose random paths validate worst.

    A round draws ``PATHS`` paths, one candidate an edge, and validates each on one batch; a candidate is as
    good as the mean accuracy of the paths that lead through it.
    """

    def count_decisions(self) -> int:
        return max(len(self.candidates(*edge)) for edge in self.edges) - 1

    def decide(self, number: int) -> dict[str, Any]:
        means = self._mean_accuracies(number)
        for cell, edge in self.edges:
            candidates = self.candidates(cell, edge)
            if len(candidates) > self.epochs - 1 - number:
                worst = min(candidates, key=means[cell][edge].__getitem__)
                self.keep(cell, edge, [k for k in candidates if k != worst])
        return {"candidates": max(len(self.candidates(*edge)) for edge in self.edges)}

    def _mean_accuracies(self, number: int) -> dict[str, list[list[float]]]:
        """Of the paths through each candidate, [E, K]; of one that no path leads through, 0."""
        choices = {cell: self._choices_of(cell) for cell in self.search.mixing_weights()}
        sums = {cell: torch.zeros_like(choice) for cell, choice in choices.items()}
        counts = {cell: torch.zeros_like(choice) for cell, choice in choices.items()}
        batches = self.search.valid_loader.forever(number * PATHS)
        for _, (inputs, labels) in zip(range(PATHS), batches, strict=False):
            path = {cell: random_path(choice) for cell, choice in choices.items()}
            correct = self._score(inputs, labels, *path.values())[1]
            for cell, taken in path.items():
                sums[cell] += taken * correct / len(labels)
                counts[cell] += taken
        return {cell: (sums[cell] / counts[cell].clamp_min(1)).tolist() for cell in choices}

    def _choices_of(self, cell: str) -> Tensor:
        """0 where a candidate may be drawn, −∞ elsewhere."""
        choices = torch.full_like(self.search.mixing_weights()[cell], -torch.inf)
        for of_type, edge in self.edges:
            if of_type == cell:
                choices[edge, self.candidates(cell, edge)] = 0
        return choices


SELECTIONS: dict[str, type[SelectPhase]] = {"perturbation": Perturbation, "shrink": Shrinking}


def _without(weights: Weights, cell: str, place: tuple[int, ...]) -> Weights:
    """With 0 for an edge or for one of its candidates."""
    changed = weights[cell].clone()
    changed[place] = 0
    return {**weights, cell: changed}
