"""The spaces S1 to S4 of RobustDARTS (Zela et al., ICLR 2020), in which plain DARTS fails: subsets of its
operations, and noise.
"""

from neuroexapt.spaces.cell_space import CellSpace


def _edges(words: str) -> tuple[tuple[str, ...], ...]:
    """Compact text: the candidates of every edge, joined by ``|``; of operations their size is written."""
    names = {"skip": "skip_connect", "max": "max_pool_3x3", "avg": "avg_pool_3x3"}
    names |= {f"{kind}{k}": f"{kind}_conv_{k}x{k}" for kind in ("sep", "dil") for k in (3, 5)}
    return tuple(tuple(names[name] for name in edge.split("|")) for edge in words.split())


S1 = CellSpace(
    "s1",
    ("skip_connect", "max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5"),
    candidates={
        "normal": _edges(
            "skip|dil3 skip|dil5 skip|dil5 skip|sep3 skip|dil3 max|skip skip|sep3 "
            "skip|sep3 skip|dil3 skip|sep3 max|skip skip|dil3 dil3|dil5 dil3|dil5"
        ),
        "reduce": _edges(
            "max|avg max|dil3 max|avg max|avg skip|dil5 max|avg max|sep3 "
            "skip|dil3 skip|dil5 max|avg max|avg skip|dil5 skip|dil5 skip|dil5"
        ),
    },
)
"""Two operations an edge, the strongest ones of an earlier search."""
S2 = CellSpace("s2", ("skip_connect", "sep_conv_3x3"))
S3 = CellSpace("s3", ("none", "skip_connect", "sep_conv_3x3"))
S4 = CellSpace("s4", ("noise", "sep_conv_3x3"))
"""Noise says nothing of the picture, so no search should choose it."""
