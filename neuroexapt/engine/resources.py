"""What operations and networks cost, and keeping a search within a budget."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroexapt.backend.measure import time_calls
from neuroexapt.core.derived import count_parameters
from neuroexapt.core.drawn import strongest
from neuroexapt.core.genotypes import AnyGenotype
from neuroexapt.core.operations import MixedOp
from neuroexapt.core.supernet import Supernet
from neuroexapt.errors import UserError
from neuroexapt.spaces.space import Space

STRENGTH = 1.0
"""Of the penalty, whose unit is one budget."""
LATENCY_SECONDS = 0.05
"""For which an operation or a network is timed."""
HIGHEST_PRICE = 2.0**40
"""Of one budget in units of mixing weight: nothing but cost counts then."""
PRICE_TOLERANCE = 1e-3

Measure = Callable[[nn.Module, Tensor], float]
Weights = Mapping[str, Tensor]


def count_flops(module: nn.Module, x: Tensor) -> float:
    """Multiply-adds of convolutions and products for one example of [B, …]: "FLOPs" in the papers."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    # On the CPU, where no kernels of our own hide them.
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).cpu()(x[:1].cpu())
    return counter.get_total_flops() / 2


def count_params(module: nn.Module, x: Tensor) -> float:
    """Parameters at inference."""
    return count_parameters(module)


def time_forward(module: nn.Module, x: Tensor) -> float:
    """Milliseconds of a forward pass of the whole batch, on its device."""
    return time_calls(lambda: module(x), x.device, LATENCY_SECONDS).median_ms


MEASURES: dict[str, Measure] = {
    "max_flops": count_flops,
    "max_params": count_params,
    "max_latency_ms": time_forward,
}
"""By the setting that limits what they measure."""


@dataclass(frozen=True)
class Budget:
    """``shares``: for each type of cells [E, K], what a candidate adds to the cost of a network, over the
    limit; ``rest``: what everything else costs, over the limit.
    """

    setting: str
    limit: float
    shares: dict[str, Tensor]
    rest: float

    def expected(self, weights: Weights) -> Tensor:
        """Share of the limit that is spent, [], where ``weights`` are probabilities."""
        spent = [(weights[cell] * share).sum() for cell, share in self.shares.items()]
        return self.rest + torch.stack(spent).sum()


class Resources:
    """Budgets of a search: a penalty for its α, and a genotype that meets them.

    Candidates are measured in the search network, on inputs of their own size, and a genotype as the network
    that ``make_network`` makes of it, on ``inputs`` [B, …]. A candidate counts for all cells of its
    type, and where 8 of 14 edges are chosen for 8/14. The penalty's costs are estimates therefore, the
    genotype's are its own.

    Raises:
        UserError: not even the smallest network is within ``limits``, values of settings in ``MEASURES``.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        supernet: Supernet,
        inputs: Tensor,
        space: Space,
        make_network: Callable[[AnyGenotype], nn.Module],
    ) -> None:
        self._inputs, self._space, self._make_network = inputs, space, make_network
        self._known: dict[tuple[str, str], float] = {}
        self._weight = next(supernet.parameters())
        shapes = _shapes_of_inputs(supernet, inputs)
        self._budgets = [self._budget(*limit, supernet, shapes) for limit in limits.items()]

    def penalty(self, weights: Weights) -> Tensor:
        """``strength · Σ max(0, cost / limit − 1)`` over the budgets, [], of the strongest candidates.

        The gradient is that of the expected cost (straight through), and none once the strongest are within
        the limit, whatever the others still weigh.
        """
        chosen = {cell: w + self._strongest(cell, w) - w.detach() for cell, w in weights.items()}
        return STRENGTH * torch.stack([(b.expected(chosen) - 1).relu() for b in self._budgets]).sum()

    def _strongest(self, cell: str, weights: Tensor) -> Tensor:
        """1 for the candidate of the largest weight on each edge that a genotype may have, else 0: [E, K]."""
        names, allowed = self._space.primitives_of(cell), weights.detach().clone()
        if "none" in names and not self._space.may_choose_none:
            allowed[:, names.index("none")] = -torch.inf
        return strongest(allowed)

    @torch.no_grad()
    def fit(self, weights: Weights) -> AnyGenotype:
        """The genotype of ``weights`` if it meets all budgets, else of what is left of them after paying.

        A candidate pays a price times its share of the budgets; the lowest price for which the genotype meets
        them is found by bisection.
        """
        low, high = 0.0, 0.0
        while not self._meets(self._at(high, weights)):
            low, high = high, 2 * high or 2.0**-10
            if high > HIGHEST_PRICE:
                raise UserError("no network within the budgets is found: raise the limits, or give only one")
        while high - low > PRICE_TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self._meets(self._at(middle, weights)) else (middle, high)
        return self._at(high, weights)

    def measure(self, genotype: AnyGenotype) -> dict[str, float]:
        """What the network of ``genotype`` costs where it is limited: flops, params, latency_ms."""
        return {b.setting.removeprefix("max_"): self._cost(b.setting, genotype) for b in self._budgets}

    def _at(self, price: float, weights: Weights) -> AnyGenotype:
        paid = {
            cell: price * torch.stack([b.shares[cell] for b in self._budgets]).sum(dim=0) for cell in weights
        }
        return self._space.derive({cell: w - paid[cell] for cell, w in weights.items()})

    def _meets(self, genotype: AnyGenotype) -> bool:
        return all(self._cost(b.setting, genotype) <= b.limit for b in self._budgets)

    @torch.no_grad()
    def _cost(self, setting: str, genotype: AnyGenotype) -> float:
        """Measured once for every genotype."""
        key = (setting, str(genotype))
        if key not in self._known:
            with torch.random.fork_rng(devices=[]):  # its weights matter to nothing
                network = self._make_network(genotype)
            network = network.to(self._inputs.device).eval()
            self._known[key] = MEASURES[setting](network, self._inputs)
        return self._known[key]

    def _budget(
        self, setting: str, limit: float, supernet: Supernet, shapes: Mapping[MixedOp, torch.Size]
    ) -> Budget:
        costs = _costs(MEASURES[setting], supernet, shapes)
        cheapest = self._space.derive({cell: -cost for cell, cost in costs.items()})
        least = self._cost(setting, cheapest)
        if least > limit:
            raise UserError(
                f"--{setting.replace('_', '-')} {limit:,.10g} is too low: the smallest network of this space "
                f"has {least:,.10g}"
            )
        for cell, chosen in cheapest.cells.items():
            costs[cell] *= len(chosen.edges) / len(costs[cell])
        chosen_cost = sum(cost.min(dim=1).values.sum().item() for cost in costs.values())
        shares = {cell: (cost / limit).to(self._weight) for cell, cost in costs.items()}
        return Budget(setting, limit, shares, (least - chosen_cost) / limit)


@torch.no_grad()
def _shapes_of_inputs(supernet: Supernet, inputs: Tensor) -> dict[MixedOp, torch.Size]:
    """What the edges of ``supernet`` get when it sees ``inputs``."""
    shapes: dict[MixedOp, torch.Size] = {}

    def note(edge: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(edge, MixedOp)
        shapes[edge] = arguments[0].shape

    edges = [module for module in supernet.modules() if isinstance(module, MixedOp)]
    hooks = [edge.register_forward_pre_hook(note) for edge in edges]
    training = supernet.training
    supernet.eval()(inputs)
    supernet.train(training)
    for hook in hooks:
        hook.remove()
    return shapes


@torch.no_grad()
def _costs(measure: Measure, supernet: Supernet, shapes: Mapping[MixedOp, torch.Size]) -> dict[str, Tensor]:
    """Of all candidates [E, K], over all cells of each type; like operations are measured once."""
    device = next(supernet.parameters()).device
    known: dict[tuple[str, torch.Size], float] = {}

    def cost(op: nn.Module, shape: torch.Size) -> float:
        key = (repr(op), shape)
        if key not in known:
            known[key] = measure(copy.deepcopy(op).eval(), torch.zeros(shape, device=device))
        return known[key]

    def costs_of(cell: str) -> Tensor:
        of_cells = [
            [[cost(op, shapes[edge]) for op in edge.ops] for edge in edges]
            for edges in supernet.mixed_ops(cell)
        ]
        return torch.tensor(of_cells, dtype=torch.float64).sum(dim=0)

    return {cell: costs_of(cell) for cell, _ in supernet.candidates.named_buffers()}
