"""Where the states, operations and passing edges of a cell stand: a small layered graph layout.

States stand in columns by their longest path from the inputs. The operations that enter a state are stacked
directly before it, and an edge that skips a column gets a lane of its own there, so nothing ever lies on top
of anything else. (K. Sugiyama, S. Tagawa, M. Toda, "Methods for visual understanding of hierarchical system
structures", IEEE Transactions on Systems, Man, and Cybernetics, 1981.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

OP_PITCH = 0.34
"""Distance in inches between two operations that enter the same state."""
_STATE_HEIGHT = 0.34
_LANE_HEIGHT = 0.1
_SLOT_GAP = 0.17
_SWEEPS = 12

Edge = tuple[int, int, str]
"""(source state, target state, operation)."""


@dataclass(eq=False)
class Slot:
    """A place in a column: a state with the operations that enter it, or a lane for a passing edge."""

    column: int
    height: float
    y: float = 0.0
    before: list["Slot"] = field(default_factory=list)
    after: list["Slot"] = field(default_factory=list)


@dataclass(eq=False)
class Wire:
    """An edge through the slots of `route`, source and target included; into the output without operation."""

    op: str | None
    route: list[Slot]
    end_y: float = 0.0


@dataclass(frozen=True)
class Layout:
    """The placed cell; the last of `states` is its output. Lengths are inches, y grows downwards."""

    states: list[Slot]
    wires: list[Wire]
    columns: list[list[Slot]]


def lay_out(edges: Sequence[Edge], state_count: int, concat: Sequence[int]) -> Layout:
    """Place `state_count` states, the operations of `edges` and the output that the states `concat` form,
    if they do not do so already: none is added to the last state.
    """
    sources: list[list[int]] = [[] for _ in range(state_count)]
    for source, target, _ in edges:
        sources[target].append(source)
    depths: list[int] = []
    for state_sources in sources:
        depths.append(1 + max((depths[source] for source in state_sources), default=-1))
    heights = [max(_STATE_HEIGHT, OP_PITCH * len(state_sources)) for state_sources in sources]
    states = [Slot(depth, height) for depth, height in zip(depths, heights, strict=True)]
    wires = [_wire(states[source], states[target], op) for source, target, op in edges]
    if is_joined(concat, state_count):
        output = Slot(1 + max(depths), _STATE_HEIGHT)
        wires += [_wire(states[source], output, None) for source in concat]
        states.append(output)

    columns: list[list[Slot]] = [[] for _ in range(1 + max(state.column for state in states))]
    for slot in dict.fromkeys(states + [slot for wire in wires for slot in wire.route]):
        columns[slot.column].append(slot)
    _order(columns)
    _straighten(columns)
    _place_ends(wires)
    return Layout(states, wires, columns)


def is_joined(concat: Sequence[int], state_count: int) -> bool:
    """Whether the output is something else than the last state."""
    return tuple(concat) != (state_count - 1,)


def _wire(source: Slot, target: Slot, op: str | None) -> Wire:
    lanes = [Slot(column, _LANE_HEIGHT) for column in range(source.column + 1, target.column)]
    route = [source, *lanes, target]
    for left, right in pairwise(route):
        left.after.append(right)
        right.before.append(left)
    return Wire(op, route)


def _order(columns: list[list[Slot]]) -> None:
    """Sort every column by the mean height of its neighbours, keeping the order with the fewest crossings."""
    _centre(columns)
    best = [list(column) for column in columns]
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        for column in columns if forward else reversed(columns):
            wanted = {slot: _mean_y(slot.before if forward else slot.after, slot.y) for slot in column}
            column.sort(key=wanted.__getitem__)
            _centre([column])
        if _crossings(columns) < _crossings(best):
            best = [list(column) for column in columns]
    columns[:] = best
    _centre(columns)


def _centre(columns: list[list[Slot]]) -> None:
    for column in columns:
        _stack(column, [0.0] * len(column))


def _crossings(columns: list[list[Slot]]) -> int:
    rank = {slot: position for column in columns for position, slot in enumerate(column)}
    crossings = 0
    for column in columns:
        ends = [(rank[slot], rank[follower]) for slot in column for follower in slot.after]
        crossings += sum(a[0] < b[0] and a[1] > b[1] for a in ends for b in ends)
    return crossings


def _straighten(columns: list[list[Slot]]) -> None:
    """Draw every slot towards its neighbours, which takes the needless bends out of long edges."""
    for sweep in range(_SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            _stack(column, [_mean_y(slot.before + slot.after, slot.y) for slot in column])


def _mean_y(slots: list[Slot], default: float) -> float:
    return fmean(slot.y for slot in slots) if slots else default


def _stack(column: list[Slot], wanted: list[float]) -> None:
    """Give the slots, in their order, heights near the `wanted` ones that keep them apart."""
    floor = float("-inf")
    for slot, y in zip(column, wanted, strict=True):
        slot.y = max(y, floor + slot.height / 2)
        floor = slot.y + slot.height / 2 + _SLOT_GAP
    shift = fmean(wanted) - fmean(slot.y for slot in column)
    for slot in column:
        slot.y += shift


def _place_ends(wires: list[Wire]) -> None:
    """Stack the wires that enter each state in the order in which they come in."""
    entering: dict[Slot, list[Wire]] = {}
    for wire in wires:
        wire.end_y = wire.route[-1].y
        if wire.op is not None:
            entering.setdefault(wire.route[-1], []).append(wire)
    for target, group in entering.items():
        group.sort(key=lambda wire: wire.route[-2].y)
        for position, wire in enumerate(group):
            wire.end_y = target.y + OP_PITCH * (position - (len(group) - 1) / 2)
