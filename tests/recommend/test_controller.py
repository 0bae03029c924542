import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from neuroexapt.core.genotypes import RECOMMENDERS, CellGenotype, RecommenderGenotype
from neuroexapt.errors import BackendUnavailableError, UserError
from neuroexapt.kernels import reference
from neuroexapt.recommend import IntegratedController, create_integrated_controller, strategies
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.recommend.request import split_behaviors
from neuroexapt.spaces.seqrec import SEQREC
from tests.recommend.tiny import TinyRecommender


def make_controller(*names: str, **config) -> IntegratedController:
    serving = {"strategies": list(names) or ["eager"], "max_batch_size": 4}
    return create_integrated_controller(
        {"model": TinyRecommender(), "device": "cpu", "serving": serving, **config}
    )


@pytest.fixture(scope="module")
def controller() -> IntegratedController:
    return make_controller("eager")


def ids(answer: dict) -> list[int]:
    return [entry["item_id"] for entry in answer["recommendations"]]


def test_it_ranks_the_whole_catalogue(controller):
    model = TinyRecommender()
    history = [3, 7, 7, 12]
    query = model.items.weight[history].mean(0)
    expected = (model.items.weight[1:] @ query).sort(descending=True, stable=True)
    answer = controller.infer_with_optimal_strategy("ada", history, 30, session_id="s1")
    assert ids(answer) == (expected.indices + 1).tolist()
    assert [entry["score"] for entry in answer["recommendations"]] == pytest.approx(expected.values.tolist())
    assert [entry["rank"] for entry in answer["recommendations"]] == list(range(1, 31))
    assert (answer["user_id"], answer["session_id"]) == ("ada", "s1")
    assert answer["inference_strategy"] == "eager"
    assert answer["inference_time_ms"] > 0


def test_seen_items_are_left_out_where_asked_even_those_that_the_model_no_longer_sees(controller):
    history = [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(history) > controller.model.max_length
    everything = controller.infer_with_optimal_strategy(0, history, 99)
    unseen = controller.infer_with_optimal_strategy(0, history, 99, exclude_seen=True)
    assert ids(unseen) == [item for item in ids(everything) if item not in history]
    assert len(ids(everything)) == 30


def test_of_a_long_history_the_latest_items_count(controller):
    recent = [9, 8, 7, 6, 5, 4]
    long = controller.infer_with_optimal_strategy(0, [1, 2, 3, *recent])
    assert long["recommendations"] == controller.infer_with_optimal_strategy(0, recent)["recommendations"]


def test_an_empty_history_gets_the_most_frequent_items(controller):
    answer = controller.infer_with_optimal_strategy("a stranger", [], 3)
    counts = controller.model.item_counts
    assert ids(answer) == [1, 2, 3]
    assert [entry["score"] for entry in answer["recommendations"]] == counts[1:4].tolist()


def test_behaviors_may_carry_timestamps(controller):
    plain = controller.infer_with_optimal_strategy(0, [4, 5])
    timed = controller.infer_with_optimal_strategy(
        0, [{"item_id": 4, "timestamp": 10}, {"item_id": 5, "timestamp": 20}]
    )
    assert timed["recommendations"] == plain["recommendations"]


@pytest.mark.parametrize("history", [np.array([4, 5]), torch.tensor([4, 5]), (4, np.int32(5))])
def test_histories_may_be_arrays(controller, history):
    plain = controller.infer_with_optimal_strategy(0, [4, 5], 3)
    found = controller.infer_with_optimal_strategy(0, history, np.int64(3))
    assert found["recommendations"] == plain["recommendations"]
    assert {type(item) for item in controller.make_request(history).items} == {int}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"user_behaviors": [1, 31]}, "item ids are integers from 1 to 30, not 31"),
        ({"user_behaviors": [0]}, "item ids are integers from 1 to 30, not 0"),
        ({"user_behaviors": ["7"]}, "not '7'"),
        ({"user_behaviors": [True]}, "not True"),
        (
            {"user_behaviors": [{"item": 3}]},
            "a behavior is an item id or a mapping with item_id, not {'item': 3}",
        ),
        ({"user_behaviors": None}, "user_behaviors must be a sequence, not None"),
        ({"user_behaviors": {1: 2}}, "user_behaviors must be a sequence, not {1: 2}"),
        ({"user_behaviors": [1], "num_recommendations": 0}, "num_recommendations must be an integer from 1"),
        (
            {"user_behaviors": [{"item_id": 1, "timestamp": 1}, 2]},
            "with every item of a history or with none",
        ),
        (
            {"user_behaviors": [{"item_id": 1, "timestamp": 2}, {"item_id": 1, "timestamp": 1}]},
            "timestamps decrease",
        ),
        ({"user_behaviors": [1], "strategy": "fast"}, "unknown strategy 'fast'; choose auto or of eager"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(controller, arguments, reason):
    with pytest.raises(UserError, match=reason):
        controller.infer_with_optimal_strategy("ada", **arguments)


def test_without_a_model_it_says_how_to_get_one():
    controller = create_integrated_controller({"device": "cpu"})
    assert controller.triton_manager.get_operator_availability()["interaction_operator"] is False
    with pytest.raises(UserError, match="no trained recommender; train one, as"):
        controller.infer_with_optimal_strategy("ada", [1])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"modle": "x"}, "config has no key 'modle'; did you mean 'model'?"),
        ({"serving": {"strategies": ["egaer"]}}, "unknown strategy 'egaer'"),
        ({"serving": {"strategies": "eager"}}, "strategies must be a list of names, not 'eager'"),
        ({"serving": {"strategies": None}}, "strategies must be a list of names, not None"),
        ({"model": 5}, "model must be a file or a SequenceRecommender, not 5"),
        ([], r"config must be a mapping, not \[\]"),
        ({"serving": {"max_batch_size": 0}}, "max_batch_size must be an integer from 1 on"),
    ],
)
def test_a_configuration_is_checked_before_anything_is_built(config, reason):
    with pytest.raises(UserError, match=reason):
        create_integrated_controller(config)


def test_a_batch_gives_each_what_it_gets_alone(controller):
    histories = [[1], [], [2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13]]
    requests = [
        controller.make_request(history, num_recommendations=1 + len(history)) for history in histories
    ]
    together = controller.infer_batch(requests)
    assert [answer["batch_size"] for answer in together] == [4, 4, 4, 4, 2, 2]
    for history, answer in zip(histories, together, strict=True):
        alone = controller.infer_with_optimal_strategy(0, history, 1 + len(history))
        assert ids(answer) == ids(alone)
        scores = [entry["score"] for entry in alone["recommendations"]]
        assert [entry["score"] for entry in answer["recommendations"]] == pytest.approx(scores)


def test_statistics_tell_what_ran_how_often_and_how_fast():
    controller = make_controller("eager", "captured")
    for _ in range(3):
        controller.infer_with_optimal_strategy(0, [1])
    stats = controller.get_comprehensive_stats()
    assert stats["requests"] == 3
    assert stats["inference_counts"] == {"eager": 3}
    assert stats["latencies"]["eager"]["median_ms"] > 0
    assert [*stats["warm_up"]["eager"]] == [1, 2, 4]
    assert stats["unavailable_strategies"] == {"captured": "a CUDA graph needs inputs on a GPU, not on cpu"}
    assert stats["triton_stats"]["interaction_operator"]["enabled"]


def test_a_strategy_by_name_that_cannot_run_says_why():
    controller = make_controller("eager", "captured")
    with pytest.raises(BackendUnavailableError, match="cannot run here: a CUDA graph needs inputs on a GPU"):
        controller.infer_with_optimal_strategy(0, [1], strategy="captured")
    with pytest.raises(BackendUnavailableError, match="not among the strategies to prepare"):
        controller.infer_with_optimal_strategy(0, [1], strategy="compiled")


def test_the_fastest_of_the_warm_up_runs(monkeypatch):
    monkeypatch.setitem(strategies.STRATEGIES, "slow", lambda scorer, samples: _slowed(scorer))
    controller = make_controller("slow", "eager")
    assert controller.infer_with_optimal_strategy(0, [1])["inference_strategy"] == "eager"
    assert controller.infer_with_optimal_strategy(0, [1], strategy="slow")["inference_strategy"] == "slow"
    timings = controller.get_comprehensive_stats()["warm_up"]
    assert timings["slow"][1] > timings["eager"][1]


def test_where_no_strategy_runs_plain_pytorch_answers(monkeypatch):
    def broken(scorer, samples):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(strategies.STRATEGIES, "eager", broken)
    controller = make_controller("eager")
    assert controller.infer_with_optimal_strategy(0, [1])["inference_strategy"] == "reference"
    found = controller.get_comprehensive_stats()["unavailable_strategies"]
    assert found == {"eager": "RuntimeError: no kernel image"}


def test_a_strategy_that_fails_later_gives_way_to_pytorch_and_is_recorded(monkeypatch):
    works = [True]

    def fragile(scorer, samples):
        def run(*inputs):
            if not works[0]:
                raise LookupError("the session is gone\nand more")
            return scorer(*inputs)

        return run

    monkeypatch.setitem(strategies.STRATEGIES, "fragile", fragile)
    controller = make_controller("fragile")
    controller.warm_up()
    works[0] = False
    answer = controller.infer_with_optimal_strategy(0, [1], strategy="fragile")
    assert (answer["inference_strategy"], answer["optimizations_applied"]) == ("reference", [])
    reason = "LookupError: the session is gone … and more"
    stats = controller.get_comprehensive_stats()
    assert stats["failures"] == [{"strategy": "fragile", "reason": reason, "count": 1}]
    assert stats["unavailable_strategies"] == {"fragile": reason}
    assert controller.infer_with_optimal_strategy(0, [1])["inference_strategy"] == "reference"
    with pytest.raises(BackendUnavailableError, match=reason):
        controller.infer_with_optimal_strategy(0, [1], strategy="fragile")


def test_an_operator_whose_kernel_fails_takes_no_strategy_with_it(kernel_on_cpu):
    def failing(*args, **kwargs):
        raise RuntimeError("no such instruction")

    expected = sasrec_controller().infer_with_optimal_strategy(0, [1, 2, 3])
    kernel_on_cpu("fused_attention_layernorm", failing)
    controller = sasrec_controller()
    found = controller.infer_with_optimal_strategy(0, [1, 2, 3])
    assert found["inference_strategy"] == "eager"
    assert found["recommendations"] == expected["recommendations"]
    stats = controller.get_comprehensive_stats()
    assert (stats["unavailable_strategies"], stats["failures"]) == ({}, [])
    assert stats["optimizations"] == {"eager": ()}
    reason = "RuntimeError: no such instruction"
    assert stats["triton_stats"]["fused_attention_layernorm"]["fallbacks"] == {reason: 1}


def test_the_kernels_that_a_strategy_runs_on_are_named_and_counted(kernel_on_cpu):
    kernel_on_cpu("fused_attention_layernorm", reference.fused_attention_layernorm)
    controller = sasrec_controller()
    for _ in range(3):
        answer = controller.infer_with_optimal_strategy(0, [1, 2, 3])
    assert answer["optimizations_applied"] == ["triton:fused_attention_layernorm"]
    operator = controller.get_comprehensive_stats()["triton_stats"]["fused_attention_layernorm"]
    assert operator["implementations"] == {"triton": 3 * 2}  # two layers, the warm-up not counted


class Decided(nn.Module):
    """Scores that a decision is part of, taken as the dispatch's is."""

    decision = 1.0

    @staticmethod
    @torch.compiler.assume_constant_result
    def decide() -> float:
        return Decided.decision

    def forward(self, items: torch.Tensor, lengths: torch.Tensor, timestamps: None = None) -> torch.Tensor:
        return items * Decided.decide()

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        return query


def test_each_compiled_strategy_is_compiled_with_its_own_switches(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    sample = torch.ones(2, 3), torch.ones(2)
    scores = []
    for decision in (1.0, 2.0):
        monkeypatch.setattr(Decided, "decision", decision)
        scores.append(strategies.compiled(strategies.Scorer(Decided()), [sample])(*sample)[0, 0].item())
    assert scores == [1, 2]


def test_what_failed_gets_another_try_when_asked_to(monkeypatch):
    works = [False]

    def fragile(scorer, samples):
        if not works[0]:
            raise LookupError("no compiler")
        return scorer

    monkeypatch.setitem(strategies.STRATEGIES, "fragile", fragile)
    controller = make_controller("fragile")
    assert controller.infer_with_optimal_strategy(0, [1])["inference_strategy"] == "reference"
    works[0] = True
    controller.retry()
    assert controller.infer_with_optimal_strategy(0, [1])["inference_strategy"] == "fragile"
    assert controller.get_comprehensive_stats()["unavailable_strategies"] == {}


def sasrec_controller() -> IntegratedController:
    torch.manual_seed(0)
    sizes = {"num_items": 30, "max_length": 6, "has_times": False, "channels": 8, "layers": 2}
    return make_controller(model=SequenceRecommender(SEQREC.network(RECOMMENDERS["SASRec"], **sizes)))


def _slowed(scorer):
    def run(*inputs):
        for _ in range(20):
            scores = scorer(*inputs)
        return scores

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A recommender that looks at times, as a file."""
    torch.manual_seed(0)
    genotype = RecommenderGenotype(CellGenotype.from_text("|hstu_2h~0|"), "short_long")
    sizes = {"num_items": 30, "max_length": 6, "has_times": True, "channels": 8, "layers": 1}
    network = SEQREC.network(genotype, **sizes)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    SequenceRecommender(network, torch.arange(31)).save(path)
    return path


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("compiled", marks=pytest.mark.slow)])
def test_all_strategies_agree_at_every_batch_size(saved, name):
    # The tiny model for torch.compile, which takes its time over each operation.
    serving = {"strategies": ["eager", name], "max_batch_size": 4}
    model = TinyRecommender() if name == "compiled" else saved
    controller = create_integrated_controller({"model": model, "device": "cpu", "serving": serving})
    history = [{"item_id": item, "timestamp": 1000 * item**2} for item in range(1, 9)]
    for histories in ([history], [history[:2], []], [history[:1], history[3:], history[:6]]):
        requests = [controller.make_request(*split_behaviors(h), num_recommendations=30) for h in histories]
        expected = controller.infer_batch(requests, "eager")
        found = controller.infer_batch(requests, name)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours["inference_strategy"], theirs["inference_strategy"]) == (name, "eager")
            assert ours["optimizations_applied"] == [name]
            assert by_item(ours) == pytest.approx(by_item(theirs), abs=1e-5)


def test_times_make_a_difference_to_a_model_that_looks_at_them(saved):
    serving = {"strategies": ["eager"], "max_batch_size": 1}
    controller = create_integrated_controller({"model": str(saved), "device": "cpu", "serving": serving})
    with torch.no_grad():
        for name, parameter in controller.model.named_parameters():
            if name.endswith("time_bias"):
                parameter.copy_(torch.randn_like(parameter))
    soon, late = (
        controller.infer_with_optimal_strategy(
            0, [{"item_id": 1 + i, "timestamp": gap * i} for i in range(5)], num_recommendations=30
        )
        for gap in (1, 10**6)
    )
    assert by_item(soon) != pytest.approx(by_item(late))


def by_item(answer: dict) -> dict[int, float]:
    return {entry["item_id"]: entry["score"] for entry in answer["recommendations"]}


def test_strategies_are_prepared_on_tensors_like_those_of_requests(controller):
    """torch.compile keeps what it made for views for views."""
    sample = strategies._sample(controller.model, 2, torch.device("cpu"))
    assert not any(x._is_view() for x in sample)


def test_only_strategies_that_can_be_prepared_are_offered():
    with pytest.raises(UserError, match="unknown strategy 'auto'; choose of eager, "):
        strategies.check_names(["auto"])
