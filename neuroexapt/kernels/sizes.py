"""Arithmetic of launches in plain Python, where Triton's own takes microseconds outside of kernels."""

MOST_PROGRAMS = 65_535
"""Along a grid's second or third axis."""


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉; ``triton.cdiv`` takes 5 µs."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
