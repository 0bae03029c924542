import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neuroexapt
from neuroexapt.core.operations import make_op
from neuroexapt.engine import resources
from neuroexapt.engine.config import SearchConfig, make_config
from neuroexapt.engine.resources import Resources, count_flops, count_params
from neuroexapt.engine.search_phase import SearchPhase
from neuroexapt.errors import UserError
from tests.engine.tiny import tiny_settings
from tests.strategies.small import make_phase

pytestmark = pytest.mark.usefixtures("small_space")


def make_resources(**limits: float) -> tuple[SearchPhase, Resources]:
    phase = make_phase(**limits)
    assert phase.resources is not None
    return phase, phase.resources


def test_flops_are_multiply_adds_of_one_picture() -> None:
    x = torch.zeros(3, 8, 10, 6)
    assert count_flops(nn.Conv2d(8, 4, 3, padding=1), x) == 8 * 4 * 9 * 60
    separable = make_op("sep_conv_3x3", 8, 2, affine=True)
    assert count_flops(separable, x) == 2 * (8 * 9 * 15 + 8 * 8 * 15)
    assert count_flops(make_op("avg_pool_3x3", 8, 1, affine=True), x) == 0


@pytest.mark.parametrize(("setting", "count"), [("max_flops", count_flops), ("max_params", count_params)])
def test_expected_cost_is_that_of_the_network_for_weights_of_one_and_zero(setting: str, count: Any) -> None:
    """For nodes with two incoming edges, both of which are chosen."""
    phase, limited = make_resources(**{setting: 1e9})
    (budget,) = limited._budgets
    one_hot = {
        cell: nn.functional.one_hot(torch.tensor([2, 1, 2, 3, 2]), 4).float() for cell in ("normal", "reduce")
    }
    for cell in one_hot:
        one_hot[cell][2] = 0  # two edges enter the second node, as the genotype has it
        budget.shares[cell].mul_(5 / 4)  # 4 of 5 edges were counted as chosen
    genotype = phase.space.derive(one_hot)
    expected = 1e9 * budget.expected(one_hot).item()
    assert limited.measure(genotype)[setting.removeprefix("max_")] == pytest.approx(expected, rel=0.05), (
        "scale and shift of BatchNorms are not in the search network"
    )


@pytest.mark.parametrize("strategy", ["pc-darts", "p-darts"])
@pytest.mark.parametrize("setting", ["max_params", "max_flops"])
def test_costs_are_those_of_what_is_derived_whatever_a_strategy_searches_in(
    strategy: str, setting: str
) -> None:
    """Partial channels, and the shallow network of a first stage."""
    expected = []
    for name in ("darts", strategy):
        phase = make_phase(strategy=name, layers=6, **{setting: 1e6})
        assert phase.resources is not None
        (budget,) = phase.resources._budgets
        expected.append(budget.expected({cell: torch.ones(5, 4) for cell in budget.shares}).item())
    assert expected[1] == pytest.approx(expected[0])


def test_the_penalty_is_the_excess_of_the_strongest_and_lowers_what_costs() -> None:
    phase, limited = make_resources(max_params=4000)
    (budget,) = limited._budgets
    alphas = phase.supernet.arch_parameters()
    with torch.no_grad():
        for alpha in alphas:
            alpha[:, [0, 2]] += torch.tensor([0.2, 0.1])  # none, which no genotype has, then convolutions
    weights = phase.strategy.relax(phase.supernet.choices())
    strongest = {cell: nn.functional.one_hot(torch.full((5,), 2), 4).float() for cell in weights}
    penalty = limited.penalty(weights)
    assert penalty.item() == pytest.approx(budget.expected(strongest).item() - 1)
    gradients = torch.autograd.grad(penalty, alphas)
    of_expected = torch.autograd.grad(budget.expected(phase.strategy.relax(phase.supernet.choices())), alphas)
    torch.testing.assert_close(gradients, of_expected)
    assert all((g[:, 2] > 0).all() and (g[:, 3] < 0).all() for g in gradients)


def test_the_penalty_ends_where_the_strongest_are_within_the_limit() -> None:
    phase, limited = make_resources(max_params=4000)
    with torch.no_grad():
        for alpha in phase.supernet.arch_parameters():
            alpha[:, 3] += 0.1
    weights = phase.strategy.relax(phase.supernet.choices())
    assert limited._budgets[0].expected(weights) > 1, "all candidates together cost more"
    assert limited.measure(phase.space.derive(weights))["params"] <= 4000
    penalty = limited.penalty(weights)
    assert penalty == 0
    assert not any(g.any() for g in torch.autograd.grad(penalty, phase.supernet.arch_parameters()))


def test_while_the_strongest_are_within_the_limit_a_search_is_the_one_without_a_limit() -> None:
    limited, free = make_phase(max_params=4000), make_phase()
    for phase in (limited, free):
        with torch.no_grad():
            for alpha in phase.supernet.arch_parameters():
                alpha[:, 3] += 1.0  # pools; three steps of 0.1 do not change that
        torch.manual_seed(1)
        assert len(list(phase.steps(0, 0))) == 3
    assert limited.resources is not None
    assert limited.resources._budgets[0].expected(limited.mixing_weights()) > 1
    torch.testing.assert_close(limited.supernet.state_dict(), free.supernet.state_dict(), rtol=0, atol=0)


def test_alphas_get_the_gradient_of_the_cost() -> None:
    limited, free = make_phase(max_params=4000), make_phase()
    pictures, labels = next(limited.valid_loader.forever(0))
    batch = neuroexapt.engine.bilevel.Batch(pictures, labels)
    alphas = limited.supernet.arch_parameters()
    assert limited.resources is not None
    cost = limited.resources.penalty(limited.strategy.relax(limited.supernet.choices()))
    for got, of_cost, of_loss in zip(
        limited.strategy.arch_gradient(limited.bilevel_step, batch, batch).gradients,
        torch.autograd.grad(cost, alphas),
        free.strategy.arch_gradient(free.bilevel_step, batch, batch).gradients,
        strict=True,
    ):
        torch.testing.assert_close(got, of_cost + of_loss)


@pytest.mark.parametrize("setting", ["max_params", "max_flops"])
def test_the_genotype_meets_the_limit_and_is_the_usual_one_where_that_does(setting: str) -> None:
    phase, limited = make_resources(**{setting: 1e9})
    torch.manual_seed(3)
    weights = {cell: torch.rand(5, 4) for cell in ("normal", "reduce")}
    usual = phase.space.derive(weights)
    assert limited.fit(weights) == usual
    name = setting.removeprefix("max_")
    limit = 0.8 * limited.measure(usual)[name]
    _, strict = make_resources(**{setting: limit})
    genotype = strict.fit(weights)
    assert 0 < strict.measure(genotype)[name] <= limit
    assert genotype != usual


@pytest.mark.parametrize(("strict", "loose"), [("params", "flops"), ("flops", "params")])
def test_every_limit_is_met_at_the_lowest_price(strict: str, loose: str) -> None:
    phase, free = make_resources(max_params=1e9, max_flops=1e9)
    torch.manual_seed(4)
    weights = {cell: torch.rand(5, 4) for cell in ("normal", "reduce")}
    limit = 0.7 * free.measure(phase.space.derive(weights))[strict]
    _, limited = make_resources(**{f"max_{strict}": limit, f"max_{loose}": 1e9})
    genotype = limited.fit(weights)
    assert limited.measure(genotype)[strict] <= limit
    prices = (2**-10 * 1.01**step for step in itertools.count())
    assert genotype == next(found for p in prices if limited._meets(found := limited._at(p, weights)))


def test_a_limit_that_no_network_meets_is_refused() -> None:
    with pytest.raises(UserError, match="--max-params 10 is too low: the smallest network of this space has"):
        make_phase(max_params=10)


def test_latency_is_measured_on_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(
        resources.MEASURES,
        "max_latency_ms",
        lambda module, x: seen.append(x.shape) or float(count_params(module, x)),
    )
    make_resources(max_latency_ms=1e6)
    assert {shape[0] for shape in seen} == {8}
    monkeypatch.undo()
    assert resources.time_forward(nn.Identity(), torch.zeros(2)) > 0


def test_a_whole_run_stays_within_its_limit(tmp_path: Path) -> None:
    free = neuroexapt.search(**tiny_settings(tmp_path, epochs=1, train_epochs=0))
    limit = 0.9 * free.result["parameters"]
    settings = tiny_settings(tmp_path, epochs=1, train_epochs=0, max_params=limit, out=tmp_path / "limited")
    result = neuroexapt.search(**settings)
    assert result.result["parameters"] == result.result["params"] <= limit
    assert neuroexapt.derive(settings["out"]) == result.genotype


def test_limits_are_positive() -> None:
    with pytest.raises(UserError, match="max_flops=0"):
        make_config(SearchConfig, {"max_flops": 0})


@pytest.mark.parametrize("strategy", ["gdas", "pc-darts"])
def test_measuring_draws_no_random_numbers_of_the_search(strategy: str) -> None:
    phase = make_phase(strategy=strategy, max_params=1e9)
    state = torch.get_rng_state()
    phase.genotype()
    assert torch.equal(torch.get_rng_state(), state)
