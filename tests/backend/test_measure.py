import pytest
import torch

from neuroexapt import backend
from neuroexapt.backend import measure, registry, workloads
from neuroexapt.errors import UserError
from neuroexapt.kernels import reference


@pytest.fixture
def cpu():
    return backend.resolve("cpu")


@pytest.fixture
def replace(monkeypatch):
    """Give an op another PyTorch implementation for one test."""
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", dict(registry.IMPLEMENTATIONS))
    monkeypatch.setattr(measure, "get_available_backends", lambda: (backend.resolve("cpu"),))
    return lambda op, fn: backend.register_impl(op, "torch", fn, lambda *_, **__: backend.Support(True))


def test_every_op_of_the_cpu_agrees_with_fp64(cpu):
    checks = backend.check_backend(cpu)
    assert [check.op for check in checks] == list(workloads.OPS)
    assert all(check.ok and 0 < check.max_error < 1e-5 for check in checks)


def test_a_wrong_gradient_is_found(cpu, replace):
    replace("softmax_sum", lambda xs, logits: reference.softmax_sum(xs, logits.detach() + 0 * logits))
    (failed,) = [check for check in backend.check_backend(cpu) if not check.ok]
    assert failed.op == "softmax_sum"
    assert "against the reference" in failed.reason


def test_an_op_that_raises_fails_its_check(cpu, replace):
    def broken(x, kernel_size, stride=1):
        raise RuntimeError("no such kernel")

    replace("avg_pool", broken)
    (failed,) = [check for check in backend.check_backend(cpu) if not check.ok]
    assert (failed.op, failed.max_error, failed.reason) == ("avg_pool", None, "no such kernel")


def test_a_benchmark_gives_times_that_passed_their_check(replace):
    (result,) = backend.benchmark_backends(0.1, "weighted_sum")
    assert (result.backend, result.status) == ("cpu", "ok")
    assert 0 < result.timing.p20_ms <= result.timing.median_ms <= result.timing.p80_ms
    assert result.max_error < 1e-5


@pytest.mark.parametrize(
    "wrong", [lambda x, k, s=1: 2 * x, lambda x, k, s=1: x[:, 1:99].float() / 0 * torch.nan]
)
def test_a_benchmark_gives_no_time_to_a_wrong_or_failing_op(replace, wrong):
    replace("max_pool", wrong)
    (result,) = backend.benchmark_backends(0.1, "max_pool")
    assert result.status != "ok"
    assert result.timing is None


def test_the_mixed_op_workload_runs_every_gradient():
    results = workloads.mixed_op(torch.device("cpu"))()
    assert len(results) == 6
    assert all(torch.isfinite(x).all() for x in results)


def test_an_unknown_workload_lists_the_valid_ones():
    with pytest.raises(UserError, match="mixed_op, softmax_sum"):
        backend.benchmark_backends(0.1, "training")


def test_timing_counts_its_calls():
    calls = []
    timing = measure.time_calls(lambda: calls.append(None), torch.device("cpu"), seconds=0)
    assert timing.calls == len(calls) - measure._WARM_UP_CALLS == measure._TIMED_CALLS[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:torch", "cuda:triton", "cuda:ext"])
def test_every_op_of_the_gpu_agrees_with_fp64(name):
    failed = [check for check in backend.check_backend(backend.resolve(name)) if not check.ok]
    assert failed == []


@pytest.mark.gpu
def test_a_gpu_benchmark_covers_every_tier():
    results = backend.benchmark_backends(5)
    assert {r.backend for r in results} == {"cpu", "cuda", "cuda:torch", "cuda:triton", "cuda:ext"}
    assert [r.status for r in results] == ["ok"] * len(results)
    assert all(r.peak_mib > 0 for r in results if r.backend != "cpu")
