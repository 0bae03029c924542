"""The public ops on the CPU: the reference's gradients, the arguments' checks, torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from neuroexapt import functional
from neuroexapt.errors import UserError


def fp64(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("op", [functional.softmax_sum, functional.weighted_sum])
def test_gradients_of_the_sums(op):
    xs = [fp64(2, 3, k) for k in (4, 4, 4)]
    assert gradcheck(lambda scores, *xs: op(xs, scores), (fp64(3), *xs))


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_of_the_separable_convolution(kernel_size, stride, dilation):
    def op(x, depthwise, pointwise):
        return functional.sepconv(x, depthwise, pointwise, stride=stride, dilation=dilation)

    weights = fp64(2, 1, kernel_size, kernel_size), fp64(3, 2, 1, 1)
    assert op(fp64(2, 2, 5, 6), *weights).shape == (2, 3, -(-5 // stride), -(-6 // stride))
    assert gradcheck(op, (fp64(2, 2, 5, 6), *weights))


@pytest.mark.parametrize("op", [functional.avg_pool, functional.max_pool])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_the_pools(op, kernel_size, stride):
    assert op(fp64(2, 2, 7, 6), kernel_size, stride).shape == (2, 2, -(-7 // stride), -(-6 // stride))
    assert gradcheck(lambda x: op(x, kernel_size, stride), (fp64(2, 2, 7, 6),))


def test_gradients_of_the_global_pool():
    assert gradcheck(functional.global_avg_pool, (fp64(2, 3, 4, 5),))


def test_padding_is_not_counted_in_an_average():
    torch.testing.assert_close(functional.avg_pool(torch.ones(1, 1, 4, 4), 3), torch.ones(1, 1, 4, 4))


def test_the_first_maximum_takes_the_gradient_and_nan_wins():
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    functional.max_pool(x, 3)[0, 0, 1, 1].backward()
    assert x.grad.flatten().tolist() == [1] + 8 * [0]
    with_nan = torch.zeros(1, 1, 3, 3)
    with_nan[0, 0, 0, 0] = float("nan")
    assert functional.max_pool(with_nan, 3).isnan().sum() == 4


def test_logits_and_weights_are_never_taken_for_each_other():
    xs, scores = [fp64(2, 2) for _ in range(3)], fp64(3)
    by_weights = functional.weighted_sum(xs, torch.softmax(scores, 0))
    torch.testing.assert_close(functional.softmax_sum(xs, scores), by_weights)
    torch.testing.assert_close(functional.weighted_sum(xs, torch.tensor([0.0, 2.0, 0.0])), 2 * xs[1])


@settings(max_examples=50, deadline=None)
@given(
    operands=st.integers(1, 20),
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_a_softmax_sum_is_a_mean_in_the_dtype_of_its_operands(operands, shape, dtype):
    """Equal candidates come out unchanged, whatever the logits."""
    x = torch.full(shape, 0.5, dtype=dtype)
    y = functional.softmax_sum([x] * operands, torch.randn(operands))
    assert (y.shape, y.dtype) == (x.shape, dtype)
    torch.testing.assert_close(y, x)


@settings(max_examples=50, deadline=None)
@given(
    operands=st.integers(1, 20),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    step=st.integers(1, 2),
)
def test_a_weighted_sum_is_linear_whatever_the_strides(operands, layout, step):
    xs = [torch.randn(2, 3, 4, 8).to(memory_format=layout)[..., ::step] for _ in range(operands)]
    weights = torch.randn(operands)
    expected = torch.einsum("k,k...->...", weights.double(), torch.stack(xs).double())
    torch.testing.assert_close(functional.weighted_sum(xs, weights).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_stacked_tensor_counts_as_its_slices():
    stacked, weights = fp64(3, 2, 2), fp64(3)
    expected = functional.weighted_sum(list(stacked), weights)
    torch.testing.assert_close(functional.weighted_sum(stacked, weights), expected)


@pytest.mark.parametrize(
    ("xs", "scores", "message"),
    [
        ([], torch.ones(0), "give at least one"),
        ([torch.ones(2)], torch.ones(2), r"must have shape \[1\], one for each tensor, not \[2\]"),
        ([torch.ones(2)], torch.ones(()), r"must have shape \[1\], one for each tensor, not \[\]"),
        ([torch.ones(2), torch.ones(1)], torch.ones(2), r"must have one shape, not \[2\] and \[1\]"),
    ],
)
def test_a_sum_that_makes_no_sense_is_refused(xs, scores, message):
    with pytest.raises(UserError, match=message):
        functional.softmax_sum(xs, scores)
    with pytest.raises(UserError, match=message):
        functional.weighted_sum(xs, scores)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.avg_pool(x, 2),
        lambda x: functional.max_pool(x, 4),
        lambda x: functional.sepconv(x, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)),
    ],
)
def test_an_even_window_is_refused(call):
    with pytest.raises(UserError, match="kernel_size must be odd"):
        call(torch.ones(1, 1, 4, 4))


def test_every_op_is_traced_without_graph_breaks():
    def every_op(x, depthwise, pointwise, weights):
        ys = [
            functional.sepconv(x, depthwise, pointwise),
            functional.avg_pool(x, 3),
            functional.max_pool(x, 3),
        ]
        y = functional.weighted_sum(ys, weights) + functional.softmax_sum(ys, weights)
        return functional.global_avg_pool(y)

    arguments = fp64(2, 2, 6, 6), fp64(2, 1, 3, 3), fp64(2, 2, 1, 1), fp64(3)
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), every_op(*arguments))
