import json
from pathlib import Path

import pytest
import torch

import neuroexapt
from neuroexapt.core.genotypes import DARTS_V2
from tests.engine.tiny import tiny_settings


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


def test_bf16_keeps_weights_and_tests_in_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = tiny_settings(
            tmp_path, epochs=1, precision=precision, auxiliary=False, out=tmp_path / precision
        )
        for name in ("train_epochs", "arch_learning_rate"):
            settings.pop(name)
        result = neuroexapt.evaluate(**settings)
        losses[precision] = result.curves["evaluate"]["train_loss"]
        assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
