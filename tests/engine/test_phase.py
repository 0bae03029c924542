from pathlib import Path
from typing import Any

import pytest

import neuroexapt
from neuroexapt.engine.phase import PhaseRunner
from tests.engine.tiny import assert_same_run, dataset_of, tiny_settings


@pytest.mark.parametrize("lag", [1, 2, 100])
def test_metrics_that_are_read_later_are_the_same(
    lag: int, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the newest steps are left out of a look; looking after every step shows the seams."""
    made = PhaseRunner.__init__

    def lagging(self: PhaseRunner, *arguments: Any) -> None:
        made(self, *arguments)
        self._lag = lag

    monkeypatch.setattr(PhaseRunner, "__init__", lagging)
    monkeypatch.setattr("neuroexapt.engine.phase.LOOK_STEPS", 1)
    again = neuroexapt.search(**tiny_settings(tmp_path, dataset=dataset_of(finished.run_dir)))
    assert_same_run(finished.run_dir, again.run_dir)
