import pytest
import torch

from neuroexapt.core.operations import Zero
from neuroexapt.engine.config import SearchConfig, make_config
from neuroexapt.spaces import DARTS, get_space
from neuroexapt.strategies.p_darts import PDarts
from tests.strategies.small import make_phase, make_step, some_alphas, values_by_epoch


def test_each_stage_has_fewer_candidates_and_starts_with_a_new_alpha() -> None:
    strategy = PDarts()
    supernet = DARTS.supernet(in_channels=1, num_classes=2, channels=2, layers=3)
    strategy.shape(supernet)
    counts = []
    for epoch in range(9):
        with torch.no_grad():
            supernet.alphas["normal"].copy_(torch.arange(8.0))
        assert strategy.start_epoch(supernet, epoch, 9) == (epoch in (3, 6))
        assert (not supernet.alphas["normal"].any()) == (epoch in (3, 6))
        assert not strategy.start_epoch(supernet, epoch, 9), "an epoch that broke off"
        counts += supernet.kept("normal").sum(dim=-1).unique().tolist()
    assert counts == [8] * 3 + [5] * 3 + [3] * 3
    assert supernet.kept("normal")[:, 5:].all(), "the strongest stay"


def test_of_two_candidates_none_is_ruled_out() -> None:
    """Else a stage's share of a small space would decide everything before α has learned."""
    strategy, supernet = (
        PDarts(),
        get_space("s2").supernet(in_channels=1, num_classes=2, channels=2, layers=3),
    )
    strategy.shape(supernet)
    before = supernet.kept("normal").clone()
    for epoch in range(6):
        strategy.start_epoch(supernet, epoch, 6)
    assert torch.equal(supernet.kept("normal"), before)


def test_each_stage_is_deeper_and_starts_with_new_weights() -> None:
    strategy = PDarts()
    supernet = DARTS.supernet(in_channels=1, num_classes=2, channels=2, layers=8)
    strategy.shape(supernet)
    depths, weights = [], []
    for epoch in range(6):
        if strategy.start_epoch(supernet, epoch, 6):
            strategy.shape(supernet)
        before = list(supernet.parameters())
        strategy.shape(supernet)
        assert all(a is b for a, b in zip(before, supernet.parameters(), strict=True)), "the second time"
        depths.append(len(supernet.cells))
        weights.append(supernet.stem[0].weight)
    assert depths == [3, 3, 5, 5, 8, 8]
    assert weights[1] is weights[0]
    assert not torch.equal(weights[2], weights[1])
    assert not torch.equal(weights[4], weights[3])
    for edges in supernet.mixed_ops("normal"):
        assert all(sum(not isinstance(op, Zero) for op in edge.ops) <= 3 for edge in edges), "few candidates"
    assert supernet(torch.randn(2, 1, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_skip_connections_are_dropped_as_a_whole_and_others_never(rate: float) -> None:
    strategy = PDarts()
    make_step(strategy)
    strategy.drop_rate.fill_(rate)
    torch.manual_seed(0)
    alpha = some_alphas()["normal"][:1].expand(20_000, 4)
    plain = alpha.softmax(dim=-1)
    weights = strategy.relax({"normal": alpha})["normal"]
    assert torch.equal(weights[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    dropped = weights[:, 1] == 0
    assert dropped.float().mean().item() == pytest.approx(rate, abs=0.01)
    torch.testing.assert_close(weights[~dropped, 1], plain[~dropped, 1] / (1 - rate))
    assert torch.equal(strategy.mixing({"cell": alpha})["cell"], plain)


def test_drop_rate_falls_within_each_stage() -> None:
    rates = values_by_epoch(PDarts(), "drop_rate", 75)
    assert rates[:25] == [0] * 25
    assert rates[25:35] == pytest.approx([0.4 * (25 - epoch) / 25 for epoch in range(10)])
    assert rates[60:75] == pytest.approx([0.7 * 0.8187307**epoch for epoch in range(15)])


def test_learning_rate_starts_anew_with_the_weights_of_each_stage(small_space: None) -> None:
    phase = make_phase(strategy="p-darts", epochs=6, learning_rate=0.2, learning_rate_min=0.0)
    assert [phase.learning_rate(epoch) for epoch in range(6)] == pytest.approx([0.2, 0.1] * 3)


def test_the_last_stage_has_the_published_depth() -> None:
    """In DARTS' stack; other spaces keep their own."""
    assert make_config(SearchConfig, {"dataset": "cifar10", "strategy": "p-darts"}).layers == 17
    mobile = {"dataset": "cifar10", "space": "mobile"}
    others = [make_config(SearchConfig, {**mobile, "strategy": name}).layers for name in ("p-darts", "darts")]
    assert others[0] == others[1]


def test_a_search_resumes_in_a_deeper_stage(small_space: None) -> None:
    first, resumed = (make_phase(strategy="p-darts", epochs=3, layers=6) for _ in range(2))
    for epoch in range(2):
        list(first.steps(epoch, 0))
    resumed.load_state_dict(first.state_dict())
    states = (phase.supernet.state_dict() for phase in (first, resumed))
    for (name, a), (_, b) in zip(*(state.items() for state in states), strict=True):
        assert torch.equal(a, b), name


def test_alpha_stays_in_the_first_two_fifths_of_each_stage(small_space: None) -> None:
    phase = make_phase(strategy="p-darts", epochs=15)
    names = [phase.metric_names(epoch) for epoch in range(15)]
    assert [len(of_epoch) for of_epoch in names] == ([2] * 2 + [4] * 3) * 3


@pytest.mark.parametrize("epochs", range(1, 8))
def test_alpha_learns_in_every_stage_of_a_short_search(epochs: int) -> None:
    held = [PDarts().holds_alpha(epoch, epochs) for epoch in range(epochs)]
    stages = [epoch * 3 // epochs for epoch in range(epochs)]
    assert all(any(not h for h, s in zip(held, stages, strict=True) if s == stage) for stage in set(stages))
