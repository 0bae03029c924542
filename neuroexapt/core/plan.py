"""The plan of a search cell: its candidates, grouped by the state they leave and by the node they enter.
An edge by itself counts as a cell of one state and one node.

With every last BatchNorm split off, a node is one affine sum over the *terms* that enter it::

    y = Σ_k w_k · BN_k(z_k) + Σ_k w_k · x_k

so all candidates that read a state can run side by side, and all that enter a node are added up in one go.
``neuroexapt.core.merged`` runs a plan in plain PyTorch; kernels may take it instead, see
``functional.cell``. A plan refers to the cell's own modules: it owns no parameter and no buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

from torch import Tensor, nn

from neuroexapt.core.hooks import hooks_of
from neuroexapt.core.operations import (
    DilConv,
    FactorizedConv,
    FactorizedReduce,
    Identity,
    MixedOp,
    Pool,
    ReLUConvBN,
    SepConv,
    SepConvBlock,
    Zero,
)

if TYPE_CHECKING:
    from neuroexapt.core.cells import SearchCell

EPS, MOMENTUM = 1e-5, 0.1
"""Of every BatchNorm that is split off; an operation with another kind runs as a module."""
CONV_SIZES, DILATIONS, POOL_SIZE = (3, 5), (1, 2), 3
"""Of the convolutions and pools that kernels know."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Term:
    """What a candidate adds to its node: ``weights[edge, column] · bn(z)``, ``· z`` where ``bn`` is None."""

    edge: int
    column: int
    source: int
    target: int
    stride: int
    bn: nn.BatchNorm2d | None


_Term = TypeVar("_Term", bound=Term)


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvTerm(Term):
    """One or two blocks of relu → depthwise → pointwise convolution; the stride is the first one's.

    ``bn`` is the last block's. Read weights through ``blocks``, since they may be exchanged.
    """

    blocks: tuple[SepConvBlock, ...]
    bn: nn.BatchNorm2d

    @property
    def kernel_size(self) -> int:
        return self.blocks[0].depthwise.kernel_size[0]

    @property
    def dilation(self) -> int:
        return self.blocks[0].dilation

    @property
    def is_known(self) -> bool:
        """Whether there are kernels for it."""
        return all(
            block.depthwise.kernel_size[0] in CONV_SIZES and block.dilation in DILATIONS
            for block in self.blocks
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolTerm(Term):
    """A pool, with or without BatchNorm; ``pool`` tells kind and kernel size."""

    pool: Pool

    @property
    def is_known(self) -> bool:
        """Whether there are kernels for it."""
        return self.pool.kernel_size == POOL_SIZE


@dataclass(frozen=True, eq=False, kw_only=True)
class IdentityTerm(Term):
    """The state itself."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModuleTerm(Term):
    """Any other operation: ``z = body(state)``, the whole of ``module`` but for ``bn``."""

    module: nn.Module
    body: Callable[[Tensor], Tensor]

    @property
    def joins_with(self) -> tuple[Any, ...] | None:
        """What relu-conv-BN operations have in common that may run as one convolution; None for others."""
        if type(self.module) is not ReLUConvBN or self.bn is None:
            return None
        conv = self.module.op[1]
        return conv.kernel_size, conv.stride, conv.padding


@dataclass(frozen=True, eq=False)
class WholeEdge:
    """An edge that runs as a module, ``module(state, weights[edge])``: hooks want it, or it was changed."""

    edge: int
    source: int
    target: int
    stride: int
    module: nn.Module


@dataclass(frozen=True, eq=False)
class StateGroup:
    """All that leaves one state. Every edge that does so has the same stride."""

    state: int
    stride: int
    convs: tuple[ConvTerm, ...]
    pools: tuple[PoolTerm, ...]
    identities: tuple[IdentityTerm, ...]
    modules: tuple[ModuleTerm, ...]
    edges: tuple[WholeEdge, ...]


@dataclass(frozen=True, eq=False)
class NodeGroup:
    """All that enters one node, by the edges ``rows``: ``terms`` in the order of edges and columns, and
    ``edges`` with weight 1.
    """

    node: int
    rows: tuple[int, ...]
    terms: tuple[Term, ...]
    edges: tuple[WholeEdge, ...]


@dataclass(frozen=True, eq=False)
class CellPlan:
    """A cell's groups: one of ``states`` for each state but the last, which has no edges, one of ``nodes``
    for each node. Its output joins the nodes ``outputs``.

    All BatchNorms of all terms are in the same mode, training or evaluation.
    """

    states: tuple[StateGroup, ...]
    nodes: tuple[NodeGroup, ...]
    outputs: tuple[int, ...]
    _edges: tuple[_EdgeState, ...]

    def fits(self, edges: Iterable[nn.Module], training: bool) -> bool:
        """Whether ``edges`` are still as they were planned: same operations, hooks and compiled edges."""
        return all(state.holds(edge, training) for state, edge in zip(self._edges, edges, strict=True))

    @cached_property
    def for_kernels(self) -> CellPlan:
        """This plan with everything that kernels do not know as a module, to which they leave it."""
        terms = {term: self._for_kernels(term) for node in self.nodes for term in node.terms}
        nodes = [replace(node, terms=tuple(terms[term] for term in node.terms)) for node in self.nodes]
        edges = [edge for node in self.nodes for edge in node.edges]
        states = [_state_group(group.state, group.stride, terms.values(), edges) for group in self.states]
        return replace(self, states=tuple(states), nodes=tuple(nodes))

    def drawn(self, weights: Tensor) -> CellPlan:
        """This plan without the candidates whose weight in ``weights`` [E, K] is 0, which waits for them."""
        is_drawn = (weights != 0).tolist()

        def kept(terms: Iterable[_Term]) -> tuple[_Term, ...]:
            return tuple(term for term in terms if is_drawn[term.edge][term.column])

        states = (
            replace(
                group,
                convs=kept(group.convs),
                pools=kept(group.pools),
                identities=kept(group.identities),
                modules=kept(group.modules),
            )
            for group in self.states
        )
        nodes = (replace(group, terms=kept(group.terms)) for group in self.nodes)
        return replace(self, states=tuple(states), nodes=tuple(nodes))

    def candidates(self) -> Iterator[tuple[int, int, nn.Module]]:
        """Edge, column and operation of every term."""
        for node in self.nodes:
            yield from (
                (term.edge, term.column, self._edges[term.edge].ops[term.column]) for term in node.terms
            )

    def _for_kernels(self, term: Term) -> Term:
        if not isinstance(term, ConvTerm | PoolTerm) or term.is_known:
            return term
        op = self._edges[term.edge].ops[term.column]
        place = {item.name: getattr(term, item.name) for item in fields(Term)}
        return ModuleTerm(**place, module=op, body=_split(op)[0])


class _EdgeState:
    """What an edge was when it was planned. Asked before every pass, so it looks at no module twice."""

    def __init__(self, edge: nn.Module, training: bool) -> None:
        # Weak, since an edge owns the plan of itself.
        self._edge = weakref.ref(edge)
        self.ops = list(edge.ops._modules.values()) if type(edge) is MixedOp else []
        modules = list(edge.modules())
        self._inner = modules[1:]
        self._hooks = [hooks for module in modules for hooks in hooks_of(module)]
        self.runs_whole = self._must_run_whole(edge, training)

    def holds(self, edge: nn.Module, training: bool) -> bool:
        return (
            edge is self._edge()
            and (type(edge) is not MixedOp or list(edge.ops._modules.values()) == self.ops)
            and self._must_run_whole(edge, training) == self.runs_whole
        )

    def _must_run_whole(self, edge: nn.Module, training: bool) -> bool:
        """Whether the edge is more than a MixedOp with nothing to observe and one mode, or adds nothing."""
        return (
            type(edge) is not MixedOp
            or edge._compiled_call_impl is not None
            or any(self._hooks)
            or edge.training != training
            or [m.training for m in self._inner].count(training) < len(self._inner)
            or all(type(op) is Zero for op in self.ops)
        )


def plan_cell(cell: SearchCell) -> CellPlan:
    """Sort the candidates of ``cell`` into groups."""
    places = [(source, target, cell.stride(source)) for source, target in cell.topology.edges]
    return _plan(cell.edges, places, cell.topology.concat, cell.training)


def plan_edge(edge: MixedOp) -> CellPlan:
    """The plan of ``edge`` alone, from state 0 to node 1."""
    return _plan([edge], [(0, 1, edge.stride)], (1,), edge.training)


def _plan(
    edges: Iterable[nn.Module],
    places: Sequence[tuple[int, int, int]],
    outputs: tuple[int, ...],
    training: bool,
) -> CellPlan:
    """``places``: source, target and stride of each of ``edges``."""
    edge_states: list[_EdgeState] = []
    terms: list[Term] = []
    whole_edges: list[WholeEdge] = []
    for row, (edge, (source, target, stride)) in enumerate(zip(edges, places, strict=True)):
        edge_states.append(_EdgeState(edge, training))
        if edge_states[-1].runs_whole:
            whole_edges.append(WholeEdge(row, source, target, stride, edge))
        else:
            ops = enumerate(edge_states[-1].ops)
            found = (_term(op, row, column, source, target, stride) for column, op in ops)
            terms += [term for term in found if term is not None]
    strides = {source: stride for source, _, stride in places}
    nodes = sorted({target for _, target, _ in places})
    return CellPlan(
        tuple(_state_group(state, stride, terms, whole_edges) for state, stride in sorted(strides.items())),
        tuple(
            NodeGroup(
                node,
                tuple(row for row, (_, target, _) in enumerate(places) if target == node),
                tuple(term for term in terms if term.target == node),
                tuple(edge for edge in whole_edges if edge.target == node),
            )
            for node in nodes
        ),
        outputs,
        tuple(edge_states),
    )


def _state_group(
    state: int, stride: int, terms: Iterable[Term], whole_edges: Iterable[WholeEdge]
) -> StateGroup:
    leaving = [term for term in terms if term.source == state]
    return StateGroup(
        state,
        stride,
        tuple(term for term in leaving if isinstance(term, ConvTerm)),
        tuple(term for term in leaving if isinstance(term, PoolTerm)),
        tuple(term for term in leaving if isinstance(term, IdentityTerm)),
        tuple(term for term in leaving if isinstance(term, ModuleTerm)),
        tuple(edge for edge in whole_edges if edge.source == state),
    )


def _term(op: nn.Module, edge: int, column: int, source: int, target: int, stride: int) -> Term | None:
    """The term of one candidate; ``none`` has none."""
    place: dict[str, Any] = {
        "edge": edge,
        "column": column,
        "source": source,
        "target": target,
        "stride": stride,
    }
    if type(op) is Zero:
        return None
    if type(op) is Identity:
        return IdentityTerm(**place, bn=None)
    blocks = _conv_blocks(op)
    if blocks and all(splits_off(block.bn) for block in blocks):
        return ConvTerm(**place, bn=blocks[-1].bn, blocks=blocks)
    if type(op) is Pool:
        return PoolTerm(**place, bn=None, pool=op)
    body, bn = _split(op)
    if not splits_off(bn):
        return ModuleTerm(**place, bn=None, module=op, body=op)
    if type(body) is Pool:
        return PoolTerm(**place, bn=bn, pool=body)
    return ModuleTerm(**place, bn=bn, module=op, body=body)


def _conv_blocks(op: nn.Module) -> tuple[SepConvBlock, ...]:
    blocks = tuple(op.op) if type(op) is SepConv else (op,)
    are_plain = all(type(block) in (SepConvBlock, DilConv) for block in blocks)
    return cast(tuple[SepConvBlock, ...], blocks) if are_plain else ()


def _split(op: nn.Module) -> tuple[Callable[[Tensor], Tensor], nn.Module | None]:
    """An operation's body and the BatchNorm that it ends in, None where that can't be told."""
    if type(op) is FactorizedReduce or type(op) is SepConvBlock or type(op) is DilConv:
        return op.convolve, op.bn
    blocks = _conv_blocks(op)
    if type(op) is SepConv and blocks:
        return op.convolve, blocks[-1].bn
    sequence = op.op if type(op) in (ReLUConvBN, FactorizedConv) else op
    if type(sequence) is nn.Sequential and len(sequence) == 2:
        return sequence[0], sequence[1]
    if type(sequence) is nn.Sequential and len(sequence) > 2:
        return sequence[:-1], sequence[-1]
    return op, None


def splits_off(bn: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a BatchNorm is of the one kind that kernels know: no affine parameters, usual constants."""
    return (
        type(bn) is nn.BatchNorm2d
        and not bn.affine
        and bn.track_running_stats
        and (bn.eps, bn.momentum) == (EPS, MOMENTUM)
    )
