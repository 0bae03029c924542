import io

import pytest
from rich.console import Console

from neuroexapt.engine.progress import Progress

VALUES = {"train_loss": 1.6632, "train_accuracy": 0.4276, "arch_loss": 1.5754}


def live_line(width: int) -> str:
    """The last state of the live line of a search in a terminal of ``width`` columns."""
    out = io.StringIO()
    progress = Progress(quiet=False)
    progress.console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with progress.phase("search", 50, 390):
        for step in (1, 100, 200):
            progress.step(12, step, VALUES)
        progress.live.refresh()
    return next(
        line for line in reversed(out.getvalue().replace("\r", "\n").splitlines()) if "step 200" in line
    )


@pytest.mark.parametrize("width", [80, 120])
def test_live_line_shows_position_time_left_and_numbers(width: int) -> None:
    line = live_line(width)
    assert "search 13/50 step 200/390" in line
    assert ":" in line.split("left")[0], "the time left"
    assert "…" not in line.split("left")[0]
    assert "loss 1.663  acc 0.428" in line


def test_wide_terminal_shows_all() -> None:
    line = live_line(120)
    assert "α loss 1.575" in line
    assert "steps/s" in line


def test_quiet_and_non_terminals_have_no_live_line() -> None:
    for progress in (Progress(quiet=True), Progress(quiet=False)):
        with progress.phase("search", 1, 1):
            assert progress.live is None
            progress.step(0, 1, VALUES)


@pytest.mark.parametrize(("speed", "shown"), [(12.34, "12.3 steps/s"), (0.04, "25.0 s a step")])
def test_a_line_an_epoch_tells_speed_where_steps_are_slow_too(
    speed: float, shown: str, capsys: pytest.CaptureFixture
) -> None:
    progress = Progress(quiet=False)
    with progress.phase("search", 5, 390):
        progress.end_epoch({"epoch": 2, **VALUES}, {"steps_per_second": speed})
    line = capsys.readouterr().err
    assert line.startswith("search epoch 3/5  loss 1.6632")
    assert line.rstrip().endswith(shown)
