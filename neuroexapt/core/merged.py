"""A cell's plan in plain PyTorch: what leaves a state runs side by side, in any dtype on any device.

The candidates that leave a state form *bundles*. The convolutions of a bundle run as one, its BatchNorms are
one with the mixing weights for its scale, and what it adds to the nodes is one sum. Pools are taken once a
state.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.backend.registry import Support, register_impl
from neuroexapt.core.batch_norm import normed_sum, sum_chunks
from neuroexapt.core.drawn import (
    add_constants,
    can_be_read,
    part_by_nodes,
    statistics_of_drawn,
)
from neuroexapt.core.layouts import Merging, choose_layout
from neuroexapt.core.operations import FactorizedReduce, convolve_joined, two_grids
from neuroexapt.core.plan import (
    EPS,
    MOMENTUM,
    CellPlan,
    ConvTerm,
    IdentityTerm,
    ModuleTerm,
    NodeGroup,
    PoolTerm,
    StateGroup,
    Term,
)


def cell(plan: CellPlan, states: Sequence[Tensor], weights: Tensor, *, drawn_only: bool = False) -> Tensor:
    """What ``functional.cell`` defines."""
    if not drawn_only:
        return _run(plan, states, weights, {})
    weights, constants = part_by_nodes(plan, weights)
    if can_be_read(weights):
        return _run(plan.drawn(weights), states, weights, constants)
    with statistics_of_drawn(plan, weights):
        return _run(plan, states, weights, constants)


def _run(
    plan: CellPlan, states: Sequence[Tensor], weights: Tensor, constants: Mapping[int, Sequence[Tensor]]
) -> Tensor:
    states = list(states)
    entering = {node.node: _start(plan, node, states[0]) for node in plan.nodes}

    def enter(node: int) -> Tensor:
        y = _sum(entering[node])
        return add_constants(y, constants[node]) if constants else y

    statistics = RunningStatistics()
    for group in plan.states:
        if group.state == len(states):
            states.append(enter(group.state))
        for target, share in _leave(group, states[group.state], weights, statistics):
            entering[target].append(share)
    states.append(enter(plan.nodes[-1].node))
    statistics.update_modules()
    channels_last = states[0].is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    joined = [states[node].contiguous(memory_format=memory_format) for node in plan.outputs]
    return torch.cat(joined, dim=1)


def _start(plan: CellPlan, node: NodeGroup, state: Tensor) -> list[Tensor]:
    """What enters a node besides its terms and edges: zeros if it has none."""
    if node.terms or node.edges:
        return []
    stride = plan.states[0].stride
    return [torch.zeros_like(state[:, :, ::stride, ::stride])]


def _leave(
    group: StateGroup, state: Tensor, weights: Tensor, statistics: "RunningStatistics"
) -> Iterable[tuple[int, Tensor]]:
    """Targets of the state and what it adds to them, [B, C, H', W']."""
    for edge in group.edges:
        yield edge.target, edge.module(state, weights[edge.edge])
    departure = _Departure(state, statistics)
    schedule = _schedule(group, departure.layout.merging)
    shares: dict[tuple[int, ...], list[Tensor]] = {}
    for bundle, bundle_weights in zip(schedule.bundles, schedule.mixing_weights(weights), strict=True):
        shares.setdefault(bundle.targets, []).append(bundle.run(departure, bundle, bundle_weights))
    for targets, members in shares.items():
        yield from zip(targets, map(departure.layout.leave, _sum(members).unbind(1)), strict=True)


def _sum(xs: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, xs)


class RunningStatistics:
    """What merged BatchNorms saw, to be passed on to the BatchNorms of the modules."""

    def __init__(self) -> None:
        self._bns: list[nn.BatchNorm2d] = []
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []

    def record(self, bns: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor) -> None:
        """``mean``, ``variance``: [N · C] for N BatchNorms, or [C] for all of them."""
        channels = bns[0].num_features
        self._bns += bns
        self._means += mean.view(-1, channels).expand(len(bns), channels).unbind()
        self._variances += variance.view(-1, channels).expand(len(bns), channels).unbind()

    @torch.no_grad()
    def update_modules(self) -> None:
        """``running = (1 - momentum) · running + momentum · batch``, as every BatchNorm does for itself."""
        if not self._bns:
            return
        means, variances, counts = _running_statistics(self._bns)
        torch._foreach_mul_(means + variances, 1 - MOMENTUM)
        torch._foreach_add_(means + variances, self._means + self._variances, alpha=MOMENTUM)
        torch._foreach_add_(counts, 1)


def _running_statistics(bns: Sequence[nn.BatchNorm2d]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Means, variances and numbers of batches; every BatchNorm of a plan has them."""
    return (
        [bn.running_mean for bn in bns if bn.running_mean is not None],
        [bn.running_var for bn in bns if bn.running_var is not None],
        [bn.num_batches_tracked for bn in bns if bn.num_batches_tracked is not None],
    )


class Bundle:
    """Terms that run together and lead to the same nodes: ``kinds[k][t]`` enters node ``targets[t]``.

    ``run`` is the method of ``_Departure`` for terms of their class.
    """

    def __init__(
        self, run: "Callable[[_Departure, Bundle, Tensor], Tensor]", kinds: Sequence[Sequence[Any]]
    ) -> None:
        self.run = run
        self.kinds = kinds
        self.targets: tuple[int, ...] = tuple(term.target for term in kinds[0])
        self.terms = list(chain.from_iterable(kinds))
        self.bns: list[nn.BatchNorm2d] = [term.bn for term in self.terms if term.bn is not None]


class Schedule:
    """The bundles that leave a state and where their mixing weights stand."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self.bundles = bundles
        self._sizes = [len(bundle.terms) for bundle in bundles]
        self._places: dict[torch.device, Tensor] = {}

    def mixing_weights(self, weights: Tensor) -> Sequence[Tensor]:
        """From [E, K] those of each bundle's terms, in order."""
        if weights.device not in self._places:
            candidates = weights.shape[1]
            terms = chain.from_iterable(bundle.terms for bundle in self.bundles)
            places = [candidates * term.edge + term.column for term in terms]
            with torch.inference_mode(False):
                self._places[weights.device] = torch.tensor(places, dtype=torch.long, device=weights.device)
        return weights.flatten().index_select(0, self._places[weights.device]).split(self._sizes)


_schedules: weakref.WeakKeyDictionary[StateGroup, dict[Merging, Schedule]] = weakref.WeakKeyDictionary()


def _schedule(group: StateGroup, merging: Merging) -> Schedule:
    known = _schedules.setdefault(group, {})
    if merging not in known:
        known[merging] = Schedule(_make_bundles(group, merging))
    return known[merging]


def _make_bundles(group: StateGroup, merging: Merging) -> list[Bundle]:
    kinds: dict[tuple[Any, ...], list[Term]] = {}
    for term in chain(group.convs, group.pools, group.identities, group.modules):
        kinds.setdefault(_kind(term, merging), []).append(term)
    bundles: dict[tuple[Any, ...], list[list[Term]]] = {}
    for (*bundle, _), terms in kinds.items():
        bundles.setdefault((*bundle, *(term.target for term in terms)), []).append(terms)
    return [Bundle(run, terms) for (run, *_), terms in bundles.items()]


def _kind(term: Term, merging: Merging) -> tuple[Any, Hashable, Hashable]:
    """How a term runs, what else it has in common with those of its bundle, and with those of its kind."""
    if isinstance(term, ConvTerm):
        sizes = tuple(block.depthwise.kernel_size for block in term.blocks)
        dilations = tuple(block.dilation for block in term.blocks)
        if merging is Merging.FAMILIES:
            return _Departure.convs, dilations, sizes
        return _Departure.convs, (dilations, sizes), id(term) if merging is Merging.NONE else None
    if isinstance(term, PoolTerm):
        run = _Departure.pools if term.bn is not None else _Departure.bare_pools
        return run, None, (term.pool.kind, term.pool.kernel_size)
    if isinstance(term, IdentityTerm):
        return _Departure.identities, None, None
    assert isinstance(term, ModuleTerm)
    if type(term.module) is FactorizedReduce and term.bn is not None:
        return _Departure.reductions, None, None
    if term.joins_with is not None:
        return _Departure.dense_convs, term.joins_with, None
    return _Departure.one_module, id(term), None


class _Departure:
    """One state on its way to its nodes: what several bundles need of it is computed once.

    Each public method takes a bundle and the weights of its terms, and returns what the bundle adds to its T
    targets, [·, T, C, …].
    """

    def __init__(self, state: Tensor, statistics: RunningStatistics) -> None:
        self.state = state
        self.layout = choose_layout(state)
        self.x = self.layout.enter(state)
        self.active = F.relu(self.x)
        self.statistics = statistics

    def convs(self, bundle: Bundle, weights: Tensor) -> Tensor:
        first, *second = zip(*(term.blocks for term in bundle.terms), strict=True)
        z = self.layout.convolve_one(self.active, first)
        for blocks in second:
            x = self._normed_sum(z, [block.bn for block in first])
            z = self.layout.convolve_each(F.relu_(x), blocks)
        return self._shares(z, bundle, weights)

    def pools(self, bundle: Bundle, weights: Tensor) -> Tensor:
        pooled = [self.layout.pool(self.x, terms[0].pool) for terms in bundle.kinds]
        if not bundle.bns[0].training:
            # Now every BatchNorm has statistics of its own.
            copies = [[z] * len(bundle.targets) for z in pooled]
            return self._shares(torch.cat([*chain.from_iterable(copies)], dim=1), bundle, weights)
        normed = []
        for z, terms in zip(pooled, bundle.kinds, strict=True):
            y, mean, variance = normed_sum(z, None)
            self.statistics.record([term.bn for term in terms], mean, variance)
            normed.append(y)
        return _mix(normed, weights.view(len(bundle.kinds), -1))

    def bare_pools(self, bundle: Bundle, weights: Tensor) -> Tensor:
        pooled = [self.layout.pool(self.x, terms[0].pool) for terms in bundle.kinds]
        return _mix(pooled, weights.view(len(bundle.kinds), -1))

    def identities(self, bundle: Bundle, weights: Tensor) -> Tensor:
        return _mix([self.x], weights.view(1, -1))

    def reductions(self, bundle: Bundle, weights: Tensor) -> Tensor:
        """All factorized reductions: their first halves as one convolution, their second halves as one."""
        ops = [term.module for term in bundle.terms]
        first, second = two_grids(self.layout.leave(self.active))
        halves = [
            F.conv2d(first, torch.cat([op.conv_1.weight for op in ops])),
            F.conv2d(second, torch.cat([op.conv_2.weight for op in ops])),
        ]
        # [B, T, 2, C / 2, H, W], the order in which each reduction joins its own
        z = torch.cat([half.unflatten(1, (len(ops), -1)) for half in halves], dim=2).flatten(1, 2)
        return self._shares(self.layout.enter(z), bundle, weights)

    def dense_convs(self, bundle: Bundle, weights: Tensor) -> Tensor:
        z = convolve_joined(self.layout.leave(self.active), [term.module for term in bundle.terms])
        return self._shares(self.layout.enter(z), bundle, weights)

    def one_module(self, bundle: Bundle, weights: Tensor) -> Tensor:
        (term,) = bundle.terms
        z = self.layout.enter(term.body(self.state))
        return self._shares(z, bundle, weights) if bundle.bns else (weights[0] * z).unsqueeze(1)

    def _shares(self, z: Tensor, bundle: Bundle, weights: Tensor) -> Tensor:
        """``Σ_k w_kt · BN_kt(z_kt)`` for each target t; ``z``: the terms' outputs in order."""
        y = self._normed_sum(z, bundle.bns, weights, len(bundle.kinds))
        return y.unflatten(1, (len(bundle.targets), -1))

    def _normed_sum(
        self, z: Tensor, bns: Sequence[nn.BatchNorm2d], weights: Tensor | None = None, summands: int = 1
    ) -> Tensor:
        """``Σ_k w_k · BN_k(z_k)``; each of ``bns`` in turn takes its channels of ``z``."""
        scale = None if weights is None else weights.repeat_interleave(z.shape[1] // len(bns))
        if bns[0].training:
            y, mean, variance = normed_sum(z, scale, summands)
            self.statistics.record(bns, mean, variance)
            return y
        mean, variance = map(torch.cat, _running_statistics(bns)[:2])
        scale = None if scale is None else scale.to(mean.dtype)
        y = F.batch_norm(z, mean, variance, scale, None, False, MOMENTUM, EPS)
        return sum_chunks(y, summands)


def _mix(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``Σ_k weights[k, t] · xs[k]`` for each t, [·, T, C, …], as one product; keeps the memory format."""
    channels_last = xs[0].dim() == 4 and xs[0].is_contiguous(memory_format=torch.channels_last)
    stacked = torch.stack([x.movedim(1, -1) if channels_last else x for x in xs])
    y = (weights.T.to(stacked.dtype) @ stacked.flatten(1)).unflatten(1, stacked.shape[1:]).transpose(0, 1)
    return y.movedim(-1, 2) if channels_last else y


register_impl("cell", "torch", cell, lambda *args, **kwargs: Support(True))
