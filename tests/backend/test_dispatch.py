"""Decisions about GPU calls are tested with fake tensors, which claim to be on a GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from neuroexapt import backend, functional
from neuroexapt.backend import candidates, registry, tuning
from neuroexapt.backend.registry import Backend, Support

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _own_counts_and_implementations(monkeypatch):
    for op, tier in candidates.MODULES:  # registered for good before they are copied for one test
        candidates.implements(op, tier)
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", dict(registry.IMPLEMENTATIONS))
    backend.reset_dispatch_report()


@pytest.fixture
def choose(monkeypatch):
    """Pretend that a backend is chosen and that the tiers named run here."""

    def pretend(tier: str, runs: tuple[str, ...] = ("ext", "triton", "torch")) -> None:
        monkeypatch.setattr(registry, "get_backend", lambda: Backend("cuda", tier, True, ""))
        monkeypatch.setattr(registry, "probe_tier", lambda t: "" if t in runs else f"no {t} here")

    return pretend


def gpu_sum(operands: int = 8, elements: int = 4096, dtype=torch.float32) -> tuple[list, torch.Tensor]:
    with FakeTensorMode():
        xs = [torch.empty(elements, dtype=dtype, device="cuda") for _ in range(operands)]
        return xs, torch.empty(operands, device="cuda")


def test_a_call_on_the_cpu_runs_the_reference_and_is_counted():
    xs, weights = [torch.ones(2), torch.ones(2)], torch.ones(2)
    functional.weighted_sum(xs, weights)
    functional.weighted_sum(xs, weights)
    decision = backend.Decision("weighted_sum", "torch", "the input is on cpu")
    assert backend.explain("weighted_sum", xs, weights) == decision
    assert backend.dispatch_report() == {decision: 2}
    backend.reset_dispatch_report()
    assert backend.dispatch_report() == {}


def test_ops_without_kernels_run_the_reference_and_say_so(choose):
    choose("auto")
    with candidates.without_kernels(["weighted_sum"]), candidates.without_kernels(["softmax_sum"]):
        for op in ("weighted_sum", "softmax_sum"):
            decision = backend.explain(op, *gpu_sum())
            assert (decision.impl, decision.reason) == ("torch", "its kernels are switched off")
    assert backend.explain("softmax_sum", *gpu_sum()).impl == "ext"


def test_auto_takes_the_extension_first_then_triton_then_pytorch(choose):
    choose("auto")
    assert backend.explain("softmax_sum", *gpu_sum()).impl == "ext"
    choose("auto", runs=("triton",))
    assert backend.explain("softmax_sum", *gpu_sum()).impl == "triton"
    choose("auto", runs=())
    decision = backend.explain("softmax_sum", *gpu_sum())
    assert (decision.impl, decision.reason) == ("torch", "ext: no ext here; triton: no triton here")


@pytest.mark.parametrize("tier", ["ext", "triton", "torch"])
def test_a_choice_by_name_is_followed_at_any_size(choose, tier):
    choose(tier)
    decision = backend.explain("softmax_sum", *gpu_sum(operands=2, elements=1))
    assert decision == backend.Decision("softmax_sum", tier, "chosen by name")


def test_auto_leaves_sums_below_the_threshold_to_pytorch(choose):
    choose("auto", runs=("ext",))
    assert backend.explain("weighted_sum", *gpu_sum(4, 1024)).impl == "ext"
    for operands, elements in ((3, 4096), (4, 1023)):
        decision = backend.explain("weighted_sum", *gpu_sum(operands, elements))
        assert decision.impl == "torch"
        assert "ext: would not pay off at this size" in decision.reason


@pytest.mark.parametrize("op", ["sepconv", "max_pool"])
def test_auto_leaves_channels_last_to_pytorch(choose, op):
    with FakeTensorMode():
        shapes = (64, 32, 128, 128), (32, 1, 3, 3), (32, 32, 1, 1)
        x, *weights = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    nhwc, rest = x.to(memory_format=torch.channels_last), weights if op == "sepconv" else (3,)
    choose("auto", runs=("triton",))
    with candidates.free_launches():
        assert backend.explain(op, x, *rest).impl == "triton"
        decision = backend.explain(op, nhwc, *rest)
    assert decision.impl == "torch"
    assert "triton: PyTorch is faster in channels-last" in decision.reason
    choose("triton")
    assert backend.explain(op, nhwc, *rest).impl == "triton"


def test_arguments_that_a_kernel_does_not_take_go_to_pytorch_with_the_reason(choose):
    choose("ext")
    xs, weights = gpu_sum(dtype=torch.float64)
    assert backend.explain("softmax_sum", xs, weights).reason == "ext: dtype torch.float64"
    mixed = [*gpu_sum(4)[0], *gpu_sum(4, dtype=torch.float16)[0]]
    assert backend.explain("softmax_sum", mixed, weights).reason == "ext: operands of several dtypes"
    many, weights = gpu_sum(49)
    assert backend.explain("softmax_sum", many, weights).reason == "ext: more than 48 operands"
    empty, weights = gpu_sum(elements=0)
    assert backend.explain("softmax_sum", empty, weights).reason == "ext: empty operands"
    xs, _ = gpu_sum()
    assert backend.explain("softmax_sum", xs, torch.ones(8)).reason == "ext: operands on several devices"


def test_a_tier_without_the_op_says_so(choose):
    choose("ext")
    with FakeTensorMode():
        x = torch.empty(1, 16, 8, 8, device="cuda")
    decision = backend.explain("max_pool", x, 3)
    assert (decision.impl, decision.reason) == ("torch", "ext: does not implement max_pool")


@pytest.mark.parametrize("op", ["softmax_sum", "weighted_sum"])
@pytest.mark.parametrize("tier", ["ext", "triton"])
def test_the_implementation_decided_on_is_the_one_that_runs(choose, op, tier):
    """Under a fake mode the op's own fake kernel runs, so that this needs no GPU."""
    choose(tier)
    xs, scores = gpu_sum()
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "neuroexapt":
                called.append(func.name())
            return func(*args, **(kwargs or {}))

    with xs[0].fake_mode, Watch():
        y = getattr(functional, op)(xs, scores)
    assert y.shape == xs[0].shape
    assert called == [f"neuroexapt::{op}_{tier}"]
    assert [decision.impl for decision in backend.dispatch_report()] == [tier]


def test_a_users_kernel_survives_the_import_of_the_built_in_one(monkeypatch):
    def mine(xs, logits):
        return xs[0]

    def register_built_in(module):
        backend.register_impl("softmax_sum", "triton", lambda xs, logits: xs[1], lambda *_: Support(True))

    backend.register_impl("softmax_sum", "triton", mine, lambda *_: Support(True))
    monkeypatch.setattr(candidates.importlib, "import_module", register_built_in)
    candidates._register_all_of.__wrapped__("neuroexapt.kernels.softmax_sum_triton")
    assert registry.IMPLEMENTATIONS["softmax_sum", "triton"].fn is mine


def test_a_users_op_runs_with_the_tiers_it_registers(choose):
    from neuroexapt.backend.dispatch import dispatch

    choose("auto", runs=("triton",))
    backend.register_impl("double", "torch", lambda x: x + x, lambda x: Support(True))
    backend.register_impl("double", "triton", lambda x: "fused", lambda x: Support(x.dim() == 1, "not 1d"))
    torch.testing.assert_close(dispatch("double", torch.ones(2)), 2 * torch.ones(2))
    (x, *_), _ = gpu_sum()
    assert dispatch("double", x) == "fused"
    with x.fake_mode:
        assert dispatch("double", x.view(2, -1)).shape == (2, 2048)


def test_each_decision_is_logged_once(caplog):
    caplog.set_level("INFO")
    for _ in range(3):
        functional.weighted_sum([torch.ones(2)], torch.ones(1))
    messages = [record.message for record in caplog.records]
    assert len(messages) <= 1  # none where an earlier test has logged it


def test_measured_crossovers_decide(choose, monkeypatch):
    choose("auto", runs=("triton",))
    crossover = tuning.Crossover("softmax_sum", "triton", "float32", 2, 64)
    config = tuning.TuningConfig.for_this_machine((crossover,))
    monkeypatch.setattr(
        candidates,
        "smallest_worthwhile_size",
        lambda op, tier, _, k: config.min_elements(op, tier, "float32", k),
    )
    assert backend.explain("softmax_sum", *gpu_sum(2, 64)).impl == "triton"
    assert backend.explain("softmax_sum", *gpu_sum(2, 63)).impl == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["torch", "triton", "ext"])
def test_each_tier_gives_the_reference_numbers_on_the_gpu(tier):
    from neuroexapt.backend import workloads

    with backend.use_backend(f"cuda:{tier}"):
        call = workloads.sample_call("softmax_sum", 4096, torch.float32, torch.device("cuda"))
        assert workloads.error_of(call, workloads.run_call(call)) < 1e-5
    assert [decision.impl for decision in backend.dispatch_report()] == [tier]


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["triton", "ext"])
def test_dispatch_survives_torch_compile_without_graph_breaks(tier):
    xs = [torch.randn(4, 16, 8, 8, device="cuda", requires_grad=True) for _ in range(4)]
    logits = torch.randn(4, device="cuda", requires_grad=True)
    with backend.use_backend(f"cuda:{tier}"):
        compiled = torch.compile(functional.softmax_sum, fullgraph=True)
        torch.testing.assert_close(compiled(xs, logits), functional.softmax_sum(xs, logits))
