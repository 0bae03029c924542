from pathlib import Path

import pytest
import torch

import neuroexapt
from neuroexapt.backend.config import load_config
from neuroexapt.core.operations import MixedOp
from neuroexapt.core.supernet import Supernet
from neuroexapt.engine import search_phase
from neuroexapt.engine.execution import choose_execution, compile_edges
from neuroexapt.spaces import DARTS
from tests.engine.tiny import tiny_settings, weights_of


@pytest.fixture
def supernet() -> Supernet:
    torch.manual_seed(0)
    return DARTS.supernet(in_channels=1, num_classes=2, channels=2, layers=3)


@pytest.mark.parametrize("fastest", ["fused", "reference", "compile"])
def test_the_fastest_is_measured_once_and_remembered(fastest: str) -> None:
    times = {"fused": 10.0, "reference": 10.0, "compile": 10.0, fastest: 5.0}
    said: list[str] = []
    assert choose_execution(times.__getitem__, "here", said.append) == fastest
    assert load_config()["fastest_execution"]["here"]["choice"] == fastest
    assert all(f"{execution} {ms:.0f} ms a step" in said[-1] for execution, ms in times.items())
    assert choose_execution(lambda e: pytest.fail("measured"), "here", said.append) == fastest


def test_a_compiler_that_fails_is_not_chosen_and_the_reason_is_said() -> None:
    def measure(execution: str) -> float:
        if execution == "compile":
            raise RuntimeError("no C++ compiler\nfound")
        return {"fused": 1.0, "reference": 2.0}[execution]

    said: list[str] = []
    assert choose_execution(measure, "here", said.append) == "fused"
    assert "compile failed: no C++ compiler found" in said[-1]


def test_an_unwritable_configuration_does_not_stop_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROEXAPT_CONFIG", "/proc/nowhere/config.json")
    said: list[str] = []
    assert choose_execution(lambda execution: float(len(execution)), "here", said.append) == "fused"
    assert any("not remembered" in line for line in said)


def test_compiling_keeps_the_state_dict(supernet: Supernet) -> None:
    names = list(supernet.state_dict())
    compile_edges(supernet)
    edges = [module for module in supernet.modules() if isinstance(module, MixedOp)]
    assert all(edge._compiled_call_impl is not None for edge in edges)
    assert list(supernet.state_dict()) == names


def test_fused_and_reference_find_the_same(tmp_path: Path) -> None:
    weights = {}
    for execution in ("fused", "reference"):
        settings = tiny_settings(tmp_path, out=tmp_path / execution, execution=execution, train_epochs=0)
        neuroexapt.search(**settings)
        weights[execution] = weights_of(tmp_path / execution, "search")
    for name, weight in weights["reference"].items():
        torch.testing.assert_close(weights["fused"][name], weight, rtol=1e-2, atol=1e-3)


def test_measuring_leaves_the_search_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fastest`` takes its steps with copies; here the reference, the only one that does not fail."""
    taken: list[str] = []

    def take_a_step(phase: search_phase.SearchPhase, execution: str) -> float:
        if execution != "reference":
            raise RuntimeError("not measured in this test")
        taken.append(execution)
        return step_ms(phase, execution)

    step_ms = search_phase.SearchPhase._step_ms
    monkeypatch.setattr(search_phase, "MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(search_phase.SearchPhase, "_step_ms", take_a_step)
    for execution in ("fastest", "reference"):
        settings = tiny_settings(tmp_path, out=tmp_path / execution, execution=execution, train_epochs=0)
        neuroexapt.search(**settings)
    assert taken == ["reference"]
    assert (tmp_path / "fastest/metrics.jsonl").read_bytes() == (
        tmp_path / "reference/metrics.jsonl"
    ).read_bytes()
