import json

import pytest
import torch
from torch import Tensor, nn

from neuroexapt.backend import new_kernel_graph
from neuroexapt.core.operations import MixedOp
from neuroexapt.errors import UserError

SAMPLE = torch.zeros(2, 4, 6, 6)


def edge(*primitives: str) -> tuple[MixedOp, tuple[Tensor, Tensor]]:
    """An edge that runs operation by operation, so that there are several nodes."""
    module = MixedOp(4, 1, primitives)
    module.fused = False
    return module, (SAMPLE, torch.ones(len(primitives)))


def test_an_op_of_the_package_is_one_node_beside_those_of_pytorch() -> None:
    module, inputs = edge("max_pool_3x3", "sep_conv_3x3")
    nodes = new_kernel_graph(module, inputs).nodes
    assert [node.op for node in nodes if "add_" not in node.op] == [
        "max_pool",
        "aten.native_batch_norm",
        "sepconv",
        "aten.native_batch_norm",
        "sepconv",
        "aten.native_batch_norm",
        "weighted_sum",
    ]
    total = nodes[-1]
    assert (total.module, total.implementation, total.shapes) == ("MixedOp", "torch", ((2, 4, 6, 6),))
    assert total.bytes == 4 * (3 * SAMPLE.numel() + 2), "two operands, two weights, one result"
    assert nodes[0].module == "MixedOp.ops.0.0"


def test_json_holds_every_node() -> None:
    module, inputs = edge("avg_pool_3x3")
    graph = new_kernel_graph(module, inputs)
    plan = json.loads(graph.to_json())
    assert len(plan["nodes"]) == len(graph.nodes)
    assert plan["bytes"] == sum(node["bytes"] for node in plan["nodes"])
    assert plan["launches"] is None, "nothing is launched on a CPU"
    assert plan["nodes"][0]["op"] == "avg_pool"
    assert plan["nodes"][0]["shapes"] == [[2, 4, 6, 6]]


def test_diff_names_what_one_of_them_lacks() -> None:
    one, two = (new_kernel_graph(*edge(*ops)) for ops in (["avg_pool_3x3"], ["max_pool_3x3"]))
    assert one.diff(one) == ()
    assert one.diff(two) == (
        "- MixedOp.ops.0.0: avg_pool [torch] 2x4x6x6",
        "+ MixedOp.ops.0.0: max_pool [torch] 2x4x6x6",
    )


def test_tracing_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    new_kernel_graph(module, [SAMPLE + 1])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="unknown backend 'tpu'"):
        new_kernel_graph(nn.ReLU(), [SAMPLE], backend="tpu")


@pytest.mark.gpu
def test_on_the_gpu_launches_are_counted() -> None:
    module = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).cuda()
    relu, linear = new_kernel_graph(module, [SAMPLE.cuda()]).nodes
    assert relu.launches == 1
    assert linear.launches is not None
    assert linear.launches >= 1


@pytest.mark.gpu
def test_on_the_gpu_a_node_names_the_tier_that_runs_it() -> None:
    module, inputs = edge("max_pool_3x3", "sep_conv_3x3", "skip_connect")
    module, inputs = module.cuda(), tuple(x.cuda() for x in inputs)
    for tier in ("triton", "torch"):
        graph = new_kernel_graph(module, inputs, backend=f"cuda:{tier}")
        pools = [node for node in graph.nodes if node.op == "max_pool"]
        assert [node.implementation for node in pools] == [tier]
        assert graph.launches is not None
        assert graph.launches >= len(graph.nodes)
