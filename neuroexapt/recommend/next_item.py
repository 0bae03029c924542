"""Predicting the next item of a history, by its rank in the whole catalogue."""

import torch
import torch.nn.functional as F
from torch import Tensor

from neuroexapt.core.sequence_network import Queries
from neuroexapt.core.task import Task
from neuroexapt.recommend.metrics import gains, hits, target_ranks


class NextItem(Task):
    """``output``: ``Queries``, ``labels``: [B, N], the item that follows each position, 0 where none is
    asked.

    The loss is the cross-entropy over the whole catalogue, or with ``negatives`` over the target and so many
    items drawn at random, the same for a batch, other targets' hits left out.

    With ``positions`` at most so many a row count in the loss, in the mean of the batch, and the rest costs
    nothing; without, every position of a captured step costs as much as if it asked for an item.

    Accuracy is HR@10: a prediction counts as correct if the target is among the ten best. Scores are taken of
    one prediction a row, the last one asked for.
    """

    figures = ("accuracy", "ndcg")
    unit = "histories"

    def __init__(self, negatives: int = 0, positions: int | None = None) -> None:
        self.negatives, self.positions = negatives, positions

    def loss(self, output: Queries, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        queries, targets = output.queries.flatten(0, 1), labels.flatten()
        if not queries.is_cuda:  # a step that is captured there needs shapes that stay
            queries, targets = queries[targets > 0], targets[targets > 0]
        if self.positions is not None:
            asked = (
                (targets > 0)
                .byte()
                .sort(descending=True, stable=True)
                .indices[: self.positions * len(labels)]
            )
            queries, targets = queries[asked], targets[asked]
        if self.negatives:
            losses = self._sampled_losses(queries, output.items, targets)
            return losses.masked_fill(targets == 0, 0).sum() / (targets > 0).sum()
        logits = (queries @ output.items[1:].T).float()
        return F.cross_entropy(logits, targets - 1, ignore_index=-1, label_smoothing=smoothing)

    def _sampled_losses(self, queries: Tensor, items: Tensor, targets: Tensor) -> Tensor:
        """[P]: ``−log(e^{s⁺} / (e^{s⁺} + Σ e^{s⁻}))``."""
        drawn = torch.randint(1, len(items), (self.negatives,), device=queries.device)
        positive = (queries * items[targets]).sum(dim=1, keepdim=True)
        negative = (queries @ items[drawn].T).masked_fill(drawn == targets[:, None], -torch.inf)
        return torch.logsumexp(torch.cat([positive, negative], dim=1).float(), dim=1) - positive[:, 0].float()

    def accuracy(self, output: Queries, labels: Tensor) -> Tensor:
        """Of the last prediction of each row alone: those before it would cost as much as the loss."""
        queries, targets = _last(output, labels)
        return hits(target_ranks(queries, output.items, targets)).mean()

    def score(self, output: Queries, labels: Tensor) -> Tensor:
        queries, targets = _last(output, labels)
        logits = (queries @ output.items[1:].T).float()
        loss = F.cross_entropy(logits, targets - 1, reduction="sum")
        ranks = target_ranks(queries, output.items, targets)
        return torch.stack([loss, hits(ranks).sum(), gains(ranks).sum()])


def _last(output: Queries, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The query [B, D] at the last position of each row that asks for an item, and that item [B]."""
    positions = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(labels > 0, positions, 0).argmax(dim=1)
    rows = torch.arange(len(labels), device=labels.device)
    return output.queries[rows, last], labels[rows, last]
