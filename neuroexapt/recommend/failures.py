"""What is kept of an exception that something else made up for."""

import textwrap


def in_one_line(error: Exception) -> str:
    """Its kind, and the first and the last line of its message: compilers put the cause last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return textwrap.shorten(f"{type(error).__name__}: {message}", width=300, placeholder=" …")
