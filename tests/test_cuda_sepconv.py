"""``sepconv`` in CUDA C++ against the reference in fp64; without a GPU, its compilation and its choices."""

import itertools
import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroexapt.backend.dispatch import explain
from neuroexapt.backend.registry import use_backend
from neuroexapt.cuda_ops import sepconv as ext
from neuroexapt.kernels import reference
from neuroexapt.kernels.sepconv import Call
from tests.cuda_compilation import assembler_report, needs_nvcc
from tests.cuda_graphs import assert_replays_the_same_bits

TOLERANCE = 2e-5
NAMES = ("y", "dx", "depthwise_grad", "pointwise_grad")
gpu = pytest.mark.gpu

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def inputs(batch: int, channels: int, out_channels: int, height: int, width: int, kernel_size: int, device):
    torch.manual_seed(0)
    shapes = (
        (batch, channels, height, width),
        (channels, 1, kernel_size, kernel_size),
        (out_channels, channels, 1, 1),
    )
    scales = (1.0, 1 / kernel_size, channels**-0.5)
    return [torch.randn(shape, device=device) * scale for shape, scale in zip(shapes, scales, strict=True)]


def outputs_and_grads(function, tensors: list[Tensor], dy: Tensor, **arguments) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, **arguments)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_matches_reference(tensors: list[Tensor], **arguments) -> None:
    exact = [tensor.double() for tensor in tensors]
    dy = torch.randn_like(reference.sepconv(*tensors, **arguments))
    expected = outputs_and_grads(reference.sepconv, exact, dy, **arguments)
    actual = outputs_and_grads(ext.sepconv, tensors, dy, **arguments)
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        error = ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
        assert error < TOLERANCE, name


@gpu
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"), list(itertools.product((3, 5), (1, 2), (1, 2)))
)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(64, 16, 16, 32, 32), (64, 64, 64, 8, 8), (3, 32, 48, 7, 16), (2, 144, 16, 5, 8), (1, 16, 272, 1, 8)],
)
def test_matches_reference(shape, kernel_size, stride, dilation, relu):
    tensors = inputs(*shape, kernel_size, "cuda")
    assert ext.supports(*tensors, stride=stride, dilation=dilation).ok
    assert_matches_reference(tensors, stride=stride, dilation=dilation, relu=relu)


@gpu
@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:])
def test_gives_each_gradient_alone_or_together(needed):
    tensors = inputs(2, 16, 32, 8, 8, 3, "cuda")
    dy = torch.randn(2, 32, 8, 8, device="cuda")
    _, *expected = outputs_and_grads(ext.sepconv, tensors, dy)
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    ext.sepconv(*leaves).backward(dy)
    for leaf, need, wanted in zip(leaves, needed, expected, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.equal(leaf.grad, wanted)


@gpu
def test_of_an_empty_batch():
    tensors = inputs(0, 16, 32, 8, 8, 3, "cuda")
    y, dx, *weight_grads = outputs_and_grads(ext.sepconv, tensors, torch.randn(0, 32, 8, 8, device="cuda"))
    assert y.shape == (0, 32, 8, 8)
    assert dx.shape == (0, 16, 8, 8)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in weight_grads)


@gpu
def test_takes_expanded_and_unaligned_tensors():
    x, depthwise, pointwise = inputs(2, 16, 16, 8, 8, 3, "cuda")
    unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    dy = torch.ones(1, 1, 1, 1, device="cuda").expand(2, 16, 8, 8)
    expected = outputs_and_grads(ext.sepconv, [x, depthwise, pointwise], dy.contiguous())
    actual = outputs_and_grads(ext.sepconv, [unaligned, depthwise, pointwise], dy)
    assert all(torch.equal(got, wanted) for got, wanted in zip(actual, expected, strict=True))


@gpu
def test_lets_nan_through_the_relu():
    tensors = inputs(1, 16, 16, 8, 8, 3, "cuda")
    tensors[0][0, 1, 4, 4] = float("nan")
    assert torch.equal(ext.sepconv(*tensors).isnan(), reference.sepconv(*tensors).isnan())


@gpu
def test_twenty_runs_give_the_same_bits():
    tensors = inputs(64, 16, 16, 32, 32, 5, "cuda")
    dy = torch.randn(64, 16, 32, 32, device="cuda")
    first = outputs_and_grads(ext.sepconv, tensors, dy)
    for _ in range(19):
        again = outputs_and_grads(ext.sepconv, tensors, dy)
        assert all(torch.equal(got, wanted) for got, wanted in zip(again, first, strict=True))


@gpu
def test_runs_inside_a_cuda_graph():
    tensors = inputs(8, 16, 16, 16, 16, 5, "cuda")
    dy = torch.randn(8, 16, 16, 16, device="cuda")
    assert_replays_the_same_bits(lambda: outputs_and_grads(ext.sepconv, tensors, dy))


@gpu
def test_compiles_into_one_graph_and_passes_opcheck():
    tensors = inputs(2, 16, 16, 8, 8, 3, "cuda")
    dy = torch.randn(2, 16, 8, 8, device="cuda")
    compiled = torch.compile(ext.sepconv, fullgraph=True)
    for got, wanted in zip(
        outputs_and_grads(compiled, tensors, dy), outputs_and_grads(ext.sepconv, tensors, dy), strict=True
    ):
        assert torch.equal(got, wanted)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.neuroexapt.sepconv_ext.default, (*leaves, 1, 1, True))


@gpu
def test_is_chosen_for_fp32_and_triton_for_the_rest():
    tensors = inputs(1024, 16, 16, 32, 32, 3, "cuda")  # 2**24 elements: from there on it pays off
    with use_backend("cuda"):
        assert explain("sepconv", *tensors).impl == "ext"
        assert explain("sepconv", *(tensor.bfloat16() for tensor in tensors)).impl == "triton"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.bfloat16}, "only fp32"),
        ({"memory_format": torch.channels_last}, "not contiguous"),
        ({"kernel_size": 7}, "kernel size 7"),
        ({"channels": 20}, "20 to 16 channels"),
        ({"width": 6}, "at width 6"),
        ({"width": 4096}, "does not fit"),
    ],
)
def test_says_which_calls_it_takes(change, reason):
    shape = {"channels": 16, "width": 8, "kernel_size": 3} | change
    x, *weights = inputs(1, shape["channels"], 16, 8, shape["width"], shape["kernel_size"], "cpu")
    x = x.to(memory_format=change.get("memory_format", torch.contiguous_format))
    tensors = [tensor.to(change.get("dtype", torch.float32)) for tensor in (x, *weights)]
    support = ext.supports(*tensors)
    assert support.ok == (not reason)
    assert reason in support.reason


@pytest.mark.parametrize(("room", "takes"), [(227, True), (99, False)])
def test_takes_what_fits_in_the_shared_memory_of_the_gpu(room, takes, monkeypatch):
    monkeypatch.setattr(ext, "shared_bytes", lambda device: room * 1024)
    with FakeTensorMode():
        tensors = inputs(1, 16, 272, 1, 8, 5, "cuda")  # a row takes 112 KB
    assert ext.supports(*tensors, dilation=2).ok == takes


@pytest.mark.parametrize("moved", [1, 2])
def test_takes_no_weights_on_another_device(moved):
    tensors = inputs(1, 16, 16, 8, 8, 3, "cpu")
    assert ext.supports(*tensors).ok
    tensors[moved] = tensors[moved].to("meta")
    assert "several devices" in ext.supports(*tensors).reason


@pytest.mark.parametrize(
    ("height", "blocks_a_row", "rows"), [(32, 64, 8), (8, 64, 2), (32, 1, 1), (7, 512, 7)]
)
def test_tiles_divide_the_picture_and_fill_the_gpu(height, blocks_a_row, rows):
    assert ext._best_rows(height, blocks_a_row, 4 * 32, None, lambda _tiles, rows: rows) == rows


def test_tiles_fit_in_shared_memory():
    assert ext._best_rows(32, 10**6, 4 * 5, None, lambda _tiles, rows: rows) == 4


def partial_sums(room: int, monkeypatch) -> int:
    """How many of each weight gradient a launch leaves on a GPU whose blocks have ``room`` bytes."""
    monkeypatch.setattr(ext, "_room", lambda device: room)
    call = Call(*inputs(256, 64, 64, 16, 8, 5, "cpu"), stride=1, dilation=2, relu=True)
    ((depthwise, pointwise),) = ext.partials([call], torch.empty(256, 64, 16, 8), (True, True))
    assert len(depthwise) == len(pointwise)
    return len(depthwise)


def test_tiles_are_smaller_where_blocks_have_less_shared_memory(monkeypatch):
    assert partial_sums(113 * 1024, monkeypatch) == 256
    assert partial_sums(99 * 1024, monkeypatch) == 256 * 2


def test_tiles_of_a_shape_are_chosen_once(monkeypatch):
    ext._best_rows.cache_clear()
    for _ in range(3):
        partial_sums(113 * 1024, monkeypatch)
    assert ext._best_rows.cache_info().currsize == 1  # else they would fill the memory during a search


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_keeps_everything_in_registers(tmp_path, arch):
    report = assembler_report("sepconv.cu", arch, tmp_path)
    # Spills show there, and so do arrays that a loop left rolled indexes at run time.
    frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    assert len(frames) == 17  # both ways: two kernel sizes, strides and dilations; and one more
    assert not any(frames)
