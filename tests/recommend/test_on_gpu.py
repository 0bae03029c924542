"""The manager's kernels and the controller's strategies on a GPU."""

import pytest
import torch

from neuroexapt.backend import registry, use_backend
from neuroexapt.backend.candidates import implements
from neuroexapt.backend.registry import Support
from neuroexapt.core.genotypes import RECOMMENDERS
from neuroexapt.recommend import create_integrated_controller, create_triton_operator_manager
from neuroexapt.recommend.config import OPERATORS
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.spaces.seqrec import SEQREC
from tests.recommend.tiny import TinyRecommender

pytestmark = pytest.mark.gpu


def test_every_operator_runs_on_its_kernel_with_the_references_results():
    torch.manual_seed(0)
    x = torch.randn(8, 50, 64, device="cuda")
    mask = (
        torch.arange(50, device="cuda") >= torch.tensor([[0], [3], [50], [49], [7], [20], [0], [33]]).cuda()
    )
    manager = create_triton_operator_manager({})
    assert manager.get_operator_availability() == dict.fromkeys(OPERATORS, True), (
        manager.get_operator_reasons()
    )
    with use_backend("cuda:triton"):  # whether or not they pay off at this size
        found = manager.benchmark_all_operators({"hidden_states": x, "attention_mask": mask}, 20)
    for operator, row in found.items():
        assert (row["status"], row["implementation"]) == ("ok", "triton"), (operator, row)


def test_an_operator_that_is_switched_off_runs_in_pytorch():
    manager = create_triton_operator_manager({"triton_operators": {"enable_interaction_operator": False}})
    manager.apply_interaction_operator(torch.randn(4096, 27, 64, device="cuda"))
    assert manager.get_operator_stats()["interaction_operator"]["implementations"] == {"torch": 1}


@pytest.mark.parametrize("strategy", ["captured", "compiled"])
def test_strategies_agree(strategy):
    serving = {"strategies": ["eager", strategy], "max_batch_size": 4}
    model = TinyRecommender()
    controller = create_integrated_controller({"model": model, "device": "cuda", "serving": serving})
    requests = [controller.make_request(history, num_recommendations=5) for history in ([1, 2], [], [3] * 9)]
    pairs = zip(
        controller.infer_batch(requests, strategy), controller.infer_batch(requests, "eager"), strict=True
    )
    for ours, theirs in pairs:
        assert (ours["inference_strategy"], theirs["inference_strategy"]) == (strategy, "eager")
        assert [entry["item_id"] for entry in ours["recommendations"]] == [
            entry["item_id"] for entry in theirs["recommendations"]
        ]
        assert [entry["score"] for entry in ours["recommendations"]] == pytest.approx(
            [entry["score"] for entry in theirs["recommendations"]], abs=1e-2
        )


@pytest.mark.parametrize("strategy", ["eager", "captured", "compiled"])
def test_an_operator_whose_kernel_fails_takes_no_strategy_with_it(strategy, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(registry, "IMPLEMENTATIONS", dict(registry.IMPLEMENTATIONS))
    assert implements("fused_attention_layernorm", "triton")
    registry.register_impl("fused_attention_layernorm", "triton", failing, lambda *_, **__: Support(True))
    sizes = {"num_items": 30, "max_length": 6, "has_times": False, "channels": 32, "layers": 2}
    model = SequenceRecommender(SEQREC.network(RECOMMENDERS["SASRec"], **sizes))
    serving = {"strategies": [strategy], "max_batch_size": 2}
    controller = create_integrated_controller({"model": model, "device": "cuda", "serving": serving})
    with use_backend("cuda:triton"):  # whether or not its kernels pay off at this size
        answer = controller.infer_with_optimal_strategy("ada", [1, 2, 3], strategy=strategy)
    assert (answer["inference_strategy"], len(answer["recommendations"])) == (strategy, 10)
    stats = controller.get_comprehensive_stats()
    assert stats["unavailable_strategies"] == {}
    fallbacks = stats["triton_stats"]["fused_attention_layernorm"]["fallbacks"]
    assert fallbacks == {"RuntimeError: no such instruction": 1}


def test_onnx_runtime_says_why_it_stays_on_the_cpu():
    serving = {"strategies": ["onnxruntime"], "max_batch_size": 1}
    config = {"model": TinyRecommender(), "device": "cuda", "serving": serving}
    controller = create_integrated_controller(config)
    controller.warm_up()
    reason = controller.get_comprehensive_stats()["unavailable_strategies"]["onnxruntime"]
    assert reason.startswith("ONNX Runtime serves from the CPU here")
