"""Training a derived network: after a search with inherited weights, or from scratch."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.core.derived import DerivedNetwork
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


class TrainPhase(Phase):
    """SGD with a cosine schedule on all training pictures, tested after every epoch.

    With an auxiliary head its loss counts ``auxiliary_weight``; drop-path grows linearly to ``drop_path``.
    """

    def __init__(
        self,
        name: str,
        network: DerivedNetwork,
        loader: Loader,
        test_loader: Loader,
        config: RunConfig,
        *,
        epochs: int,
        auxiliary_weight: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        self.name = name
        self.epochs = epochs
        self.steps_per_epoch = loader.steps_per_epoch
        self.device = loader.device
        self.network = network
        self.optimizer = make_sgd(self.parameters(), config)
        self._loader, self._test_loader = loader, test_loader
        self._config = config
        self._auxiliary_weight, self._drop_path = auxiliary_weight, drop_path
        # On the device, so that a captured step sees it change.
        self._drop_probability = torch.zeros((), device=self.device)
        if drop_path:
            network.drop_path_probability = self._drop_probability
        self._capture_steps()

    def _capture_steps(self) -> None:
        self._take_step = capture(self._step, self.device, self.network)
        self._score = capture(functools.partial(score, self.network), self.device, self.network)

    def metric_names(self, epoch: int) -> Sequence[str]:
        return ("train_loss", "train_accuracy")

    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def learning_rate(self, epoch: int) -> float:
        return cosine(epoch, self.epochs, self._config.learning_rate, self._config.learning_rate_min)

    def steps(self, epoch: int, start: int) -> Iterator[Tensor]:
        self.network.train()
        set_learning_rate(self.optimizer, self.learning_rate(epoch))
        self._drop_probability.fill_(self._drop_path * epoch / self.epochs)
        for batch in self._loader.epoch(epoch, start):
            yield self._take_step(*batch)

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            logits, auxiliary_logits = self.network.forward_with_auxiliary(images)
        loss = F.cross_entropy(logits.float(), labels)
        objective = loss
        if auxiliary_logits is not None:
            objective = loss + self._auxiliary_weight * F.cross_entropy(auxiliary_logits.float(), labels)
        self.optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self._config.grad_clip)
        self.optimizer.step()
        return torch.stack([loss.detach(), accuracy(logits, labels)])

    def _autocast(self) -> torch.autocast:
        """No cache: every weight is cast once a step, and a graph must not find one of another step."""
        wanted = self._config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.network.eval()
        test_loss, test_accuracy = evaluate_loss(self._score, self._test_loader)
        return {
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": self.learning_rate(epoch),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        self._capture_steps()
