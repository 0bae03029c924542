"""Figures as SVG elements that live inside an HTML page."""

import io
import re

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from neuroexapt.report.style import RC_PARAMS, themed

LEAST_SCALE = 0.75
"""To which a wide figure is made smaller to fit the page; beyond, its letters would be too small to read."""
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@matplotlib.rc_context(RC_PARAMS)
def inline_svg(figure: Figure, identifier: str, description: str) -> Markup:
    """The figure as `<svg>` on a transparent ground, in the page's colours, read out as `description`.

    All ids start with `identifier`: matplotlib numbers its ids anew in every figure, and of two equal ids on
    a page only the first counts, so that one figure would be clipped by another's frame.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # matplotlib's style sheet has the selector `*`, which would reach the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{identifier}-", svg)
    least = LEAST_SCALE * 72 * figure.get_figwidth()
    attributes = f'role="img" aria-label="{escape(description)}" style="--least-width: {least:.0f}pt"'
    svg = svg.replace("<svg", f"<svg {attributes}", 1)
    return Markup(themed(svg))
