"""Training through torch.compile. Here the compiler only traces, where it is not said otherwise: the whole of
it takes minutes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neuroexapt
from neuroexapt.backend import use_backend
from neuroexapt.core.derived import DerivedNetwork
from neuroexapt.core.genotypes import DARTS_V2
from neuroexapt.data import make_loader
from neuroexapt.data.parts import ResidentImages
from neuroexapt.engine import execution
from neuroexapt.engine.captured import CapturedStep
from neuroexapt.engine.config import EvaluateConfig
from neuroexapt.engine.evaluate import resnet18
from neuroexapt.engine.execution import STEPS_THAT_PAY, compiled_copy
from neuroexapt.engine.training import TrainPhase
from neuroexapt.spaces import DARTS, SEQREC
from tests.engine.test_evaluate import evaluate_settings
from tests.engine.tiny import weights_of


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # as it is before anything is compiled
        yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was traced, and is run as it was written."""
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        execution, "COMPILATION", {**execution.COMPILATION, "backend": compiler, "options": None}
    )
    return graphs


def make_network(layers: int = 3, auxiliary: bool = True) -> DerivedNetwork:
    torch.manual_seed(0)
    return DARTS.network(
        DARTS_V2, in_channels=3, num_classes=4, channels=4, layers=layers, auxiliary=auxiliary
    )


def make_phase(
    device: str = "cpu", said: list[str] | None = None, drop_path: float = 0.4, **settings: Any
) -> TrainPhase:
    """Everything that a recipe has: drop-path, the auxiliary head, the average of the weights."""
    network = make_network().to(device)
    images = torch.randint(
        256, (16, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    loader = make_loader(
        ResidentImages(images, torch.arange(16) % 4),
        batch_size=8, device=torch.device(device), seed=0, mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    return TrainPhase(
        "evaluate", network, loader, loader, EvaluateConfig(**settings),
        epochs=4, auxiliary_weight=0.4, drop_path=drop_path, label_smoothing=0.1, ema=0.9,
        say=(said if said is not None else []).append,
    )  # fmt: skip


def train(phase: TrainPhase, epochs: range) -> Tensor:
    """Losses of the steps of these epochs; each begins with random numbers of its own."""
    losses = []
    for epoch in epochs:
        torch.manual_seed(epoch)
        losses += list(phase.steps(epoch, 0))
        phase.end_epoch(epoch)
    return torch.stack(losses)


def test_what_is_compiled_trains_the_network_itself(traced: list[Any]) -> None:
    """Its steps, its average of weights and its state are those of a training that is not compiled."""
    plain, compiled = make_phase(compile=False), make_phase(compile=True)
    torch.testing.assert_close(train(compiled, range(1, 4)), train(plain, range(1, 4)))
    assert len(traced) == 3, "a graph for every kind of cell, in training alone"
    expected, found = (torch.utils._pytree.tree_leaves_with_path(p.state_dict()) for p in (plain, compiled))
    for (place, x), (other_place, y) in zip(expected, found, strict=True):
        assert place == other_place
        torch.testing.assert_close(x, y)
    assert plain._stepped is plain.network


def test_the_network_stays_as_it_was_made(traced: list[Any]) -> None:
    """What is tested, given back and exported is not compiled."""
    phase = make_phase(compile=True)
    train(phase, range(1))
    for network in (phase.network, phase.trained):
        assert all(module._compiled_call_impl is None for module in network.modules())


def test_a_compiled_training_resumes_from_its_state(traced: list[Any]) -> None:
    through, first, resumed = (make_phase(compile=True) for _ in range(3))
    expected = train(through, range(3))[-2:]
    train(first, range(2))
    train(resumed, range(1))  # weights of another moment, which loading replaces
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(train(resumed, range(2, 3)), expected)


def test_a_compiler_that_fails_leaves_the_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(execution, "COMPILATION", {"backend": compiler})
    said: list[str] = []
    plain, failing = make_phase(compile=False), make_phase(compile=True, said=said)
    assert torch.equal(train(failing, range(2)), train(plain, range(2)))
    assert len(said) == 2, "tried once"
    assert "training without torch.compile, which failed: " in said[-1]
    assert "no C++ compiler" in said[-1]


@pytest.mark.parametrize(
    ("settings", "epochs", "on_gpu", "expected"),
    [
        ({"precision": "bf16"}, STEPS_THAT_PAY // 2, True, True),
        ({"precision": "bf16"}, STEPS_THAT_PAY // 2 - 1, True, False),
        ({"precision": "bf16"}, STEPS_THAT_PAY, False, False),
        ({"precision": "bf16", "channels_last": False}, STEPS_THAT_PAY, True, False),
        ({"precision": "fp32"}, STEPS_THAT_PAY, True, False),
        ({"precision": "bf16", "compile": False}, STEPS_THAT_PAY, True, False),
        ({"compile": True}, 1, False, True),
    ],
)
def test_compiled_where_that_pays(
    settings: dict[str, Any], epochs: int, on_gpu: bool, expected: bool
) -> None:
    phase = make_phase(**settings)
    assert phase.steps_per_epoch == 2
    phase.epochs, phase.device = epochs, torch.device("cuda" if on_gpu else "cpu")
    assert phase._is_to_be_compiled() is expected


def test_recommenders_are_compiled_on_demand_alone() -> None:
    phase = make_phase(precision="bf16")
    phase.epochs, phase.device, phase._task = STEPS_THAT_PAY, torch.device("cuda"), SEQREC.task
    assert not phase._is_to_be_compiled()


def test_cells_of_a_deep_network_share_their_graphs(traced: list[Any]) -> None:
    """More kinds than the compiler traces by default; of a copy, too, that is gone when another is traced."""
    network, pictures = make_network(layers=20, auxiliary=False).train(), torch.randn(2, 3, 8, 8)
    for same_tensors in (False, True):
        compiled_copy(network, same_tensors=same_tensors)(pictures)
        assert len(traced) == 9


def test_a_network_without_cells_is_compiled_as_a_whole(traced: list[Any]) -> None:
    network = resnet18(in_channels=3, num_classes=4).train()
    twin = compiled_copy(network, same_tensors=True)
    twin(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(traced) == 1
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.slow
def test_what_is_dropped_at_random_is_the_same_compiled() -> None:
    """By the compiler itself, whose own random numbers are others."""
    network, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.randn(64, 8)
    results = []
    for module in (network, compiled_copy(network, same_tensors=True)):
        torch.manual_seed(1)
        results.append(module(x))
    torch.testing.assert_close(*results)


def test_a_run_goes_on_compiled_or_not(tmp_path: Path, traced: list[Any]) -> None:
    whole = neuroexapt.evaluate(**evaluate_settings(tmp_path, out=tmp_path / "whole"))
    settings = evaluate_settings(tmp_path, compile=True)
    first = neuroexapt.evaluate(**settings)
    assert traced
    assert list(weights_of(first.run_dir, "evaluate")) == list(whole.model.state_dict())
    assert first.curves["evaluate"]["train_loss"] == pytest.approx(whole.curves["evaluate"]["train_loss"])
    assert neuroexapt.evaluate(resume=first.run_dir, compile=False).result == first.result


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_a_captured_compiled_training_equals_the_one_launched_one_by_one(
    exact_products: None, drop_path: float
) -> None:
    """By the compiler itself. What paths it drops on a GPU nothing else drops, so that with drop-path the one
    launched one by one is compiled, too.
    """
    with use_backend("cuda:torch"):
        one_by_one = make_phase("cuda", drop_path=drop_path, compile=drop_path > 0)
        one_by_one._take_step = one_by_one._step
        captured = make_phase("cuda", drop_path=drop_path, compile=True)
        expected, found = train(one_by_one, range(1, 4)), train(captured, range(1, 4))
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
    assert captured._stepped is not captured.network
    assert isinstance(captured._take_step, CapturedStep)
    assert captured._take_step.reason == ""
