"""For all tests: GPU tests are skipped visibly without a GPU, and Triton then runs in its interpreter."""

import os

# One thread a test process: the workers share the cores, and so do the processes that tests start. Read when
# torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel module is first imported, which no test may do before this.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _private_configuration(tmp_path, monkeypatch):
    """Keep the developer's own settings out of the tests and the tests out of them."""
    monkeypatch.setenv("NEUROEXAPT_CONFIG", str(tmp_path / "config.json"))
    monkeypatch.delenv("NEUROEXAPT_BACKEND", raising=False)


@pytest.fixture
def small_space(monkeypatch):
    """The space of ``tests.strategies.small`` by its name."""
    from neuroexapt.spaces import SPACES
    from tests.strategies.small import SPACE

    monkeypatch.setitem(SPACES, SPACE.name, SPACE)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def stored(request: pytest.FixtureRequest) -> torch.dtype:
    """What a fused cell's pictures are stored in."""
    return request.param


@pytest.fixture
def exact_products():
    """fp32 products of convolutions and of matrices exact to rounding, unless the test asks for less."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.fixture
def nan_filled_empty():
    """Let ``torch.empty`` and its kin return NaN, so that output a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
