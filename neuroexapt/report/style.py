"""Colours, lettering and operation styles that every figure of the report shares."""

import re
import zlib
from dataclasses import dataclass
from typing import Any

# Name: colour on a light page, colour on a dark one. Figures are drawn in the light colours; `themed` makes
# them follow the page. The operations' colours are Okabe and Ito's palette, safe for the colour-blind, the
# pale ones darkened until a thin line of them shows on white.
THEME = {
    "ink": ("#1f2430", "#e6e9ee"),
    "muted": ("#667080", "#9aa4b2"),
    "grid": ("#dfe3e8", "#333a45"),
    "panel": ("#eef1f4", "#262c36"),
    "surface": ("#ffffff", "#181c22"),
    "page": ("#f5f6f8", "#0f1216"),
    "accent": ("#5746af", "#a79bf2"),
    "contrast": ("#b3530a", "#f0a060"),
    "sep_conv": ("#0072b2", "#4fabe6"),
    "dil_conv": ("#b8508a", "#e58cbd"),
    "conv": ("#35a0e0", "#8fd0fa"),
    "avg_pool": ("#d99000", "#f2b52e"),
    "max_pool": ("#cf5200", "#f58349"),
    "skip": ("#009e73", "#2fc79b"),
    "none": ("#8b919c", "#8b919c"),
    "unknown_0": ("#7a6a00", "#cdbb3a"),
    "unknown_1": ("#7b4fc9", "#b899f0"),
    "unknown_2": ("#8c4a2f", "#d29a80"),
    "unknown_3": ("#0f8391", "#46bccb"),
}
INK, MUTED, GRID, PANEL, SURFACE, ACCENT, CONTRAST = (
    THEME[name][0] for name in ("ink", "muted", "grid", "panel", "surface", "accent", "contrast")
)

# By a part of the operation's name, the first that fits: what to call it, and its colour. Operations of
# recommenders never meet those of pictures and have the same colours.
_FAMILIES = {
    "sep_conv": ("separable convolution", "sep_conv"),
    "dil_conv": ("dilated convolution", "dil_conv"),
    "conv": ("convolution", "conv"),
    "avg_pool": ("average pooling", "avg_pool"),
    "max_pool": ("max pooling", "max_pool"),
    "skip": ("skip connection", "skip"),
    "none": ("none", "none"),
    "hstu_local": ("HSTU over a window", "dil_conv"),
    "hstu": ("HSTU", "sep_conv"),
    "attn": ("attention", "unknown_3"),
    "fusion": ("fusion of windows", "unknown_2"),
    "ffn": ("feed-forward", "avg_pool"),
    "dot_interaction": ("dot interaction", "max_pool"),
    "mb_k3": ("inverted residual, 3x3", "sep_conv"),
    "mb_k5": ("inverted residual, 5x5", "dil_conv"),
    "mb_k7": ("inverted residual, 7x7", "max_pool"),
}

RC_PARAMS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "neuroexapt",
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
    """How one operation looks everywhere: the colour says its family, the dashes its kernel size, or how much
    an inverted residual expands.
    """

    family: str
    colour: str
    line: str


def op_style(op: str) -> OpStyle:
    """The style of operation `op`; one that no family knows is a family of its own."""
    sizes = [int(size) for size in re.findall(r"\d+(?=x\d)|(?<=_e)\d+", op)]
    line = {1: "dotted", 5: "dashed", 6: "dashed", 7: "dotted"}.get(max(sizes, default=3), "solid")
    for stem, (family, colour) in _FAMILIES.items():
        if stem in op:
            return OpStyle(family, THEME[colour][0], line)
    return OpStyle(op, THEME[f"unknown_{zlib.crc32(op.encode()) % 4}"][0], line)


def themed(text: str) -> str:
    """`text`, a piece of SVG or CSS, with each light colour replaced by its CSS variable, as `var(--ink)`."""
    for name, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{name})")
    return text


def state_name(name: str) -> str:
    """`name` with TeX subscripts as Unicode: `c_{k-2}` becomes cₖ₋₂."""
    return re.sub(r"_\{([^}]*)\}", lambda match: match[1].translate(_SUBSCRIPTS), name)
