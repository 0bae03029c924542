import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import neuroexapt
from neuroexapt.core.genotypes import DARTS_V2, Genotype
from neuroexapt.engine import evaluate
from neuroexapt.engine.evaluate import resnet18
from neuroexapt.engine.training import TrainPhase
from neuroexapt.errors import UserError
from tests.engine.tiny import dataset_of, killed_at, tiny_settings, weights_of


def evaluate_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = tiny_settings(folder, auxiliary=False, **changes)
    return {k: v for k, v in settings.items() if k not in ("train_epochs", "arch_learning_rate")}


def test_evaluate_trains_and_resumes_without_its_genotype_file(tmp_path: Path) -> None:
    file = tmp_path / "genotype.json"
    file.write_text(json.dumps(DARTS_V2.to_dict()))
    settings = evaluate_settings(tmp_path, genotype=str(file), drop_path=0.2)
    result = neuroexapt.evaluate(**settings)
    assert result.genotype == DARTS_V2
    assert len(result.curves["evaluate"]["test_accuracy"]) == 2
    file.unlink()
    assert (
        neuroexapt.evaluate(resume=settings["out"]).result["test_accuracy"] == result.result["test_accuracy"]
    )


def test_bf16_keeps_weights_and_tests_in_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = evaluate_settings(tmp_path, epochs=1, precision=precision, out=tmp_path / precision)
        result = neuroexapt.evaluate(**settings)
        losses[precision] = result.curves["evaluate"]["train_loss"]
        assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


def fast_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Everything that the fast recipe has, small, over two seeds and next to a random genotype."""
    own = {"recipe": "fast", "learning_rate_warmup": 0.5, "seeds": 2, "seed": 3, "controls": "random"}
    return evaluate_settings(folder, **{**own, **changes})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return neuroexapt.evaluate(**fast_settings(tmp_path_factory.mktemp("compared")))


PHASES = ("evaluate", "evaluate-seed4", "random", "random-seed4")


def test_means_and_deviations_are_over_seeds(compared: Any) -> None:
    assert tuple(compared.curves) == PHASES
    result = compared.result
    for kind, outcome in {"evaluate": result, **result["controls"]}.items():
        last = [compared.curves[phase]["test_accuracy"][-1] for phase in (kind, f"{kind}-seed4")]
        assert outcome["test_accuracies"] == last
        assert outcome["test_accuracy"] == pytest.approx(statistics.mean(last))
        assert outcome["test_accuracy_deviation"] == pytest.approx(statistics.stdev(last))
    losses = {tuple(compared.curves[phase]["train_loss"]) for phase in PHASES}
    assert len(losses) == len(PHASES), "no two trainings are the same"
    assert json.loads((compared.run_dir / "result.json").read_text()) == result
    assert set(result["seconds_by_phase"]) == set(PHASES)


def test_every_seed_draws_a_random_genotype_of_its_own(compared: Any) -> None:
    one, other = map(Genotype.from_dict, compared.result["controls"]["random"]["genotypes"])
    assert len({one, other, compared.genotype}) == 3


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    result = neuroexapt.evaluate(**evaluate_settings(tmp_path, epochs=1)).result
    assert (result["test_accuracy_deviation"], result["controls"]) == (None, {})


def test_the_average_is_what_is_tested_and_given_back(compared: Any) -> None:
    averaged = compared.model.state_dict()
    latest = weights_of(compared.run_dir, "evaluate")
    assert not any(
        torch.equal(averaged[name], latest[name]) for name in averaged if name.endswith("running_mean")
    )


@pytest.mark.parametrize("phase_name", ["evaluate", "random-seed4"])
def test_resumes_bit_for_bit_from_any_training(phase_name: str, compared: Any, tmp_path: Path) -> None:
    dataset = dataset_of(compared.run_dir)
    settings = fast_settings(tmp_path, dataset=dataset, checkpoint_seconds=1e-9)
    with killed_at(TrainPhase, 1, 2, phase_name):
        neuroexapt.evaluate(**settings)
    resumed = neuroexapt.evaluate(resume=settings["out"], quiet=True)
    assert (resumed.run_dir / "metrics.jsonl").read_bytes() == (
        compared.run_dir / "metrics.jsonl"
    ).read_bytes()
    for name, x in compared.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], x), name


def test_controls_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = fast_settings(tmp_path, epochs=1, seeds=1, controls="random,resnet18", quiet=False)
    result = neuroexapt.evaluate(**settings).result
    *_, random, resnet, own = capsys.readouterr().err.splitlines()
    assert random.startswith("random: test accuracy ")
    assert resnet.startswith("resnet18: test accuracy ")
    assert resnet.endswith(", 11,169,219 parameters")
    assert own.startswith("test accuracy ")
    assert result["controls"]["resnet18"]["genotypes"] == []


def test_controls_may_have_as_much_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([30.0, 10.0])
    monkeypatch.setattr(evaluate, "_step_ms", lambda run, kind, genotype: next(measured))
    settings = evaluate_settings(tmp_path, controls="random", control_budget="time")
    result = neuroexapt.evaluate(**settings)
    assert (result.result["epochs"], result.result["controls"]["random"]["epochs"]) == (2, 6)
    assert neuroexapt.evaluate(resume=result.run_dir).result == result.result, "measured once"


def test_a_step_is_timed_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MEASURED_SECONDS", 0.0)
    settings = {"controls": "random", "epochs": 1}
    plain = neuroexapt.evaluate(**evaluate_settings(tmp_path, out=tmp_path / "plain", **settings))
    timed = neuroexapt.evaluate(
        **evaluate_settings(tmp_path, out=tmp_path / "timed", control_budget="time", **settings)
    )
    for phase, name in (("evaluate", "train_loss"), ("random", "train_loss")):
        assert timed.curves[phase][name][:1] == plain.curves[phase][name]


def test_resnet_keeps_small_pictures_large() -> None:
    network = resnet18(1, 10)
    seen = []
    network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert seen == [(2, 64, 8, 8)]
    assert sum(p.numel() for p in resnet18(3, 10).parameters()) == 11_173_962


def test_a_genotype_may_be_a_text_too_long_for_a_file_name(tmp_path: Path) -> None:
    text = str(DARTS_V2)
    assert len(text) > 255
    result = neuroexapt.evaluate(**evaluate_settings(tmp_path, genotype=text))
    assert result.genotype == DARTS_V2


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        neuroexapt.evaluate(**evaluate_settings(tmp_path, genotype=str(tmp_path)))


def test_the_space_is_that_of_the_run_whose_genotype_it_is(tmp_path: Path) -> None:
    found = neuroexapt.search(**tiny_settings(tmp_path, space="s2", epochs=1, train_epochs=0))
    settings = fast_settings(tmp_path, out=tmp_path / "evaluated", epochs=1, controls="random", seeds=1)
    result = neuroexapt.evaluate(**{**settings, "genotype": str(found.run_dir)})
    assert json.loads((result.run_dir / "config.json").read_text())["space"] == "s2"
    (control,) = result.result["controls"]["random"]["genotypes"]
    operations = {operation for name in ("normal", "reduce") for operation, _ in control[name]}
    assert operations <= {"skip_connect", "sep_conv_3x3"}
