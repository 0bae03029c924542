"""A cell drawn as a graph, with matplotlib alone."""

from collections.abc import Sequence
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
from neuroexapt.report.cell_layout import Edge, Layout, lay_out
from neuroexapt.report.style import INK, MUTED, PANEL, RC_PARAMS, op_style, state_name

# Inches, which are the data coordinates of the axes as well.
_BOX_HEIGHT = 0.25
_STATE_WIDTH = 0.5
_ARROW = 0.22
_CURVE_SPAN = 0.85
_MARGIN = 0.12
_TITLE_HEIGHT = 0.3
_LEGEND_ROW = 0.22
_LEGEND_ENTRY_WIDTH = 1.75
_FONT_SIZE = 9


@matplotlib.rc_context(RC_PARAMS)
def draw_cell(
    edges: Sequence[Edge], node_names: Sequence[str], concat: Sequence[int], title: str = ""
) -> Figure:
    """Draw a cell: inputs left, output c_k right, a box for every operation before the state it enters.

    `edges` are (source, target, operation) with source < target, both indices into `node_names`; `concat`
    are the states that form the output, joined to it in grey. Raises UserError for an edge that runs
    backwards and for a state that the cell does not have.
    """
    _check(edges, len(node_names), concat)
    layout = lay_out(edges, len(node_names), concat)
    op_width = max((_text_width(op) for _, _, op in edges), default=0.0) + 0.18
    lefts = _column_lefts(len(layout.columns), op_width)
    width = lefts[-1] + _STATE_WIDTH + _MARGIN

    families = {op_style(op).family: op_style(op).colour for _, _, op in edges}
    legend_columns = max(1, int(width / _LEGEND_ENTRY_WIDTH))
    header = _TITLE_HEIGHT if title else 0.0
    footer = 0.1 + _LEGEND_ROW * ceil(len(families) / legend_columns)
    slots = [slot for column in layout.columns for slot in column]
    top = min(slot.y - slot.height / 2 for slot in slots) - _MARGIN - header
    bottom = max(slot.y + slot.height / 2 for slot in slots) + _MARGIN + footer

    figure = Figure(figsize=(width, bottom - top))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(bottom, top))
    axes.set_axis_off()
    if title:
        axes.text(_MARGIN, top + _MARGIN, title, va="top", weight="bold", size=10)
    _draw_wires(axes, layout, lefts, op_width)
    names = [*map(state_name, node_names), state_name("c_{k}")]
    for slot, name in zip(layout.states, names, strict=True):
        _draw_box(axes, lefts[slot.column], slot.y, _STATE_WIDTH, name, edge=INK, face=PANEL)
    figure.legend(
        [Line2D([], [], color=colour, linewidth=3) for colour in families.values()],
        families,
        loc="lower left",
        ncols=legend_columns,
        fontsize=8,
        handlelength=1,
        borderaxespad=0.6,
    )
    return figure


def _check(edges: Sequence[Edge], state_count: int, concat: Sequence[int]) -> None:
    for source, target, op in edges:
        if not 0 <= source < target < state_count:
            raise UserError(
                f"edge {source} → {target} ({op}) must join two of {state_count} states, forwards"
            )
    for state in concat:
        if not 0 <= state < state_count:
            raise UserError(f"the output names state {state}, but the cell has only {state_count} states")


def _text_width(text: str) -> float:
    font = FontProperties(family="DejaVu Sans", size=_FONT_SIZE)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return width / 72


def _column_lefts(count: int, op_width: float) -> list[float]:
    """The x at which the states of each column begin; the output's column, the last, has no operations."""
    step = _STATE_WIDTH + _CURVE_SPAN + op_width + _ARROW
    lefts = [_MARGIN + step * column for column in range(count)]
    lefts[-1] -= op_width + _ARROW
    return lefts


def _draw_wires(axes: Axes, layout: Layout, lefts: list[float], op_width: float) -> None:
    for wire in layout.wires:
        colour = op_style(wire.op).colour if wire.op else MUTED
        last = wire.route[-1]
        end_x = lefts[last.column] - (op_width + _ARROW if wire.op else 0)
        points = [(lefts[wire.route[0].column] + _STATE_WIDTH, wire.route[0].y)]
        for lane in wire.route[1:-1]:
            points += [
                (lefts[lane.column] - op_width - _ARROW, lane.y),
                (lefts[lane.column] + _STATE_WIDTH, lane.y),
            ]
        points.append((end_x, wire.end_y))
        axes.add_patch(
            PathPatch(_smooth(points), fill=False, edgecolor=colour, linewidth=1.3 if wire.op else 0.9)
        )
        if wire.op:
            _draw_box(axes, end_x, wire.end_y, op_width, wire.op, edge=colour, face=(colour, 0.13))
            tip = (lefts[last.column], last.y + (wire.end_y - last.y) * 0.3)
            axes.add_patch(
                FancyArrowPatch(
                    (end_x + op_width, wire.end_y),
                    tip,
                    arrowstyle="-|>,head_length=3,head_width=2",
                    color=colour,
                    shrinkA=0,
                    shrinkB=0,
                )
            )


def _smooth(points: list[tuple[float, float]]) -> Path:
    """A curve from each even point to the next and a straight line from each odd one."""
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
    axes: Axes, left: float, y: float, width: float, text: str, *, edge: str, face: str | tuple[str, float]
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, y - _BOX_HEIGHT / 2),
            width,
            _BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.07",
            edgecolor=edge,
            facecolor=face,
            linewidth=1,
        )
    )
    axes.text(left + width / 2, y, text, ha="center", va="center_baseline", size=_FONT_SIZE)
