"""One bilevel step: α on a validation batch, then w on a training batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from neuroexapt.core.supernet import Supernet
from neuroexapt.core.task import CLASSIFICATION, Task


class Batch(NamedTuple):
    """``inputs``: what the search network takes, pictures [B, C, H, W] normalised fp32 for instance,
    ``labels``: [B, …] int64, both on the network's device.
    """

    inputs: Tensor
    labels: Tensor


class Gradients(NamedTuple):
    """Gradients of some parameters, and the loss [] and what the network made of the batch they came from,
    pictures' logits [B, num_classes] for instance.
    """

    gradients: tuple[Tensor, ...]
    loss: Tensor
    output: Any


class StepMetrics(NamedTuple):
    """Means over the batches of one step; 0-dim tensors, left on the device so that no step waits for
    them.
    """

    train_loss: Tensor
    train_accuracy: Tensor
    arch_loss: Tensor
    arch_accuracy: Tensor


class Strategy(nn.Module, ABC):
    """A search method: how α becomes mixing weights, and where the gradient of α comes from.

    All that is called within a step is captured in a CUDA graph: what changes from epoch to epoch, such as a
    temperature, is a buffer that ``start_epoch`` fills, and what is random comes from PyTorch's generator of
    the device. As a module a strategy has its buffers on the device and in the checkpoints.
    """

    paper: ClassVar[str]
    """Where the method was published."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Published settings of a search, for those that neither the user nor the data set's preset gives."""
    defaults_of_space: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Those that were published for a search space, by its name; they stand over ``defaults``."""
    not_fused: ClassVar[str] = ""
    """Why cells do not run by their plan, if they don't."""

    single_path: ClassVar[bool] = False
    """Whether one operation an edge is drawn for every pass; the others, of weight 0, do not run."""
    learns_alpha: ClassVar[bool] = True
    """Whether α tells anything in the end."""
    against_collapse: ClassVar[bool] = False
    """Whether the method was made to keep skip connections from winning."""

    @abstractmethod
    def relax(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mixing weights [E, K] of every cell type from its α [E, K], drawn anew for every pass if random."""

    def mixing(self, alphas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mixing weights for validation and for deriving: ``relax`` without what is random in it.

        Where steps draw one path by α, validation takes the strongest one.
        """
        return self.relax(alphas)

    def penalty(self, alphas: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor | None:
        """What the loss of α counts besides that of the batch, []; ``weights`` is what ``relax`` returned."""
        return None

    @abstractmethod
    def arch_gradient(self, step: "BilevelStep", train: Batch, valid: Batch) -> Gradients:
        """The gradient of the validation loss with respect to each α; w must be left as it was."""

    def weight_gradient(self, step: "BilevelStep", train: Batch) -> Gradients:
        """The gradient of the training loss with respect to each of w; α must be left as it was."""
        return step.gradients(train, step.weights)

    def shape(self, supernet: Supernet) -> None:
        """Make of ``supernet`` what the method searches in its present state; do nothing the second time.

        Called on a new search network, after a checkpoint of the strategy was loaded, and after
        ``start_epoch`` asked for it.
        """

    def holds_alpha(self, epoch: int, epochs: int) -> bool:
        """Whether α stays as it is in ``epoch`` of ``epochs``, besides the warm-up that the user wants."""
        return not self.learns_alpha

    def annealing(self, epoch: int, epochs: int) -> tuple[int, int]:
        """Where the learning rate of w is on its cosine in ``epoch`` of ``epochs``, and how long that is."""
        return epoch, epochs

    def start_epoch(self, supernet: Supernet, epoch: int, epochs: int) -> bool:
        """Set up ``epoch`` of ``epochs``, perhaps one that broke off; whether the network has to change."""
        return False


class BilevelStep:
    """Alternate descent on ``min_α L_val(w*(α), α)`` and ``min_w L_train(w, α)`` (DARTS, algorithm 1).

    The α step computes no weight gradients, the weight step none of α. Nothing of a step waits for the
    device, so that all of it can be captured in one CUDA graph.
    """

    def __init__(
        self,
        supernet: Supernet,
        strategy: Strategy,
        weight_optimizer: torch.optim.Optimizer,
        arch_optimizer: torch.optim.Optimizer,
        *,
        grad_clip: float,
        task: Task = CLASSIFICATION,
        cost: Callable[[Mapping[str, Tensor]], Tensor | None] = lambda weights: None,
    ) -> None:
        self.supernet = supernet
        self.strategy = strategy
        self.weight_optimizer = weight_optimizer
        self.arch_optimizer = arch_optimizer
        self.grad_clip = grad_clip
        self.task = task
        self.cost = cost
        self.weights = supernet.weights()
        self.alphas = supernet.arch_parameters()

    def gradients(
        self, batch: Batch, wanted: Sequence[Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> Gradients:
        """Those of loss, penalty and cost with respect to ``wanted``, of the search network as the strategy
        relaxes it. The loss that is returned is that of the batch.

        With ``weights``, of the loss alone at these mixing weights, which may be among ``wanted``.
        """
        with torch.enable_grad(), _required_alone(wanted, [*self.weights, *self.alphas]):
            alphas = self.supernet.choices()
            relaxed = self.strategy.relax(alphas) if weights is None else weights
            output = self.supernet(batch.inputs, relaxed)
            loss = self.task.loss(output, batch.labels)
            terms = [self.strategy.penalty(alphas, relaxed), self.cost(relaxed)] if weights is None else []
            objective = sum((term for term in terms if term is not None), start=loss)
            # Nothing passes through some of them once the candidates behind them were ruled out.
            gradients = torch.autograd.grad(objective, wanted, materialize_grads=True)
            return Gradients(gradients, loss.detach(), output.detach())

    def __call__(self, train: Batch, valid: Batch | None) -> StepMetrics:
        """Update α on ``valid`` (None: α stays, as in warm-up epochs), then w on ``train``."""
        self.supernet.train()
        nan = torch.full((), torch.nan, device=train.labels.device)
        arch_loss, arch_accuracy = (nan, nan) if valid is None else self._step_alphas(train, valid)
        train_loss, train_accuracy = self._step_weights(train)
        return StepMetrics(train_loss, train_accuracy, arch_loss, arch_accuracy)

    def _step_alphas(self, train: Batch, valid: Batch) -> tuple[Tensor, Tensor]:
        arch = self.strategy.arch_gradient(self, train, valid)
        _apply(self.arch_optimizer, self.alphas, arch.gradients)
        return arch.loss, self.task.accuracy(arch.output, valid.labels)

    def _step_weights(self, train: Batch) -> tuple[Tensor, Tensor]:
        found = self.strategy.weight_gradient(self, train)
        _apply(self.weight_optimizer, self.weights, found.gradients, self.grad_clip)
        return found.loss, self.task.accuracy(found.output, train.labels)


@contextmanager
def _required_alone(wanted: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, no other of ``parameters`` requires a gradient, so that no operation computes one."""
    chosen = {id(parameter) for parameter in wanted}
    others = [parameter for parameter in parameters if id(parameter) not in chosen]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _apply(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    clip: float | None = None,
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = _laid_out_like(parameter, gradient)
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()


def _laid_out_like(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Fused optimizers want one layout, down to the strides of dimensions of size 1."""
    if gradient.stride() == parameter.stride():
        return gradient
    if gradient.is_contiguous() and parameter.is_contiguous():
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)
