"""Training a network on all training data: after a search with inherited weights, or from scratch."""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.backend.candidates import free_launches
from neuroexapt.backend.measure import time_calls
from neuroexapt.core.task import CLASSIFICATION, Task
from neuroexapt.data import Loader
from neuroexapt.engine.captured import Step, capture
from neuroexapt.engine.config import RunConfig
from neuroexapt.engine.execution import STEPS_THAT_PAY, compiled_copy, in_one_line
from neuroexapt.engine.phase import Phase

logger = logging.getLogger(__name__)

ADAMW_BETAS = (0.9, 0.98)
"""As published for SASRec and HSTU."""


def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Learning rate of an epoch: half a cosine from ``start`` at 0 to ``end`` at ``epochs`` (SGDR, 2017)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def make_optimizer(parameters: Sequence[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """That of the weights; on a GPU its learning rate is there too, so that a captured step sees it
    change.
    """
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    settings: dict[str, Any] = {
        "lr": torch.tensor(config.learning_rate, device=device) if on_gpu else config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": on_gpu or None,  # the only variant that reads the rate on the device
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, betas=ADAMW_BETAS, capturable=on_gpu, **settings)
    return torch.optim.SGD(parameters, momentum=config.momentum, **settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what was saved of each parameter, laid out as it is, which fused optimizers want; the settings
    stay, since they depend on the device.
    """
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, of_it in optimizer.state.items():
        for name, value in of_it.items():
            is_alike = isinstance(value, Tensor) and value.shape == parameter.shape
            if is_alike and value.stride() != parameter.stride():
                of_it[name] = torch.empty_like(parameter).copy_(value)


@torch.no_grad()
def score(network: Callable[[Tensor], Any], task: Task, inputs: Tensor, labels: Tensor) -> Tensor:
    """Loss and figures of the task, summed over a batch: [1 + len(task.figures)]."""
    return task.score(network(inputs), labels)


def evaluate_figures(score_batch: Step, task: Task, loader: Loader) -> dict[str, float]:
    """``loss`` and the figures of the task, mean over everything in the loader, not augmented.

    ``score_batch`` is ``score`` of the network.
    """
    names = ("loss", *task.figures)
    totals, count = torch.zeros(len(names), device=loader.device), 0
    for inputs, labels in loader.evaluation():
        totals += score_batch(inputs, labels)
        count += len(labels)
    return {name: total / count for name, total in zip(names, totals.tolist(), strict=True)}


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


class BestNetwork:
    """The network as it was after the epoch that validated best, and what it made of the test."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.epoch, self.value = -1, -math.inf
        self.test: dict[str, float] = {}

    def beaten_by(self, network: nn.Module, value: float, epoch: int) -> bool:
        """Whether ``value`` is better than all before; then ``network`` is kept, in the same memory."""
        if not value > self.value:
            return False
        self.epoch, self.value = epoch, value
        self.network.load_state_dict(network.state_dict())
        return True

    def state_dict(self) -> dict[str, Any]:
        figures = {"epoch": self.epoch, "value": self.value if self.test else None, "test": self.test}
        return {"network": self.network.state_dict(), **figures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.epoch, self.test = state["epoch"], state["test"]
        self.value = -math.inf if state["value"] is None else state["value"]


class TrainPhase(Phase):
    """The optimizer's steps with a cosine schedule on all training data, tested after every epoch.

    With a ``valid_loader`` it is the network of the epoch that validated best (by the last of the task's
    figures) that is tested and kept, and training ends ``patience`` epochs after that one.

    Args:
        task: what the network is trained for and judged by.
        auxiliary_weight: of the loss of the network's auxiliary head; 0 where it has none.
        drop_path: probability of dropping an operation, which grows linearly to it.
        warmup: share of the steps over which the learning rate rises to the cosine.
        label_smoothing: share of each label that is spread over all classes while training.
        ema: decay of the ``WeightAverage`` that is tested in place of the network; 0: none.
        say: told what takes long, or does not go as it should.
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
        task: Task = CLASSIFICATION,
        valid_loader: Loader | None = None,
        patience: int | None = None,
        auxiliary_weight: float = 0.0,
        drop_path: float = 0.0,
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
        ema: float = 0.0,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.name = name
        self.epochs = epochs
        self.steps_per_epoch = loader.steps_per_epoch
        self.device = loader.device
        self.network = network
        self.optimizer = make_optimizer(self.parameters(), config)
        self._loader, self._test_loader, self._valid_loader = loader, test_loader, valid_loader
        self._task, self._patience = task, patience
        self._config = config
        self._auxiliary_weight, self._label_smoothing = auxiliary_weight, label_smoothing
        self._drop_path, self._warmup_steps = drop_path, warmup * epochs * loader.steps_per_epoch
        # On the device, so that a captured step sees it change.
        self._drop_probability = torch.zeros((), device=self.device)
        if drop_path:
            network.drop_path_probability = self._drop_probability
        self._average = WeightAverage(network, ema) if ema else None
        self._best = BestNetwork(network) if valid_loader else None
        self._say = say
        # What steps run: the network, or a copy of the same weights whose cells are compiled.
        self._stepped, self._is_prepared = network, False
        self._capture_steps()

    @property
    def trained(self) -> nn.Module:
        """What is tested: the network of the best epoch, or as it is, or the average of its weights."""
        return self._best.network if self._best else self._current

    @property
    def _current(self) -> nn.Module:
        return self._average.network if self._average else self.network

    def _capture_steps(self) -> None:
        self._take_step = capture(self._step, self.device, self.network)
        self._score = capture(functools.partial(score, self._current, self._task), self.device, self._current)

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
            self.prepare(*batch)
            yield self._take_step(*batch)

    def step_ms(self, seconds: float) -> float:
        """Median time of a step, measured for about ``seconds``; the network is another afterwards."""
        batch = next(self._loader.epoch(0))
        self.network.train()
        self.prepare(*batch)
        return time_calls(lambda: self._take_step(*batch), self.device, seconds).median_ms

    def prepare(self, inputs: Tensor, labels: Tensor) -> None:
        """Compile the network, in training mode, for such batches if that is wanted; once, before the first
        step.
        """
        if not self._is_prepared and self._is_to_be_compiled():
            self._compile(inputs, labels)
        self._is_prepared = True

    def _is_to_be_compiled(self) -> bool:
        """As configured, or where it was measured to be faster and saves more than it takes."""
        config = self._config
        if config.compile is not None:
            return config.compile
        measured = self._task is CLASSIFICATION and config.precision == "bf16"
        is_nchw = config.channels_last is False
        pays = self.epochs * self.steps_per_epoch >= STEPS_THAT_PAY
        return self.device.type == "cuda" and measured and not is_nchw and pays

    def _compile(self, inputs: Tensor, labels: Tensor) -> None:
        """Have steps run a compiled network once another copy has shown that compiling works."""
        self._say(f"compiling the network of {self.name}, which takes a minute or two")
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), free_launches():
                self._losses(compiled_copy(self.network, same_tensors=False), inputs, labels)[0].backward()
        except Exception as error:  # whatever a compiler or its toolchain raises
            self._say(f"training without torch.compile, which failed: {in_one_line(error)}")
            return
        self._stepped = compiled_copy(self.network, same_tensors=True)
        if self._drop_path:
            self._stepped.drop_path_probability = self._drop_probability  # is no buffer

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        objective, loss, output = self._losses(self._stepped, inputs, labels)
        self.optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self._config.grad_clip)
        self.optimizer.step()
        if self._average:
            self._average.update()
        with torch.no_grad():
            return torch.stack([loss.detach(), self._task.accuracy(output.detach(), labels)])

    def _losses(self, network: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Any]:
        """What is minimised, the loss of what the network gives, and that."""
        with self._autocast():
            output, auxiliary_output = self._forward(network, inputs)
        loss = self._loss(output, labels)
        if auxiliary_output is None:
            return loss, loss, output
        return loss + self._auxiliary_weight * self._loss(auxiliary_output, labels), loss, output

    def _forward(self, network: nn.Module, inputs: Tensor) -> tuple[Any, Any]:
        """What the network gives and, if its loss counts, the auxiliary head."""
        if self._auxiliary_weight:
            return network.forward_with_auxiliary(inputs)  # type: ignore[operator]
        return network(inputs), None

    def _loss(self, output: Any, labels: Tensor) -> Tensor:
        return self._task.loss(output, labels, self._label_smoothing)

    def _autocast(self) -> torch.autocast:
        """No cache: every weight is cast once a step, and a graph must not find one of another step."""
        wanted = self._config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self._current.eval()
        valid: dict[str, float] = {}
        if self._best and self._valid_loader:
            valid = evaluate_figures(self._score, self._task, self._valid_loader)
            if self._best.beaten_by(self._current, valid[self._task.figures[-1]], epoch):
                self._best.test = evaluate_figures(self._score, self._task, self._test_loader)
            test = self._best.test
        else:
            test = evaluate_figures(self._score, self._task, self._test_loader)
        return {
            **{f"valid_{name}": value for name, value in valid.items()},
            **{f"test_{name}": value for name, value in test.items()},
            "learning_rate": self.learning_rate(epoch, self.steps_per_epoch - 1),
        }

    def reason_to_stop(self, record: dict[str, Any], seconds: float) -> str:
        if self._best is None or self._patience is None:
            return ""
        waited = record["epoch"] - self._best.epoch
        return f"it validated best {waited} epochs ago" if waited >= self._patience else ""

    def state_dict(self) -> dict[str, Any]:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self._average.network.state_dict()} if self._average else {}
        return state | ({"best": self._best.state_dict()} if self._best else {})

    @staticmethod
    def trained_weights(state: dict[str, Any]) -> dict[str, Tensor]:
        """Those of ``trained`` in what ``state_dict`` gave."""
        return state["best"]["network"] if "best" in state else state.get("average", state["network"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self._average:
            self._average.network.load_state_dict(state["average"])
        if self._best:
            self._best.load_state_dict(state["best"])
        self._capture_steps()
