import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from neuroexapt import functional
from neuroexapt.backend import dispatch_report, reset_dispatch_report
from neuroexapt.core.operations import (
    OPS,
    PRIMITIVES,
    FactorizedReduce,
    Identity,
    MixedOp,
    Pool,
    Zero,
    make_op,
)
from neuroexapt.errors import UserError

C = 4


def batch_norm(x: Tensor) -> Tensor:
    mean, var = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


def sepconv_block(x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int, dilation: int) -> Tensor:
    padding = dilation * (depthwise.shape[-1] // 2)
    x = F.conv2d(x.relu(), depthwise, None, stride, padding, dilation, groups=C)
    return batch_norm(torch.einsum("bihw,oi->bohw", x, pointwise[:, :, 0, 0]))


def skip(x: Tensor, stride: int, weights: list[Tensor]) -> Tensor:
    if stride == 1:
        return x
    even, odd = x.relu()[:, :, ::2, ::2], x.relu()[:, :, 1::2, 1::2]
    halves = [
        torch.einsum("bihw,oi->bohw", s, w[:, :, 0, 0]) for s, w in zip((even, odd), weights, strict=True)
    ]
    return batch_norm(torch.cat(halves, dim=1))


def factorized(x: Tensor, stride: int, weights: list[Tensor]) -> Tensor:
    x = F.conv2d(x.relu(), weights[0], stride=(1, stride), padding=(0, 3))
    return batch_norm(F.conv2d(x, weights[1], stride=(stride, 1), padding=(3, 0)))


def windows(x: Tensor, stride: int, fill: float) -> Tensor:
    """All 3x3 windows with padding 1: [B, C, H', W', 9]."""
    padded = F.pad(x, (1, 1, 1, 1), value=fill)
    return padded.unfold(2, 3, stride).unfold(3, 3, stride).flatten(4)


DEFINITIONS = {
    "none": lambda x, s, w: torch.zeros_like(x[:, :, ::s, ::s]),
    "max_pool_3x3": lambda x, s, w: windows(x, s, -torch.inf).amax(-1),
    "avg_pool_3x3": lambda x, s, w: windows(x, s, torch.nan).nanmean(-1),
    "skip_connect": skip,
    "dil_conv_3x3": lambda x, s, w: sepconv_block(x, w[0], w[1], s, 2),
    "dil_conv_5x5": lambda x, s, w: sepconv_block(x, w[0], w[1], s, 2),
    "nor_conv_1x1": lambda x, s, w: batch_norm(F.conv2d(x.relu(), w[0], None, s)),
    "nor_conv_3x3": lambda x, s, w: batch_norm(F.conv2d(x.relu(), w[0], None, s, 1)),
    "conv_7x1_1x7": factorized,
} | {
    f"sep_conv_{k}x{k}": lambda x, s, w: sepconv_block(sepconv_block(x, w[0], w[1], s, 1), w[2], w[3], 1, 1)
    for k in (3, 5, 7)
}


def test_every_op_has_a_definition() -> None:
    assert set(DEFINITIONS) | {"noise"} == set(OPS)
    assert set(PRIMITIVES) <= set(OPS)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_equals_its_definition(name: str, stride: int) -> None:
    torch.manual_seed(0)
    op = make_op(name, C, stride, affine=False).double().train()
    x = torch.randn(3, C, 8, 8, dtype=torch.float64)
    actual = op(x)
    expected = DEFINITIONS[name](x, stride, list(op.parameters()))
    assert actual.shape == (3, C, 8 // stride, 8 // stride)
    assert (actual - expected).abs().max() <= 1e-12


def test_noise_is_drawn_anew_and_tells_nothing_of_the_picture() -> None:
    x = torch.full((4, 3, 32, 32), 7.0, requires_grad=True)
    noise = make_op("noise", 3, 2, affine=False)
    y = noise(x)
    assert y.shape == (4, 3, 16, 16)
    assert abs(y.mean()) < 0.1
    assert abs(y.std() - 1) < 0.1
    assert not y.requires_grad
    assert not torch.equal(y, noise(x))


@pytest.mark.parametrize("name", sorted(OPS))
def test_stride_two_rounds_odd_sizes_up(name: str) -> None:
    op = make_op(name, C, 2, affine=True)
    assert op(torch.randn(2, C, 7, 9)).shape == (2, C, 4, 5)


def test_unknown_op_names_the_closest() -> None:
    with pytest.raises(UserError, match="did you mean 'sep_conv_3x3'"):
        make_op("sep_conv_3x4", C, 1, affine=True)


def test_factorized_reduce_refuses_odd_widths() -> None:
    with pytest.raises(UserError, match="5 channels are odd"):
        FactorizedReduce(4, 5)


def test_factorized_reduce_trains_on_large_channels_last_pictures() -> None:
    # Where it was two convolutions of stride 2, PyTorch crashed here.
    torch.manual_seed(0)
    op = FactorizedReduce(4, 4)
    exact = copy.deepcopy(op).double()
    x = torch.randn(16, 4, 64, 64)
    op.convolve(x.to(memory_format=torch.channels_last)).square().sum().backward()
    exact.convolve(x.double()).square().sum().backward()
    for conv, expected in ((op.conv_1, exact.conv_1), (op.conv_2, exact.conv_2)):
        assert torch.allclose(conv.weight.grad.double(), expected.weight.grad, rtol=1e-4)


def test_mixed_op_is_the_weighted_sum_of_its_ops() -> None:
    torch.manual_seed(0)
    mixed = MixedOp(C, 1).double()
    x = torch.randn(4, C, 6, 6, dtype=torch.float64)
    weights = torch.rand(len(PRIMITIVES), dtype=torch.float64, requires_grad=True)
    y = mixed(x, weights)
    expected = sum(w * op(x) for w, op in zip(weights, mixed.ops, strict=True))
    assert (y - expected).abs().max() <= 1e-12
    (gradient,) = torch.autograd.grad(y.square().sum(), weights)
    assert gradient[0] == 0
    assert (gradient[1:] != 0).all()


def test_mixed_op_normalises_pools() -> None:
    mixed = MixedOp(C, 2)
    for name in ("max_pool_3x3", "avg_pool_3x3"):
        pool, norm = mixed.candidate(name)
        assert isinstance(pool, Pool)
        assert isinstance(norm, nn.BatchNorm2d)
        assert not norm.affine


def test_mixed_op_takes_a_users_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under any name, also one that modules use themselves."""
    monkeypatch.setitem(OPS, "double", lambda channels, stride, affine: _Double())
    mixed = MixedOp(C, 1, primitives=("skip_connect", "double"))
    x = torch.randn(2, C, 4, 4)
    assert torch.allclose(mixed(x, torch.tensor([0.25, 0.5])), 1.25 * x)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_mixed_op_of_none_alone_gives_zeros() -> None:
    assert MixedOp(C, 2, primitives=("none",))(torch.randn(2, C, 5, 5), torch.ones(1)).count_nonzero() == 0


def test_none_stops_infinities() -> None:
    x = torch.full((1, C, 2, 2), torch.inf)
    assert MixedOp(C, 1, primitives=("none",))(x, torch.ones(1)).isfinite().all()
    assert isinstance(MixedOp(C, 1).candidate("none"), Zero)
    assert isinstance(MixedOp(C, 1).candidate("skip_connect"), Identity)


# An edge by its plan


def make_edge(stride: int = 1, primitives: tuple[str, ...] = tuple(DEFINITIONS)) -> MixedOp:
    torch.manual_seed(0)
    edge = MixedOp(C, stride, primitives).double()
    for module in edge.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Statistics of their own, so that evaluation mode tells one BatchNorm from another.
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return edge


def results(edge: MixedOp, size: tuple[int, int, int], fused: bool) -> list[Tensor]:
    """Output, gradients and buffers of a copy of ``edge``, and how often it ran as a cell."""
    edge = copy.deepcopy(edge)
    edge.fused = fused
    torch.manual_seed(1)
    batch, height, width = size
    x = torch.randn(batch, C, height, width, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(edge.ops), dtype=torch.float64, requires_grad=True)
    reset_dispatch_report()
    y = edge(x, weights)
    cells = sum(count for decision, count in dispatch_report().items() if decision.op == "cell")
    gradients = torch.autograd.grad(y, [x, weights, *edge.parameters()], torch.randn_like(y))
    return [torch.tensor(cells), y, *gradients, *edge.buffers()]


def assert_equals_reference(edge: MixedOp, size: tuple[int, int, int] = (16, 7, 6), cells: int = 1) -> None:
    (fused_cells, *fused), (reference_cells, *reference) = (results(edge, size, f) for f in (True, False))
    assert (fused_cells, reference_cells) == (cells, 0)
    for actual, expected in zip(fused, reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(16, 7, 6), (33, 1, 5), (64, 8, 8)])
def test_a_fused_edge_is_the_same(stride: int, training: bool, size: tuple[int, int, int]) -> None:
    assert_equals_reference(make_edge(stride).train(training), size)


@pytest.mark.parametrize("size", [(15, 8, 8), (16, 8, 9), (1, 3, 3)])
def test_on_the_cpu_edges_that_would_lose_run_operation_by_operation(size: tuple[int, int, int]) -> None:
    assert_equals_reference(make_edge(), size, cells=0)


@pytest.mark.parametrize("primitives", [("skip_connect",), ("none", "max_pool_3x3"), ("conv_7x1_1x7",)])
def test_a_fused_edge_of_few_operations_is_the_same(primitives: tuple[str, ...]) -> None:
    assert_equals_reference(make_edge(primitives=primitives))


def hook_one_operation(edge: MixedOp) -> None:
    edge.candidate("dil_conv_3x3").register_forward_hook(lambda module, args, output: 3 * output)


def freeze_one_operation(edge: MixedOp) -> None:
    edge.candidate("sep_conv_3x3").eval()


@pytest.mark.parametrize("change", [hook_one_operation, freeze_one_operation])
def test_an_edge_of_hooks_or_mixed_modes_runs_operation_by_operation(
    change: Callable[[MixedOp], None],
) -> None:
    edge = make_edge()
    edge.plan  # noqa: B018  (the one that must not be used any longer)
    change(edge)
    assert_equals_reference(edge, cells=0)


def test_a_fused_edge_follows_the_exchange_of_an_operation() -> None:
    edge = make_edge()
    edge.plan  # noqa: B018
    edge.ops[edge.primitives.index("sep_conv_5x5")] = Zero(1)
    assert_equals_reference(edge)


def test_copies_and_pickles_of_an_edge_make_their_own_plan() -> None:
    edge = make_edge()
    names, x, weights = (
        list(edge.state_dict()),
        torch.randn(16, C, 5, 5).double(),
        torch.ones(len(DEFINITIONS)),
    )
    edge.eval()(x, weights.double())
    for twin in (copy.deepcopy(edge), pickle.loads(pickle.dumps(edge))):
        assert list(twin.state_dict()) == names
        nn.init.zeros_(twin.candidate("sep_conv_3x3").op[0].depthwise.weight)
        twin.fused, reference = True, copy.deepcopy(twin)
        reference.fused = False
        torch.testing.assert_close(twin(x, weights.double()), reference(x, weights.double()))


def test_an_edge_is_freed_without_the_garbage_collector() -> None:
    edge = make_edge()
    edge(torch.randn(16, C, 5, 5).double(), torch.ones(len(DEFINITIONS)).double())
    freed = weakref.ref(edge)
    gc.disable()
    try:
        del edge
        assert freed() is None
    finally:
        gc.enable()


def test_a_compiled_edge_runs_operation_by_operation() -> None:
    edge = make_edge().eval()
    x, weights = torch.randn(16, C, 5, 5).double(), torch.rand(len(DEFINITIONS)).double()
    expected = edge(x, weights)
    torch._dynamo.reset()
    edge.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(edge(x, weights), expected)


def test_on_a_gpu_without_kernels_for_it_an_edge_runs_operation_by_operation() -> None:
    edge = MixedOp(C, 1, ("skip_connect", "max_pool_3x3"))
    with FakeTensorMode():
        x, weights = torch.empty(16, C, 5, 5, device="cuda"), torch.empty(1, 2, device="cuda")
    assert not functional.cell_is_fused(edge.plan, [x], weights)
    assert functional.cell_is_fused(edge.plan, [torch.empty(16, C, 5, 5)], torch.empty(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_edge_of_half_precision_runs_operation_by_operation(dtype: torch.dtype) -> None:
    edge = make_edge().bfloat16()
    x, weights = torch.randn(16, C, 8, 8).bfloat16(), torch.rand(len(DEFINITIONS)).to(dtype)
    reset_dispatch_report()
    assert edge(x, weights).dtype == torch.bfloat16
    assert "cell" not in {decision.op for decision in dispatch_report()}


def test_mixed_op_refuses_weights_of_another_number() -> None:
    with pytest.raises(UserError, match=r"weights must have shape \[8\], not \[7\]"):
        MixedOp(C, 1)(torch.randn(2, C, 4, 4), torch.ones(7))


def test_mixed_op_refuses_a_repeated_op() -> None:
    with pytest.raises(UserError, match="twice"):
        MixedOp(C, 1, primitives=("none", "none"))
