"""A cell's plan in plain PyTorch: what leaves a state runs side by side, in any dtype on any device.

The candidates that leave a state form *bundles*. A bundle's convolutions are one merged convolution for each
kernel size, its BatchNorms are one with the mixing weights for its scale, and what it adds to the nodes is
one sum. Pools are taken once a state.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuroexapt.backend.registry import Support, register_impl
from neuroexapt.core.layouts import Layout, choose_layout
from neuroexapt.core.operations import FactorizedReduce, shift_by_one
from neuroexapt.core.plan import (
    EPS,
    MOMENTUM,
    CellPlan,
    ConvTerm,
    IdentityTerm,
    ModuleTerm,
    PoolTerm,
    StateGroup,
    Term,
)


class Bundle:
    """Terms of one family that lead to the same nodes: ``kinds[k][t]`` enters node ``targets[t]``."""

    def __init__(self, family: str, kinds: Sequence[Sequence[Term]]) -> None:
        self.family = family
        self.kinds = kinds
        self.targets = [term.target for term in kinds[0]]
        self.terms = list(chain.from_iterable(kinds))
        self.bns = [term.bn for term in self.terms if term.bn is not None]


class Schedule:
    """The bundles of every state, and where their mixing weights stand."""

    def __init__(self, plan: CellPlan) -> None:
        self.bundles = [_bundles(group) for group in plan.states]
        self.sizes = [len(bundle.terms) for bundle in chain.from_iterable(self.bundles)]
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def mixing_weights(self, weights: Tensor) -> Iterator[Tensor]:
        """From [E, K] those of each bundle's terms, in order."""
        rows, columns = self._indices_on(weights.device)
        return iter(weights[rows, columns].split(self.sizes))

    def _indices_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._indices:
            terms = [term for bundle in chain.from_iterable(self.bundles) for term in bundle.terms]
            rows, columns = [term.edge for term in terms], [term.column for term in terms]
            with torch.inference_mode(False):
                self._indices[device] = (
                    torch.tensor(rows, device=device),
                    torch.tensor(columns, device=device),
                )
        return self._indices[device]


_schedules: weakref.WeakKeyDictionary[CellPlan, Schedule] = weakref.WeakKeyDictionary()


class RunningStatistics:
    """What the merged BatchNorms saw, to be given to the BatchNorms of the modules."""

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
        running = [bn.running_mean for bn in self._bns] + [bn.running_var for bn in self._bns]
        torch._foreach_mul_(running, 1 - MOMENTUM)
        torch._foreach_add_(running, self._means + self._variances, alpha=MOMENTUM)
        torch._foreach_add_([bn.num_batches_tracked for bn in self._bns], 1)


def cell(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """What ``functional.cell`` defines."""
    if plan not in _schedules:
        _schedules[plan] = Schedule(plan)
    schedule = _schedules[plan]
    mixing_weights = schedule.mixing_weights(weights)
    statistics = RunningStatistics()
    states = list(states)
    inputs = len(states)
    entering: dict[int, list[Tensor]] = {node.node: [] for node in plan.nodes}
    for group, bundles in zip(plan.states, schedule.bundles, strict=True):
        if group.state == len(states):
            states.append(_sum(entering[group.state]))
        x = states[group.state]
        for edge in group.edges:
            entering[edge.target].append(edge.module(x, weights[edge.edge]))
        leave = StateRun(x, statistics)
        for bundle in bundles:
            shares = leave.run(bundle, next(mixing_weights))
            for target, share in zip(bundle.targets, shares, strict=True):
                entering[target].append(share)
    states.append(_sum(entering[plan.nodes[-1].node]))
    statistics.update_modules()
    return torch.cat(states[inputs:], dim=1)


class StateRun:
    """One state on its way out: what several bundles need of it is computed once."""

    def __init__(self, state: Tensor, statistics: RunningStatistics) -> None:
        self.state = state
        self.layout: type[Layout] = choose_layout(state)
        self.x = self.layout.enter(state)
        self.active = F.relu(self.x)
        self.statistics = statistics

    def run(self, bundle: Bundle, weights: Tensor) -> Sequence[Tensor]:
        """What the bundle adds to each of its targets, [B, C, H', W']."""
        shares = getattr(self, f"_{bundle.family}")(bundle, weights)
        return [self.layout.leave(share) for share in shares]

    def _convs(self, bundle: Bundle, weights: Tensor) -> Sequence[Tensor]:
        z = self.layout.convolve_one(
            self.active, [[term.blocks[0] for term in kind] for kind in bundle.kinds]
        )
        if len(bundle.terms[0].blocks) == 2:
            z = self._norm(z, [term.blocks[0].bn for term in bundle.terms])
            z = self.layout.convolve_each(
                F.relu_(z), [[term.blocks[1] for term in kind] for kind in bundle.kinds]
            )
        return self._normed_sum(z, bundle, weights)

    def _normed_sum(self, z: Tensor, bundle: Bundle, weights: Tensor) -> Sequence[Tensor]:
        """``Σ_k w_kt · BN_kt(z_kt)`` for every target t."""
        shares = self._norm(z, bundle.bns, weights)
        return shares.unflatten(1, (len(bundle.kinds), len(bundle.targets), -1)).sum(1).unbind(1)

    def _norm(self, z: Tensor, bns: Sequence[nn.BatchNorm2d], weights: Tensor | None = None) -> Tensor:
        """``w_n · BN_n(z_n)`` for the N BatchNorms whose channels ``z`` holds in dimension 1."""
        scale = weights if weights is None else weights.repeat_interleave(z.shape[1] // len(bns))
        if not bns[0].training:
            mean, variance = (
                torch.cat([getattr(bn, name) for bn in bns]) for name in ("running_mean", "running_var")
            )
            return F.batch_norm(z, mean, variance, scale, None, False, MOMENTUM, EPS)
        mean, variance = bns[0].running_mean.new_zeros(2, z.shape[1])
        # With momentum 1 they become the batch's own.
        y = F.batch_norm(z, mean, variance, scale, None, True, 1.0, EPS)
        self.statistics.record(bns, mean, variance)
        return y

    def _pools(self, bundle: Bundle, weights: Tensor) -> Sequence[Tensor]:
        pooled = [self.layout.enter(kind[0].pool(self.state)) for kind in bundle.kinds]
        if not bundle.bns[0].training:
            # Every BatchNorm has running statistics of its own.
            repeated = [z.repeat(1, len(bundle.targets), *[1] * (z.dim() - 2)) for z in pooled]
            return self._normed_sum(torch.cat(repeated, dim=1), bundle, weights)
        normed = []
        for z, kind in zip(pooled, bundle.kinds, strict=True):
            mean, variance = kind[0].bn.running_mean.new_zeros(2, z.shape[1])
            normed.append(F.batch_norm(z, mean, variance, None, None, True, 1.0, EPS))
            self.statistics.record([term.bn for term in kind], mean, variance)
        return _mix(normed, weights.view(len(bundle.kinds), -1))

    def _identities(self, bundle: Bundle, weights: Tensor) -> Sequence[Tensor]:
        return _mix([self.x], weights.view(1, -1))

    def _reductions(self, bundle: Bundle, weights: Tensor) -> Sequence[Tensor]:
        """All factorized reductions: the halves of all channels in one convolution each."""
        ops = [term.module for term in bundle.terms]
        x = F.relu(self.state)
        halves = [
            F.conv2d(x, torch.cat([op.conv_1.weight for op in ops]), stride=2),
            F.conv2d(shift_by_one(x), torch.cat([op.conv_2.weight for op in ops]), stride=2),
        ]
        z = torch.cat([half.unflatten(1, (len(ops), -1)) for half in halves], dim=2).flatten(1, 2)
        return self._normed_sum(self.layout.enter(z), bundle, weights)

    def _modules(self, bundle: Bundle, weights: Tensor) -> Sequence[Tensor]:
        (term,) = bundle.terms
        z = self.layout.enter(term.body(self.state))
        return self._normed_sum(z, bundle, weights) if bundle.bns else [weights * z]


def _mix(xs: Sequence[Tensor], weights: Tensor) -> Sequence[Tensor]:
    """``Σ_k weights[k, t] · xs[k]`` for every t; ``weights``: [K, T]."""
    stacked = torch.stack(xs)
    return (weights.T @ stacked.flatten(1)).unflatten(1, stacked.shape[1:]).unbind()


def _sum(xs: Sequence[Tensor]) -> Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


def _bundles(group: StateGroup) -> list[Bundle]:
    kinds: dict[tuple[str, Hashable], list[Term]] = {}
    for term in chain(group.convs, group.pools, group.identities, group.modules):
        kinds.setdefault(_kind(term), []).append(term)
    bundles: dict[Hashable, list[list[Term]]] = {}
    for (family, _), terms in kinds.items():
        blocks = len(terms[0].blocks) if isinstance(terms[0], ConvTerm) else 0
        bundles.setdefault((family, blocks, *(term.target for term in terms)), []).append(terms)
    return [Bundle(key[0], terms) for key, terms in bundles.items()]


def _kind(term: Term) -> tuple[str, Hashable]:
    """A family, and within it what can be merged with this term into one operation."""
    if isinstance(term, ConvTerm):
        return "convs", tuple((block.depthwise.kernel_size, block.dilation) for block in term.blocks)
    if isinstance(term, PoolTerm):
        return "pools", (term.pool.kind, term.pool.kernel_size)
    if isinstance(term, IdentityTerm):
        return "identities", None
    assert isinstance(term, ModuleTerm)
    if type(term.module) is FactorizedReduce and term.bn is not None:
        return "reductions", None
    return "modules", id(term)


register_impl("cell", "torch", cell, lambda *args, **kwargs: Support(True))
