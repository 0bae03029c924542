import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import neuroexapt
from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.interrupt import Interrupted
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.engine.training import TrainPhase
from neuroexapt.errors import UserError
from tests.engine.tiny import assert_same_run, dataset_of, killed_at, tiny_settings, weights_of


@pytest.mark.parametrize(
    ("phase", "epoch", "step"), [(SearchPhase, 0, 2), (SearchPhase, 1, 1), (TrainPhase, 0, 3)]
)
def test_resumes_bit_for_bit_from_any_step(
    phase: type, epoch: int, step: int, finished: Any, tmp_path: Path
) -> None:
    """With a checkpoint after every step, dying right before step ``step`` of ``epoch``."""
    settings = tiny_settings(tmp_path, dataset=dataset_of(finished.run_dir), checkpoint_seconds=1e-9)
    with killed_at(phase, epoch, step):
        neuroexapt.search(**settings)
    neuroexapt.search(resume=settings["out"], quiet=True)
    assert_same_run(finished.run_dir, settings["out"])


@pytest.mark.parametrize(("is_kept", "of_epochs"), [(True, [3, 3]), (False, [3, 1])])
def test_an_epoch_that_was_interrupted_took_all_its_seconds(
    is_kept: bool, of_epochs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second a step. Earlier versions did not keep when the epoch had begun."""
    seconds, steps = 0, SearchPhase.steps

    def timed_steps(self: Any, epoch: int, start: int) -> Iterator[torch.Tensor]:
        nonlocal seconds
        for metrics in steps(self, epoch, start):
            seconds += 1
            yield metrics

    monkeypatch.setattr(SearchPhase, "steps", timed_steps)
    monkeypatch.setattr("neuroexapt.engine.phase.time", SimpleNamespace(monotonic=lambda: seconds))
    settings = tiny_settings(tmp_path, train_epochs=0, checkpoint_seconds=1e-9)
    with killed_at(SearchPhase, 1, 2):
        neuroexapt.search(**settings)
    if not is_kept:
        checkpoint = settings["out"] / "checkpoints" / "search.safetensors"
        state = load_checkpoint(checkpoint)
        del state["position"]["epoch_began"]
        save_checkpoint(checkpoint, state)
    seconds = 1000
    found = neuroexapt.search(resume=settings["out"], quiet=True)
    timing = [json.loads(line) for line in (found.run_dir / "timing.jsonl").read_text().splitlines()]
    assert [record["seconds"] for record in timing] == of_epochs
    assert found.result["seconds_by_phase"]["search"] == 6


def test_a_finished_run_resumes_to_itself(finished: Any, tmp_path: Path) -> None:
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    again = neuroexapt.search(resume=finished.run_dir)
    assert again.genotype == finished.genotype
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before


def start_search(settings: dict[str, Any]) -> subprocess.Popen:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "quiet"]
    return subprocess.Popen(
        [sys.executable, "-m", "neuroexapt", "search", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def wait_for_steps(run: Path, count: int) -> None:
    """Until the run has recorded ``count`` epochs."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the search did not get there in time")


LONG = {"epochs": 10, "train_epochs": 1}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return neuroexapt.search(**tiny_settings(tmp_path_factory.mktemp("long"), **LONG))


def test_sigkill_then_resume_equals_an_uninterrupted_run(long_run: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, dataset=dataset_of(long_run.run_dir), **LONG)
    for epochs in (2, 5):
        process = start_search(settings if epochs == 2 else {"resume": settings["out"]})
        wait_for_steps(settings["out"], epochs)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    neuroexapt.search(resume=settings["out"], quiet=True)
    assert_same_run(long_run.run_dir, settings["out"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(number: int, long_run: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, dataset=dataset_of(long_run.run_dir), **LONG)
    process = start_search(settings)
    wait_for_steps(settings["out"], 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    last = errors.strip().splitlines()[-1]
    assert "everything is saved. Continue with: neuroexapt search --resume" in last
    assert "Traceback" not in errors
    position = load_checkpoint(settings["out"] / "checkpoints" / "search.safetensors")["position"]
    assert f"epoch {position['epoch']}, step {position['step']}" in last
    neuroexapt.search(resume=settings["out"], quiet=True)
    assert_same_run(long_run.run_dir, settings["out"])


def test_interruption_reaches_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = SearchPhase.steps

    def interrupting_steps(self: Any, epoch: int, start: int) -> Iterator[torch.Tensor]:
        for metrics in steps(self, epoch, start):
            signal.raise_signal(signal.SIGINT)
            yield metrics

    monkeypatch.setattr(SearchPhase, "steps", interrupting_steps)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="epoch 0, step 1"):
        neuroexapt.search(**tiny_settings(tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = SearchPhase.steps

    def failing_steps(self: Any, epoch: int, start: int) -> Iterator[torch.Tensor]:
        for i, metrics in enumerate(steps(self, epoch, start), start):
            yield metrics * torch.nan if (epoch, i) == (1, 1) else metrics

    settings = tiny_settings(tmp_path, checkpoint_seconds=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(SearchPhase, "steps", failing_steps)
        with pytest.raises(
            UserError, match="train_loss became nan in phase search, epoch 1, step 1; the last good"
        ):
            neuroexapt.search(**settings)
    kept = load_checkpoint(settings["out"] / "checkpoints" / "search.safetensors")
    assert (kept["position"]["epoch"], kept["position"]["step"]) == (1, 1)
    assert all(t.isfinite().all() for t in kept["phase"]["supernet"].values())


def test_non_finite_weights_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = SearchPhase.steps

    def spoiling_steps(self: Any, epoch: int, start: int) -> Iterator[torch.Tensor]:
        for metrics in steps(self, epoch, start):
            if epoch == 1:
                self.supernet.classifier.weight.data.fill_(torch.inf)
            yield metrics

    monkeypatch.setattr(SearchPhase, "steps", spoiling_steps)
    settings = tiny_settings(tmp_path)
    with pytest.raises(UserError, match=r"became (inf|nan) in phase search, epoch 1"):
        neuroexapt.search(**settings)
    kept = weights_of(settings["out"], "search")
    assert all(t.isfinite().all() for t in kept.values())


class TestResumeRefuses:
    @pytest.fixture
    def run(self, finished: Any, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(finished.run_dir, tmp_path / "my copy"))

    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no config\.json"):
            neuroexapt.search(resume=tmp_path)

    def test_a_run_without_checkpoints(self, run: Path) -> None:
        for checkpoint in (run / "checkpoints").iterdir():
            checkpoint.unlink()
        with pytest.raises(UserError, match=r"search\.safetensors is missing"):
            neuroexapt.search(resume=run)

    def test_a_run_of_the_other_kind(self, run: Path) -> None:
        with pytest.raises(UserError, match=r"go on with neuroexapt search --resume '/.*copy'"):
            neuroexapt.evaluate(resume=run)

    def test_a_run_that_lost_its_search_checkpoint(self, run: Path) -> None:
        (run / "checkpoints" / "search.safetensors").unlink()
        with pytest.raises(UserError, match=r"search\.safetensors is missing"):
            neuroexapt.search(resume=run)

    def test_changed_settings(self, run: Path) -> None:
        with pytest.raises(UserError, match="keeps its settings: leave out --epochs, --seed"):
            neuroexapt.search(resume=run, seed=3, epochs=9, quiet=True)

    def test_an_edited_config(self, run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "epochs": 3}))
        with pytest.raises(UserError, match="epochs was 2 and is 3"):
            neuroexapt.search(resume=run)

    def test_records_that_are_missing_or_damaged(self, run: Path) -> None:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[1:]))
        with pytest.raises(UserError, match="lacks records of phase search, epochs 0 to 1"):
            neuroexapt.search(resume=run)
        (run / "metrics.jsonl").write_text("{oops\n" + "".join(lines[1:]))
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 1, is damaged"):
            neuroexapt.search(resume=run)

    def test_other_data(self, run: Path, tmp_path: Path) -> None:
        import numpy as np

        config = json.loads((run / "config.json").read_text())
        arrays = dict(np.load(config["dataset"].removeprefix("npz:")))
        arrays["y_train"] = arrays["y_train"][::-1]
        np.savez(tmp_path / "other.npz", **arrays)
        state = load_checkpoint(run / "checkpoints" / "search.safetensors")
        state["identity"]["dataset"] = config["dataset"] = f"npz:{tmp_path / 'other.npz'}"
        save_checkpoint(run / "checkpoints" / "search.safetensors", state)
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="data was"):
            neuroexapt.search(resume=run)
