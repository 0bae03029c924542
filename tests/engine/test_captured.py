import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neuroexapt
from neuroexapt.backend import use_backend
from neuroexapt.core.derived import DartsNetwork
from neuroexapt.core.genotypes import DARTS_V2
from neuroexapt.data import make_loader
from neuroexapt.data.augment import Augmentation
from neuroexapt.data.parts import ResidentImages
from neuroexapt.engine import captured, search_phase, training
from neuroexapt.engine.captured import CapturedStep, capture
from neuroexapt.engine.config import EvaluateConfig, SearchConfig
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.engine.training import TrainPhase
from neuroexapt.spaces import DARTS
from tests.engine.tiny import assert_same_run, dataset_of, tiny_settings
from tests.strategies.small import make_phase


def test_on_the_cpu_a_step_stays_what_it_is() -> None:
    assert capture(torch.sin, torch.device("cpu")) is torch.sin


class Recording:
    """Takes the place of a graph where there is no GPU: its replay computes from inputs of its own."""

    def __init__(self, step: Any, inputs: tuple[Tensor, ...], *stream_and_pool: Any) -> None:
        self.step = step
        self.inputs = tuple(torch.full_like(x, -1) for x in inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for target, source in zip(self.inputs, inputs, strict=True):
            target.copy_(source)
        return self.step(*self.inputs)


def test_a_run_of_replays_equals_one_of_steps(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the graph itself: what a step reads and changes stays where it was captured."""
    recordings: list[Recording] = []

    def record(*arguments: Any) -> Recording:
        recordings.append(Recording(*arguments))
        return recordings[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(captured, "_beside", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(captured, "_capture", record)
    monkeypatch.setattr(captured, "try_to_capture", lambda capture: (capture(), ""))
    for module in (search_phase, training):
        monkeypatch.setattr(module, "capture", lambda step, device, network: CapturedStep(step, network))
    settings = tiny_settings(tmp_path, dataset=dataset_of(finished.run_dir))
    assert_same_run(finished.run_dir, neuroexapt.search(**settings).run_dir)
    assert len(recordings) == 4, "a step of the search, its validation, a step of either training"


gpu = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _kernels_of_pytorch() -> Iterator[None]:
    """What is captured makes no difference here, and these need not be compiled."""
    with use_backend("cuda:torch" if torch.cuda.is_available() else "cpu"):
        yield


class Counter:
    """A step with a state: adds its input to a total; counts how often Python ran it."""

    def __init__(self) -> None:
        self.total = torch.zeros((), device="cuda")
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total += x.sum()
        return self.total * 2


@gpu
def test_every_call_counts_once_and_python_runs_the_step_twice() -> None:
    counter = Counter()
    step = CapturedStep(counter)
    outputs = [step(torch.full((3,), float(i), device="cuda")) for i in range(6)]
    assert torch.stack(outputs).tolist() == [0.0, 6.0, 18.0, 36.0, 60.0, 90.0]
    assert counter.total.item() == 45
    assert counter.calls == 2
    assert step.reason == ""


@gpu
def test_each_shape_has_a_graph_of_its_own() -> None:
    counter = Counter()
    step = CapturedStep(counter)
    for size in (4, 4, 2, 4, 2, 2, 4):
        step(torch.ones(size, device="cuda"))
    assert counter.total.item() == 22
    assert counter.calls == 4


@gpu
def test_what_cannot_be_captured_runs_as_it_is_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def waits(x: Tensor) -> Tensor:
        return x * x.sum().item() + torch.rand_like(x).mul(0)

    step = CapturedStep(waits)
    x = torch.arange(3.0, device="cuda")
    for _ in range(3):
        assert torch.equal(step(x), 3 * x)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert step.reason in warning
    assert "captur" in step.reason
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert CapturedStep(torch.sin)(x).equal(x.sin()), "the device is usable afterwards"


@gpu
def test_hooks_go_on_being_called() -> None:
    network, called = torch.nn.Sequential(torch.nn.ReLU()).cuda(), []
    network[0].register_forward_hook(lambda *_: called.append(True))
    step = CapturedStep(network, network)
    for _ in range(4):
        step(torch.ones(2, device="cuda"))
    assert len(called) == 4
    assert step.reason == "a graph would not call the hooks of 0"


@gpu
def test_random_numbers_are_those_of_the_step_itself() -> None:
    def numbers(step: Any) -> Tensor:
        torch.cuda.manual_seed(3)
        return torch.stack([step(torch.ones(5, device="cuda")) for _ in range(4)])

    def drop(x: Tensor) -> Tensor:
        return x * torch.rand_like(x) + torch.rand(5, device="cuda")

    assert torch.equal(numbers(CapturedStep(drop)), numbers(drop))


def loader(stream: int, count: int = 40, drop_last: bool = True) -> Any:
    generator = torch.Generator().manual_seed(stream)
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    part = ResidentImages(images, torch.arange(count) % 4)
    return make_loader(
        part,
        batch_size=8,
        device=CUDA,
        seed=stream,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augmentation=Augmentation(crop_padding=2, flip=True, cutout=4),
        drop_last=drop_last,
    )


def make_search_phase(execution: str, strategy: str) -> SearchPhase:
    torch.manual_seed(0)
    config = SearchConfig(epochs=4, warmup_epochs=1, strategy=strategy, execution=execution, batch_size=8)
    supernet = DARTS.supernet(in_channels=3, num_classes=4, channels=4, layers=3).to(CUDA)
    phase = SearchPhase(supernet, loader(1), loader(2, count=44), config)
    phase.prepare_execution(print)
    return phase


def run(phase: Any, epochs: range) -> Tensor:
    rows = []
    for epoch in epochs:
        rows += list(phase.steps(epoch, 0))
        record = phase.end_epoch(epoch)
        rows.append(torch.tensor([v for v in record.values() if isinstance(v, float)]))
    return torch.cat([row.cpu().double() for row in rows])


@pytest.fixture
def reproducible() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(False)


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@gpu
@pytest.mark.parametrize("strategy", ["darts", "darts-2nd"])
def test_a_captured_search_equals_the_one_launched_one_by_one(strategy: str, reproducible: None) -> None:
    """Warm-up epochs, the change of learning rate, the last batch of a validation."""
    replayed, eager = make_search_phase("fused", strategy), make_search_phase("fused", strategy)
    eager._take_step, eager._score = eager._step, eager._score_batch
    assert_same(run(replayed, range(3)), run(eager, range(3)))
    for step in (replayed._take_step, replayed._score):
        assert isinstance(step, CapturedStep)
        assert step.reason == ""
    for a, b in zip(replayed.parameters(), eager.parameters(), strict=True):
        assert_same(a, b)


@gpu
def test_a_captured_search_resumes_from_its_state(reproducible: None) -> None:
    through, first = make_search_phase("fused", "darts"), make_search_phase("fused", "darts")
    run(first, range(2))
    resumed = make_search_phase("fused", "darts")
    run(resumed, range(1))  # graphs and states of another moment, which loading replaces
    resumed.load_state_dict(first.state_dict())
    assert_same(run(through, range(3))[-7:], run(resumed, range(2, 3))[-7:])


@gpu
@pytest.mark.parametrize("strategy", ["darts", "gdas"])
def test_twenty_searches_give_the_same_bits(strategy: str) -> None:
    """With all kernels, at the sizes that they take."""

    def result() -> list[Tensor]:
        torch.manual_seed(0)
        supernet = DARTS.supernet(in_channels=3, num_classes=4, channels=16, layers=3).to(CUDA)
        config = SearchConfig(epochs=2, strategy=strategy, batch_size=8)
        phase = SearchPhase(supernet, loader(1), loader(2), config)
        phase.prepare_execution(print)
        for _ in phase.steps(0, 0):
            pass
        return phase.parameters()

    with use_backend("cuda:ext"):
        first, *others = (result() for _ in range(20))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@gpu
def test_no_step_waits_for_the_device() -> None:
    phase = make_search_phase("fused", "darts")
    run(phase, range(2))
    steps = phase.steps(2, 0)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_train_phase(**changes: Any) -> TrainPhase:
    torch.manual_seed(0)
    config = EvaluateConfig(epochs=4, batch_size=8, **changes)
    network = DartsNetwork(DARTS_V2, in_channels=3, num_classes=4, channels=4, layers=3, auxiliary=False).to(
        CUDA
    )
    return TrainPhase(
        "evaluate", network, loader(1), loader(2, 44, drop_last=False), config,
        epochs=4, drop_path=0.3, warmup=0.4, label_smoothing=0.1, ema=0.9,
    )  # fmt: skip


@gpu
def test_a_captured_training_equals_the_one_launched_one_by_one(reproducible: None) -> None:
    """Drop-path, warm-up and the average of weights included: what they read changes from step to step."""
    replayed, eager = make_train_phase(), make_train_phase()
    eager._take_step = eager._step
    results = []
    for phase in (replayed, eager):
        torch.cuda.manual_seed(1)
        results.append(run(phase, range(3)))
    assert_same(*results)
    assert replayed._take_step.reason == ""


@gpu
def test_a_captured_training_resumes_from_its_state(reproducible: None) -> None:
    def train(phase: TrainPhase, epochs: range) -> Tensor:
        torch.cuda.manual_seed(epochs.start)
        return run(phase, epochs)

    through, first, resumed = make_train_phase(), make_train_phase(), make_train_phase()
    train(through, range(2))
    train(first, range(2))
    train(resumed, range(1))  # graphs, states and an average of another moment, which loading replaces
    resumed.load_state_dict(first.state_dict())
    assert_same(train(resumed, range(2, 3)), train(through, range(2, 3)))


@gpu
def test_garbage_waits_until_a_step_is_captured() -> None:
    collects: list[bool] = []

    def step(x: Tensor) -> Tensor:
        collects.append(gc.isenabled())
        return x + 1

    take = capture(step, torch.device("cuda"))
    for _ in range(3):
        assert take(torch.ones(2, device="cuda")).tolist() == [2, 2]
    assert collects == [True, False]
    assert gc.isenabled()


@gpu
@pytest.mark.usefixtures("small_space")
def test_kernels_run_one_by_one_after_a_capture_that_broke_without_a_word() -> None:
    phase = make_phase("cuda", 16, strategy="darts")
    phase.prepare_execution(print)
    take, step = phase._take_step, phase._step

    def break_the_capture(*batches: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
        return step(*batches)

    assert isinstance(take, CapturedStep)
    take._step = break_the_capture
    assert torch.stack(list(phase.steps(0, 0))).isfinite().all()
    assert take.reason
