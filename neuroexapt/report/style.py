"""Colours, lettering and operation styles that every figure of the report shares.

Figures are drawn in the light colours below. `DARK` names the counterpart that the HTML page swaps in for
each of them when the reader prefers a dark page, so that one drawing serves both.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Any

INK = "#1f2430"
MUTED = "#667080"
GRID = "#dfe3e8"
PANEL = "#eef1f4"
SURFACE = "#ffffff"
ACCENT = "#5746af"
CONTRAST = "#b3530a"

# Okabe and Ito's colour-blind safe palette, the light ones darkened until a thin line of them shows on white.
_FAMILIES = (
    ("sep_conv", "separable convolution", "#0072b2"),
    ("dil_conv", "dilated convolution", "#b8508a"),
    ("conv", "convolution", "#35a0e0"),
    ("avg_pool", "average pooling", "#d99000"),
    ("max_pool", "max pooling", "#cf5200"),
    ("skip", "skip connection", "#009e73"),
    ("none", "none", "#8b919c"),
)
_UNKNOWN_COLOURS = ("#7a6a00", "#7b4fc9", "#8c4a2f", "#0f8391")

DARK = {
    INK: "#e6e9ee",
    MUTED: "#9aa4b2",
    GRID: "#333a45",
    PANEL: "#262c36",
    SURFACE: "#171b21",
    ACCENT: "#a79bf2",
    CONTRAST: "#f0a060",
    "#0072b2": "#4fabe6",
    "#b8508a": "#e58cbd",
    "#35a0e0": "#8fd0fa",
    "#d99000": "#f2b52e",
    "#cf5200": "#f58349",
    "#009e73": "#2fc79b",
    "#8b919c": "#8b919c",
    "#7a6a00": "#cdbb3a",
    "#7b4fc9": "#b899f0",
    "#8c4a2f": "#d29a80",
    "#0f8391": "#46bccb",
}

RC_PARAMS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": SURFACE,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}

_SUBSCRIPTS = str.maketrans("0123456789+-k", "₀₁₂₃₄₅₆₇₈₉₊₋ₖ")


@dataclass(frozen=True)
class OpStyle:
    """How one operation looks everywhere: the colour says its family, the dashes its kernel size."""

    family: str
    colour: str
    line: str


def op_style(op: str) -> OpStyle:
    """The style of operation `op`; one that no family knows is a family of its own."""
    kernel_sizes = [int(size) for size in re.findall(r"(\d+)x\d+", op)]
    line = {5: "dashed", 7: "dotted"}.get(max(kernel_sizes, default=3), "solid")
    for stem, family, colour in _FAMILIES:
        if stem in op:
            return OpStyle(family, colour, line)
    return OpStyle(op, _UNKNOWN_COLOURS[zlib.crc32(op.encode()) % len(_UNKNOWN_COLOURS)], line)


def state_name(name: str) -> str:
    """`name` with TeX subscripts as Unicode: `c_{k-2}` becomes cₖ₋₂."""
    return re.sub(r"_\{([^}]*)\}", lambda match: match[1].translate(_SUBSCRIPTS), name)
