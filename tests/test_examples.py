import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from neuroexapt.cli.app import run_command
from neuroexapt.recommend.model import SequenceRecommender
from tests.engine.tiny import tiny_settings, write_tiny_npz

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classify(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    data = write_tiny_npz(folder / "tiny.npz")
    command = [
        sys.executable, str(EXAMPLES / "basic_classification.py"), *arguments, f"--dataset=npz:{data}",
        "--epochs=1", "--train_epochs=1", "--batch_size=8", "--layers=3", "--init_channels=2",
        f"--out={folder / 'run'}", "--backend=cpu",
    ]  # fmt: skip
    environment = {"NEUROEXAPT_CONFIG": str(folder / "config.json"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_mode_fixed_trains_the_given_genotype_in_the_searchs_size(tmp_path: Path) -> None:
    done = classify(tmp_path, "--mode=fixed", "--genotype=PC-DARTS", "--quiet")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["genotype"], config["layers"], config["init_channels"]) == ("PC-DARTS", 3, 2)
    assert config["auxiliary"] is False


@pytest.mark.slow
def test_mode_benchmark_runs_every_mode_and_prints_one_table(tmp_path: Path) -> None:
    """Compilation is switched off: it would take minutes."""
    done = classify(tmp_path, "--mode=benchmark", TORCH_COMPILE_DISABLE="1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert list(results) == ["exapt", "fixed", "cached"]
    for name, result in results.items():
        assert name in done.stdout
        assert f"{result['test_accuracy']:.2%}" in done.stdout
        assert result["seconds"] > 0
        assert result["parameters"] > 0
        assert result["peak_memory_bytes"] > 0
    assert results["exapt"]["genotype"] == results["cached"]["genotype"]
    (measured,) = json.loads((tmp_path / "config.json").read_text())["fastest_execution"].values()
    assert measured["choice"] in ("fused", "reference", "compile")


def test_mode_benchmark_passes_a_failure_on(tmp_path: Path) -> None:
    done = classify(tmp_path, "--mode=benchmark", "--seed=-1")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: seed=-1: choose one from 0 to 2**63 - 1"


def test_unknown_mode_is_one_line(tmp_path: Path) -> None:
    done = classify(tmp_path, "--mode=fast")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "exapt" in line


def test_custom_op_is_searched_over_and_shows_in_the_genotype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load_example("custom_search_space")
    try:
        genotype = example.main(**tiny_settings(tmp_path, train_epochs=1))
        space = json.loads((tmp_path / "run" / "space.json").read_text())
        metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    finally:
        example.OPS.pop("squeeze_excite")
        example.SPACES.pop("gated")
    assert space["primitives"][-1] == "squeeze_excite"
    assert len(metrics[0]["alpha"]["normal"][0]) == len(space["primitives"]) == 5
    weights = [m["alpha"]["normal"][0][-1] for m in metrics if m["phase"] == "search"]
    assert weights[0] != weights[1], "α of the user's op is learned"
    ops = {op for op, _ in genotype.normal + genotype.reduce}
    assert ops <= set(space["primitives"]) - {"none"}
    assert "squeeze_excite" in ops
    assert "squeeze_excite" in (tmp_path / "run" / "report.html").read_text()


def test_a_recommender_is_trained_saved_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("sequence_recommendation")
    data, model = tmp_path / "made.txt", tmp_path / "model.safetensors"
    data.write_text("".join(f"u{user} a b c d e{user % 3} f g\n" for user in range(15)))
    arguments = ["--mode=fixed", "--genotype=SASRec", "--train-epochs=1", "--batch-size=8", "--max-length=4"]
    arguments += [
        "--init-channels=4",
        "--backend=cpu",
        "--quiet",
        f"--out={tmp_path / 'run'}",
        f"--model={model}",
    ]
    assert run_command(example.app, [f"--data={data}", *arguments]) == 0
    assert "after c, d, e0, f: " in capsys.readouterr().out
    assert SequenceRecommender.load(model).num_items == 9


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dataset=cifar10"], "leave out --dataset"),
        (["--genotype=SASRec"], "leave out --genotype"),
        (["--mode=fixed", "--epochs=1"], "give --train-epochs instead of --epochs"),
    ],
)
def test_what_would_be_ignored_is_refused(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "made.txt"
    data.write_text("".join(f"u{user} a b c d\n" for user in range(15)))
    assert run_command(load_example("sequence_recommendation").app, [f"--data={data}", *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_a_recommender_without_data_is_told_where_to_get_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(load_example("sequence_recommendation").app, []) == 2
    assert "grouplens.org" in capsys.readouterr().err
