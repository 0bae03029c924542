"""One bilevel step: α on a validation batch, then w on a training batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.core.supernet import Supernet


class Batch(NamedTuple):
    """``images``: [B, C, H, W] normalised fp32, ``labels``: [B] int64, both on the network's device."""

    images: Tensor
    labels: Tensor


class ArchGradient(NamedTuple):
    """Gradients of every α, and loss [] and logits [B, num_classes] of the validation batch they came
    from.
    """

    gradients: Sequence[Tensor]
    loss: Tensor
    logits: Tensor


class StepMetrics(NamedTuple):
    """Means over the batches of one step; 0-dim tensors, left on the device so that no step waits for
    them.
    """

    train_loss: Tensor
    train_accuracy: Tensor
    arch_loss: Tensor
    arch_accuracy: Tensor


class Strategy(ABC):
    """A search method: how α becomes mixing weights, and where the gradient of α comes from."""

    @abstractmethod
    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mixing weights [E, K] of every cell type from its α [E, K]."""

    @abstractmethod
    def arch_gradient(self, step: "BilevelStep", train: Batch, valid: Batch) -> ArchGradient:
        """The gradient of the validation loss with respect to each α; w must be left as it was."""


class BilevelStep:
    """Alternate descent on ``min_α L_val(w*(α), α)`` and ``min_w L_train(w, α)`` (DARTS, algorithm 1).

    The α step asks autograd for no weight gradients, the weight step for no α gradients.
    """

    def __init__(
        self,
        supernet: Supernet,
        strategy: Strategy,
        weight_optimizer: torch.optim.Optimizer,
        arch_optimizer: torch.optim.Optimizer,
        *,
        grad_clip: float,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        self.supernet = supernet
        self.strategy = strategy
        self.weight_optimizer = weight_optimizer
        self.arch_optimizer = arch_optimizer
        self.grad_clip = grad_clip
        self.criterion = criterion
        self.weights = supernet.weights()
        self.alphas = supernet.arch_parameters()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss [] and logits [B, num_classes] of the search network as the strategy relaxes it."""
        logits = self.supernet(batch.images, self.strategy.relax(dict(self.supernet.alphas)))
        return self.criterion(logits, batch.labels), logits

    def __call__(self, train: Batch, valid: Batch | None) -> StepMetrics:
        """Update α on ``valid`` (None: α stays, as in warm-up epochs), then w on ``train``."""
        self.supernet.train()
        nan = train.images.new_full((), torch.nan)
        arch_loss, arch_accuracy = (nan, nan) if valid is None else self._step_alphas(train, valid)
        train_loss, train_accuracy = self._step_weights(train)
        return StepMetrics(train_loss, train_accuracy, arch_loss, arch_accuracy)

    def _step_alphas(self, train: Batch, valid: Batch) -> tuple[Tensor, Tensor]:
        arch = self.strategy.arch_gradient(self, train, valid)
        _apply(self.arch_optimizer, self.alphas, arch.gradients)
        return arch.loss, accuracy(arch.logits, valid.labels)

    def _step_weights(self, train: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = self.loss(train)
        gradients = torch.autograd.grad(loss, self.weights)
        _apply(self.weight_optimizer, self.weights, gradients, self.grad_clip)
        return loss.detach(), accuracy(logits, train.labels)

    @contextmanager
    def running_statistics_kept(self) -> Iterator[None]:
        """Whatever runs inside leaves the buffers of the search network as they were."""
        buffers = list(self.supernet.buffers())
        saved = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def _apply(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    clip: float | None = None,
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of correct top-1 predictions, a 0-dim tensor in 0..1."""
    return (logits.argmax(dim=1) == labels).float().mean()
