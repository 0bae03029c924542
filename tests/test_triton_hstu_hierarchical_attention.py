"""The kernels of HSTU's attention against the definition in fp64: on a GPU natively, else interpreted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from neuroexapt import functional
from neuroexapt.backend import dispatch_report, reset_dispatch_report, use_backend
from neuroexapt.kernels import hstu_hierarchical_attention_triton as kernels
from neuroexapt.kernels.hstu_hierarchical_attention import hstu_hierarchical_attention as definition
from neuroexapt.kernels.hstu_hierarchical_attention import time_bucket_starts
from tests.kernels.held_to_reference import DEVICE, runs_kernels

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BUCKETS = 40
gpu = pytest.mark.gpu
pytestmark = runs_kernels


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_inputs(
    shape: tuple[int, int, int, int],
    value_width: int,
    lengths: list[int] | None = None,
    jagged: bool = False,
    dtype: torch.dtype = torch.float32,
    times: bool = False,
    windows: tuple[int | None, ...] = (None,),
) -> dict[str, Any]:
    """Arguments of a call with queries [B, N, H, d]; only the first ``lengths`` rows where jagged."""
    batch, length, heads, width = shape
    rows = (sum(lengths or []),) if jagged else (batch, length)
    arguments: dict[str, Any] = {
        name: random_tensor(*rows, heads, size, seed=seed).to(dtype)
        for seed, (name, size) in enumerate((("query", width), ("key", width), ("value", value_width)))
    }
    arguments |= {"position_bias": random_tensor(2 * length + 3, seed=3), "windows": windows}
    if times:
        generator = torch.Generator().manual_seed(4)
        timestamps = torch.randint(0, 10**6, rows, generator=generator).to(DEVICE)
        arguments |= {"time_bias": random_tensor(BUCKETS, seed=5), "timestamps": timestamps}
    if jagged:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
        return arguments | {"offsets": offsets, "max_length": length}
    return arguments | {"lengths": None if lengths is None else torch.tensor(lengths, device=DEVICE)}


def attend(function, arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and every gradient, for a fixed random gradient of y."""
    leaves = {
        name: x.detach().to(dtype or x.dtype).requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    y = function(**(arguments | leaves))
    dy = random_tensor(*y.shape, seed=9).to(arguments["query"].dtype).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_matches_definition(arguments: dict[str, Any]) -> None:
    actual = attend(kernels.hstu_hierarchical_attention, arguments)
    expected = attend(definition, arguments, torch.float64)
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape
        assert actual[name].dtype == (arguments["query"] if name == "y" else arguments[name]).dtype
        if wanted.numel():
            error = (actual[name].double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
            assert error < TOLERANCE[arguments["query"].dtype], name


AWKWARD = [
    {"shape": (2, 37, 2, 5), "value_width": 7},
    {"shape": (2, 70, 2, 16), "value_width": 8, "lengths": [70, 33]},
    {"shape": (3, 41, 2, 8), "value_width": 8, "lengths": [41, 0, 17], "times": True, "windows": (None, 20)},
    {"shape": (3, 45, 2, 8), "value_width": 20, "lengths": [45, 0, 37], "jagged": True, "windows": (40, 3)},
    {"shape": (2, 20, 1, 8), "value_width": 8, "lengths": [9, 20], "jagged": True, "times": True},
    {"shape": (1, 1, 1, 3), "value_width": 4, "times": True},
    {"shape": (2, 3, 1, 3), "value_width": 3, "lengths": [0, 0]},
]


@pytest.mark.parametrize("case", AWKWARD)
def test_kernels_match_the_definition(case: dict, nan_filled_empty) -> None:
    assert_matches_definition(make_inputs(**case))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize("times", [False, True])
def test_there_need_be_no_position_table(times: bool, dtype: torch.dtype) -> None:
    arguments = make_inputs((2, 19, 2, 4), 4, times=times, dtype=dtype)
    assert_matches_definition(arguments | {"position_bias": None})


# Blocks that fill the longest sequence and blocks that do not.
@pytest.mark.parametrize("length", [64, 70])
def test_tiles_that_are_not_square_in_phases_of_16_bits(length: int, monkeypatch) -> None:
    """What fp32, the one dtype that the interpreter computes in correctly, has no use for itself."""
    in_fp32 = kernels._loop_constants
    blocks = kernels.Blocks(32, 16, 4, 1)
    monkeypatch.setattr(kernels, "_blocks", lambda kernel, call: blocks)
    monkeypatch.setattr(kernels, "_loop_constants", lambda *args: in_fp32(*args) | {"PHASED": True})
    assert_matches_definition(make_inputs((1, length, 2, 4), 4, lengths=[61], windows=(None, 19)))
    assert_matches_definition(make_inputs((1, length, 1, 4), 4))


@pytest.mark.parametrize("needed", ["query", "key", "value", "position_bias", "time_bias"])
def test_each_gradient_alone(needed: str, nan_filled_empty) -> None:
    arguments = make_inputs((2, 18, 2, 4), 4, times=True)
    together = attend(kernels.hstu_hierarchical_attention, arguments)
    arguments[needed].requires_grad_()
    y = kernels.hstu_hierarchical_attention(**arguments)
    (grad,) = torch.autograd.grad(y, arguments[needed], random_tensor(*y.shape, seed=9))
    assert torch.equal(grad, together[needed])


def test_an_empty_batch_has_gradients_of_zero() -> None:
    results = attend(kernels.hstu_hierarchical_attention, make_inputs((0, 4, 2, 3), 3, times=True))
    assert results["y"].shape == (0, 4, 2, 3)
    assert results["position_bias"].abs().sum() == results["time_bias"].abs().sum() == 0


def test_slices_of_a_wider_tensor_need_no_copy() -> None:
    wide = random_tensor(2, 9, 2, 3 * 4, seed=0)
    arguments = make_inputs((2, 9, 2, 4), 4) | dict(
        zip(("query", "key", "value"), wide.split(4, dim=-1), strict=True)
    )
    assert_matches_definition(arguments)


def test_padding_neither_leaks_nor_gets_a_gradient() -> None:
    arguments = make_inputs((3, 21, 2, 4), 4, lengths=[21, 0, 8], times=True)
    clean = attend(kernels.hstu_hierarchical_attention, arguments)
    padding = torch.arange(21, device=DEVICE) >= arguments["lengths"][:, None]
    for name in ("query", "key", "value"):
        arguments[name][padding] = float("nan")
    dirty = attend(kernels.hstu_hierarchical_attention, arguments)
    for name, x in dirty.items():
        assert torch.equal(x, clean[name]), name
        if x.dim() > 1:
            assert x[padding].abs().sum() == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=gpu)])
def test_a_later_position_changes_no_bit_before_it(dtype: torch.dtype) -> None:
    length, changed = (24, 18) if DEVICE == "cpu" else (300, 201)
    arguments = make_inputs((2, length, 2, 16), 16, dtype=dtype, times=True, windows=(None, 9))
    before = kernels.hstu_hierarchical_attention(**arguments)
    for name in ("query", "key", "value", "timestamps"):
        arguments[name][:, changed] += 7
    after = kernels.hstu_hierarchical_attention(**arguments)
    assert torch.equal(after[:, :changed], before[:, :changed])
    assert not torch.equal(after[:, changed:], before[:, changed:])


def test_differences_of_timestamps_next_to_a_bucket_take_the_definitions_bucket() -> None:
    starts = time_bucket_starts(BUCKETS + 30, torch.device(DEVICE))[::3]
    times = torch.cat([starts - 1, starts, starts + 1]).sort().values[None] + 2**50
    arguments = make_inputs((1, times.shape[1], 1, 2), 2, times=True)
    arguments |= {
        "timestamps": torch.cat([times[:, :1], times[:, :-1]], 1),
        "time_bias": random_tensor(BUCKETS + 30, seed=1),
    }
    assert_matches_definition(arguments)


# Together every row of the tables of tiles; widths that are no powers of two among them.
@gpu
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.bfloat16, 16),
        (torch.bfloat16, 96),
        (torch.bfloat16, 256),
        (torch.float16, 64),
        (torch.float16, 200),
        (torch.float32, 24),
        (torch.float32, 64),
        (torch.float32, 96),
        (torch.float32, 256),
    ],
)
def test_every_dtype_and_head_width(dtype: torch.dtype, width: int, nan_filled_empty) -> None:
    lengths = [333, 0, 64, 257]
    common = {"dtype": dtype, "lengths": lengths, "windows": (None, 70), "times": True}
    assert_matches_definition(make_inputs((4, 333, 2, width), width, jagged=True, **common))


@gpu
def test_tf32_where_products_may_be_rounded_to_it(exact_products) -> None:
    arguments = make_inputs((2, 300, 2, 64), 64)
    exact = attend(kernels.hstu_hierarchical_attention, arguments)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    rounded = attend(kernels.hstu_hierarchical_attention, arguments)
    for name, x in exact.items():
        assert 0 < (rounded[name] - x).abs().max() / x.abs().max() < 5e-3, name


@gpu
@pytest.mark.parametrize("length", [1, 50, 129, 200, 1024, 2500])
def test_every_length(length: int, nan_filled_empty) -> None:
    assert_matches_definition(make_inputs((2, length, 4, 64), 64, dtype=torch.bfloat16))


@gpu
def test_the_longest_sequences_take_little_memory() -> None:
    arguments = make_inputs((1, 8192, 2, 64), 64, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = attend(kernels.hstu_hierarchical_attention, arguments)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20  # the scores alone would be 512 MiB
    exact = attend(definition, arguments)
    for name, wanted in exact.items():
        error = (results[name].float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error < 5e-2, name


@gpu
def test_gradients_have_the_same_bits_every_time() -> None:
    arguments = make_inputs((8, 500, 4, 64), 64, dtype=torch.bfloat16, times=True, windows=(None, 100))
    first = attend(kernels.hstu_hierarchical_attention, arguments)
    for _ in range(5):
        again = attend(kernels.hstu_hierarchical_attention, arguments)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@gpu
def test_dispatch_takes_the_kernels_and_says_so() -> None:
    arguments = make_inputs((8, 200, 2, 32), 32)
    reset_dispatch_report()
    with use_backend("cuda:triton"):
        y = functional.hstu_hierarchical_attention(**arguments)
    assert [d.impl for d in dispatch_report()] == ["triton"]
    assert torch.equal(y, kernels.hstu_hierarchical_attention(**arguments))


@gpu
def test_the_kernels_survive_compilation_and_capture() -> None:
    arguments = make_inputs((4, 200, 2, 32), 32, dtype=torch.bfloat16, lengths=[200, 3, 0, 77], times=True)
    expected = attend(kernels.hstu_hierarchical_attention, arguments)
    compiled = attend(torch.compile(kernels.hstu_hierarchical_attention, fullgraph=True), arguments)
    assert all(torch.equal(compiled[name], x) for name, x in expected.items())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = kernels.hstu_hierarchical_attention(**arguments)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected["y"])
