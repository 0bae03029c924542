import json
from pathlib import Path
from typing import Any

import pytest
import torch

import neuroexapt
from neuroexapt.core.genotypes import Genotype
from neuroexapt.errors import UserError
from tests.engine.tiny import assert_same_run, dataset_of, tiny_settings, weights_of


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


def test_a_search_in_bf16_differs_by_rounding(finished: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, dataset=dataset_of(finished.run_dir), train_epochs=0, precision="bf16")
    found, expected = (
        run.curves["search"]["train_loss"] for run in (neuroexapt.search(**settings), finished)
    )
    assert found[0] != expected[0]
    assert found == pytest.approx(expected, rel=0.1)


def test_one_seed_gives_one_result(finished: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, dataset=dataset_of(finished.run_dir))
    torch.manual_seed(123)  # whatever was random before
    again = neuroexapt.search(**settings)
    assert_same_run(finished.run_dir, again.run_dir)


def test_another_seed_gives_another_result(finished: Any, tmp_path: Path) -> None:
    other = neuroexapt.search(**tiny_settings(tmp_path, dataset=dataset_of(finished.run_dir), seed=1))
    assert not torch.equal(
        weights_of(other.run_dir, "search")["alphas.normal"],
        weights_of(finished.run_dir, "search")["alphas.normal"],
    )


def test_refuses_to_replace_a_run(finished: Any) -> None:
    settings = {"dataset": dataset_of(finished.run_dir), "batch_size": 8, "out": finished.run_dir}
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        neuroexapt.search(**settings)
    assert (finished.run_dir / "result.json").exists()


def test_settings_of_a_run_do_not_name_its_folder(finished: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    again = neuroexapt.search(config=finished.run_dir / "config.json", epochs=1, train_epochs=0)
    assert again.run_dir != finished.run_dir
    assert (finished.run_dir / "result.json").exists()


@pytest.mark.parametrize("others", [["thesis.txt"], ["config.json", "thesis.txt"], ["config.json"]])
def test_refuses_a_folder_of_something_else_even_with_overwrite(others: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in others:
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(UserError, match="is no run's folder; choose another"):
        neuroexapt.search(**tiny_settings(tmp_path, overwrite=True))
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == sorted(others)


def test_overwrite_replaces_a_run_that_was_killed_while_it_wrote(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, epochs=1, train_epochs=0)
    neuroexapt.search(**settings)
    (settings["out"] / ".result.json.tmp").write_text("{")
    neuroexapt.search(**settings, overwrite=True)
    assert not (settings["out"] / ".result.json.tmp").exists()


def test_overwrite_is_not_carried_out_when_the_new_run_is_refused(finished: Any) -> None:
    with pytest.raises(UserError, match="do not fill a batch"):
        neuroexapt.search(
            dataset=dataset_of(finished.run_dir),
            batch_size=500,
            out=finished.run_dir,
            overwrite=True,
            quiet=True,
        )
    assert (finished.run_dir / "result.json").exists()


def test_what_was_not_trained_is_not_shown_as_if_it_were(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    neuroexapt.search(**tiny_settings(tmp_path, epochs=1, train_epochs=0, quiet=False))
    assert capsys.readouterr().err.splitlines()[-1].startswith("not trained after the search: test accuracy ")
    assert "was not trained after the search" in (tmp_path / "run" / "report.html").read_text()


def test_warm_up_keeps_alpha(tmp_path: Path) -> None:
    result = neuroexapt.search(**tiny_settings(tmp_path, warmup_epochs=1, train_epochs=0))
    first, last = result.curves["search"]["alpha"]
    assert all(abs(w - 0.125) < 1e-3 for row in first["normal"] for w in row)
    assert first != last
    assert "arch_loss" not in json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[0])


def test_second_order_search_leads_elsewhere(finished: Any, tmp_path: Path) -> None:
    """From the same weights and batches as the first order."""
    settings = tiny_settings(tmp_path, dataset=dataset_of(finished.run_dir), strategy="darts-2nd", epochs=1)
    second = neuroexapt.search(**{**settings, "train_epochs": 0})
    assert second.curves["search"]["alpha"][0] != finished.curves["search"]["alpha"][0]


def test_a_progressive_search_that_ends_early_inherits_nothing(tmp_path: Path, capsys: Any) -> None:
    """Its network has grown to 3 of 4 cells by then."""
    settings = tiny_settings(tmp_path, strategy="p-darts", epochs=1, layers=4, quiet=False)
    assert neuroexapt.search(**settings).result["test_accuracy"] > 0
    assert "only 3 of 4 cells when the search ended, so nothing is inherited" in capsys.readouterr().err
