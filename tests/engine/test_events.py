import errno
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import neuroexapt
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.errors import UserError
from tests.engine.tiny import killed_at, tiny_settings


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_event_files_hold_what_the_run_recorded(tmp_path: Path) -> None:
    result = neuroexapt.search(**tiny_settings(tmp_path))
    events = events_of(result.run_dir / "tensorboard" / "search")
    tags = events.Tags()

    curve = result.curves["search"]
    for name in ("train_loss", "train_accuracy", "arch_loss", "valid_loss", "valid_accuracy"):
        values = [event.value for event in events.Scalars(f"epoch/{name}")]
        assert [round(v, 5) for v in values] == [round(v, 5) for v in curve[name]], name
    assert {"epoch/steps_per_second", "epoch/peak_memory_bytes"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("step/train_loss")] == list(range(6))
    entropies = [tag for tag in tags["scalars"] if tag.startswith("alpha_entropy_normal/")]
    assert len(entropies) == 14
    assert set(tags["images"]) == {"alpha/normal", "alpha/reduce", "cell/normal", "cell/reduce"}
    assert {event.step for event in events.Images("cell/normal")} == {2, 5}
    assert "epoch/test_accuracy" in events_of(result.run_dir / "tensorboard" / "inherit").Tags()["scalars"]


def test_resuming_between_epochs_keeps_all_events(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, epochs=3, train_epochs=0)
    with killed_at(SearchPhase, 2, 0):
        neuroexapt.search(**settings)
    for _ in range(2):  # on from epoch 2, then once more when all is done
        neuroexapt.search(resume=settings["out"], quiet=True)
        events = events_of(settings["out"] / "tensorboard" / "search")
        assert [event.step for event in events.Scalars("epoch/valid_accuracy")] == [2, 5, 8]
        assert [event.step for event in events.Scalars("step/train_loss")] == list(range(9))


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(UserError, match="No space left on device; make room or choose another place"):
        neuroexapt.search(**tiny_settings(tmp_path))
