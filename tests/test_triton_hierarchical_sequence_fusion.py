"""The fusion's kernels on a GPU: dtypes, sizes, layouts, determinism, capture and compilation."""

import functools

import pytest
import torch
from torch import Tensor

from neuroexapt import functional
from neuroexapt.backend import explain, use_backend
from neuroexapt.kernels import hierarchical_sequence_fusion as definition
from neuroexapt.kernels import hierarchical_sequence_fusion_triton as kernels
from tests.kernels.held_to_reference import TOLERANCE, largest_error
from tests.kernels.on_gpu import assert_deterministic, assert_runs_compiled_and_captured
from tests.kernels.sequences import assert_causal, assert_padding_is_ignored
from tests.kernels.test_hierarchical_sequence_fusion import CASES, inputs

pytestmark = pytest.mark.gpu
WINDOWS = (1, 3, 7, 15)
SIZES = [
    *CASES,
    (16, 50, 64, WINDOWS),
    (5, 200, 100, WINDOWS),
    (3, 300, 256, WINDOWS),
    (2, 1024, 200, (5, 100)),
    (2, 100, 640, WINDOWS),
]


def by_kernel(*tensors: Tensor, **options) -> Tensor:
    with use_backend("cuda:triton"):
        assert explain("hierarchical_sequence_fusion", *tensors, **options).impl == "triton"
        return functional.hierarchical_sequence_fusion(*tensors, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "length", "width", "windows"), SIZES)
def test_matches_the_definition(batch, length, width, windows, dtype, nan_filled_empty):
    sequences, weights = inputs(batch, length, width, windows, dtype)
    options = {"windows": windows, "temperature": 0.7}
    error = largest_error(
        functools.partial(definition.hierarchical_sequence_fusion, **options),
        functools.partial(by_kernel, **options),
        [*sequences, *weights],
    )
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 256])
def test_ignores_padding(width, dtype, nan_filled_empty):
    sequences, weights = inputs(5, 200, width, WINDOWS, dtype)
    assert_padding_is_ignored(by_kernel, sequences, weights, [200, 0, 33, 128, 65], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_knows_no_later_position(dtype):
    assert_causal(by_kernel, *inputs(2, 200, 64, WINDOWS, dtype), position=70)


def test_takes_strided_input():
    (x,), weights = inputs(3, 40, 32, WINDOWS)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(by_kernel(strided, *weights), by_kernel(x, *weights))


def test_is_deterministic():
    sequences, weights = inputs(32, 200, 64, WINDOWS, torch.bfloat16)
    assert_deterministic(by_kernel, [*sequences, *weights])


def test_runs_compiled_and_captured():
    sequences, weights = inputs(8, 50, 64, WINDOWS)
    assert_runs_compiled_and_captured(kernels.hierarchical_sequence_fusion, [*sequences, *weights])


def test_wide_windows_fall_back():
    sequences, weights = inputs(2, 300, 16, (1, 200))
    with use_backend("cuda:triton"):
        decision = explain("hierarchical_sequence_fusion", *sequences, *weights, windows=(1, 200))
    assert decision.impl == "torch"
    assert "over 129 positions" in decision.reason
