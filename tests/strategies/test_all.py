"""What holds for every strategy."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroexapt.engine.captured import CapturedStep
from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.config import SearchConfig, make_config
from neuroexapt.engine.search_phase import ARCH_BETAS, SearchPhase
from neuroexapt.errors import UserError
from neuroexapt.spaces import NAS_BENCH_201
from neuroexapt.strategies import STRATEGIES, get_strategy
from tests.strategies.small import make_loader_of, make_phase, make_step

EPOCHS = 4


pytestmark = pytest.mark.usefixtures("small_space")


def run(phase: SearchPhase, epoch: int, start: int = 0) -> list[torch.Tensor]:
    return list(phase.steps(epoch, start))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """From its checkpoint within the last epoch: noise, schedules and changes of the network included."""
    whole = make_phase(strategy=name)
    for epoch in range(EPOCHS - 1):
        run(whole, epoch)
    steps = whole.steps(EPOCHS - 1, 0)
    next(steps)
    random_state = torch.get_rng_state()
    save_checkpoint(tmp_path / "checkpoint", whole.state_dict())
    torch.set_rng_state(random_state)
    last = list(steps)

    resumed = make_phase(strategy=name)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint"))
    torch.set_rng_state(random_state)
    assert torch.equal(torch.stack(run(resumed, EPOCHS - 1, 1)), torch.stack(last))
    expected = whole.supernet.state_dict()
    for key, value in resumed.supernet.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert resumed.genotype() == whole.genotype()
    figures = []
    for phase in (resumed, whole):
        torch.set_rng_state(random_state)  # random paths are validated by paths drawn anew
        figures.append(phase.end_epoch(EPOCHS - 1))
    assert figures[0] == figures[1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_mixing_weights_of_validation_do_not_vary(name: str) -> None:
    strategy = get_strategy(name)
    step, *_ = make_step(strategy, channels=8)
    alphas = dict(step.supernet.alphas)
    first, second = strategy.mixing(alphas), strategy.mixing(alphas)
    assert list(first) == ["normal", "reduce"]
    assert all(torch.equal(first[cell], second[cell]) for cell in first)
    assert all(weights.shape == alphas[cell].shape for cell, weights in first.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_space_with_one_type_of_cell_is_searched(name: str) -> None:
    torch.manual_seed(0)
    config = make_config(
        SearchConfig, {"strategy": name, "space": "nas-bench-201", "epochs": EPOCHS, "batch_size": 8}
    )
    supernet = NAS_BENCH_201.supernet(in_channels=2, num_classes=3, channels=8, layers=5)
    phase = SearchPhase(supernet, make_loader_of(1), make_loader_of(2), config)
    before = supernet.alphas["cell"].detach().clone()
    assert torch.stack(run(phase, EPOCHS - 1)).isfinite().all()
    assert phase.strategy.learns_alpha != torch.equal(supernet.alphas["cell"], before)
    assert phase.mixing_weights()["cell"].shape == (6, 5)
    assert phase.end_epoch(EPOCHS - 1)["genotype"] == phase.genotype().to_dict()


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_paper_is_named(name: str) -> None:
    assert STRATEGIES[name].paper[-4:].isdigit()


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("space", ["darts", "nas-bench-201"])
def test_published_settings_are_settings(name: str, space: str) -> None:
    config = make_config(SearchConfig, {"dataset": "cifar10", "strategy": name, "space": space})
    assert config.strategy == name


@pytest.mark.parametrize(
    ("name", "space", "published"),
    [  # epochs, batch, learning rate of w from and to, of α, epochs of warm-up: of the methods' own code
        ("darts", "darts", (50, 64, 0.025, 0.001, 3e-4, 0)),
        ("pc-darts", "darts", (50, 256, 0.1, 0.0, 6e-4, 15)),
        ("p-darts", "darts", (75, 96, 0.025, 0.0, 6e-4, 0)),
        ("fair-darts", "darts", (50, 128, 0.005, 0.001, 3e-3, 0)),
        ("drnas-progressive", "darts", (50, 64, 0.1, 0.0, 6e-4, 0)),
        ("drnas", "nas-bench-201", (100, 64, 0.025, 0.001, 3e-4, 0)),
        ("beta-darts", "nas-bench-201", (100, 64, 0.025, 0.001, 3e-4, 0)),
        ("sdarts-rs", "nas-bench-201", (100, 64, 0.025, 0.001, 3e-4, 0)),
        ("lambda-darts", "nas-bench-201", (100, 64, 0.025, 0.001, 1e-4, 0)),
    ],
)
def test_settings_are_the_published_ones(name: str, space: str, published: tuple[float, ...]) -> None:
    config = make_config(SearchConfig, {"dataset": "cifar10", "strategy": name, "space": space})
    rates = (config.learning_rate, config.learning_rate_min, config.arch_learning_rate)
    assert (config.epochs, config.batch_size, *rates, config.warmup_epochs) == published
    assert (config.arch_weight_decay, ARCH_BETAS) == (1e-3, (0.5, 0.999))


@pytest.mark.parametrize("optimizer", ["weight", "arch"])
def test_optimizers_take_their_settings(optimizer: str) -> None:
    prefix = "" if optimizer == "weight" else "arch_"
    settings = {f"{prefix}learning_rate": 0.2, f"{prefix}weight_decay": 0.3}
    (group,) = getattr(make_phase(**settings), f"{optimizer}_optimizer").param_groups
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)


def test_the_user_stands_over_the_preset_over_what_was_published() -> None:
    assert make_config(SearchConfig, {"dataset": "cifar10", "strategy": "gdas"}).epochs == 250
    assert make_config(SearchConfig, {"dataset": "digits", "strategy": "gdas"}).epochs == 15
    assert make_config(SearchConfig, {"dataset": "digits", "strategy": "gdas", "epochs": 3}).epochs == 3


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(UserError, match="unknown strategy 'dart'; known are darts, "):
        make_config(SearchConfig, {"strategy": "dart"})


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_step_looks_at_a_value(name: str) -> None:
    """On a GPU that would wait for the device. Tensors without values show it everywhere."""
    with FakeTensorMode():
        step, train, valid = make_step(get_strategy(name), channels=8)
        step.supernet.set_execution("reference")
        assert step(train, valid).train_loss.shape == ()
        step.strategy.mixing(step.supernet.choices())


@pytest.mark.parametrize("name", ["darts", "gdas"])
def test_validation_sees_one_path_where_steps_draw_one(name: str) -> None:
    phase, seen = make_phase(strategy=name), []
    phase.supernet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    phase.end_epoch(0)
    for weights in seen:
        for mixing in weights.values():
            assert torch.equal(mixing.max(dim=-1).values == 1, torch.full((len(mixing),), name != "darts"))
    assert seen


def test_alpha_learns_and_is_validated_on_pictures_that_weights_do_not_see() -> None:
    phase, steps, scored = make_phase(warmup_epochs=1), [], []
    train, valid = make_loader_of(1), make_loader_of(2)
    phase._take_step = lambda *batches: steps.append(batches) or torch.zeros(4)
    phase._score = lambda *batch: scored.append(batch) or torch.zeros(2)
    run(phase, 0)
    assert [len(batches) for batches in steps] == [2] * len(steps), "warm-up"
    run(phase, 1)
    for got, expected in zip(steps[-1], (*list(train.epoch(1))[-1], *next(valid.forever(5))), strict=True):
        assert torch.equal(got, expected)
    phase.end_epoch(1)
    for got, expected in zip(scored, valid.evaluation(), strict=True):
        assert torch.equal(got[0], expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_captured_step_equals_the_one_launched_one_by_one(name: str) -> None:
    """Noise included: a graph draws the numbers that the step itself would draw."""
    losses = []
    for captured in (True, False):
        phase = make_phase("cuda", 16, strategy=name)
        phase.prepare_execution(print)
        if not captured:
            phase._take_step = phase._step
        torch.cuda.manual_seed(1)
        losses.append(torch.stack([step[0] for step in run(phase, 0)]))
        # Later on rounding decides, as to which candidates are ruled out.
        assert torch.stack([step[0] for step in run(phase, EPOCHS - 1)]).isfinite().all()
        if captured:
            assert isinstance(phase._take_step, CapturedStep)
            assert phase._take_step.reason == ""
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
