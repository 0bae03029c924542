"""What the functions that run a search cell have in common: all that leaves some states, as they take it, and
what the functions of one pass tell each other. See ``neuroexapt.cuda_ops.cell``.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from neuroexapt.core.operations import FactorizedReduce, SepConvBlock
from neuroexapt.core.plan import ModuleTerm, StateGroup, Term, WholeEdge
from neuroexapt.cuda_ops.cell_operands import Conv, Summand

DENSE_GEOMETRIES = (((1, 1), (1, 1), (0, 0)), ((3, 3), (1, 1), (1, 1)))
"""Kernel size, stride and padding of the dense convolutions that there are kernels for."""


@dataclass(eq=False)
class Entry:
    """A term on its way to its node, and what of it is kept for the backward pass: z, or a pool's input."""

    member: Term | WholeEdge
    z: Tensor
    stats: Tensor | None
    kept: Tensor

    @property
    def summand(self) -> Summand:
        return Summand(self.z, self.stats, weight_of(self.member))


@dataclass(eq=False)
class Pass:
    """What the functions of one forward pass of a cell, and of its backward pass, tell each other."""

    kernels: Any
    exact: bool  # products of fp32 grade
    training: bool
    weights: Tensor
    drawn_only: bool  # candidates of weight 0 do not run
    inputs: int  # states that leave together
    output: Tensor | None  # all sums in one, until it is complete
    sums: dict[int, Tensor]  # of nodes that nothing was added to yet
    branch: Any  # beside the convolutions: what only the next node or the one before waits for
    entries: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    coefs: dict[Term, Tensor] = field(default_factory=dict)
    late: set[Term] = field(default_factory=set)  # those whose coefs are there after the next join
    begun: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # sums, of how many entries
    grad_weights: Tensor | None = None

    def mixing(self, members: Iterable[Term | WholeEdge]) -> list[Tensor | None]:
        """The weight of each that runs only if that is not 0, None of the others."""
        entries = (weight_of(member) if self.drawn_only else None for member in members)
        return [None if entry is None else self.weights[entry] for entry in entries]

    def asking(self, members: Iterable[Term | WholeEdge]) -> dict[str, Any]:
        """Keyword arguments for kernels of ``members``, which leave out what was not drawn."""
        return {"mixing": self.mixing(members)} if self.drawn_only else {}

    @property
    def leaving_out(self) -> dict[str, Any]:
        """Keyword arguments for kernels that are given all mixing weights."""
        return {"drawn_only": True} if self.drawn_only else {}

    def join(self) -> None:
        self.branch.join()
        self.late.clear()


class Flow:
    """All that leaves some states of one shape and stride, state by state, as ``_LeaveStates`` takes it.

    ``width``: of the states; some convolutions run outside if it is no multiple of 4.
    """

    def __init__(self, groups: Sequence[StateGroup], width: int = 4) -> None:
        self.states = tuple(group.state for group in groups)
        self.stride = groups[0].stride if groups else 1
        self.first = tuple(term for group in groups for term in group.convs)
        self.second = tuple(term for term in self.first if len(term.blocks) == 2)
        self.pools = tuple(term for group in groups for term in group.pools)
        self.means_only = all(term.pool.kind == "avg" and term.bn is None for term in self.pools)
        self.identities = tuple(term for group in groups for term in group.identities)
        modules = [term for group in groups for term in group.modules]
        self.reductions = tuple(term for term in modules if _is_reduction(term))
        self.dense = tuple(term for term in modules if _is_dense(term) and width % 4 == 0)
        others = (term for term in modules if term not in self.reductions + self.dense)
        edges = (edge for group in groups for edge in group.edges)
        self.outside: tuple[ModuleTerm | WholeEdge, ...] = (*others, *edges)
        # All that leaves something of its own to be kept.
        self.computed = (*self.first, *self.reductions, *self.dense, *self.outside)
        members: tuple[Term | WholeEdge, ...] = (*self.computed, *self.pools, *self.identities)
        self.targets = sorted({member.target for member in members})

    @cached_property
    def weights(self) -> list[Tensor]:
        """Two of each: depthwise and pointwise ones in ``first`` and ``second``, halves of ``reductions``.
        Then those of ``dense``."""
        blocks = [*(term.blocks[0] for term in self.first), *(term.blocks[1] for term in self.second)]
        ops: list[Any] = [term.module for term in self.reductions]
        halves = (conv.weight for op in ops for conv in (op.conv_1, op.conv_2))
        dense_ops: list[Any] = [term.module for term in self.dense]
        return [*_weights(blocks), *halves, *(op.op[1].weight for op in dense_ops)]

    @cached_property
    def owners(self) -> list[Term]:
        """The term of each of ``weights``."""
        pairs = (*self.first, *self.second, *self.reductions)
        return [*(term for term in pairs for _ in range(2)), *self.dense]

    def convs(self, pass_: Pass, xs: dict[int, Tensor], weights: Sequence[Tensor]) -> list[Conv]:
        """The convolutions in ``first`` of the states ``xs``."""
        pairs = self._pairs(weights)[: len(self.first)]
        mixing = self._mixing(pass_, self.first, xs)
        return [
            Conv(xs[term.source], None, *pair, term.dilation, term.stride, m)
            for term, pair, m in zip(self.first, pairs, mixing, strict=True)
        ]

    def second_convs(
        self,
        pass_: Pass,
        xs: dict[int, Tensor],
        zs: Sequence[Tensor],
        stats: Sequence[Tensor],
        weights: Sequence[Tensor],
    ) -> list[Conv]:
        """The convolutions in ``second`` of what the first ones of ``xs``, normalised by ``stats``, left."""
        pairs = self._pairs(weights)[len(self.first) :][: len(self.second)]
        mixing = self._mixing(pass_, self.second, xs)
        return [Conv(z, s, *pair, 1, 1, m) for z, s, pair, m in zip(zs, stats, pairs, mixing, strict=True)]

    def _mixing(self, pass_: Pass, terms: Sequence[Term], xs: dict[int, Tensor]) -> Sequence[Tensor | None]:
        """Of convolutions that need not run: both halves of a separable one or none."""
        if terms and pass_.drawn_only and pass_.kernels.can_leave_out(next(iter(xs.values())), self.stride):
            return pass_.mixing(terms)
        return [None] * len(terms)

    def halves(self, weights: Sequence[Tensor]) -> dict[Any, tuple[Tensor, Tensor]]:
        """The weights of ``reductions``."""
        pairs = self._pairs(weights)[len(self.first) + len(self.second) :]
        return dict(zip(self.reductions, pairs, strict=True))

    def dense_weights(self, weights: Sequence[Tensor]) -> dict[Any, Tensor]:
        """The weights of ``dense``."""
        return dict(zip(self.dense, weights[len(weights) - len(self.dense) :], strict=True))

    def _pairs(self, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        in_pairs = weights[: len(weights) - len(self.dense)]
        return list(zip(in_pairs[::2], in_pairs[1::2], strict=True))


def _is_reduction(term: ModuleTerm) -> bool:
    return term.bn is not None and type(term.module) is FactorizedReduce


def _is_dense(term: ModuleTerm) -> bool:
    return term.joins_with in DENSE_GEOMETRIES


def weight_of(member: Term | WholeEdge) -> tuple[int, int] | None:
    """Which mixing weight it has; None is one."""
    return None if isinstance(member, WholeEdge) else (member.edge, member.column)


def _weights(blocks: Sequence[SepConvBlock]) -> list[Tensor]:
    return [weight for block in blocks for weight in (block.depthwise.weight, block.pointwise.weight)]
