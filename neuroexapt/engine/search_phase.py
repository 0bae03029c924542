"""The search itself as a phase: bilevel steps over the two halves of the training pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.core.genotypes import Genotype
from neuroexapt.core.supernet import Supernet
from neuroexapt.data import Loader
from neuroexapt.engine.bilevel import Batch, BilevelStep
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.device import get_device_name
from neuroexapt.engine.execution import choose_execution, compile_edges
from neuroexapt.engine.phase import Phase
from neuroexapt.engine.training import cosine, evaluate_loss, make_sgd, set_learning_rate
from neuroexapt.spaces import CellSpace, get_space
from neuroexapt.strategies import get_strategy

FIGURES_PER_SEARCH = 10
ARCH_BETAS = (0.5, 0.999)
"""Adam's coefficients for α, as published."""


class SearchPhase(Phase):
    """SGD with a cosine schedule for w, Adam for α after ``warmup_epochs``, validated after every epoch."""

    name = "search"

    def __init__(
        self, supernet: Supernet, train_loader: Loader, valid_loader: Loader, config: SearchConfig
    ) -> None:
        self.epochs = config.epochs
        self.steps_per_epoch = train_loader.steps_per_epoch
        self.device = train_loader.device
        self.supernet = supernet
        self.space: CellSpace = get_space(config.space)
        self.strategy = get_strategy(config.strategy)
        self._config = config
        self._train_loader, self._valid_loader = train_loader, valid_loader
        self.bilevel_step = self._make_step(supernet)
        self.weight_optimizer = self.bilevel_step.weight_optimizer
        self.arch_optimizer = self.bilevel_step.arch_optimizer

    def _make_step(self, supernet: Supernet) -> BilevelStep:
        config = self._config
        arch_optimizer = torch.optim.Adam(
            supernet.arch_parameters(),
            config.arch_learning_rate,
            betas=ARCH_BETAS,
            weight_decay=config.arch_weight_decay,
        )
        weight_optimizer = make_sgd(supernet.weights(), config)
        return BilevelStep(
            supernet, self.strategy, weight_optimizer, arch_optimizer, grad_clip=config.grad_clip
        )

    def prepare_execution(self, say: Callable[[str], None]) -> None:
        """Set up ``config.execution``; measuring uses copies, so the search's own state is not touched."""
        config = self._config
        if config.execution == "eager":
            return
        train, valid = Batch(*next(self._train_loader.epoch(0))), Batch(*next(self._valid_loader.forever(0)))

        def take_step(network: Supernet) -> None:
            self._make_step(network)(train, valid)

        key = (
            f"{get_device_name(self.device)}, torch {torch.__version__}, {config.space}, {config.strategy}, "
            f"{config.layers} layers, {config.init_channels} channels, batch {tuple(train.images.shape)}"
        )
        if choose_execution(config.execution, self.supernet, take_step, key, say) == "compile":
            compile_edges(self.supernet)

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
        set_learning_rate(self.weight_optimizer, self.learning_rate(epoch))
        train = self._train_loader.epoch(epoch, start)
        if self._warming_up(epoch):
            for batch in train:
                yield torch.stack(self.bilevel_step(Batch(*batch), None)[:2])
            return
        valid = self._valid_loader.forever(epoch * self.steps_per_epoch + start)
        for batch, valid_batch in zip(train, valid, strict=False):
            yield torch.stack(self.bilevel_step(Batch(*batch), Batch(*valid_batch)))

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> dict[str, Any]:
        self.supernet.eval()
        weights = self.mixing_weights()
        valid_loss, valid_accuracy = evaluate_loss(lambda x: self.supernet(x, weights), self._valid_loader)
        return {
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "learning_rate": self.learning_rate(epoch),
            "arch_learning_rate": self._config.arch_learning_rate,
            "alpha": {cell: w.tolist() for cell, w in weights.items()},
            "alpha_entropy": {cell: entropy(w).tolist() for cell, w in weights.items()},
            "genotype": self.genotype().to_dict(),
        }

    @torch.no_grad()
    def mixing_weights(self) -> dict[str, Tensor]:
        return self.strategy.relax(dict(self.supernet.alphas))

    def genotype(self) -> Genotype:
        """What the search would choose if it stopped now."""
        return self.space.derive(self.mixing_weights())

    def figures(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Heat maps of α and the cells chosen so far, some ten times in a search: drawing takes time."""
        if record["epoch"] % max(1, self.epochs // FIGURES_PER_SEARCH) and record["epoch"] + 1 < self.epochs:
            return {}
        from neuroexapt.report.cell_graph import draw_cell
        from neuroexapt.report.figures import alpha_heat_map, edge_names

        topology, genotype = self.space.topology, self.genotype()
        edges = edge_names(topology.edges, topology.state_names)
        figures: dict[str, Any] = {}
        for cell, weights in record["alpha"].items():
            figures[f"alpha/{cell}"] = alpha_heat_map(weights, edges, self.space.primitives)
            figures[f"cell/{cell}"] = draw_cell(genotype.edges(cell), topology.state_names, topology.concat)
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "supernet": self.supernet.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.supernet.load_state_dict(state["supernet"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.arch_optimizer.load_state_dict(state["arch_optimizer"])


def entropy(weights: Tensor) -> Tensor:
    """``-Σ_k w log w`` in nats of each row of [E, K]."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1)
