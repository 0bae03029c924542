"""What a network is trained for: its loss, and the figures that it is judged by."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


class Task(ABC):
    """Accuracy is the share of predictions that count as correct."""

    figures: ClassVar[tuple[str, ...]] = ("accuracy",)
    """What ``score`` adds up besides the loss; the last one decides between epochs."""
    unit: ClassVar[str]
    """What is predicted for."""

    @abstractmethod
    def loss(self, output: Any, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean loss of a training batch, []; ``smoothing`` is the share of labels spread over all classes."""

    @abstractmethod
    def accuracy(self, output: Any, labels: Tensor) -> Tensor:
        """Of a training batch, [] in 0..1."""

    @abstractmethod
    def score(self, output: Any, labels: Tensor) -> Tensor:
        """Sums over a batch of loss and ``figures``, [1 + len(figures)]."""


class Classification(Task):
    """``output``: logits [B, num_classes], ``labels``: [B]; accuracy is top-1."""

    unit = "pictures"

    def loss(self, output: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    def accuracy(self, output: Tensor, labels: Tensor) -> Tensor:
        return (output.argmax(dim=1) == labels).float().mean()

    def score(self, output: Tensor, labels: Tensor) -> Tensor:
        correct = (output.argmax(dim=1) == labels).sum()
        return torch.stack([F.cross_entropy(output, labels, reduction="sum"), correct.float()])


CLASSIFICATION = Classification()
