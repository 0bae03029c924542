from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import neuroexapt
from tests.engine.tiny import tiny_settings


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
    assert {event.step for event in events.Images("cell/normal")} == {3, 6}
    assert "epoch/test_accuracy" in events_of(result.run_dir / "tensorboard" / "inherit").Tags()["scalars"]
