"""A cell drawn as a graph, with matplotlib alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.textpath import text_to_path

from neuroexapt.errors import UserError
from neuroexapt.report.cell_layout import Edge, Slot, Wire, is_joined, lay_out
from neuroexapt.report.style import INK, MUTED, PANEL, RC_PARAMS, op_style, state_name

# Inches, which are the data coordinates of the axes as well.
_BOX_HEIGHT = 0.25
_BOX_PADDING = 0.09
_MIN_STATE_WIDTH = 0.5
_ARROW_SPAN = 0.22
_CURVE_SPAN = 0.85
_MARGIN = 0.12
_TITLE_HEIGHT = 0.3
_LEGEND_ROW_HEIGHT = 0.22
_LEGEND_ENTRY_WIDTH = 1.75

_FONT_SIZE = 9


@matplotlib.rc_context(RC_PARAMS)
def draw_cell(
    edges: Sequence[Edge], node_names: Sequence[str], concat: Sequence[int], title: str = ""
) -> Figure:
    """Draw a cell: inputs left, output right, a box for every operation before the state it enters.

    `edges` are (source, target, operation) with source < target, both indices into `node_names`; `concat`
    are the states that form the output c_k, joined to it in grey; the last state alone is the output itself.
    Names may have TeX subscripts. Raises UserError for an edge that does not run forwards between two states
    and for an output of a state that is not there.
    """
    _check(edges, len(node_names), concat)
    layout = lay_out(edges, len(node_names), concat)
    joined = is_joined(concat, len(node_names))
    names = [state_name(name) for name in (*node_names, *(["c_{k}"] if joined else []))]
    grid = _Grid(
        state_width=max(_MIN_STATE_WIDTH, *map(_box_width, names)),
        op_width=max((_box_width(op) for _, _, op in edges), default=0.0),
        last_column=len(layout.columns) - 1,
        ends_without_operations=joined,
    )
    families = {op_style(op).family: op_style(op).colour for _, _, op in edges}
    slots = [slot for column in layout.columns for slot in column]
    figure, axes = _figure(slots, grid.width, title, families)
    for wire in layout.wires:
        _draw_wire(axes, grid, wire)
    for slot, name in zip(layout.states, names, strict=True):
        _draw_box(axes, grid.state_left(slot.column), slot.y, grid.state_width, name, INK, PANEL)
    return figure


@dataclass(frozen=True)
class _Grid:
    """Where the columns stand: operations, then the states they enter; no operation enters what is joined."""

    state_width: float
    op_width: float
    last_column: int
    ends_without_operations: bool

    @property
    def width(self) -> float:
        return self.state_left(self.last_column) + self.state_width + _MARGIN

    def op_left(self, column: int) -> float:
        return self.state_left(column) - _ARROW_SPAN - self.op_width

    def state_left(self, column: int) -> float:
        ops = self.op_width + _ARROW_SPAN
        left = _MARGIN + column * (self.state_width + _CURVE_SPAN + ops)
        return left - ops if self.ends_without_operations and column == self.last_column else left

    def state_right(self, column: int) -> float:
        return self.state_left(column) + self.state_width


def _check(edges: Sequence[Edge], state_count: int, concat: Sequence[int]) -> None:
    for source, target, op in edges:
        if not 0 <= source < target < state_count:
            raise UserError(
                f"edge {source} → {target} ({op}) must join two of {state_count} states, forwards"
            )
    for state in concat:
        if not 0 <= state < state_count:
            raise UserError(f"the output names state {state}, but the cell has only {state_count} states")


def _box_width(text: str) -> float:
    font = FontProperties(family=RC_PARAMS["font.sans-serif"], size=_FONT_SIZE)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return width / 72 + 2 * _BOX_PADDING


def _figure(slots: Sequence[Slot], width: float, title: str, families: dict[str, str]) -> tuple[Figure, Axes]:
    """A figure that fits the slots, all of it axes, with the title above and the legend below them."""
    legend_columns = max(1, int(width / _LEGEND_ENTRY_WIDTH))
    legend_height = _LEGEND_ROW_HEIGHT * ceil(len(families) / legend_columns)
    top = min(slot.y - slot.height / 2 for slot in slots) - _MARGIN - (_TITLE_HEIGHT if title else 0)
    bottom = max(slot.y + slot.height / 2 for slot in slots) + 2 * _MARGIN + legend_height
    figure = Figure(figsize=(width, bottom - top))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(bottom, top))
    axes.set_axis_off()
    axes.text(_MARGIN, top + _MARGIN, title, va="top", weight="bold", size=10)
    axes.legend(
        [Line2D([], [], color=colour, linewidth=3) for colour in families.values()],
        families,
        loc="lower left",
        ncols=legend_columns,
        fontsize=8,
        handlelength=1,
    )
    return figure, axes


def _draw_wire(axes: Axes, grid: _Grid, wire: Wire) -> None:
    source, *lanes, target = wire.route
    points = [(grid.state_right(source.column), source.y)]
    for lane in lanes:
        points += [(grid.op_left(lane.column), lane.y), (grid.state_right(lane.column), lane.y)]
    if wire.op is None:
        points.append((grid.state_left(target.column), target.y))
        axes.add_patch(PathPatch(_smooth(points), fill=False, edgecolor=MUTED, linewidth=0.9))
        return
    colour, op_left = op_style(wire.op).colour, grid.op_left(target.column)
    points.append((op_left, wire.end_y))
    axes.add_patch(PathPatch(_smooth(points), fill=False, edgecolor=colour, linewidth=1.3))
    _draw_box(axes, op_left, wire.end_y, grid.op_width, wire.op, colour, (colour, 0.13))
    tail = (op_left + grid.op_width, wire.end_y)
    tip = (grid.state_left(target.column), target.y + 0.3 * (wire.end_y - target.y))
    arrow_style = "-|>,head_length=3,head_width=2"
    axes.add_patch(FancyArrowPatch(tail, tip, arrowstyle=arrow_style, color=colour, shrinkA=0, shrinkB=0))


def _smooth(points: Sequence[tuple[float, float]]) -> Path:
    """A path that swings from each even point to the next and runs straight from each odd one."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for index in range(1, len(points)):
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        if index % 2:
            middle = (x0 + x1) / 2
            vertices += [(middle, y0), (middle, y1), (x1, y1)]
            codes += [Path.CURVE4] * 3
        else:
            vertices.append((x1, y1))
            codes.append(Path.LINETO)
    return Path(vertices, codes)


def _draw_box(
    axes: Axes, left: float, y: float, width: float, text: str, edge: str, face: str | tuple[str, float]
) -> None:
    box = FancyBboxPatch(
        (left, y - _BOX_HEIGHT / 2),
        width,
        _BOX_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.07",
        edgecolor=edge,
        facecolor=face,
    )
    axes.add_patch(box)
    axes.text(left + width / 2, y, text, ha="center", va="center_baseline", size=_FONT_SIZE)
