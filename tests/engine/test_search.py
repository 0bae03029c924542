import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import neuroexapt
from neuroexapt.core.genotypes import DARTS_V2, Genotype
from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.interrupt import Interrupted
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.engine.training import TrainPhase, cosine
from neuroexapt.errors import UserError
from tests.engine.tiny import tiny_settings


def weights_of(run: Path, phase: str) -> dict[str, torch.Tensor]:
    state = load_checkpoint(run / "checkpoints" / f"{phase}.safetensors")["phase"]
    return state["supernet" if phase == "search" else "network"]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: every weight and α of every phase, every metric, the genotype."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert (a / "genotype.json").read_bytes() == (b / "genotype.json").read_bytes()
    for phase in ("search", "inherit", "scratch"):
        x, y = weights_of(a, phase), weights_of(b, phase)
        assert list(x) == list(y)
        assert all(torch.equal(x[name], y[name]) for name in x), phase


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return neuroexapt.search(**tiny_settings(tmp_path_factory.mktemp("finished")))


def test_result_and_run_folder_are_complete(finished: Any) -> None:
    run = finished.run_dir
    result = json.loads((run / "result.json").read_text())
    assert set(result) >= {
        "genotype", "valid_accuracy", "test_accuracy", "seconds", "steps_per_second", "parameters",
        "peak_memory_bytes", "versions", "device",
    }  # fmt: skip
    assert Genotype.from_dict(result["genotype"]) == finished.genotype
    assert json.loads((run / "genotype.json").read_text()) == result["genotype"]
    assert result["parameters"] == sum(p.numel() for p in finished.model.parameters())
    assert result["seconds"] > 0
    epochs = {phase: len(curve["train_loss"]) for phase, curve in finished.curves.items()}
    assert epochs == {"search": 2, "inherit": 1, "scratch": 1}
    assert (run / "report.html").stat().st_size > 10_000
    assert {p.name for p in (run / "tensorboard").iterdir()} == {"search", "inherit", "scratch"}
    assert neuroexapt.derive(run) == finished.genotype


def test_split_is_recorded_disjoint_and_complete(finished: Any) -> None:
    split = json.loads((finished.run_dir / "split.json").read_text())
    assert sorted(split["w"] + split["alpha"]) == list(range(48))
    assert len(split["w"]) == 24


def test_recorded_test_accuracy_is_the_models(finished: Any) -> None:
    import numpy as np

    from neuroexapt.data import load_dataset, normalise

    data = load_dataset(json.loads((finished.run_dir / "config.json").read_text())["dataset"])
    x = normalise(data.test.images, torch.tensor(data.mean), torch.tensor(data.std))
    # The result's model is the one with the inherited weights.
    with torch.no_grad():
        predicted = finished.model.eval()(x).argmax(dim=1)
    accuracy = np.mean((predicted == data.test.labels).numpy())
    assert accuracy == pytest.approx(finished.result["test_accuracy"])


def test_one_seed_gives_one_result(finished: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, dataset=_dataset_of(finished))
    torch.manual_seed(123)  # whatever was random before
    again = neuroexapt.search(**settings)
    assert_same_run(finished.run_dir, again.run_dir)


def _dataset_of(finished: Any) -> str:
    return json.loads((finished.run_dir / "config.json").read_text())["dataset"]


def test_another_seed_gives_another_result(finished: Any, tmp_path: Path) -> None:
    other = neuroexapt.search(**tiny_settings(tmp_path, dataset=_dataset_of(finished), seed=1))
    assert not torch.equal(
        weights_of(other.run_dir, "search")["alphas.normal"],
        weights_of(finished.run_dir, "search")["alphas.normal"],
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("phase", "epoch", "step"), [(SearchPhase, 0, 2), (SearchPhase, 1, 1), (TrainPhase, 0, 3)]
)
def test_resumes_bit_for_bit_from_any_step(
    phase: type, epoch: int, step: int, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint after every step, dying right before step ``step`` of ``epoch``."""
    settings = tiny_settings(tmp_path, dataset=_dataset_of(finished), checkpoint_seconds=1e-9)
    steps = phase.steps

    def dying_steps(self: Any, at_epoch: int, start: int) -> Iterator[torch.Tensor]:
        for i, metrics in enumerate(steps(self, at_epoch, start), start):
            if (at_epoch, i) == (epoch, step):
                raise Killed
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(phase, "steps", dying_steps)
        with pytest.raises(Killed):
            neuroexapt.search(**settings)
    neuroexapt.search(resume=settings["out"], quiet=True)
    assert_same_run(finished.run_dir, settings["out"])


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
    deadline = time.monotonic() + 120
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
    settings = tiny_settings(tmp_path, dataset=_dataset_of(long_run), **LONG)
    for epochs in (2, 5):
        process = start_search(settings if epochs == 2 else {"resume": settings["out"]})
        wait_for_steps(settings["out"], epochs)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    neuroexapt.search(resume=settings["out"], quiet=True)
    assert_same_run(long_run.run_dir, settings["out"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(number: int, long_run: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, dataset=_dataset_of(long_run), **LONG)
    process = start_search(settings)
    wait_for_steps(settings["out"], 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
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


def test_refuses_to_replace_a_run(finished: Any) -> None:
    settings = {"dataset": _dataset_of(finished), "batch_size": 8, "out": finished.run_dir}
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        neuroexapt.search(**settings)
    assert (finished.run_dir / "result.json").exists()


def test_refuses_a_folder_of_something_else_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no run; choose another folder"):
        neuroexapt.search(**tiny_settings(tmp_path, overwrite=True))
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_overwrite_is_not_carried_out_when_the_new_run_is_refused(finished: Any) -> None:
    with pytest.raises(UserError, match="do not fill a batch"):
        neuroexapt.search(
            dataset=_dataset_of(finished), batch_size=500, out=finished.run_dir, overwrite=True, quiet=True
        )
    assert (finished.run_dir / "result.json").exists()


class TestResumeRefuses:
    @pytest.fixture
    def run(self, finished: Any, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(finished.run_dir, tmp_path / "copy"))

    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no config\.json"):
            neuroexapt.search(resume=tmp_path)

    def test_a_run_without_checkpoints(self, run: Path) -> None:
        for checkpoint in (run / "checkpoints").iterdir():
            checkpoint.unlink()
        with pytest.raises(UserError, match=r"search\.safetensors is missing"):
            neuroexapt.search(resume=run)

    def test_a_run_of_the_other_kind(self, run: Path) -> None:
        with pytest.raises(UserError, match=r"evaluate\.safetensors is missing"):
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


def test_warm_up_keeps_alpha(tmp_path: Path) -> None:
    result = neuroexapt.search(**tiny_settings(tmp_path, warmup_epochs=1, train_epochs=0))
    first, last = result.curves["search"]["alpha"]
    assert all(abs(w - 0.125) < 1e-3 for row in first["normal"] for w in row)
    assert first != last
    assert "arch_loss" not in json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])


def test_second_order_search_runs(tmp_path: Path) -> None:
    result = neuroexapt.search(**tiny_settings(tmp_path, strategy="darts-2nd", epochs=1, train_epochs=0))
    assert result.result["test_accuracy"] >= 0


def test_evaluate_trains_and_resumes_without_its_genotype_file(tmp_path: Path) -> None:
    file = tmp_path / "genotype.json"
    file.write_text(json.dumps(DARTS_V2.to_dict()))
    settings = tiny_settings(tmp_path, genotype=str(file), epochs=2, auxiliary=False, drop_path=0.2)
    for name in ("train_epochs", "arch_learning_rate"):
        settings.pop(name)
    result = neuroexapt.evaluate(**settings)
    assert result.genotype == DARTS_V2
    assert len(result.curves["evaluate"]["test_accuracy"]) == 2
    file.unlink()
    assert (
        neuroexapt.evaluate(resume=settings["out"]).result["test_accuracy"] == result.result["test_accuracy"]
    )


def test_cosine_is_the_published_schedule() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.025)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.001)
    for epoch in range(50):
        assert cosine(epoch, 50, 0.025, 0.001) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
