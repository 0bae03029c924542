"""The search itself as a phase: bilevel steps over the two halves of the training pictures."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.backend.measure import time_calls
from neuroexapt.benchmarks import Table
from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.core.supernet import Supernet
from neuroexapt.data import Loader
from neuroexapt.engine.bilevel import Batch, BilevelStep
from neuroexapt.engine.captured import capture
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.device import get_device_name, place
from neuroexapt.engine.execution import choose_execution, set_execution
from neuroexapt.engine.phase import Phase
from neuroexapt.engine.training import (
    cosine,
    evaluate_loss,
    load_optimizer,
    make_sgd,
    score,
    set_learning_rate,
)
from neuroexapt.spaces import get_space
from neuroexapt.spaces.space import Space
from neuroexapt.strategies import get_strategy

FIGURES_PER_SEARCH = 10
MEASURED_SECONDS = 5.0
ARCH_BETAS = (0.5, 0.999)
"""Adam's coefficients for α, as published."""


class SearchPhase(Phase):
    """SGD with a cosine schedule for w, Adam for α after ``warmup_epochs``, validated after every epoch.

    With a ``table`` every epoch's record tells the true accuracy of its genotype, which nothing else uses.
    """

    name = "search"

    def __init__(
        self,
        supernet: Supernet,
        train_loader: Loader,
        valid_loader: Loader,
        config: SearchConfig,
        table: Table | None = None,
    ) -> None:
        self.epochs = config.epochs
        self.steps_per_epoch = train_loader.steps_per_epoch
        self.device = train_loader.device
        self.supernet = supernet
        self.space: Space = get_space(config.space)
        self.strategy = get_strategy(config.strategy).to(self.device)
        self._config = config
        self._train_loader, self._valid_loader = train_loader, valid_loader
        self._table = table
        self._execution = "reference"
        self._make_step()

    def _make_step(self) -> None:
        """The search network as the strategy wants it, and optimizers for the parameters that it has then."""
        supernet, config = self.supernet, self._config
        self.strategy.shape(supernet)
        place(supernet, self.device)
        self.weight_optimizer = make_sgd(supernet.weights(), config)
        self.arch_optimizer = torch.optim.Adam(
            supernet.arch_parameters(),
            config.arch_learning_rate,
            betas=ARCH_BETAS,
            weight_decay=config.arch_weight_decay,
            capturable=self.device.type == "cuda",
        )
        self.bilevel_step = BilevelStep(
            supernet, self.strategy, self.weight_optimizer, self.arch_optimizer, grad_clip=config.grad_clip
        )
        supernet.set_recompute(config.recompute)
        self._set_execution(self._execution)

    def _reshape(self) -> None:
        """Follow the strategy to another network; parameters that stay keep their optimizer's state."""
        before = {**self.weight_optimizer.state, **self.arch_optimizer.state}
        self._make_step()
        for optimizer in (self.weight_optimizer, self.arch_optimizer):
            kept = [p for group in optimizer.param_groups for p in group["params"] if p in before]
            optimizer.state.update({parameter: before[parameter] for parameter in kept})

    def prepare_execution(self, say: Callable[[str], None]) -> None:
        """Set up ``config.execution``; measuring uses copies, so the search's own state is not touched."""
        execution = self._config.execution
        if execution == "fastest":
            execution = choose_execution(self._step_ms, self._step_key(), say)
        self._set_execution(execution)

    def _set_execution(self, execution: str) -> None:
        set_execution(self.supernet, execution)
        self._execution = execution
        self._capture_steps()

    def _capture_steps(self) -> None:
        self._take_step, self._score = self._step, self._score_batch
        if self._execution != "reference":
            self._take_step = capture(self._step, self.device, self.supernet)
            self._score = capture(self._score_batch, self.device, self.supernet)

    def _step_ms(self, execution: str) -> float:
        """Median time of a step with a copy of the search network."""
        supernet = copy.deepcopy(self.supernet)
        twin = SearchPhase(supernet, self._train_loader, self._valid_loader, self._config)
        twin._set_execution(execution)
        batches = *next(self._train_loader.epoch(0)), *next(self._valid_loader.forever(0))
        return time_calls(lambda: twin._take_step(*batches), self.device, MEASURED_SECONDS).median_ms

    def _step_key(self) -> str:
        """What the time of a step depends on."""
        config, batch = self._config, next(self._train_loader.epoch(0))
        return (
            f"{get_device_name(self.device)}, torch {torch.__version__}, {config.space}, {config.strategy}, "
            f"{config.layers} layers, {config.init_channels} channels, batch {tuple(batch[0].shape)}"
            f"{', recompute' if config.recompute else ''}"
        )

    def metric_names(self, epoch: int) -> Sequence[str]:
        names = ("train_loss", "train_accuracy", "arch_loss", "arch_accuracy")
        return names[:2] if self._warming_up(epoch) else names

    def _warming_up(self, epoch: int) -> bool:
        return epoch < self._config.warmup_epochs

    def parameters(self) -> list[nn.Parameter]:
        return list(self.supernet.parameters())

    def learning_rate(self, epoch: int) -> float:
        return cosine(epoch, self.epochs, self._config.learning_rate, self._config.learning_rate_min)

    def steps(self, epoch: int, start: int) -> Iterator[Tensor]:
        if self.strategy.start_epoch(self.supernet, epoch, self.epochs):
            self._reshape()
        set_learning_rate(self.weight_optimizer, self.learning_rate(epoch))
        train = self._train_loader.epoch(epoch, start)
        if self._warming_up(epoch):
            for batch in train:
                yield self._take_step(*batch)
            return
        valid = self._valid_loader.forever(epoch * self.steps_per_epoch + start)
        for batch, valid_batch in zip(train, valid, strict=False):
            yield self._take_step(*batch, *valid_batch)

    def _step(self, images: Tensor, labels: Tensor, *valid: Tensor) -> Tensor:
        metrics = self.bilevel_step(Batch(images, labels), Batch(*valid) if valid else None)
        return torch.stack(metrics if valid else metrics[:2])

    def _score_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        weights = self.mixing_weights()
        return score(lambda x: self.supernet(x, weights), images, labels)

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.supernet.eval()
        weights = self.mixing_weights()
        valid_loss, valid_accuracy = evaluate_loss(self._score, self._valid_loader)
        return {
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "learning_rate": self.learning_rate(epoch),
            "arch_learning_rate": self._config.arch_learning_rate,
            "alpha": {cell: w.tolist() for cell, w in weights.items()},
            "alpha_entropy": {cell: entropy(w).tolist() for cell, w in weights.items()},
            "genotype": self.genotype().to_dict(),
            **self.table_accuracies(self.genotype()),
        }

    def table_accuracies(self, genotype: AnyGenotype) -> dict[str, float]:
        """Test accuracies of the genotype as the table has them."""
        figures = self._table.query(genotype) if self._table else {}
        return {f"table_{name}": value for name, value in figures.items() if name.endswith("_test")}

    @torch.no_grad()
    def mixing_weights(self) -> dict[str, Tensor]:
        return self.strategy.mixing(self.supernet.choices())

    def genotype(self) -> AnyGenotype:
        """What the search would choose if it stopped now."""
        return self.space.derive(self.mixing_weights())

    def figures(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Heat maps of α and the cells chosen so far, some ten times in a search: drawing takes time."""
        if record["epoch"] % max(1, self.epochs // FIGURES_PER_SEARCH) and record["epoch"] + 1 < self.epochs:
            return {}
        from neuroexapt.report.cell_graph import draw_cell
        from neuroexapt.report.figures import alpha_heat_map, edge_names

        space, figures = self.space.describe(), {}
        for cell, weights in record["alpha"].items():
            edges = edge_names(space["edges"][cell], space["nodes"])
            figures[f"alpha/{cell}"] = alpha_heat_map(weights, edges, space["primitives"])
        for cell, chosen in self.genotype().cells.items():
            figures[f"cell/{cell}"] = draw_cell(*chosen)
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "supernet": self.supernet.state_dict(),
            "strategy": self.strategy.state_dict(),
            "mixing": self.mixing_weights(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strategy.load_state_dict(state["strategy"])
        self.supernet.load_state_dict(state["supernet"])
        self._make_step()
        load_optimizer(self.weight_optimizer, state["weight_optimizer"])
        load_optimizer(self.arch_optimizer, state["arch_optimizer"])


def entropy(weights: Tensor) -> Tensor:
    """``-Σ_k w log w`` in nats of each row of [E, K]."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1)
