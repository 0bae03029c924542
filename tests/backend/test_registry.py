import dataclasses

import pytest
import torch

from neuroexapt import backend
from neuroexapt.backend import registry
from neuroexapt.backend.config import save_config
from neuroexapt.errors import BackendUnavailableError, UserError


@pytest.fixture
def everything_runs(monkeypatch):
    """Every device and tier passes its probe, and nothing is remembered before or after."""
    monkeypatch.setattr(registry, "_probe_device", lambda device: "")
    monkeypatch.setattr(registry, "probe_tier", lambda tier: "")
    _forget()
    yield
    _forget()


def _forget() -> None:
    registry._probed.cache_clear()
    registry._best_device.cache_clear()
    registry._saved_spec.cache_clear()


def test_lists_every_backend_with_a_reason_for_those_that_cannot_run():
    backends = backend.list_backends()
    assert [b.value for b in backends] == ["cpu", "cuda", "cuda:torch", "cuda:triton", "cuda:ext", "mps"]
    assert all(b.available != bool(b.reason) for b in backends)
    assert backend.get_available_backends() == tuple(b for b in backends if b.available)


def test_a_backend_is_frozen_and_names_its_torch_device():
    cpu = backend.resolve("cpu")
    assert cpu.torch_device == torch.device("cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cpu.device = "cuda"


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"'tpu'; choose one of auto, cpu, cuda, .*, mps"):
        backend.resolve("tpu")


def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(registry, "_probe_device", lambda device: "the driver is broken")
    _forget()
    with pytest.raises(BackendUnavailableError, match="'cuda:ext' cannot run here: the driver is broken"):
        backend.resolve("cuda:ext")
    _forget()


def test_auto_falls_back_to_the_cpu_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(registry, "_probe_device", lambda device: "" if device == "cpu" else "not there")
    caplog.set_level("INFO")
    _forget()
    assert [backend.resolve("auto").value for _ in range(3)] == ["cpu"] * 3
    assert [record.message for record in caplog.records] == ["running on the CPU, which is slower: not there"]
    _forget()


@pytest.mark.usefixtures("everything_runs")
def test_auto_prefers_the_gpu():
    assert backend.resolve("auto") == backend.resolve("cuda")


def test_a_tier_whose_probe_fails_is_unavailable_and_says_so_once(monkeypatch, caplog):
    def broken_probe():
        raise RuntimeError("ptxas crashed\nand said more")

    pytest.importorskip("triton")
    from neuroexapt.kernels import softmax_sum_triton

    monkeypatch.setattr(softmax_sum_triton, "probe", broken_probe)
    registry.probe_tier.cache_clear()
    assert [registry.probe_tier("triton") for _ in range(2)] == ["ptxas crashed"] * 2
    assert [record.message for record in caplog.records] == [
        "running without the triton kernels, which is slower: ptxas crashed"
    ]
    registry.probe_tier.cache_clear()


@pytest.mark.usefixtures("everything_runs")
def test_argument_context_process_environment_and_saved_choice_go_in_this_order(monkeypatch):
    assert backend.get_backend().value == "cuda"
    save_config({"backend": "cuda:torch"})
    registry._saved_spec.cache_clear()
    assert backend.get_backend().value == "cuda:torch"
    monkeypatch.setenv("NEUROEXAPT_BACKEND", "mps")
    assert backend.get_backend().value == "mps"
    monkeypatch.setattr(registry, "_process_choice", None)
    backend.set_backend("cuda:triton")
    assert backend.get_backend().value == "cuda:triton"
    with backend.use_backend("cuda:ext") as used:
        assert backend.get_backend() == used
        with backend.use_backend("cpu"):
            assert backend.get_backend().value == "cpu"
        assert backend.get_backend() == used
    assert backend.get_backend().value == "cuda:triton"


@pytest.mark.usefixtures("everything_runs")
def test_the_former_choice_returns_after_an_error():
    with pytest.raises(KeyError), backend.use_backend("cuda:ext"):
        raise KeyError
    assert backend.get_backend().value == "cuda"


def test_a_broken_configuration_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    registry._saved_spec.cache_clear()
    with pytest.raises(UserError, match=r"config\.json.*mend or delete it"):
        backend.get_backend()


def test_memory_of_the_cpu_is_unknown():
    assert backend.get_memory_info("cpu") == backend.MemoryInfo(None, None, None, None, None)


@pytest.mark.gpu
def test_memory_of_the_gpu():
    x = torch.ones(2**20, device="cuda")
    memory = backend.get_memory_info("cuda")
    assert x.nbytes <= memory.allocated <= memory.reserved <= memory.total
    assert memory.peak >= memory.allocated
    assert 0 < memory.free < memory.total


@pytest.mark.gpu
def test_every_tier_runs_on_the_gpu():
    tiers = [b for b in backend.list_backends() if b.device == "cuda"]
    assert [(b.value, b.reason) for b in tiers if not b.available] == []
