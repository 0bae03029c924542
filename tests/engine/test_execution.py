import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from neuroexapt.backend.config import load_config
from neuroexapt.core.operations import MixedOp
from neuroexapt.core.supernet import Supernet
from neuroexapt.engine import execution
from neuroexapt.engine.execution import choose_execution, compile_edges
from neuroexapt.spaces import DARTS


@pytest.fixture
def supernet() -> Supernet:
    torch.manual_seed(0)
    return DARTS.supernet(in_channels=1, num_classes=2, channels=2, layers=3)


def is_compiled(network: Supernet) -> bool:
    return all(m._compiled_call_impl is not None for m in network.modules() if isinstance(m, MixedOp))


def clock(monkeypatch: pytest.MonkeyPatch, eager: float, compiled: float) -> None:
    """Let steps of a compiled network take ``compiled`` ms and of any other ``eager`` ms."""
    timed: list[Supernet] = []

    def time_calls(step: Callable[[], None], device: torch.device, seconds: float) -> SimpleNamespace:
        step()
        return SimpleNamespace(median_ms=compiled if is_compiled(timed[-1]) else eager)

    monkeypatch.setattr(execution, "time_calls", time_calls)
    monkeypatch.setattr("tests.engine.test_execution.take_step", timed.append)


def take_step(network: Supernet) -> None:
    """Replaced by ``clock``."""


@pytest.mark.parametrize(("compiled", "choice"), [(5.0, "compile"), (20.0, "eager")])
def test_fastest_is_what_was_measured_faster_and_is_remembered(
    compiled: float, choice: str, supernet: Supernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, eager=10.0, compiled=compiled)
    said: list[str] = []
    before = copy.deepcopy(supernet.state_dict())
    assert choose_execution("fastest", supernet, lambda n: take_step(n), "here", said.append) == choice
    assert load_config()["execution"]["here"]["choice"] == choice
    assert f"measured 10 ms eager, {compiled:.0f} ms compiled a step" in said[-1]
    assert not is_compiled(supernet)
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())

    monkeypatch.setattr(execution, "time_calls", None)
    assert choose_execution("fastest", supernet, lambda n: None, "here", said.append) == choice


def test_a_compiler_that_fails_is_eager_with_the_reason(
    supernet: Supernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, eager=10.0, compiled=1.0)

    def step(network: Supernet) -> None:
        take_step(network)
        if is_compiled(network):
            raise RuntimeError("no C++ compiler found")

    said: list[str] = []
    assert choose_execution("fastest", supernet, step, "here", said.append) == "eager"
    assert "torch.compile failed: no C++ compiler found" in said[-1]


def test_an_unwritable_configuration_does_not_stop_the_search(
    supernet: Supernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, eager=1.0, compiled=2.0)
    monkeypatch.setenv("NEUROEXAPT_CONFIG", "/proc/nowhere/config.json")
    said: list[str] = []
    assert choose_execution("fastest", supernet, lambda n: take_step(n), "here", said.append) == "eager"
    assert any("not remembered" in line for line in said)


@pytest.mark.parametrize("wanted", ["eager", "compile"])
def test_an_explicit_choice_is_not_measured(wanted: str, supernet: Supernet) -> None:
    assert choose_execution(wanted, supernet, lambda n: pytest.fail("measured"), "here", print) == wanted


def test_compiling_keeps_the_state_dict(supernet: Supernet) -> None:
    names = list(supernet.state_dict())
    compile_edges(supernet)
    assert is_compiled(supernet)
    assert list(supernet.state_dict()) == names
