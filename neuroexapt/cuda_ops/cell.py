"""The fused search cell in CUDA C++, for 16, 32 or 64 channels, stored in fp32 or bf16.

A cell runs by its plan (``neuroexapt.core.plan``) as two kinds of autograd functions. ``_LeaveStates``
computes all that leaves a state, or states that are there at the same time, as a cell's inputs are:
convolutions, pools, the statistics of their BatchNorms. ``_EnterNode`` adds up all that enters a node.
Between them autograd sees *handles*, tensors without content, one from each set of states to each node that
it feeds: as its gradient a handle carries the gradient g of the node. From that and from a few coefficients
a channel the gradient of every term follows as ``dz = A · g + B · z + D`` where a kernel reads ``z``, so
neither normalised tensors nor gradients of single terms are ever stored.

What is no separable or dense convolution, pool, identity or factorized reduction runs *outside*: as a module
under autograd, on the state itself. Its output enters ``_LeaveStates`` beside the states.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neuroexapt.backend import Support, register_impl
from neuroexapt.core.buffers import buffers_changed_if
from neuroexapt.core.drawn import add_constants, part_by_nodes
from neuroexapt.core.operations import convolve_joined
from neuroexapt.core.plan import (
    POOL_SIZE,
    CellPlan,
    ConvTerm,
    IdentityTerm,
    ModuleTerm,
    NodeGroup,
    PoolTerm,
    Term,
    WholeEdge,
)
from neuroexapt.cuda_ops import cell_kernels
from neuroexapt.cuda_ops.arguments import dense, dtype_refusals, shared_bytes
from neuroexapt.cuda_ops.cell_operands import (
    ConvGrad,
    DenseGrad,
    PoolGrad,
    Pooling,
    ReduceGrad,
    StateGrad,
    Summand,
    products_are_exact,
)
from neuroexapt.cuda_ops.cell_pass import Entry, Flow, Pass, weight_of

CHANNELS = (16, 32, 64)

SHARED_BYTES = 227 * 1024
"""Of a block: what convolutions take for their backward pass (``csrc/cell_conv_backward.cu``)."""

_FEWEST_ADDED_EARLY = 6
"""Terms of a node, which otherwise wait for more: the sum so far is written and read once more."""


def cell(plan: CellPlan, states: Sequence[Tensor], weights: Tensor, *, drawn_only: bool = False) -> Tensor:
    """What ``functional.cell`` computes.

    Pointwise products are of fp32 grade where ``torch.backends.cudnn.conv.fp32_precision`` is ``"ieee"``,
    else of TF32, as those of PyTorch's own convolutions are. All that is kept of states in bf16 is in bf16
    and multiplied in TF32; weights, statistics, sums and their coefficients are fp32.
    """
    with torch.cuda.device(states[0].device):
        return run(plan, states, weights, cell_kernels, drawn_only=drawn_only)


def supports(
    plan: CellPlan, states: Sequence[Tensor], weights: Tensor, *, drawn_only: bool = False
) -> Support:
    """Whether the kernels take these arguments."""
    reason = next(_refusals(plan, states, weights), "")
    return Support(not reason, reason)


def flows_of(plan: CellPlan) -> list[Flow]:
    """Of each state by itself."""
    return [Flow([group]) for group in plan.states]


def refusals(
    plan: CellPlan, flows: Sequence[Flow], states: Sequence[Tensor], weights: Tensor
) -> Iterator[str]:
    """What stands in the way of kernels on any tier; ``flows``: ``flows_of(plan)``."""
    convs = [term for state in plan.states for term in state.convs]
    pools = [term for state in plan.states for term in state.pools]
    others = (weights, *_own_tensors(plan, flows))
    yield from dtype_refusals(states, others)
    if any(tensor.device != weights.device for tensor in (*states, *others)):
        yield "tensors on several devices"
    if any(state.shape != states[0].shape for state in states):
        yield "states of several shapes"
    height, width = states[0].shape[2:]
    if states[0].numel() == 0:
        yield "an empty batch"
    if states[0].shape[0] * -(-height // 2) * -(-width // 2) == 1:
        yield "a single value per channel"
    for conv in convs:
        if not conv.is_known:
            yield f"kernel size {conv.kernel_size}, dilation {conv.dilation}"
    if not all(pool.is_known for pool in pools):
        yield f"pools other than of size {POOL_SIZE}"
    if len({(pool.edge, pool.pool.kind) for pool in pools}) < len(pools):
        yield "an edge with two pools of a kind"


def _refusals(plan: CellPlan, states: Sequence[Tensor], weights: Tensor) -> Iterator[str]:
    """What stands in the way of these kernels."""
    flows = flows_of(plan)
    yield from refusals(plan, flows, states, weights)
    device, channels, width = states[0].device, states[0].shape[1], states[0].shape[3]
    if device.type == "cuda" and shared_bytes(device) < SHARED_BYTES:
        yield "a block of this GPU has less than 227 KB of shared memory"
    if channels not in CHANNELS:
        yield f"{channels} channels"
    if width > cell_kernels.MAX_WIDTH:
        yield f"pictures {width} wide"
    if any(
        max(len(flow.first), 2 * len(flow.reductions), len(flow.dense)) > cell_kernels.MAX_CONVS
        for flow in flows
    ):
        yield "too many convolutions leave one state"
    if any(
        len(state.convs) + len(state.modules) + len(state.edges) >= cell_kernels.MAX_ADDENDS
        for state in plan.states
    ):
        yield "too many operations leave one state"
    if any(len(node.terms) + len(node.rows) > cell_kernels.MAX_TERMS for node in plan.nodes):
        yield "too many terms enter one node"
    if any(
        len({term.edge for term in node.terms if isinstance(term, PoolTerm)}) > cell_kernels.MAX_POOLED_EDGES
        for node in plan.nodes
    ):
        yield "too many pools enter one node"
    if len(plan.nodes) > cell_kernels.MAX_EDGES:
        yield f"{len(plan.nodes)} nodes"


def _own_tensors(plan: CellPlan, flows: Sequence[Flow]) -> Iterator[Tensor]:
    """What the kernels read besides their arguments: weights and running statistics."""
    for flow in flows:
        yield from flow.weights
    for node in plan.nodes:
        bns = (term.bn for term in node.terms if term.bn is not None)
        yield from (bn.running_mean for bn in bns if bn.running_mean is not None)


def run(
    plan: CellPlan, states: Sequence[Tensor], weights: Tensor, kernels: Any, *, drawn_only: bool = False
) -> Tensor:
    """The cell by the functions of ``kernels``: those of ``cell_kernels``, or others that do the same.

    What is not drawn runs all the same if they do not leave it out.
    """
    leaves_out = drawn_only and kernels.LEAVES_OUT  # and then knows of the constants
    weights, constants = part_by_nodes(plan, weights) if drawn_only and not leaves_out else (weights, {})
    weights = weights.contiguous()
    exact = products_are_exact()
    output, sums = _empty_sums(plan, states[0])
    pass_ = Pass(
        kernels,
        exact,
        _is_training(plan),
        weights.detach(),
        leaves_out,
        len(states),
        output,
        sums,
        kernels.Branch(),
    )
    shared_weights = _ShareWeights.apply(pass_, len(plan.nodes), weights)
    handles: defaultdict[int, list[Tensor]] = defaultdict(list)
    entered: list[Tensor] = []

    def leave(first: int, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The states from number ``first`` on, for other uses."""
        flow = Flow(plan.states[first : first + len(xs)], xs[0].shape[-1])
        if not flow.targets:
            return xs
        xs, outside = _run_outside(pass_, flow, xs, weights)
        leaving = _LeaveStates.apply(pass_, flow, *xs, *outside, *flow.weights)
        for target, handle in zip(flow.targets, leaving[len(xs) :], strict=True):
            handles[target].append(handle)
        return leaving[: len(xs)]

    leave(0, states)
    for i, node in enumerate(plan.nodes):
        y = _EnterNode.apply(pass_, i, node, shared_weights[i], *handles.pop(node.node, ()))
        entered += leave(node.node, [add_constants(y, constants[node.node]) if constants else y])
    if output is not None:
        return _Concatenate.apply(pass_, *entered)
    left = [y for node, y in zip(plan.nodes, entered, strict=True) if node.node in plan.outputs]
    return left[0] if len(left) == 1 else torch.cat(left, 1)


class _Outputs:
    """``z`` of all that leaves some states, and ``stats`` of what has a BatchNorm, as they come about."""

    def __init__(self, pass_: Pass) -> None:
        self.z: dict[Any, Tensor] = {}
        self.stats: dict[Any, Tensor] = {}
        self.pass_ = pass_
        self._moments: dict[Any, Tensor] = {}

    def put(self, members: Sequence[Any], zs: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
        self.z.update(zip(members, zs, strict=True))
        found = zip(members, moments, strict=True)
        self._moments.update((member, m) for member, m in found if _batch_norm(member, 0) is not None)

    def normalise(self, block: int) -> None:
        """Make ``stats`` of all moments since the last time, in one launch."""
        if not self._moments:
            return
        bns = [_batch_norm(member, block) for member in self._moments]
        stats = self.pass_.kernels.statistics(
            bns, list(self._moments.values()), self.pass_.training, **self.pass_.asking(self._moments)
        )
        self.stats.update(zip(self._moments, stats, strict=True))
        self._moments.clear()


def _compute_first(
    outputs: _Outputs,
    flow: Flow,
    xs: dict[int, Tensor],
    outside: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> None:
    """Put all but ``flow.second`` and the identities into ``outputs``."""
    pass_, kernels = outputs.pass_, outputs.pass_.kernels
    outputs.z.update(zip(flow.outside, map(_planes, outside), strict=True))
    with pass_.branch:
        if flow.pools:
            _pool(outputs, flow, xs)
        _begin_sums(pass_, flow.states[-1])
    if flow.first:
        outputs.put(flow.first, *kernels.convolve(flow.convs(pass_, xs, weights), pass_.exact))
        pass_.branch.start()
    halves = flow.halves(weights)
    for state, reductions in _by_state(flow.reductions).items():
        of_state = [halves[term] for term in reductions]
        outputs.put(reductions, *kernels.reduce(xs[state], of_state, pass_.exact))
    dense_weights = flow.dense_weights(weights)
    for state, terms in _by_state(flow.dense).items():
        of_terms = [dense_weights[term] for term in terms]
        outputs.put(terms, *kernels.convolve_dense(xs[state], of_terms, pass_.exact, **pass_.asking(terms)))
    normalised = [member for member in flow.outside if _batch_norm(member, 0) is not None]
    if normalised:
        zs = [outputs.z[member] for member in normalised]
        outputs.put(normalised, zs, kernels.plane_moments(zs))
    outputs.normalise(0)


def _pool(outputs: _Outputs, flow: Flow, xs: dict[int, Tensor]) -> None:
    """Put ``flow.pools`` into ``outputs``."""
    kinds = {term.pool.kind for term in flow.pools}
    pools = _by_state(flow.pools)
    pass_ = outputs.pass_
    asking = {"mixing": list(map(pass_.mixing, pools.values()))} if pass_.drawn_only else {}
    pooled = pass_.kernels.pool([xs[state] for state in pools], flow.stride, kinds, **asking)
    for terms, *results in zip(pools.values(), *pooled, strict=True):
        outputs.put(terms, *([of_kind[term.pool.kind] for term in terms] for of_kind in results))
    outputs.normalise(0)


class _Saved:
    """What ``_LeaveStates`` keeps for its backward pass, in the order of ``tensors``.

    ``source``, which its methods take: what the gradient of each z starts from, and its coefficients.
    """

    def __init__(self, pass_: Pass, flow: Flow, tensors: Sequence[Tensor]) -> None:
        saved = iter(tensors)
        self._pass = pass_
        self._flow = flow
        self.xs = {state: next(saved) for state in flow.states}
        self.mixing = next(saved)
        self.weights = [next(saved) for _ in flow.weights]
        self.first_z: dict[Any, Tensor] = {member: next(saved) for member in flow.computed}
        self._first_stats = [next(saved) for _ in flow.second]
        self._second_z = list(saved)

    def second_grads(self, source: dict[Any, Any]) -> list[ConvGrad]:
        terms = self._flow.second
        inputs = [self.first_z[term] for term in terms]
        convs = self._flow.second_convs(self._pass, self.xs, inputs, self._first_stats, self.weights)
        return [
            ConvGrad(conv, z, *source[term])
            for term, conv, z in zip(terms, convs, self._second_z, strict=True)
        ]

    def first_grads(self, source: dict[Any, Any]) -> dict[int, list[ConvGrad]]:
        """Of every state that has convolutions."""
        convs = dict(zip(self._flow.first, self._flow.convs(self._pass, self.xs, self.weights), strict=True))
        return {
            state: [ConvGrad(convs[term], self.first_z[term], *source[term]) for term in terms]
            for state, terms in _by_state(self._flow.first).items()
        }

    def reduce_grads(self, source: dict[Any, Any]) -> dict[int, list[ReduceGrad]]:
        """Of every state that has factorized reductions."""
        halves = self._flow.halves(self.weights)
        return {
            state: [ReduceGrad(halves[term], self.first_z[term], *source[term]) for term in terms]
            for state, terms in _by_state(self._flow.reductions).items()
        }

    def dense_grads(self, source: dict[Any, Any]) -> dict[int, list[DenseGrad]]:
        """Of every state that has dense convolutions."""
        weights = self._flow.dense_weights(self.weights)
        return {
            state: [
                DenseGrad(weights[term], self.first_z[term], *source[term])._replace(mixing=mixing)
                for term, mixing in zip(terms, self._pass.mixing(terms), strict=True)
            ]
            for state, terms in _by_state(self._flow.dense).items()
        }


class _ShareWeights(torch.autograd.Function):
    """The mixing weights for every node; the nodes write their gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, pass_: Pass, nodes: int, weights: Tensor) -> tuple[Tensor, ...]:
        ctx.pass_ = pass_
        return tuple(weights.view_as(weights) for _ in range(nodes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_tokens: Tensor) -> tuple[None, None, Tensor | None]:
        ctx.pass_.join()
        grad_weights, ctx.pass_.grad_weights = ctx.pass_.grad_weights, None
        return None, None, grad_weights


class _ShareState(torch.autograd.Function):
    """A state for several uses, whose gradients are added up in one go."""

    @staticmethod
    def forward(ctx: Any, pass_: Pass, uses: int, x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.pass_ = pass_
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[None, None, Tensor | None]:
        addends = [_planes(g) for g in gs if g is not None]
        pass_ = ctx.pass_
        if not addends:
            return None, None, None
        return None, None, *pass_.kernels.state_gradients([StateGrad(addends[0], [], addends)], 1, None)


class _LeaveStates(torch.autograd.Function):
    """States and the outputs of what runs outside → the states again, for other uses, and a handle for every
    target."""

    @staticmethod
    def forward(ctx: Any, pass_: Pass, flow: Flow, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = iter(tensors)
        xs = {state: next(inputs) for state in flow.states}
        outside = [next(inputs) for _ in flow.outside]
        weights = list(map(dense, inputs))  # parameters may be views at any offset
        outputs = _Outputs(pass_)
        _compute_first(outputs, flow, xs, outside, weights)
        z, stats = outputs.z, outputs.stats
        first_z, first_stats = dict(z), dict(stats)
        if flow.second:
            halfway = ([z[term] for term in flow.second], [stats[term] for term in flow.second])
            convs = flow.second_convs(pass_, xs, *halfway, weights)
            outputs.put(flow.second, *pass_.kernels.convolve(convs, pass_.exact))
            outputs.normalise(1)
        z.update((term, xs[term.source].detach()) for term in flow.identities)

        for member, output in z.items():
            forms_again = isinstance(member, PoolTerm) and not pass_.kernels.KEEPS_POOLS
            kept = xs[member.source].detach() if forms_again else output
            pass_.entries[member.target].append(Entry(member, output, stats.get(member), kept))
        ctx.set_materialize_grads(False)
        ctx.pass_, ctx.flow = pass_, flow
        ctx.save_for_backward(
            *(*xs.values(), pass_.weights, *weights),
            *(first_z[member] for member in flow.computed),
            *(first_stats[term] for term in flow.second),
            *(z[term] for term in flow.second),
        )
        like = next(iter(z.values()))
        handles = (like.new_empty(()).expand(like.shape) for _ in flow.targets)
        return *(x.view_as(x) for x in xs.values()), *handles

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pass_, flow, kernels = ctx.pass_, ctx.flow, ctx.pass_.kernels
        saved = _Saved(pass_, flow, ctx.saved_tensors)
        received = [None if gradient is None else _planes(gradient) for gradient in gradients]
        g = dict(zip(flow.targets, received[len(flow.states) :], strict=True))
        addends: dict[int, list[Tensor]] = {
            state: [] if own is None else [own] for state, own in zip(flow.states, received, strict=False)
        }
        wants_state = dict(zip(flow.states, ctx.needs_input_grad[2:], strict=False))
        wants_weights = any(ctx.needs_input_grad[2 + len(flow.states) + len(flow.outside) :])
        # What the gradient of each z starts from, and its coefficients: of the last z, then of the first.
        source = {member: (g[member.target], pass_.coefs.pop(member, None)) for member in saved.first_z}
        partials: list[Any] = []

        if not pass_.late.isdisjoint(flow.computed + flow.pools):
            pass_.join()
        if flow.second:
            us, coefs, second_partials = kernels.backward_second(
                saved.second_grads(source), pass_.exact, pass_.training, wants_weights
            )
            source.update(zip(flow.second, zip(us, coefs, strict=True), strict=True))
            partials.append(second_partials)
        pass_.branch.start()
        if flow.first:
            grads = saved.first_grads(source)
            dxs, first_partials = kernels.backward_first(list(grads.values()), pass_.exact, wants_weights)
            for state, of_state in zip(grads, dxs, strict=True):
                addends[state] += of_state
            partials.insert(0, first_partials)
        for state, reduce_grads in saved.reduce_grads(source).items():
            dxs, reduce_partials = kernels.backward_reduce(
                saved.xs[state], reduce_grads, pass_.exact, wants_weights
            )
            addends[state] += dxs
            partials.append(reduce_partials)
        partials = [partial for stage in partials for pair in zip(*stage, strict=True) for partial in pair]
        for state, dense_grads in saved.dense_grads(source).items():
            dxs, dense_partials = kernels.backward_dense(
                saved.xs[state], dense_grads, pass_.exact, wants_weights, pass_.branch
            )
            addends[state] += dxs
            partials += dense_partials

        weights = saved.weights
        grad_weights: list[Any] = [None] * len(weights)
        if wants_weights:
            with pass_.branch:
                grad_weights = kernels.reduce_partials(partials, weights, **pass_.asking(flow.owners))
        totals = {
            state: StateGrad(saved.xs[state], pool_grads, addends[state], flow.means_only)
            for state, pool_grads in _pool_grads(flow, g, pass_.coefs).items()
            if wants_state[state] and (pool_grads or addends[state])
        }
        grad_states = kernels.state_gradients(
            list(totals.values()), flow.stride, saved.mixing, **pass_.leaving_out
        )
        grad_of_state = dict(zip(totals, grad_states, strict=True))
        grad_outside = _outside_gradients(kernels, flow.outside, saved.first_z, source)
        if wants_weights:
            pass_.join()
        return None, None, *map(grad_of_state.get, flow.states), *grad_outside, *grad_weights


class _EnterNode(torch.autograd.Function):
    """Handles → y [B, C, H, W], the node's part of the cell's output."""

    @staticmethod
    def forward(
        ctx: Any, pass_: Pass, number: int, node: NodeGroup, weights: Tensor, *handles: Tensor
    ) -> Tensor:
        entries = pass_.entries.pop(node.node, [])
        pass_.join()
        y = _add_up(pass_, number, entries, weights)
        ctx.pass_, ctx.node, ctx.members = pass_, node, [entry.member for entry in entries]
        ctx.has_stats = [entry.stats is not None for entry in entries]
        stats = (entry.stats for entry in entries if entry.stats is not None)
        ctx.save_for_backward(weights, *(entry.kept for entry in entries), *stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        pass_ = ctx.pass_
        weights, *saved = ctx.saved_tensors
        kept, all_stats = saved[: len(ctx.members)], iter(saved[len(ctx.members) :])
        stats = [next(all_stats) if has else None for has in ctx.has_stats]
        g = _planes(g)
        wants_weights = ctx.needs_input_grad[3]
        if wants_weights and pass_.grad_weights is None:
            pass_.grad_weights = torch.zeros_like(weights)
        summands = {
            member: Summand(
                z, stats, weight_of(member), None if pass_.kernels.KEEPS_POOLS else _pooling_of(member)
            )
            for member, z, stats in zip(ctx.members, kept, stats, strict=True)
            if not isinstance(member, WholeEdge) and (wants_weights or not isinstance(member, IdentityTerm))
        }
        pass_.join()
        late = _late(pass_, summands)
        soon = {member: term for member, term in summands.items() if member not in late}
        nothing = _nothing(ctx.node, weights.shape[1]) if wants_weights and pass_.drawn_only else []
        if soon or nothing:
            _backward_add_up(pass_, soon, weights, g, wants_weights, nothing)
        if late:
            with pass_.branch:
                pass_.branch.keep(g, *saved)
                _backward_add_up(pass_, late, weights, g, wants_weights)
            pass_.late.update(late)
        token = pass_.grad_weights if wants_weights else None
        return None, None, None, token, *(g if need else None for need in ctx.needs_input_grad[4:])


def _add_up(pass_: Pass, number: int, entries: Sequence[Entry], weights: Tensor) -> Tensor:
    """The sum of a node with all ``entries``, where it was begun of the others."""
    begun = pass_.begun.pop(number, None)
    y, added = begun or (pass_.sums.pop(number), 0)
    so_far = [Summand(y, None, None)] if begun else []
    terms = [*so_far, *(entry.summand for entry in entries[added:])]
    pass_.kernels.add_up(terms, weights, y, **pass_.leaving_out)
    return y


def _begin_sums(pass_: Pass, state: int) -> None:
    """The sums of the two nodes after ``state``, with what has entered them so far.

    More than that takes longer than the convolutions of the state, beside which it is done.
    """
    if not pass_.branch.is_one or pass_.drawn_only:
        return
    if any(y.dtype == torch.bfloat16 for y in pass_.sums.values()):  # a sum would be rounded twice
        return
    for target in (state + 1, state + 2):
        entries, number = pass_.entries.get(target, []), target - pass_.inputs
        _, added = pass_.begun.get(number, (None, 0))
        if len(entries) - added >= _FEWEST_ADDED_EARLY:
            pass_.begun[number] = _add_up(pass_, number, entries, pass_.weights), len(entries)


def _late(pass_: Pass, summands: dict[Term, Summand]) -> dict[Term, Summand]:
    """Those whose coefs can wait: of all states but the one, or those together, that was there last."""
    if not pass_.branch.is_one:
        return {}
    last = max((member.source for member in summands), default=0)
    first_soon = 0 if last < pass_.inputs else last
    return {member: term for member, term in summands.items() if member.source < first_soon}


def _backward_add_up(
    pass_: Pass,
    summands: dict[Term, Summand],
    weights: Tensor,
    g: Tensor,
    wants_weights: bool,
    nothing: Sequence[tuple[int, int]] = (),
) -> None:
    """Make the coefs of all ``summands``."""
    constants = {"nothing": nothing} if nothing else {}
    grad_weights = pass_.grad_weights if wants_weights else None
    terms = list(summands.values())
    coefs = pass_.kernels.backward_add_up(
        terms, weights, g, grad_weights, pass_.training, **pass_.leaving_out, **constants
    )
    pass_.coefs.update(zip(summands, coefs, strict=True))


class _Concatenate(torch.autograd.Function):
    """The nodes, which lie side by side already, as one tensor."""

    @staticmethod
    def forward(ctx: Any, pass_: Pass, *nodes: Tensor) -> Tensor:
        ctx.nodes = len(nodes)
        output, pass_.output = pass_.output, None  # held no longer: as a result it holds the pass itself
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *g.contiguous().chunk(ctx.nodes, dim=1)


def _run_outside(
    pass_: Pass, flow: Flow, states: Sequence[Tensor], weights: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The states for further use, and the outputs of what runs outside."""
    xs = dict(zip(flow.states, map(_planes, states), strict=True))
    outputs: dict[Any, Tensor] = {}
    for state, members in _by_state(flow.outside).items():
        convs = [m for m in members if isinstance(m, ModuleTerm) and m.joins_with is not None]
        others = [member for member in members if member not in convs]
        xs[state], *shares = _ShareState.apply(pass_, 1 + len(others) + bool(convs), xs[state])
        for member, share in zip(others, shares, strict=False):
            is_edge = isinstance(member, WholeEdge)
            outputs[member] = (
                member.module(share, weights[member.edge]) if is_edge else _run_body(pass_, member, share)
            )
        if convs:
            outputs |= _convolve_joined(shares[-1], convs)
    like = next(iter(xs.values()))
    return list(xs.values()), [outputs[member].to(like.dtype) for member in flow.outside]


def _run_body(pass_: Pass, term: ModuleTerm, x: Tensor) -> Tensor:
    """A module runs even if it was not drawn, but then it sees no statistics."""
    (mixing,) = pass_.mixing([term])
    with nullcontext() if mixing is None else buffers_changed_if([mixing != 0], [term.module]):
        return term.body(x)


def _convolve_joined(x: Tensor, terms: Sequence[ModuleTerm]) -> dict[ModuleTerm, Tensor]:
    """z of relu-conv-BN terms that leave x: those of one geometry are parts of one convolution."""
    active = F.relu(x)
    outputs: dict[ModuleTerm, Tensor] = {}
    alike: dict[Any, list[ModuleTerm]] = {}
    for term in terms:
        alike.setdefault(term.joins_with, []).append(term)
    for members in alike.values():
        ops: list[Any] = [term.module for term in members]
        outputs.update(zip(members, convolve_joined(active, ops).chunk(len(ops), dim=1), strict=True))
    return outputs


def _by_state(members: Sequence[Any]) -> dict[int, list[Any]]:
    """Terms or edges, by the state that they leave."""
    found: dict[int, list[Any]] = {}
    for member in members:
        found.setdefault(member.source, []).append(member)
    return found


def _is_training(plan: CellPlan) -> bool:
    return any(term.bn.training for node in plan.nodes for term in node.terms if term.bn is not None)


def _batch_norm(member: Term | WholeEdge, block: int) -> nn.BatchNorm2d | None:
    """That of a convolution's block, or of another term; None where there is none."""
    if isinstance(member, WholeEdge):
        return None
    return member.blocks[block].bn if isinstance(member, ConvTerm) else member.bn


def _pooling_of(member: Term) -> Pooling | None:
    return Pooling(member.pool.kind, member.stride) if isinstance(member, PoolTerm) else None


def _empty_sums(plan: CellPlan, state: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
    """[B, C, H, W] for every node; where all of them leave the cell, they are parts of one tensor."""
    batch, channels, height, width = state.shape
    stride, count = plan.states[0].stride, len(plan.nodes)
    size = -(-height // stride), -(-width // stride)
    if len(plan.outputs) < count:
        return None, {i: state.new_empty(batch, channels, *size) for i in range(count)}
    output = state.new_empty(batch, count * channels, *size)
    return output, {i: _slice(output, i, count) for i in range(count)}


def _nothing(node: NodeGroup, candidates: int) -> list[tuple[int, int]]:
    """Edge and column of every ``none`` that enters a node."""
    known = {(term.edge, term.column) for term in node.terms}
    rows = set(node.rows) - {edge.edge for edge in node.edges}
    return [(row, k) for row in sorted(rows) for k in range(candidates) if (row, k) not in known]


def _slice(output: Tensor, number: int, count: int) -> Tensor:
    """One of ``count`` parts of the channels; to autograd no view, lest writing to the others upsets it."""
    batch, channels, height, width = output.shape
    size = (batch, channels // count, height, width)
    offset = number * size[1] * height * width
    return output.new_empty(0).set_(output.untyped_storage(), offset, size, output.stride())


def _planes(x: Tensor) -> Tensor:
    """x itself where every picture is contiguous, else a copy that is."""
    return x if x[0].is_contiguous() else x.contiguous()


def _pool_grads(flow: Flow, g: dict[int, Tensor], coefs: dict[Term, Tensor]) -> dict[int, list[PoolGrad]]:
    """For every state, of every node that a pool or an identity of it enters."""
    of_kind: dict[str, dict[tuple[int, int], Tensor]] = {"max": {}, "avg": {}}
    for pool in flow.pools:
        of_kind[pool.pool.kind][pool.source, pool.target] = coefs.pop(pool)
    identities = {(term.source, term.target): (term.edge, term.column) for term in flow.identities}
    found: dict[int, list[PoolGrad]] = {state: [] for state in flow.states}
    for place in sorted({*of_kind["max"], *of_kind["avg"], *identities}):
        state, target = place
        of_place = (of_kind["max"].get(place), of_kind["avg"].get(place), identities.get(place))
        found[state].append(PoolGrad(g[target], *of_place))
    return found


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


register_impl("cell", "ext", cell, supports)
