"""How strengths and temperatures change over a search."""


def linear(start: float, end: float, epoch: int, epochs: int) -> float:
    """From ``start`` in the first epoch to ``end`` in the last one."""
    return start + (end - start) * epoch / max(1, epochs - 1)
