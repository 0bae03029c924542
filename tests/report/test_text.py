"""Numbers as the report prints them."""

import pytest

from neuroexapt.report.text import duration, large, memory, percent, points, rate


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (percent, 0.98765, "98.77 %"),
        (points, 0.0123, "+1.23"),
        (points, -0.5, "−50.00"),
        (large, 950, "950"),
        (large, 3_349_342, "3.35 M"),
        (rate, 12.345, "12.3"),
        (rate, 12345.6, "12,346"),
        (duration, 0.25, "0.25 s"),
        (duration, 59.99, "1 min 0 s"),
        (duration, 75, "1 min 15 s"),
        (duration, 7260, "2 h 1 min"),
        (memory, 5 * 2**20, "5 MiB"),
        (memory, 1.5 * 2**30, "1.5 GiB"),
    ],
)
def test_numbers(write, value, text):
    assert write(value) == text
