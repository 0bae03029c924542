"""The figures of a search: α as a heat map and over time, its entropy, curves, exapt against from-scratch."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from neuroexapt.report.style import ACCENT, CONTRAST, INK, MUTED, RC_PARAMS, SURFACE, op_style, state_name

_CURVE_SIZE = (4.6, 2.7)
_PANEL_SIZE = (2.3, 1.7)


def edge_names(edges: Sequence[tuple[int, int]], node_names: Sequence[str]) -> list[str]:
    """A name for each (source, target) edge, as `cₖ₋₂ → 0`."""
    return [
        f"{state_name(node_names[source])} → {state_name(node_names[target])}" for source, target in edges
    ]


@matplotlib.rc_context(RC_PARAMS)
def alpha_heat_map(
    weights: ArrayLike, edge_labels: Sequence[str], primitives: Sequence[str], title: str = ""
) -> Figure:
    """Softmax weights of one cell type, [edges, primitives], as a grid, the largest of each row in bold.

    The colour scale is full at 0.5, or at the largest weight above that, so that grids of different epochs
    compare and weights near uniform look even.
    """
    weights = np.asarray(weights, dtype=float)
    edge_count, op_count = weights.shape
    full = max(0.5, weights.max())
    figure, axes = _grid_axes(edge_labels, primitives, title)
    # The scale runs from clear to full instead of from white, and so suits a page of any colour.
    scale = LinearSegmentedColormap.from_list("weight", [(ACCENT, 0.03), (ACCENT, 1.0)])
    axes.pcolormesh(weights, cmap=scale, vmin=0, vmax=full, edgecolor=SURFACE, linewidth=1.5)
    for (edge, op), weight in np.ndenumerate(weights):
        axes.text(
            op + 0.5,
            edge + 0.5,
            f"{weight:.2f}",
            ha="center",
            va="center_baseline",
            size=8,
            color=SURFACE if weight > 0.7 * full else INK,
            weight="bold" if weight == weights[edge].max() else "normal",
        )
    axes.set_yticks(np.arange(edge_count) + 0.5, edge_labels, color=INK)
    axes.set_xticks(
        np.arange(op_count) + 0.5, primitives, rotation=30, ha="left", rotation_mode="anchor", color=INK
    )
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.invert_yaxis()
    return figure


@matplotlib.rc_context(RC_PARAMS)
def alpha_history(history: ArrayLike, primitives: Sequence[str], top: float, title: str = "") -> Figure:
    """Softmax weights of one edge over time, [epochs, primitives], up to `top`, in the operations' styles."""
    figure, axes = _axes(_PANEL_SIZE, 0.4, title)
    history = np.asarray(history, dtype=float)
    for op, weights in zip(primitives, history.T, strict=True):
        style = op_style(op)
        _plot(axes, weights, color=style.colour, linestyle=style.line, linewidth=1.3)
    axes.set_ylim(0, top)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    return figure


@matplotlib.rc_context(RC_PARAMS)
def entropy_history(history: ArrayLike, op_count: int, title: str = "") -> Figure:
    """Entropy of α in nats over time, [epochs, edges]: edges thin, their mean bold, the maximum dotted."""
    figure, axes = _axes(_CURVE_SIZE, 0.95, title)
    history = np.asarray(history, dtype=float)
    one_edge: dict[str, Any] = {"color": MUTED, "linewidth": 0.7, "alpha": 0.6}
    _plot(axes, history, **one_edge)
    _plot(axes, history.mean(axis=1), color=ACCENT, linewidth=2.2, label="mean of all edges")
    axes.plot([], [], label="one edge", **one_edge)
    axes.axhline(log(op_count), color=INK, linestyle="dotted", linewidth=1, label=f"uniform, ln {op_count}")
    axes.set_ylabel("entropy (nats)")
    axes.set_ylim(0, 1.1 * log(max(op_count, 2)))
    axes.legend(fontsize=8)
    return figure


@matplotlib.rc_context(RC_PARAMS)
def curves(values: Mapping[str, Sequence[float]], quantity: str, title: str = "") -> Figure:
    """Up to three named curves over the epochs; `quantity` labels them and is in per cent if an accuracy."""
    figure, axes = _axes(_CURVE_SIZE, 0.95, title)
    for (name, curve), colour in zip(values.items(), (ACCENT, CONTRAST, MUTED), strict=False):
        _plot(axes, curve, color=colour, label=name)
    axes.set_ylabel(quantity)
    if quantity.endswith("accuracy"):
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(fontsize=8)
    return figure


def _grid_axes(rows: Sequence[str], columns: Sequence[str], title: str) -> tuple[Figure, Axes]:
    """Axes of cells of a fixed size, in a figure with room for the names on the left and leaning above."""
    longest_row, longest_column = max(map(len, rows)), max(map(len, columns))
    grid_width, grid_height = 0.62 * len(columns), 0.26 * len(rows)
    left, bottom = 0.15 + 0.075 * longest_row, 0.08
    width = left + grid_width + max(0.1, 0.07 * longest_column - 0.2)
    height = bottom + grid_height + 0.25 + 0.042 * longest_column + (0.3 if title else 0)
    figure = Figure(figsize=(width, height))
    rectangle = (left / width, bottom / height, grid_width / width, grid_height / height)
    return figure, figure.add_axes(rectangle, title=title)


def _axes(size: tuple[float, float], left: float, title: str) -> tuple[Figure, Axes]:
    """Axes over epochs with the same margins, in inches, in every figure of a kind, so that columns align."""
    width, height = size
    figure = Figure(figsize=size)
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.1 / width,
        bottom=0.44 / height,
        top=1 - (0.28 if title else 0.1) / height,
    )
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _plot(axes: Axes, values: Sequence[float] | np.ndarray, **style: Any) -> None:
    """Values over the epochs, from 1 on; those of a single epoch as dots, since no line would show."""
    axes.plot(range(1, len(values) + 1), values, marker="o" if len(values) == 1 else None, **style)
