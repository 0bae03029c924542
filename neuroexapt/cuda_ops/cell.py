"""The fused search cell in CUDA C++, for fp32 and 16, 32 or 64 channels.

A cell runs by its plan (``neuroexapt.core.plan``) as two kinds of autograd functions. ``_LeaveState``
computes all that leaves a state: convolutions, pools, the statistics of their BatchNorms. ``_EnterNode``
adds up all that enters a node. Between them autograd sees *handles*, tensors without content, one from each
state to each node that it feeds: as its gradient a handle carries the gradient g of the node. From that and
from a few coefficients a channel the gradient of every term follows as ``dz = A · g + B · z + D`` where a
kernel reads ``z``, so neither normalised tensors nor gradients of single terms are ever stored.

What is no separable convolution, pool, identity or factorized reduction runs *outside*: as a module under
autograd, on the state itself. Its output enters ``_LeaveState`` beside the state.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neuroexapt.backend import Support, register_impl
from neuroexapt.core.operations import FactorizedReduce, SepConvBlock
from neuroexapt.core.plan import (
    POOL_SIZE,
    CellPlan,
    ConvTerm,
    IdentityTerm,
    ModuleTerm,
    NodeGroup,
    StateGroup,
    Term,
    WholeEdge,
)
from neuroexapt.cuda_ops import cell_kernels
from neuroexapt.cuda_ops.cell_kernels import Conv, ConvGrad, PoolGrad, ReduceGrad, Summand

CHANNELS = (16, 32, 64)


def cell(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """What ``functional.cell`` computes.

    Pointwise products are of fp32 grade where ``torch.backends.cudnn.conv.fp32_precision`` is ``"ieee"``,
    else of TF32, as those of PyTorch's own convolutions are.
    """
    with torch.cuda.device(states[0].device):
        return run(plan, states, weights, cell_kernels)


def supports(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> Support:
    """Whether the kernels take these arguments."""
    reason = next(_refusals(plan, states, weights), "")
    return Support(not reason, reason)


def _refusals(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> Iterator[str]:
    """What stands in the way."""
    flows = [_Flow(group) for group in plan.states]
    convs = [term for state in plan.states for term in state.convs]
    pools = [term for state in plan.states for term in state.pools]
    tensors = (*states, weights, *_own_tensors(plan, flows))
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        yield "only fp32"
    if any(tensor.device != weights.device for tensor in tensors):
        yield "tensors on several devices"
    if any(state.shape != states[0].shape for state in states):
        yield "states of several shapes"
    if torch.is_autocast_enabled("cuda"):
        yield "autocast is on"
    channels, height, width = states[0].shape[1:]
    if channels not in CHANNELS:
        yield f"{channels} channels"
    if states[0].numel() == 0:
        yield "an empty batch"
    if width > cell_kernels.MAX_WIDTH:
        yield f"pictures {width} wide"
    if states[0].shape[0] * -(-height // 2) * -(-width // 2) == 1:
        yield "a single value per channel"
    for conv in convs:
        if not conv.is_known:
            yield f"kernel size {conv.kernel_size}, dilation {conv.dilation}"
    if not all(pool.is_known for pool in pools):
        yield f"pools other than of size {POOL_SIZE}"
    if len({(pool.edge, pool.pool.kind) for pool in pools}) < len(pools):
        yield "an edge with two pools of a kind"
    if any(max(len(flow.first), 2 * len(flow.reductions)) > cell_kernels.MAX_CONVS for flow in flows):
        yield "too many convolutions leave one state"
    if any(
        len(state.convs) + len(state.modules) + len(state.edges) >= cell_kernels.MAX_ADDENDS
        for state in plan.states
    ):
        yield "too many operations leave one state"
    if any(len(node.terms) + len(node.edges) > cell_kernels.MAX_TERMS for node in plan.nodes):
        yield "too many terms enter one node"
    if len(plan.nodes) > cell_kernels.MAX_EDGES:
        yield f"{len(plan.nodes)} nodes"


def _own_tensors(plan: CellPlan, flows: "Sequence[_Flow]") -> Iterator[Tensor]:
    """What the kernels read besides their arguments: weights and running statistics."""
    for flow in flows:
        yield from flow.weights
    for node in plan.nodes:
        bns = (term.bn for term in node.terms if term.bn is not None)
        yield from (bn.running_mean for bn in bns if bn.running_mean is not None)


def run(plan: CellPlan, states: Sequence[Tensor], weights: Tensor, kernels: Any) -> Tensor:
    """The cell by the functions of ``kernels``: those of ``cell_kernels``, or others that do the same."""
    weights = weights.contiguous()
    flows = [_Flow(group) for group in plan.states]
    output = _empty_output(plan, states[0])
    exact = cell_kernels.products_are_exact()
    pass_ = _Pass(kernels, exact, _is_training(plan), weights.detach(), len(plan.nodes), output)
    shared_weights = _ShareWeights.apply(pass_, len(plan.nodes), weights)
    handles: defaultdict[int, list[Tensor]] = defaultdict(list)
    entered: list[Tensor] = []

    def leave(flow: _Flow, x: Tensor) -> Tensor:
        if not flow.targets:
            return x
        x, outside = _run_outside(pass_, flow, _planes(x), weights)
        x, *leaving = _LeaveState.apply(pass_, flow, x, *outside, *flow.weights)
        for target, handle in zip(flow.targets, leaving, strict=True):
            handles[target].append(handle)
        return x

    for flow, state in zip(flows, states, strict=False):
        leave(flow, state)
    for i, node in enumerate(plan.nodes):
        y = _EnterNode.apply(pass_, i, node, shared_weights[i], *handles.pop(node.node, ()))
        entered.append(leave(flows[node.node], y) if node.node < len(flows) else y)
    if len(plan.outputs) == len(plan.nodes):
        return _Concatenate.apply(pass_, *entered)
    pass_.output = None
    return torch.cat([y for node, y in zip(plan.nodes, entered, strict=True) if node.node in plan.outputs], 1)


@dataclass(eq=False)
class _Entry:
    """A term on its way to its node."""

    member: Term | WholeEdge
    z: Tensor
    stats: Tensor | None

    @property
    def summand(self) -> Summand:
        entry = None if isinstance(self.member, WholeEdge) else (self.member.edge, self.member.column)
        return Summand(self.z, self.stats, entry)


@dataclass(eq=False)
class _Pass:
    """What the functions of one forward pass of a cell, and of its backward pass, tell each other."""

    kernels: Any
    exact: bool  # products of fp32 grade
    training: bool
    weights: Tensor
    nodes: int
    output: Tensor | None  # until it is complete
    entries: dict[int, list[_Entry]] = field(default_factory=lambda: defaultdict(list))
    coefs: dict[Term, Tensor] = field(default_factory=dict)
    grad_weights: Tensor | None = None


class _Flow:
    """All that leaves one state, in the order in which ``_LeaveState`` takes it."""

    def __init__(self, group: StateGroup) -> None:
        self.group = group
        self.first = group.convs
        self.second = tuple(term for term in group.convs if len(term.blocks) == 2)
        self.reductions = tuple(term for term in group.modules if _is_reduction(term))
        others = (term for term in group.modules if not _is_reduction(term))
        self.outside: tuple[ModuleTerm | WholeEdge, ...] = (*others, *group.edges)
        inside: tuple[Term, ...] = (*self.first, *self.reductions, *group.pools, *group.identities)
        self.targets = sorted({member.target for member in (*inside, *self.outside)})

    @cached_property
    def weights(self) -> list[Tensor]:
        """Two of each: depthwise and pointwise ones in ``first`` and ``second``, halves of ``reductions``."""
        blocks = [*(term.blocks[0] for term in self.first), *(term.blocks[1] for term in self.second)]
        ops: list[Any] = [term.module for term in self.reductions]
        return [*_weights(blocks), *(conv.weight for op in ops for conv in (op.conv_1, op.conv_2))]

    def convs(self, x: Tensor, weights: Sequence[Tensor]) -> list[Conv]:
        """The convolutions in ``first`` of the state ``x``."""
        pairs = _pairs(weights)[: len(self.first)]
        return [
            Conv(x, None, *pair, term.dilation, term.stride)
            for term, pair in zip(self.first, pairs, strict=True)
        ]

    def second_convs(
        self, zs: Sequence[Tensor], stats: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> list[Conv]:
        """The convolutions in ``second`` of what the first ones, normalised by ``stats``, left."""
        pairs = _pairs(weights)[len(self.first) :][: len(self.second)]
        return [Conv(z, s, *pair, 1) for z, s, pair in zip(zs, stats, pairs, strict=True)]

    def halves(self, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The weights of ``reductions``."""
        return _pairs(weights)[len(self.first) + len(self.second) :]


class _Outputs:
    """``z`` of all that leaves a state, and ``stats`` of what has a BatchNorm, as they come about."""

    def __init__(self, pass_: _Pass) -> None:
        self.z: dict[Any, Tensor] = {}
        self.stats: dict[Any, Tensor] = {}
        self.pass_ = pass_
        self._moments: dict[Any, Tensor] = {}

    def put(self, members: Sequence[Any], zs: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
        self.z.update(zip(members, zs, strict=True))
        self._moments.update(zip(members, moments, strict=True))

    def normalise(self, block: int) -> None:
        """Make ``stats`` of all moments since the last time, in one launch."""
        if not self._moments:
            return
        bns = [_batch_norm(member, block) for member in self._moments]
        stats = self.pass_.kernels.statistics(bns, list(self._moments.values()), self.pass_.training)
        self.stats.update(zip(self._moments, stats, strict=True))
        self._moments.clear()


def _compute_first(
    outputs: _Outputs, flow: _Flow, x: Tensor, outside: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor | None:
    """Put all but ``flow.second`` and the identities into ``outputs``; returns the reductions' grids."""
    pass_, kernels, grids = outputs.pass_, outputs.pass_.kernels, None
    outputs.z.update(zip(flow.outside, map(_planes, outside), strict=True))
    if flow.first:
        outputs.put(flow.first, *kernels.convolve(flow.convs(x, weights), pass_.exact))
    if flow.reductions:
        grids, *reduced = kernels.reduce(x, flow.halves(weights), pass_.exact)
        outputs.put(flow.reductions, *reduced)
    normalised = [member for member in flow.outside if _batch_norm(member, 0) is not None]
    if normalised:
        zs = [outputs.z[member] for member in normalised]
        outputs.put(normalised, zs, kernels.plane_moments(zs))
    pools = flow.group.pools
    if pools:
        pooled = kernels.pool(x, flow.group.stride, {term.pool.kind for term in pools})
        outputs.put(pools, *([of_kind[term.pool.kind] for term in pools] for of_kind in pooled))
    outputs.normalise(0)
    return grids


class _Saved:
    """What ``_LeaveState`` keeps for its backward pass, in the order of ``tensors``.

    ``source``, which its methods take: what the gradient of each z starts from, and its coefficients.
    """

    def __init__(self, flow: _Flow, tensors: Sequence[Tensor]) -> None:
        saved = iter(tensors)
        self._flow = flow
        self.x, self.mixing, self.grids = next(saved), next(saved), next(saved)
        self.weights = [next(saved) for _ in flow.weights]
        self.first_z: dict[Any, Tensor] = {
            member: next(saved) for member in (*flow.first, *flow.reductions, *flow.outside)
        }
        self._first_stats = [next(saved) for _ in flow.second]
        self._second_z = list(saved)

    def second_grads(self, source: dict[Any, Any]) -> list[ConvGrad]:
        terms = self._flow.second
        inputs = [self.first_z[term] for term in terms]
        convs = self._flow.second_convs(inputs, self._first_stats, self.weights)
        return [
            ConvGrad(conv, z, *source[term])
            for term, conv, z in zip(terms, convs, self._second_z, strict=True)
        ]

    def first_grads(self, source: dict[Any, Any]) -> list[ConvGrad]:
        convs = self._flow.convs(self.x, self.weights)
        return [
            ConvGrad(conv, self.first_z[term], *source[term])
            for term, conv in zip(self._flow.first, convs, strict=True)
        ]

    def reduce_grads(self, source: dict[Any, Any]) -> list[ReduceGrad]:
        halves = self._flow.halves(self.weights)
        return [
            ReduceGrad(pair, self.first_z[term], *source[term])
            for term, pair in zip(self._flow.reductions, halves, strict=True)
        ]


class _ShareWeights(torch.autograd.Function):
    """The mixing weights for every node; the nodes write their gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, pass_: _Pass, nodes: int, weights: Tensor) -> tuple[Tensor, ...]:
        ctx.pass_ = pass_
        return tuple(weights.view_as(weights) for _ in range(nodes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_tokens: Tensor) -> tuple[None, None, Tensor | None]:
        grad_weights, ctx.pass_.grad_weights = ctx.pass_.grad_weights, None
        return None, None, grad_weights


class _ShareState(torch.autograd.Function):
    """A state for several uses, whose gradients are added up in one go."""

    @staticmethod
    def forward(ctx: Any, pass_: _Pass, uses: int, x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pass_ = pass_
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[None, None, Tensor | None]:
        addends = [_planes(g) for g in gs if g is not None]
        pass_ = ctx.pass_
        total = pass_.kernels.state_gradient(addends[0], 1, [], pass_.weights, addends) if addends else None
        return None, None, total


class _LeaveState(torch.autograd.Function):
    """x and the outputs of what runs outside → x again, for other uses, and a handle for every target."""

    @staticmethod
    def forward(ctx: Any, pass_: _Pass, flow: _Flow, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outside, weights = tensors[: len(flow.outside)], tensors[len(flow.outside) :]
        outputs = _Outputs(pass_)
        grids = _compute_first(outputs, flow, x, outside, weights)
        z, stats = outputs.z, outputs.stats
        first_z, first_stats = dict(z), dict(stats)
        if flow.second:
            inputs, input_stats = [z[term] for term in flow.second], [stats[term] for term in flow.second]
            convs = flow.second_convs(inputs, input_stats, weights)
            outputs.put(flow.second, *pass_.kernels.convolve(convs, pass_.exact))
            outputs.normalise(1)
        z.update((term, x.detach()) for term in flow.group.identities)

        for member, output in z.items():
            pass_.entries[member.target].append(_Entry(member, output, stats.get(member)))
        ctx.set_materialize_grads(False)
        ctx.pass_, ctx.flow = pass_, flow
        ctx.save_for_backward(
            *(x, pass_.weights, grids),
            *weights,
            *(first_z[member] for member in (*flow.first, *flow.reductions, *flow.outside)),
            *(first_stats[term] for term in flow.second),
            *(z[term] for term in flow.second),
        )
        size = next(iter(z.values())).shape
        return x.view_as(x), *(x.new_empty(()).expand(size) for _ in flow.targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, *gs: Tensor) -> tuple[Tensor | None, ...]:
        pass_, flow, kernels = ctx.pass_, ctx.flow, ctx.pass_.kernels
        saved = _Saved(flow, ctx.saved_tensors)
        wants_weights = any(ctx.needs_input_grad[3 + len(flow.outside) :])
        g = dict(zip(flow.targets, map(_planes, gs), strict=True))
        # What the gradient of each z starts from, and its coefficients: of the last z, then of the first.
        source = {member: (g[member.target], pass_.coefs.pop(member, None)) for member in saved.first_z}
        partials: list[Any] = []

        if flow.second:
            us, coefs, second_partials = kernels.backward_second(
                saved.second_grads(source), pass_.exact, pass_.training, wants_weights
            )
            source.update(zip(flow.second, zip(us, coefs, strict=True), strict=True))
            partials.append(second_partials)
        addends = [] if grad_x is None else [_planes(grad_x)]
        if flow.first:
            dxs, first_partials = kernels.backward_first(
                saved.first_grads(source), pass_.exact, wants_weights
            )
            addends += dxs
            partials.insert(0, first_partials)
        if flow.reductions:
            dx, reduce_partials = kernels.backward_reduce(
                saved.x, saved.grids, saved.reduce_grads(source), pass_.exact, wants_weights
            )
            addends.append(dx)
            partials.append(reduce_partials)

        dx = None
        pool_grads = _pool_grads(flow.group, g, pass_.coefs)
        if ctx.needs_input_grad[2] and (pool_grads or addends):
            dx = kernels.state_gradient(saved.x, flow.group.stride, pool_grads, saved.mixing, addends)
        grad_outside = _outside_gradients(kernels, flow.outside, saved.first_z, source)
        weights = saved.weights
        grad_weights = (
            _weight_gradients(kernels, partials, weights) if wants_weights else [None] * len(weights)
        )
        return None, None, dx, *grad_outside, *grad_weights


class _EnterNode(torch.autograd.Function):
    """Handles → y [B, C, H, W], the node's part of the cell's output."""

    @staticmethod
    def forward(
        ctx: Any, pass_: _Pass, number: int, node: NodeGroup, weights: Tensor, *handles: Tensor
    ) -> Tensor:
        assert pass_.output is not None
        entries = pass_.entries.pop(node.node, [])
        y = _slice(pass_.output, number, pass_.nodes)
        pass_.kernels.add_up([entry.summand for entry in entries], weights, y)
        ctx.pass_, ctx.members = pass_, [entry.member for entry in entries]
        ctx.has_stats = [entry.stats is not None for entry in entries]
        stats = (entry.stats for entry in entries if entry.stats is not None)
        ctx.save_for_backward(weights, *(entry.z for entry in entries), *stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        pass_ = ctx.pass_
        weights, *saved = ctx.saved_tensors
        zs, all_stats = saved[: len(ctx.members)], iter(saved[len(ctx.members) :])
        stats = [next(all_stats) if has else None for has in ctx.has_stats]
        g = _planes(g)
        wants_weights = ctx.needs_input_grad[3]
        if wants_weights and pass_.grad_weights is None:
            pass_.grad_weights = torch.zeros_like(weights)
        entries = [
            entry
            for entry in map(_Entry, ctx.members, zs, stats)
            if not isinstance(entry.member, WholeEdge)
            and (wants_weights or not isinstance(entry.member, IdentityTerm))
        ]
        if entries:
            grad_weights = pass_.grad_weights if wants_weights else None
            coefs = pass_.kernels.backward_add_up(
                [entry.summand for entry in entries], weights, g, grad_weights, pass_.training
            )
            pass_.coefs.update(zip((entry.member for entry in entries), coefs, strict=True))
        token = pass_.grad_weights if wants_weights else None
        return None, None, None, token, *(g if need else None for need in ctx.needs_input_grad[4:])


class _Concatenate(torch.autograd.Function):
    """The nodes, which lie side by side already, as one tensor."""

    @staticmethod
    def forward(ctx: Any, pass_: _Pass, *nodes: Tensor) -> Tensor:
        ctx.nodes = len(nodes)
        output, pass_.output = pass_.output, None  # held no longer: as a result it holds the pass itself
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *g.contiguous().chunk(ctx.nodes, dim=1)


def _run_outside(pass_: _Pass, flow: _Flow, x: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x for further use, and the outputs of what runs outside."""
    if not flow.outside:
        return x, []
    x, *shares = _ShareState.apply(pass_, 1 + len(flow.outside), x)
    outputs = [
        member.module(share, weights[member.edge]) if isinstance(member, WholeEdge) else member.body(share)
        for member, share in zip(flow.outside, shares, strict=True)
    ]
    return x, outputs


def _is_reduction(term: ModuleTerm) -> bool:
    return term.bn is not None and type(term.module) is FactorizedReduce


def _is_training(plan: CellPlan) -> bool:
    return any(term.bn.training for node in plan.nodes for term in node.terms if term.bn is not None)


def _batch_norm(member: Term | WholeEdge, block: int) -> nn.BatchNorm2d | None:
    """That of a convolution's block, or of another term; None where there is none."""
    if isinstance(member, WholeEdge):
        return None
    return member.blocks[block].bn if isinstance(member, ConvTerm) else member.bn


def _weights(blocks: Sequence[SepConvBlock]) -> list[Tensor]:
    return [weight for block in blocks for weight in (block.depthwise.weight, block.pointwise.weight)]


def _pairs(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights[::2], weights[1::2], strict=True))


def _empty_output(plan: CellPlan, state: Tensor) -> Tensor:
    """[B, nodes · C, H, W], which the nodes write their parts of."""
    batch, channels, height, width = state.shape
    stride = plan.states[0].stride
    return state.new_empty(batch, len(plan.nodes) * channels, -(-height // stride), -(-width // stride))


def _slice(output: Tensor, number: int, count: int) -> Tensor:
    """One of ``count`` parts of the channels; to autograd no view, lest writing to the others upsets it."""
    batch, channels, height, width = output.shape
    size = (batch, channels // count, height, width)
    offset = number * size[1] * height * width
    return output.new_empty(0).set_(output.untyped_storage(), offset, size, output.stride())


def _planes(x: Tensor) -> Tensor:
    """x itself where every picture is contiguous, else a copy that is."""
    return x if x[0].is_contiguous() else x.contiguous()


def _pool_grads(group: StateGroup, g: dict[int, Tensor], coefs: dict[Term, Tensor]) -> list[PoolGrad]:
    """Of every node that a pool or an identity of this state enters."""
    of_kind: dict[str, dict[int, Tensor]] = {"max": {}, "avg": {}}
    for pool in group.pools:
        of_kind[pool.pool.kind][pool.target] = coefs.pop(pool)
    identities = {term.target: (term.edge, term.column) for term in group.identities}
    targets = sorted({*of_kind["max"], *of_kind["avg"], *identities})
    return [
        PoolGrad(g[target], of_kind["max"].get(target), of_kind["avg"].get(target), identities.get(target))
        for target in targets
    ]


def _outside_gradients(
    kernels: Any,
    outside: Sequence[Term | WholeEdge],
    z: dict[Any, Tensor],
    source: dict[Any, tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """Of the outputs of what ran outside; that of a whole edge is the node's own."""
    gradients = {member: source[member][0] for member in outside}
    terms = [member for member in outside if not isinstance(member, WholeEdge)]
    if terms:
        gs, coefs = zip(*(source[term] for term in terms), strict=True)
        gradients.update(zip(terms, kernels.affine_gradients(gs, [z[t] for t in terms], coefs), strict=True))
    return list(gradients.values())


def _weight_gradients(kernels: Any, partials: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
    """In the order of ``weights``: by convolution, depthwise before pointwise."""
    ordered = [partial for stage in partials for pair in zip(*stage, strict=True) for partial in pair]
    return kernels.reduce_partials(ordered, weights)


register_impl("cell", "ext", cell, supports)
