"""The Triton kernels against the reference in fp64: on a GPU natively, elsewhere through the interpreter.

The interpreter computes fp32 alone correctly and slowly, so that everywhere-tests are tiny; dtypes,
memory layouts, capture and compilation are tested on the GPU (marker ``gpu``).
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuroexapt.errors import UserError
from neuroexapt.kernels import pool_triton, reference, sepconv_triton
from tests.cuda_graphs import assert_replays_the_same_bits
from tests.kernels.held_to_reference import DEVICE, TOLERANCE, runs_kernels

WEIGHT_NAMES = ("dx", "depthwise_grad", "pointwise_grad")
pytestmark = [pytest.mark.usefixtures("exact_products"), runs_kernels]
gpu = pytest.mark.gpu


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def sepconv_inputs(
    batch: int,
    channels: int,
    out_channels: int,
    height: int,
    width: int,
    kernel_size: int,
    dtype=torch.float32,
) -> list[Tensor]:
    return [
        random_tensor(batch, channels, height, width, seed=0, dtype=dtype),
        random_tensor(channels, 1, kernel_size, kernel_size, seed=1, dtype=dtype) / kernel_size,
        random_tensor(out_channels, channels, 1, 1, seed=2, dtype=dtype) / channels**0.5,
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; 0 for empty tensors."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def outputs_and_grads(function, inputs: list[Tensor], grad_seed: int = 3, **arguments) -> list[Tensor]:
    """The function's output and its gradient in each input, for a fixed random output gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*leaves, **arguments)
    dy = random_tensor(*y.shape, seed=grad_seed).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_matches_reference(function, definition, inputs: list[Tensor], **arguments) -> None:
    actual = outputs_and_grads(function, inputs, **arguments)
    # Contiguous, since on the GPU PyTorch's own avg_pool2d differentiates channels_last wrongly up to 2.11
    # (https://github.com/pytorch/pytorch/issues/188344).
    leaves = [tensor.detach().double().contiguous().requires_grad_() for tensor in inputs]
    y = definition(*leaves, **arguments)
    dy = random_tensor(*y.shape, seed=3).to(inputs[0].dtype).double()
    expected = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for name, got, wanted in zip(("y", *WEIGHT_NAMES), actual, expected, strict=False):
        assert relative_error(got, wanted) < TOLERANCE[inputs[0].dtype], name


# batch, channels, out_channels, height, width, kernel_size, stride, dilation, relu
AWKWARD_SEPCONVS = [
    (2, 3, 5, 7, 6, 3, 1, 1, True),
    (1, 17, 4, 5, 9, 5, 2, 1, True),
    (2, 4, 18, 6, 7, 3, 2, 2, False),
    (1, 2, 3, 9, 8, 7, 1, 2, True),
    (1, 1, 1, 1, 1, 5, 2, 2, True),
    (3, 2, 2, 1, 13, 3, 1, 1, True),
]


@pytest.mark.parametrize("case", AWKWARD_SEPCONVS)
def test_sepconv_matches_reference(case):
    *shape, stride, dilation, relu = case
    assert_matches_reference(
        sepconv_triton.sepconv,
        reference.sepconv,
        sepconv_inputs(*shape),
        stride=stride,
        dilation=dilation,
        relu=relu,
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        *[st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)]
    ),
    kernel_size=st.sampled_from((3, 5)),
    stride=st.sampled_from((1, 2)),
    dilation=st.sampled_from((1, 2)),
)
def test_sepconv_matches_reference_for_any_shape(shape, kernel_size, stride, dilation):
    inputs = sepconv_inputs(*shape, kernel_size)
    assert_matches_reference(
        sepconv_triton.sepconv, reference.sepconv, inputs, stride=stride, dilation=dilation
    )


def test_sepconv_of_an_empty_batch():
    y, *grads = outputs_and_grads(sepconv_triton.sepconv, sepconv_inputs(0, 3, 4, 5, 5, 3))
    assert y.shape == (0, 4, 5, 5)
    assert grads[0].shape == (0, 3, 5, 5)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads[1:])


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)))
def test_sepconv_gives_each_gradient_alone_or_together(needed):
    inputs = sepconv_inputs(2, 3, 4, 5, 6, 3)
    _, *expected = outputs_and_grads(sepconv_triton.sepconv, inputs)
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
    y = sepconv_triton.sepconv(*leaves)
    assert y.requires_grad == any(needed)
    if any(needed):
        y.backward(random_tensor(*y.shape, seed=3))
    for leaf, need, wanted in zip(leaves, needed, expected, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.equal(leaf.grad, wanted)


def test_sepconv_lets_nan_through_the_relu():
    x, depthwise, pointwise = sepconv_inputs(1, 2, 3, 9, 9, 3)
    x[0, 1, 4, 4] = float("nan")
    y = sepconv_triton.sepconv(x, depthwise, pointwise)
    assert torch.equal(y.isnan(), reference.sepconv(x, depthwise, pointwise).isnan())
    assert y.isnan().any()


def test_sepconv_statistics_are_those_of_its_output():
    inputs = sepconv_inputs(3, 4, 5, 7, 6, 3)
    y, mean, var = sepconv_triton.sepconv_with_stats(
        *(tensor.requires_grad_() for tensor in inputs), stride=2
    )
    expected = reference.sepconv(*(tensor.double() for tensor in inputs), stride=2)
    assert torch.equal(y, sepconv_triton.sepconv(*inputs, stride=2))
    assert relative_error(mean, expected.mean((0, 2, 3))) < 2e-5
    assert relative_error(var, expected.var((0, 2, 3), correction=0)) < 2e-5
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad


def test_sepconv_statistics_survive_a_mean_a_thousand_times_the_deviation():
    x, depthwise, pointwise = sepconv_inputs(3, 1, 1, 16, 16, 3)
    depthwise = torch.zeros_like(depthwise)
    depthwise[:, :, 1, 1] = 1.0
    x, pointwise = x + 1000.0, torch.ones_like(pointwise)
    _, mean, var = sepconv_triton.sepconv_with_stats(x, depthwise, pointwise, relu=False)
    assert relative_error(mean, x.double().mean((0, 2, 3))) < 1e-6
    assert relative_error(var, x.double().var((0, 2, 3), correction=0)) < 1e-4


def test_sepconv_is_differentiable_once():
    x, depthwise, pointwise = (tensor.requires_grad_() for tensor in sepconv_inputs(1, 2, 2, 4, 4, 3))
    y = sepconv_triton.sepconv(x, depthwise, pointwise)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5, 5)}, r"needs x of shape \[B, C, H, W\]"),
        ({"x": torch.zeros(1, 4, 5, 5)}, "depthwise_weight must be"),
        ({"pointwise_weight": torch.zeros(2, 5, 1, 1)}, "pointwise_weight must be"),
        ({"x": torch.zeros(1, 3, 5, 5, dtype=torch.float16)}, "cast them"),
        ({"stride": 3}, "strides 1, 2"),
        ({"dilation": 3}, "dilations 1, 2"),
        ({"depthwise_weight": torch.zeros(3, 1, 4, 4)}, "kernel sizes 3, 5, 7"),
    ],
)
def test_sepconv_says_what_is_wrong(change, message):
    arguments = {
        "x": torch.zeros(1, 3, 5, 5),
        "depthwise_weight": torch.zeros(3, 1, 3, 3),
        "pointwise_weight": torch.zeros(2, 3, 1, 1),
    }
    with pytest.raises(UserError, match=message):
        sepconv_triton.sepconv(**(arguments | change))


def test_cpu_tensors_are_not_supported():
    inputs = [tensor.cpu() for tensor in sepconv_inputs(1, 2, 2, 4, 4, 3)]
    for support in (sepconv_triton.supports(*inputs), pool_triton.supports(inputs[0], 3)):
        assert not support.ok
        assert "CUDA tensor" in support.reason


POOLS = {
    "avg": (pool_triton.avg_pool, reference.avg_pool),
    "max": (pool_triton.max_pool, reference.max_pool),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("kernel_size", "stride"), list(itertools.product((3, 5, 7), (1, 2))))
@pytest.mark.parametrize("shape", [(2, 3, 7, 6), (1, 5, 1, 9), (1, 1, 2, 2)])
def test_pool_matches_reference(pool, kernel_size, stride, shape):
    kernel, definition = POOLS[pool]
    x = random_tensor(*shape, seed=0)
    assert_matches_reference(kernel, definition, [x], kernel_size=kernel_size, stride=stride)


def test_max_pool_breaks_ties_and_passes_nan_on_as_torch_does():
    x = random_tensor(2, 3, 9, 8, seed=0).round()  # few distinct values: nearly every window has a tie
    x[0, 0, 4, 3] = x[0, 0, 5, 4] = float("nan")
    x[0, 1] = float("-inf")
    actual = outputs_and_grads(pool_triton.max_pool, [x], kernel_size=3, stride=1)
    expected = outputs_and_grads(reference.max_pool, [x], kernel_size=3, stride=1)
    assert torch.equal(actual[0].nan_to_num(9), expected[0].nan_to_num(9))
    torch.testing.assert_close(actual[1], expected[1])


def test_global_avg_pool_matches_reference():
    x = random_tensor(3, 5, 9, 17, seed=0)
    assert_matches_reference(pool_triton.global_avg_pool, reference.global_avg_pool, [x])


@pytest.mark.parametrize("pool", [pool_triton.avg_pool, pool_triton.max_pool])
def test_pool_of_an_empty_batch(pool):
    y, dx = outputs_and_grads(pool, [torch.zeros(0, 3, 5, 5, device=DEVICE)], kernel_size=3, stride=2)
    assert y.shape == (0, 3, 3, 3)
    assert dx.shape == (0, 3, 5, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool_triton.avg_pool(torch.zeros(3, 5, 5), 3), r"needs x of shape \[B, C, H, W\]"),
        (lambda: pool_triton.max_pool(torch.zeros(1, 3, 5, 5), 4), "kernel sizes 3, 5, 7"),
        (lambda: pool_triton.max_pool(torch.zeros(1, 3, 5, 5), 3, 3), "strides 1, 2"),
        (lambda: pool_triton.global_avg_pool(torch.zeros(3, 5, 5)), r"needs x of shape \[B, C, H, W\]"),
    ],
)
def test_pool_says_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()


def operator_samples() -> list[tuple]:
    """Each operator with inputs for ``opcheck``."""
    tensors = sepconv_inputs(2, 3, 4, 5, 6, 3)
    x = tensors[0]
    ops = torch.ops.neuroexapt
    return [
        (ops.sepconv_triton, (*tensors, 2, 1, True)),
        (ops.sepconv_with_stats, (*tensors, 1, 1, True)),
        (ops.avg_pool, (x, 3, 1)),
        (ops.max_pool, (x.to(memory_format=torch.channels_last), 3, 2, True)),
        (ops.global_avg_pool, (x,)),
    ]


@pytest.mark.parametrize("sample", range(len(operator_samples())))
def test_operators_pass_opcheck(sample):
    operator, arguments = operator_samples()[sample]
    leaves = [a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(operator.default, leaves)


def all_operators(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    y = sepconv_triton.sepconv(x, depthwise, pointwise, stride=2)
    y = pool_triton.avg_pool(y, 3) + pool_triton.max_pool(y, 3)
    return pool_triton.global_avg_pool(y)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=gpu)])
def test_compiles_into_one_graph(backend):
    inputs = sepconv_inputs(2, 3, 4, 8, 8, 3)
    compiled = torch.compile(all_operators, fullgraph=True, backend=backend)
    for got, wanted in zip(
        outputs_and_grads(compiled, inputs), outputs_and_grads(all_operators, inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def sliced(x: Tensor) -> Tensor:
    """The same values with strides that fit no memory format."""
    wide = x.new_zeros(x.shape[0], 2 * x.shape[1], x.shape[2] + 1, 3 * x.shape[3])
    view = wide[:, ::2, 1:, ::3]
    view.copy_(x)
    return view


LAYOUTS = {"contiguous": Tensor.contiguous, "channels_last": channels_last, "sliced": sliced}
# batch, channels, out_channels, height, width, kernel_size, stride, dilation
GPU_SEPCONVS = [
    (3, 20, 36, 13, 11, 3, 1, 1),
    (3, 20, 36, 13, 11, 5, 2, 1),
    (3, 20, 36, 13, 11, 3, 2, 2),
    (3, 20, 36, 13, 11, 7, 1, 2),
]


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", GPU_SEPCONVS)
def test_sepconv_on_gpu_in_each_dtype(case, dtype):
    *shape, stride, dilation = case
    inputs = sepconv_inputs(*shape, dtype=dtype)
    assert_matches_reference(
        sepconv_triton.sepconv, reference.sepconv, inputs, stride=stride, dilation=dilation
    )


@gpu
@pytest.mark.parametrize("shape", [(64, 16, 16, 32, 32, 5), (64, 64, 64, 8, 8, 3), (2, 3, 150, 33, 35, 3)])
def test_sepconv_on_gpu_at_full_size(shape):
    assert_matches_reference(sepconv_triton.sepconv, reference.sepconv, sepconv_inputs(*shape))


@gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 32])
def test_sepconv_on_gpu_in_each_layout(layout, dtype, channels):
    inputs = sepconv_inputs(4, channels, 16, 10, 12, 3, dtype=dtype)
    inputs[0] = LAYOUTS[layout](inputs[0])
    assert_matches_reference(sepconv_triton.sepconv, reference.sepconv, inputs, stride=2)
    y = sepconv_triton.sepconv(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@gpu
def test_sepconv_on_gpu_takes_an_expanded_gradient():
    inputs = [tensor.requires_grad_() for tensor in sepconv_inputs(4, 8, 8, 10, 12, 3)]
    from_expanded = torch.autograd.grad(sepconv_triton.sepconv(*inputs).sum(), inputs)
    y = sepconv_triton.sepconv(*inputs)
    from_dense = torch.autograd.grad(y, inputs, torch.ones_like(y))
    for got, wanted in zip(from_expanded, from_dense, strict=True):
        assert torch.equal(got, wanted)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sepconv_on_gpu_follows_autocast(dtype):
    inputs = [tensor.requires_grad_() for tensor in sepconv_inputs(4, 8, 8, 10, 12, 3)]
    with torch.autocast("cuda", dtype):
        assert sepconv_triton.supports(*inputs).ok
        y = sepconv_triton.sepconv(*inputs)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y.float().square().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert torch.equal(y, sepconv_triton.sepconv(*(tensor.to(dtype) for tensor in inputs)))


@gpu
def test_sepconv_on_gpu_uses_tf32_only_where_convolutions_may():
    inputs = sepconv_inputs(8, 64, 64, 16, 16, 3)
    expected = reference.sepconv(*(tensor.double() for tensor in inputs))
    assert relative_error(sepconv_triton.sepconv(*inputs), expected) < 2e-6
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert 1e-5 < relative_error(sepconv_triton.sepconv(*inputs), expected) < 2e-3


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (5, 2)])
def test_pool_on_gpu(pool, layout, dtype, kernel_size, stride):
    kernel, definition = POOLS[pool]
    x = LAYOUTS[layout](random_tensor(5, 20, 13, 11, seed=0, dtype=dtype))
    assert_matches_reference(kernel, definition, [x], kernel_size=kernel_size, stride=stride)


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_global_avg_pool_on_gpu(layout, dtype):
    x = LAYOUTS[layout](random_tensor(5, 20, 13, 11, seed=0, dtype=dtype))
    assert_matches_reference(pool_triton.global_avg_pool, reference.global_avg_pool, [x])


@gpu
def test_twenty_runs_give_the_same_bits():
    inputs = sepconv_inputs(64, 16, 16, 32, 32, 5)
    first = outputs_and_grads(all_operators, inputs)
    for _ in range(19):
        for got, wanted in zip(outputs_and_grads(all_operators, inputs), first, strict=True):
            assert torch.equal(got, wanted)


@gpu
def test_runs_inside_a_cuda_graph():
    inputs = [tensor.requires_grad_() for tensor in sepconv_inputs(8, 16, 16, 16, 16, 3)]

    def step() -> list[Tensor]:
        y = all_operators(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    assert_replays_the_same_bits(step)
