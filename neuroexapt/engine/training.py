"""Training a network on all training pictures: after a search with inherited weights, or from scratch."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.backend.measure import time_calls
from neuroexapt.data import Loader
from neuroexapt.engine.bilevel import accuracy
from neuroexapt.engine.captured import Step, capture
from neuroexapt.engine.config import RunConfig
from neuroexapt.engine.phase import Phase


def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Learning rate of an epoch: half a cosine from ``start`` at 0 to ``end`` at ``epochs`` (SGDR, 2017)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def make_sgd(parameters: Sequence[nn.Parameter], config: RunConfig) -> torch.optim.SGD:
    """SGD; on a GPU its learning rate is there too, so that a captured step sees it change."""
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    return torch.optim.SGD(
        parameters,
        torch.tensor(config.learning_rate, device=device) if on_gpu else config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=on_gpu or None,  # the only variant that reads the rate on the device
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what was saved of each parameter; the settings stay, since they depend on the device."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def score(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and number of correct top-1 predictions, summed over a batch: [2]."""
    logits = network(images)
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), correct.float()])


def evaluate_loss(score_batch: Step, loader: Loader) -> tuple[float, float]:
    """Mean cross-entropy and top-1 accuracy (0..1) over every picture of the loader, not augmented.

    ``score_batch`` is ``score`` of the network.
    """
    totals, count = torch.zeros(2, device=loader.device), 0
    for images, labels in loader.evaluation():
        totals += score_batch(images, labels)
        count += len(labels)
    loss, correct = totals.tolist()
    return loss / count, correct / count


class WeightAverage:
    """An exponential moving average of a network's weights and running statistics.

    After step t, counted from 0: ``average += (1 - d) · (network - average)`` with
    ``d = min(decay, (1 + t) / (10 + t))``, so that the first weights are soon forgotten. ``network`` is the
    averaged one. ``update`` can be captured into a graph, since d comes from a tensor.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._decay = decay
        self._averaged, self._latest = _floating(self.network), _floating(network)
        self._weight = torch.zeros((), device=self._latest[0].device)

    def set_step(self, t: int) -> None:
        self._weight.fill_(1 - min(self._decay, (1 + t) / (10 + t)))

    @torch.no_grad()
    def update(self) -> None:
        change = torch._foreach_sub(self._latest, self._averaged)
        torch._foreach_mul_(change, self._weight)
        torch._foreach_add_(self._averaged, change)


def _floating(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers but for BatchNorm's counts of batches."""
    return [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]


class TrainPhase(Phase):
    """SGD with a cosine schedule on all training pictures, tested after every epoch.

    Args:
        auxiliary_weight: of the loss of the network's auxiliary head; 0 where it has none.
        drop_path: probability of dropping an operation, which grows linearly to it.
        warmup: share of the steps over which the learning rate rises to the cosine.
        label_smoothing: share of each label that is spread over all classes while training.
        ema: decay of the ``WeightAverage`` that is tested in place of the network; 0: none.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        loader: Loader,
        test_loader: Loader,
        config: RunConfig,
        *,
        epochs: int,
        auxiliary_weight: float = 0.0,
        drop_path: float = 0.0,
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
        ema: float = 0.0,
    ) -> None:
        self.name = name
        self.epochs = epochs
        self.steps_per_epoch = loader.steps_per_epoch
        self.device = loader.device
        self.network = network
        self.optimizer = make_sgd(self.parameters(), config)
        self._loader, self._test_loader = loader, test_loader
        self._config = config
        self._auxiliary_weight, self._label_smoothing = auxiliary_weight, label_smoothing
        self._drop_path, self._warmup_steps = drop_path, warmup * epochs * loader.steps_per_epoch
        # On the device, so that a captured step sees it change.
        self._drop_probability = torch.zeros((), device=self.device)
        if drop_path:
            network.drop_path_probability = self._drop_probability
        self._average = WeightAverage(network, ema) if ema else None
        self._capture_steps()

    @property
    def trained(self) -> nn.Module:
        """What is tested: the network, or the average of its weights."""
        return self._average.network if self._average else self.network

    def _capture_steps(self) -> None:
        self._take_step = capture(self._step, self.device, self.network)
        self._score = capture(functools.partial(score, self.trained), self.device, self.trained)

    def metric_names(self, epoch: int) -> Sequence[str]:
        return ("train_loss", "train_accuracy")

    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def learning_rate(self, epoch: int, step: int) -> float:
        """The cosine's, which changes once an epoch; below it in the first steps."""
        rate = cosine(epoch, self.epochs, self._config.learning_rate, self._config.learning_rate_min)
        steps = epoch * self.steps_per_epoch + step + 1
        return rate * min(1.0, steps / self._warmup_steps) if self._warmup_steps else rate

    def steps(self, epoch: int, start: int) -> Iterator[Tensor]:
        self.network.train()
        self._drop_probability.fill_(self._drop_path * epoch / self.epochs)
        for step, batch in enumerate(self._loader.epoch(epoch, start), start):
            set_learning_rate(self.optimizer, self.learning_rate(epoch, step))
            if self._average:
                self._average.set_step(epoch * self.steps_per_epoch + step)
            yield self._take_step(*batch)

    def step_ms(self, seconds: float) -> float:
        """Median time of a step, measured for about ``seconds``; the network is another afterwards."""
        batch = next(self._loader.epoch(0))
        self.network.train()
        return time_calls(lambda: self._take_step(*batch), self.device, seconds).median_ms

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            logits, auxiliary_logits = self._forward(images)
        loss = self._loss(logits, labels)
        objective = loss
        if auxiliary_logits is not None:
            objective = loss + self._auxiliary_weight * self._loss(auxiliary_logits, labels)
        self.optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self._config.grad_clip)
        self.optimizer.step()
        if self._average:
            self._average.update()
        return torch.stack([loss.detach(), accuracy(logits, labels)])

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the classifier and, if its loss counts, of the auxiliary head."""
        if self._auxiliary_weight:
            return self.network.forward_with_auxiliary(images)  # type: ignore[operator]
        return self.network(images), None

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self._label_smoothing)

    def _autocast(self) -> torch.autocast:
        """No cache: every weight is cast once a step, and a graph must not find one of another step."""
        wanted = self._config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.trained.eval()
        test_loss, test_accuracy = evaluate_loss(self._score, self._test_loader)
        return {
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": self.learning_rate(epoch, self.steps_per_epoch - 1),
        }

    def state_dict(self) -> dict[str, Any]:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | ({"average": self._average.network.state_dict()} if self._average else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self._average:
            self._average.network.load_state_dict(state["average"])
        self._capture_steps()
