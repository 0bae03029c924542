"""The fused attention's kernels on a GPU: dtypes, sizes, layouts, determinism, capture and compilation."""

import functools

import pytest
import torch
from torch import Tensor

from neuroexapt import functional
from neuroexapt.backend import explain, use_backend
from neuroexapt.kernels import fused_attention_layernorm as definition
from neuroexapt.kernels import fused_attention_layernorm_triton as kernels
from tests.kernels.held_to_reference import TOLERANCE, largest_error, relative_error, results_and_gradients
from tests.kernels.on_gpu import assert_deterministic, assert_runs_compiled_and_captured
from tests.kernels.sequences import assert_causal, assert_padding_is_ignored
from tests.kernels.test_fused_attention_layernorm import CASES, inputs

pytestmark = pytest.mark.gpu
SIZES = [
    *CASES,
    (16, 50, 64, 2, 32),
    (5, 200, 64, 2, 32),
    (2, 300, 256, 4, 64),
    (1, 1100, 200, 2, 100),
    (2, 150, 130, 1, 256),
    (2, 600, 64, 4, 16),
    (2, 100, 640, 4, 80),
]


def by_kernel(*tensors: Tensor, **options) -> Tensor:
    with use_backend("cuda:triton"):
        assert explain("fused_attention_layernorm", *tensors, **options).impl == "triton"
        return functional.fused_attention_layernorm(*tensors, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "length", "width", "heads", "head"), SIZES)
def test_matches_the_definition(batch, length, width, heads, head, dtype, nan_filled_empty):
    sequences, weights = inputs(batch, length, width, heads, head, dtype)
    tensors = [*sequences, *weights]
    assert largest_error(definition.fused_attention_layernorm, by_kernel, tensors) < TOLERANCE[dtype]
    # Said to be full, long sequences do not go through PyTorch's attention.
    op = functools.partial(by_kernel, lengths=torch.full((batch,), length, device="cuda"))
    assert largest_error(definition.fused_attention_layernorm, op, tensors) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head", [32, 128])
def test_ignores_padding(head, dtype, nan_filled_empty):
    sequences, weights = inputs(5, 300, 64, 2, head, dtype)
    assert_padding_is_ignored(by_kernel, sequences, weights, [300, 0, 33, 128, 65], TOLERANCE[dtype])


def test_attends_to_eight_thousand_positions():
    sequences, weights = inputs(1, 8192, 32, 1, 32, torch.bfloat16)
    full = torch.tensor([8192], device="cuda")
    actual = results_and_gradients(
        functools.partial(by_kernel, lengths=full), [*sequences, *weights], torch.bfloat16
    )
    exact = results_and_gradients(by_kernel, [x.float() for x in (*sequences, *weights)], torch.bfloat16)
    for got, wanted in zip(actual, exact, strict=True):
        assert relative_error(got, wanted.double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [200, 700])
def test_knows_no_later_position(length, dtype):
    assert_causal(by_kernel, *inputs(2, length, 64, 2, 32, dtype), position=70)


def test_takes_heads_out_of_one_projection():
    sequences, weights = inputs(2, 100, 64, 2, 32)
    packed = torch.stack(sequences[1:], dim=2)
    assert torch.equal(by_kernel(sequences[0], *packed.unbind(2), *weights), by_kernel(*sequences, *weights))


@pytest.mark.parametrize("length", [50, 600])
def test_is_deterministic(length):
    sequences, weights = inputs(8, length, 64, 2, 32, torch.bfloat16)
    lengths = torch.arange(length - 8, length, device="cuda")
    assert_deterministic(functools.partial(by_kernel, lengths=lengths), [*sequences, *weights])


@pytest.mark.parametrize("length", [50, 600])
def test_runs_compiled_and_captured(length):
    sequences, weights = inputs(4, length, 64, 2, 32)
    assert_runs_compiled_and_captured(kernels.fused_attention_layernorm, [*sequences, *weights])


def test_dropout_draws_the_same_mask_both_ways_and_another_each_replay():
    sequences, weights = inputs(2, 50, 64, 2, 32)
    out_weight, _, norm_weight, norm_bias = weights
    # With W = 0, b = 1, x = 0, norm weight 1 and bias 0, what is kept is above a row's mean.
    bias = torch.ones_like(norm_bias).requires_grad_()
    tensors = torch.zeros_like(sequences[0]), *sequences[1:], torch.zeros_like(out_weight)
    norm = torch.ones_like(norm_weight), torch.zeros_like(norm_bias)
    by_kernel(*tensors, bias, *norm, dropout=0.4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        by_kernel(*tensors, bias, *norm, dropout=0.4).sum().backward()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            y = by_kernel(*tensors, bias, *norm, dropout=0.4)
            (gradient,) = torch.autograd.grad(y, bias, norm_weight.expand_as(y))
        masks = []
        for _ in range(2):
            graph.replay()
            masks.append(y > 0)
            kept = masks[-1].double()
            z = (kept / 0.6).requires_grad_()
            normalised = torch.nn.functional.layer_norm(z, z.shape[-1:])
            (z_gradient,) = torch.autograd.grad(normalised, z, norm_weight.double().expand_as(z))
            assert relative_error(gradient, (z_gradient * kept / 0.6).sum((0, 1))) < 1e-4
            assert abs(kept.mean() - 0.6) < 0.03
    assert not torch.equal(*masks)
