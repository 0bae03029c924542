"""The plan of a search cell: its candidates, grouped by the state they leave and by the node they enter.

With every last BatchNorm split off, a node is one affine sum over the *terms* that enter it::

    y = Σ_k w_k · BN_k(z_k) + Σ_k w_k · x_k

so all candidates that read a state can run side by side, and all that enter a node are added up in one go.
``neuroexapt.core.merged`` runs a plan in plain PyTorch; kernels may take it instead, see
``functional.cell``. A plan refers to the cell's own modules: it owns no parameter and no buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Term:
    """What one candidate adds to its node: ``weights[edge, column] · bn(z)``, or ``· z`` where ``bn`` is None."""

    edge: int
    column: int
    source: int
    target: int
    stride: int
    bn: nn.BatchNorm2d | None


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


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolTerm(Term):
    """A pool and its BatchNorm; ``pool`` tells kind and kernel size."""

    pool: Pool
    bn: nn.BatchNorm2d


@dataclass(frozen=True, eq=False, kw_only=True)
class IdentityTerm(Term):
    """The state itself."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModuleTerm(Term):
    """Any other operation: ``z = body(state)``, the whole of ``module`` but for ``bn``."""

    module: nn.Module
    body: Callable[[Tensor], Tensor]


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
    """All that enters one node: ``terms`` in the order of edges and columns, and ``edges`` with weight 1."""

    node: int
    terms: tuple[Term, ...]
    edges: tuple[WholeEdge, ...]


@dataclass(frozen=True, eq=False)
class CellPlan:
    """A cell's groups, ``states[i]`` for state i (the last has none) and one of ``nodes`` for each node.

    ``fingerprint`` tells whether the cell is still the one that was planned.
    """

    states: tuple[StateGroup, ...]
    nodes: tuple[NodeGroup, ...]
    fingerprint: tuple[object, ...]


def plan_cell(cell: SearchCell) -> CellPlan:
    """Sort the candidates of ``cell`` into groups."""
    terms: list[Term] = []
    whole_edges: list[WholeEdge] = []
    for row, ((source, target), edge) in enumerate(zip(cell.topology.edges, cell.edges, strict=True)):
        if runs_whole(edge):
            whole_edges.append(WholeEdge(row, source, target, edge.stride, edge))
        else:
            found = (_term(op, row, k, source, target, edge.stride) for k, op in enumerate(edge.ops))
            terms += [term for term in found if term is not None]
    targets = cell.topology.concat
    return CellPlan(
        tuple(_state_group(state, terms, whole_edges) for state in range(targets[-1])),
        tuple(
            NodeGroup(
                node,
                tuple(term for term in terms if term.target == node),
                tuple(edge for edge in whole_edges if edge.target == node),
            )
            for node in targets
        ),
        fingerprint(cell),
    )


def fingerprint(cell: SearchCell) -> tuple[object, ...]:
    """Which modules make up the edges and which edges must run whole: what a plan depends on."""
    return (
        *(op for edge in cell.edges for op in edge.ops._modules.values()),
        *(runs_whole(edge) for edge in cell.edges),
    )


def runs_whole(edge: nn.Module) -> bool:
    """Whether an edge is more than a MixedOp: has hooks anywhere, is compiled, or is a class of its own."""
    return type(edge) is not MixedOp or edge._compiled_call_impl is not None or _has_hooks(edge.modules())


def _has_hooks(modules: Iterable[nn.Module]) -> bool:
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def _state_group(state: int, terms: list[Term], whole_edges: list[WholeEdge]) -> StateGroup:
    leaving = [term for term in terms if term.source == state]
    edges = tuple(edge for edge in whole_edges if edge.source == state)
    return StateGroup(
        state,
        next((member.stride for member in (*leaving, *edges)), 1),
        tuple(term for term in leaving if isinstance(term, ConvTerm)),
        tuple(term for term in leaving if isinstance(term, PoolTerm)),
        tuple(term for term in leaving if isinstance(term, IdentityTerm)),
        tuple(term for term in leaving if isinstance(term, ModuleTerm)),
        edges,
    )


def _term(op: nn.Module, edge: int, column: int, source: int, target: int, stride: int) -> Term | None:
    """The term of one candidate; ``none`` has none."""
    place = {"edge": edge, "column": column, "source": source, "target": target, "stride": stride}
    if type(op) is Zero:
        return None
    if type(op) is Identity:
        return IdentityTerm(**place, bn=None)
    blocks = _conv_blocks(op)
    if blocks and all(_splits_off(block.bn) for block in blocks):
        return ConvTerm(**place, bn=blocks[-1].bn, blocks=blocks)
    body, bn = _split(op)
    if bn is None or not _splits_off(bn):
        return ModuleTerm(**place, bn=None, module=op, body=op)
    if type(body) is Pool:
        return PoolTerm(**place, bn=bn, pool=body)
    return ModuleTerm(**place, bn=bn, module=op, body=body)


def _conv_blocks(op: nn.Module) -> tuple[SepConvBlock, ...]:
    if type(op) in (SepConvBlock, DilConv):
        return (op,)
    return tuple(op.op) if type(op) is SepConv else ()


def _split(op: nn.Module) -> tuple[Callable[[Tensor], Tensor], nn.Module | None]:
    """An operation's body and the BatchNorm that it ends in, None where that can't be told."""
    if type(op) is FactorizedReduce:
        return op.convolve, op.bn
    sequence = op.op if type(op) in (ReLUConvBN, FactorizedConv) else op
    if type(sequence) is nn.Sequential and len(sequence) == 2:
        return sequence[0], sequence[1]
    if type(sequence) is nn.Sequential and len(sequence) > 2:
        return sequence[:-1], sequence[-1]
    return op, None


def _splits_off(bn: nn.Module) -> bool:
    return (
        type(bn) is nn.BatchNorm2d
        and not bn.affine
        and bn.track_running_stats
        and (bn.eps, bn.momentum) == (EPS, MOMENTUM)
    )
