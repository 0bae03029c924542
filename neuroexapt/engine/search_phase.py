"""The search itself as a phase: bilevel steps over the two parts of the training data."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.backend.measure import time_calls
from neuroexapt.benchmarks import Table
from neuroexapt.core.buffers import buffers_copied
from neuroexapt.core.drawn import strongest
from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.core.supernet import Supernet
from neuroexapt.data import Loader
from neuroexapt.engine.bilevel import Batch, BilevelStep
from neuroexapt.engine.captured import capture
from neuroexapt.engine.config import SearchConfig
from neuroexapt.engine.curvature import largest_eigenvalue
from neuroexapt.engine.device import deterministic_convolutions, get_device_name, place
from neuroexapt.engine.execution import choose_execution, set_execution
from neuroexapt.engine.phase import Phase
from neuroexapt.engine.resources import MEASURES, Resources
from neuroexapt.engine.stopping import COLLAPSED, PREFERRED, Stopping, count_skips, preference
from neuroexapt.engine.training import (
    cosine,
    evaluate_figures,
    load_optimizer,
    make_optimizer,
    score,
    set_learning_rate,
)
from neuroexapt.errors import UserError
from neuroexapt.spaces import get_space
from neuroexapt.spaces.space import Space
from neuroexapt.strategies import against_collapse, get_strategy

FIGURES_PER_SEARCH = 10
MEASURED_SECONDS = 5.0
ARCH_BETAS = (0.5, 0.999)
"""Adam's coefficients for α, as published."""


class SearchPhase(Phase):
    """SGD with a cosine schedule for w, Adam for α after ``warmup_epochs``, validated after every epoch.

    With a ``table`` every epoch's record tells the true accuracy of its genotype, which nothing else uses.
    ``facts``: what networks must know of the data, where there are budgets.
    """

    name = "search"

    def __init__(
        self,
        supernet: Supernet,
        train_loader: Loader,
        valid_loader: Loader,
        config: SearchConfig,
        table: Table | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.epochs = config.epochs
        self.steps_per_epoch = train_loader.steps_per_epoch
        self.device = train_loader.device
        self.supernet = supernet
        self.space: Space = get_space(config.space)
        self.strategy = get_strategy(config.strategy).to(self.device)
        self._config = config
        self._train_loader, self.valid_loader = train_loader, valid_loader
        self._table = table
        self._facts = facts or {}
        self.stopping = Stopping(config.stop, config.minutes)
        self._say: Callable[[str], None] = lambda text: None
        self._is_warned = False
        self._execution = "reference"
        self._place_network()
        if config.recompute and next(supernet.search_cells(), None) is None:
            raise UserError(f"only cells of pictures can --recompute; leave it out for {self.space.name}")
        self.resources = self._make_resources()  # before the strategy makes the network another one
        self._make_step()

    def _shape_network(self) -> None:
        """Make the search network what the strategy wants it to be."""
        self.strategy.shape(self.supernet)
        self._place_network()

    def _place_network(self) -> None:
        channels_last = None if self.device.type == "cpu" else False  # kernels want NCHW
        place(self.supernet, self.device, channels_last, self._config.precision)

    def _make_resources(self) -> Resources | None:
        config = self._config
        limits = config.given(MEASURES)
        if not limits:
            return None
        inputs = next(self._train_loader.epoch(0))[0]

        def make_network(genotype: AnyGenotype) -> nn.Module:
            return self.space.network(
                genotype, **self._facts, channels=config.init_channels, layers=config.layers
            )

        return Resources(limits, self.supernet, inputs, self.space, make_network)

    def _make_step(self) -> None:
        """The search network as the strategy wants it, and optimizers for the parameters that it has then."""
        self._shape_network()
        supernet, config = self.supernet, self._config
        self.weight_optimizer = make_optimizer(supernet.weights(), config)
        self.arch_optimizer = torch.optim.Adam(
            supernet.arch_parameters(),
            config.arch_learning_rate,
            betas=ARCH_BETAS,
            weight_decay=config.arch_weight_decay,
            capturable=self.device.type == "cuda",
        )
        self.bilevel_step = BilevelStep(
            supernet,
            self.strategy,
            self.weight_optimizer,
            self.arch_optimizer,
            grad_clip=config.grad_clip,
            task=self.space.task,
            cost=self.resources.penalty if self.resources else lambda weights: None,
        )
        supernet.set_drawn_only(self.strategy.single_path)
        supernet.set_recompute(config.recompute)
        supernet.set_precision(config.precision)
        self._set_execution(self._execution)

    def reshape(self) -> None:
        """Follow a change of the network; parameters that stay keep their optimizer's state."""
        before = {**self.weight_optimizer.state, **self.arch_optimizer.state}
        self._make_step()
        for optimizer in (self.weight_optimizer, self.arch_optimizer):
            kept = [p for group in optimizer.param_groups for p in group["params"] if p in before]
            optimizer.state.update({parameter: before[parameter] for parameter in kept})

    def prepare_execution(self, say: Callable[[str], None]) -> None:
        """Set up ``config.execution``; measuring uses copies, so the search's own state is not touched."""
        self._say = say
        execution = self._config.execution
        if execution == "fused" and self.strategy.not_fused:
            say(f"the cells do not run fused: {self.strategy.not_fused}")
        if execution == "fastest":
            execution = choose_execution(self._step_ms, self._step_key(), say)
        self._set_execution(execution)

    def _set_execution(self, execution: str) -> None:
        set_execution(self.supernet, execution)
        self._execution = execution
        self._capture_steps()

    def _capture_steps(self) -> None:
        self._take_step, self._score = self._step, self._score_batch
        self._arch_gradient = self._arch_gradient_of
        if self._execution != "reference":
            self._take_step = capture(self._step, self.device, self.supernet)
            self._score = capture(self._score_batch, self.device, self.supernet)
            self._arch_gradient = capture(self._arch_gradient_of, self.device, self.supernet)

    def _step_ms(self, execution: str) -> float:
        """Median time of a step with a copy of the search network."""
        supernet = copy.deepcopy(self.supernet)
        twin = SearchPhase(supernet, self._train_loader, self.valid_loader, self._config, facts=self._facts)
        twin._set_execution(execution)
        batches = *next(self._train_loader.epoch(0)), *next(self.valid_loader.forever(0))
        return time_calls(lambda: twin._take_step(*batches), self.device, MEASURED_SECONDS).median_ms

    def _step_key(self) -> str:
        """What the time of a step depends on."""
        config, batch = self._config, next(self._train_loader.epoch(0))
        return (
            f"{get_device_name(self.device)}, torch {torch.__version__}, {config.space}, {config.strategy}, "
            f"{config.layers} layers, {config.init_channels} channels, batch {tuple(batch[0].shape)}"
            f"{', recompute' if config.recompute else ''}{', bf16' if config.precision == 'bf16' else ''}"
        )

    def metric_names(self, epoch: int) -> Sequence[str]:
        names = ("train_loss", "train_accuracy", "arch_loss", "arch_accuracy")
        return names[:2] if self._warming_up(epoch) else names

    def _warming_up(self, epoch: int) -> bool:
        in_search = min(epoch, self.epochs - 1)  # a selection goes on as the search ended
        return epoch < self._config.warmup_epochs or self.strategy.holds_alpha(in_search, self.epochs)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.supernet.parameters())

    def learning_rate(self, epoch: int) -> float:
        place, length = self.strategy.annealing(epoch, self.epochs)
        return cosine(place, length, self._config.learning_rate, self._config.learning_rate_min)

    def steps(self, epoch: int, start: int) -> Iterator[Tensor]:
        if self.strategy.start_epoch(self.supernet, epoch, self.epochs):
            self.reshape()
        return self.steps_at(epoch, start, self.learning_rate(epoch))

    def steps_at(self, epoch: int, start: int, learning_rate: float) -> Iterator[Tensor]:
        """``steps`` at a learning rate of their own, also after the last epoch."""
        set_learning_rate(self.weight_optimizer, learning_rate)
        train = self._train_loader.epoch(epoch, start)
        if self._warming_up(epoch):
            for batch in train:
                yield self._take_step(*batch)
            return
        valid = self.valid_loader.forever(epoch * self.steps_per_epoch + start)
        for batch, valid_batch in zip(train, valid, strict=False):
            yield self._take_step(*batch, *valid_batch)

    def _step(self, inputs: Tensor, labels: Tensor, *valid: Tensor) -> Tensor:
        with deterministic_convolutions():
            metrics = self.bilevel_step(Batch(inputs, labels), Batch(*valid) if valid else None)
        return torch.stack(metrics if valid else metrics[:2])

    def _score_batch(self, inputs: Tensor, labels: Tensor) -> Tensor:
        weights = self.mixing_weights()
        if not self.strategy.single_path:
            return score(lambda x: self.supernet(x, weights), self.space.task, inputs, labels)
        # No step trained all candidates mixed.
        if self.strategy.learns_alpha:
            path = {cell: strongest(mixing) for cell, mixing in weights.items()}
        else:  # any is as good
            path = self.strategy.relax(self.supernet.choices())
        return self.score_part(inputs, labels, path)

    def score_part(self, inputs: Tensor, labels: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """``score`` of a part of the network, in training mode: by the statistics of the batch, since running
        ones are of other parts, too; they stay as they are.
        """
        with buffers_copied(self.supernet):
            return score(lambda x: self.supernet(x, weights), self.space.task, inputs, labels)

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> dict[str, Any]:
        curvature = self._curvature(epoch) if self._config.stop == "eigenvalue" else {}
        self.supernet.train(self.strategy.single_path)  # see _score_batch
        weights = self.mixing_weights()
        genotype = self.choose(weights)
        figures = evaluate_figures(self._score, self.space.task, self.valid_loader)
        return {
            **{f"valid_{name}": value for name, value in figures.items()},
            "learning_rate": self.learning_rate(epoch),
            "arch_learning_rate": self._config.arch_learning_rate,
            "alpha": {cell: w.tolist() for cell, w in weights.items()},
            "alpha_entropy": {cell: entropy(w).tolist() for cell, w in weights.items()},
            "preference": self.preference(),
            "genotype": genotype.to_dict(),
            **self._skips(weights, genotype),
            **curvature,
            **self.table_accuracies(genotype),
        }

    def _curvature(self, epoch: int) -> dict[str, float]:
        """Of the validation loss over α, on one batch."""
        self.supernet.train()
        batch = next(iter(self.valid_loader.forever(epoch * self.steps_per_epoch)))
        alphas = self.supernet.arch_parameters()
        return {"eigenvalue": largest_eigenvalue(lambda: self._arch_gradient(*batch), alphas)}

    def _arch_gradient_of(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Of the loss without noise: [P], α of all types of cells in a row."""
        with torch.enable_grad():
            weights = self.strategy.mixing(self.supernet.choices())
        with buffers_copied(self.supernet):
            alphas = self.supernet.arch_parameters()
            found = self.bilevel_step.gradients(Batch(inputs, labels), alphas, weights)
        return torch.cat([gradient.flatten() for gradient in found.gradients])

    def _skips(self, weights: Mapping[str, Tensor], genotype: AnyGenotype) -> dict[str, float]:
        """Share of a normal cell's skip connections in all weights, and how many its genotype has."""
        if "skip_connect" not in self.space.primitives:
            return {}
        share = self._share_of_skips(next(iter(weights.values())))
        return {"skip_share": share, "skips": count_skips(genotype)[0]}

    def _share_of_skips(self, candidates: Tensor) -> float:
        """In the sum of what a normal cell's candidates [E, K] have."""
        skips = candidates[:, self.space.primitives.index("skip_connect")]
        return (skips.sum() / candidates.sum()).item()

    def _prefers_skips(self, share: float) -> bool:
        """Whether a ``share`` of all weights is more than chance gives them among what is left."""
        left = self.supernet.kept(next(iter(self.supernet.alphas)))
        return share > PREFERRED * self._share_of_skips(left)

    def reason_to_stop(self, record: dict[str, Any], seconds: float) -> str:
        skips, operations = count_skips(self.genotype())
        collapsed = skips >= COLLAPSED * operations and self._prefers_skips(record["skip_share"])
        if collapsed and not self._is_warned:
            self._is_warned = True
            self._say(
                f"{skips} of the {operations} operations of a normal cell are skip connections now: the "
                "search collapses, as DARTS is known to. Made against it are --strategy "
                f"{', '.join(against_collapse())}; --stop ends a search in time"
            )
        # What α has not decided is chance, in spaces of few candidates often skip connections.
        chosen = skips if record["preference"] >= PREFERRED else 0
        return self.stopping.after_epoch(
            self.mixing_weights(), skips=chosen, eigenvalue=record.get("eigenvalue"), seconds=seconds
        )

    def time_is_over(self, seconds: float) -> bool:
        return self.stopping.time_is_over(seconds)

    def table_accuracies(self, genotype: AnyGenotype) -> dict[str, float]:
        """Test accuracies of the genotype as the table has them."""
        figures = self._table.query(genotype) if self._table else {}
        return {f"table_{name}": value for name, value in figures.items() if name.endswith("_test")}

    @torch.no_grad()
    def mixing_weights(self) -> dict[str, Tensor]:
        """What the genotype follows from, and what validation sees, or the strongest path of it."""
        return self.stopping.weights or self.strategy.mixing(self.supernet.choices())

    def genotype(self) -> AnyGenotype:
        """What the search would choose if it stopped now."""
        return self.choose(self.mixing_weights())

    def preference(self) -> float:
        """How much α prefers the strongest operations to the others that are left, 1 for not at all."""
        weights = self.mixing_weights()
        return preference(weights, {cell: self.supernet.kept(cell) for cell in weights})

    def choose(self, weights: dict[str, Tensor]) -> AnyGenotype:
        """The genotype that mixing weights stand for, within the budgets."""
        return self.resources.fit(weights) if self.resources else self.space.derive(weights)

    def figures(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Heat maps of α and the cells chosen so far, some ten times in a search: drawing takes time."""
        if record["epoch"] % max(1, self.epochs // FIGURES_PER_SEARCH) and record["epoch"] + 1 < self.epochs:
            return {}
        from neuroexapt.report.cell_graph import draw_cell
        from neuroexapt.report.figures import alpha_heat_map, edge_names

        space, figures = self.space.describe(self._config.layers), {}
        for cell, weights in record["alpha"].items():
            edges = edge_names(space["edges"][cell], space["nodes"])
            figures[f"alpha/{cell}"] = alpha_heat_map(weights, edges, self.space.primitives_of(cell))
        for cell, chosen in self.genotype().cells.items():
            figures[f"cell/{cell}"] = draw_cell(*chosen)
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "supernet": self.supernet.state_dict(),
            "strategy": self.strategy.state_dict(),
            "genotype": self.genotype().to_dict(),
            "stopping": self.stopping.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strategy.load_state_dict(state["strategy"])
        self.stopping.load_state_dict(state["stopping"])
        self._shape_network()
        self.supernet.load_state_dict(state["supernet"])
        self._make_step()
        load_optimizer(self.weight_optimizer, state["weight_optimizer"])
        load_optimizer(self.arch_optimizer, state["arch_optimizer"])


def entropy(weights: Tensor) -> Tensor:
    """``-Σ_k w log w`` in nats of each row of [E, K]."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1)
