import json
from dataclasses import asdict

import pytest
import torch
from torch._subclasses import FakeTensorMode

from neuroexapt.backend import (
    BackendOptimizer,
    Crossover,
    TuningConfig,
    auto_configure_backend,
    optimizer,
    registry,
    tuning,
)
from neuroexapt.backend.measure import Timing
from neuroexapt.backend.tuning import NEVER
from neuroexapt.errors import UserError


@pytest.fixture(autouse=True)
def _forget_saved_tuning():
    tuning.saved_tuning.cache_clear()
    tuning.smallest_worthwhile_size.cache_clear()
    yield
    tuning.saved_tuning.cache_clear()
    tuning.smallest_worthwhile_size.cache_clear()


def measured(*sizes: tuple[int, int]) -> TuningConfig:
    """Crossovers of the fp32 sum on Triton, by number of operands."""
    return TuningConfig.for_this_machine(
        tuple(Crossover("softmax_sum", "triton", "float32", operands, size) for operands, size in sizes)
    )


def test_without_measurements_the_shipped_defaults_rule():
    config = TuningConfig.for_this_machine()
    assert config.min_elements("softmax_sum", "ext", "float32", 3) == NEVER
    assert config.min_elements("softmax_sum", "ext", "float32", 4) == 1024
    assert config.min_elements("max_pool", "triton", "float16", 1) == 2**26
    assert config.min_elements("an op of the user's", "triton", "float16", 1) == 1024


def test_a_crossover_holds_for_as_many_operands_or_more():
    config = measured((4, 4096), (8, 256))
    sizes = [config.min_elements("softmax_sum", "triton", "float32", k) for k in (3, 4, 7, 8, 16)]
    assert sizes == [NEVER, 4096, 4096, 256, 256]


def test_a_crossover_says_nothing_about_another_dtype():
    assert measured((4, 4096)).min_elements("softmax_sum", "triton", "float16", 8) == 1024


def test_applied_crossovers_are_used_and_found_again():
    tuning.apply_tuning(measured((2, 64)))
    for _ in range(2):
        assert tuning.smallest_worthwhile_size("softmax_sum", "triton", torch.float32, 2) == 64
        tuning.saved_tuning.cache_clear()
        tuning.smallest_worthwhile_size.cache_clear()


def test_another_machines_crossovers_give_a_warning_and_the_defaults(caplog):
    tuning.apply_tuning(TuningConfig("some GPU", "1.0", "1.0", measured((2, 64)).crossovers))
    assert tuning.saved_tuning() == TuningConfig.for_this_machine()
    assert "the saved ones are for some GPU, torch 1.0, triton 1.0" in caplog.text


def test_the_optimizer_keeps_its_result_in_a_file(tmp_path):
    writer, reader = BackendOptimizer(), BackendOptimizer()
    writer.config = measured((2, 64))
    writer.save_config(tmp_path / "tuned.json", "cpu")
    assert json.loads((tmp_path / "tuned.json").read_text())["backend"] == "cpu"
    assert reader.load_config(tmp_path / "tuned.json") == reader.config == writer.config


@pytest.mark.parametrize("content", [None, "{}", '{"tuning": {"device": "cpu"}}', "[1]"])
def test_a_file_that_holds_no_tuning_is_an_error(tmp_path, content):
    path = tmp_path / "tuned.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError):
        BackendOptimizer().load_config(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure():
    assert auto_configure_backend() == TuningConfig.for_this_machine()


@pytest.mark.parametrize(
    ("kernel_ms", "expected"),
    [
        ({1024: 2.0, 4096: 2.0, 16384: 1.05}, 16384),
        ({1024: 0.5, 4096: 1.06, 16384: 0.5}, 16384),
        ({1024: 1.0, 4096: 0.5, 16384: 0.5}, 1024),
        ({1024: 0.5, 4096: 0.5, 16384: 1.06}, NEVER),
    ],
)
def test_a_crossover_is_the_size_from_which_the_kernel_never_loses(monkeypatch, kernel_ms, expected):
    """PyTorch takes 1 ms at every size; a kernel may take 5 % more."""
    monkeypatch.setattr(optimizer, "_SIZES", tuple(kernel_ms))
    monkeypatch.setattr(optimizer.workloads, "sample_call", lambda op, size, *_: size)
    monkeypatch.setattr(
        optimizer, "_milliseconds", lambda size, backend: 1.0 if backend == "cuda:torch" else kernel_ms[size]
    )
    assert optimizer._crossover("softmax_sum", "ext", torch.float32, 4).min_elements == expected


def test_a_dtype_that_a_kernel_refuses_is_not_measured(monkeypatch):
    fp32_only = registry.Implementation(lambda x: x, lambda x: registry.Support(x.dtype == torch.float32))
    monkeypatch.setitem(registry.IMPLEMENTATIONS, ("global_avg_pool", "ext"), fp32_only)
    with FakeTensorMode():  # its tensors claim to be on a GPU
        assert optimizer._takes("global_avg_pool", "ext", torch.float32)
        assert not optimizer._takes("global_avg_pool", "ext", torch.float16)


@pytest.mark.gpu
def test_measuring_on_the_gpu_covers_every_op_and_dtype(monkeypatch):
    monkeypatch.setattr(optimizer, "_SIZES", (1024,))
    monkeypatch.setattr(optimizer, "_OPERANDS", (4,))
    monkeypatch.setattr(optimizer, "time_calls", lambda *_: Timing(1.0, 1.0, 1.0, 5))
    config = auto_configure_backend(save=True)
    assert {c.op for c in config.crossovers if c.tier == "triton"} == set(optimizer.workloads.OPS)
    assert {c.dtype for c in config.crossovers} == {"float32", "float16", "bfloat16"}
    assert tuning.saved_tuning() == config
    assert TuningConfig.from_dict(asdict(config)) == config
