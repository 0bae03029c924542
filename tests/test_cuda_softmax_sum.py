"""``softmax_sum`` and ``weighted_sum`` in CUDA C++ and Triton against the reference in fp64.

Without a GPU the Triton version runs in the interpreter on small shapes and the CUDA version is skipped.
"""

import pytest
import torch
from torch import Tensor

from neuroexapt.kernels import reference
from tests.kernels.held_to_reference import DEVICE, runs_kernels

TIERS = [pytest.param("ext", marks=pytest.mark.gpu), "triton"]
SUMS = ["softmax_sum", "weighted_sum"]
# The interpreter truncates where the GPU rounds, so bf16 is tested on the GPU only.
DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Shape and number of operands: one element, whole accesses, a tail, many operands, many blocks.
CASES = [
    ((1,), 1),
    ((16, 1), 3),
    ((3, 5, 7, 1), 8),
    ((3, 5), 48),
    pytest.param((8, 16, 32, 33), 8, marks=pytest.mark.gpu),
    pytest.param((64, 16, 32, 32), 33, marks=pytest.mark.gpu),
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}

pytestmark = [pytest.mark.usefixtures("nan_filled_empty"), runs_kernels]


def kernel(op: str, tier: str):
    if tier == "ext":
        from neuroexapt.cuda_ops import softmax_sum as module
    else:
        from neuroexapt.kernels import softmax_sum_triton as module
    return getattr(module, op)


def operands(shape, count: int, dtype=torch.float32, layout="contiguous") -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(count)
    xs = [LAYOUTS[layout](torch.randn(shape, device=DEVICE).to(dtype)) for _ in range(count)]
    return xs, torch.randn(count, device=DEVICE)


def gradients(sum_op, xs: list[Tensor], scores: Tensor, grad_y: Tensor, wants=None) -> list[Tensor | None]:
    """The sum and the gradients of every operand and of the scores, None where not wanted."""
    wants = wants or [True] * (len(xs) + 1)
    leaves = [x.detach().requires_grad_(want) for x, want in zip([*xs, scores], wants, strict=True)]
    y = sum_op(leaves[:-1], leaves[-1])
    y.backward(grad_y.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_matches_reference(op: str, tier: str, xs: list[Tensor], scores: Tensor, wants=None) -> None:
    grad_y = torch.randn(xs[0].shape, device=DEVICE).to(xs[0].dtype)
    results = gradients(kernel(op, tier), xs, scores, grad_y, wants)
    in_fp64 = [x.double() for x in xs], scores.double(), grad_y.double()
    expected = gradients(getattr(reference, op), *in_fp64, wants)
    for result, exact in zip(results[:-1], expected[:-1], strict=True):
        assert (result is None) == (exact is None)
        if exact is not None:
            assert result.dtype == xs[0].dtype
            size = max(1.0, exact.abs().max().item())
            torch.testing.assert_close(result.double(), exact, rtol=0, atol=TOLERANCES[xs[0].dtype] * size)
    if expected[-1] is not None:
        # A sum over all elements: its error grows with their number, not with the result.
        size = xs[0].numel() ** 0.5
        torch.testing.assert_close(results[-1].double(), expected[-1], rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("op", SUMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "count"), CASES)
def test_matches_reference(op, tier, dtype, shape, count):
    assert_matches_reference(op, tier, *operands(shape, count, dtype))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_takes_any_strides(tier, layout, dtype):
    assert_matches_reference("softmax_sum", tier, *operands((2, 3, 5, 4), 5, dtype, layout))


@pytest.mark.parametrize("tier", TIERS)
def test_takes_operands_of_different_layouts(tier):
    xs, logits = operands((2, 3, 5, 4), len(LAYOUTS))
    xs = [layout(x) for layout, x in zip(LAYOUTS.values(), xs, strict=True)]
    assert_matches_reference("softmax_sum", tier, xs, logits)


@pytest.mark.parametrize("tier", TIERS)
def test_keeps_channels_last(tier):
    xs, logits = operands((2, 3, 5, 4), 4, layout="channels_last")
    assert kernel("softmax_sum", tier)(xs, logits).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "wants", [[True, False, True, False], [False, False, False, True], [True, True, True, False]]
)
def test_computes_only_the_gradients_wanted(tier, wants):
    assert_matches_reference("softmax_sum", tier, *operands((3, 5, 7), 3), wants)


@pytest.mark.parametrize("tier", TIERS)
def test_saves_no_operands_when_the_logits_are_fixed(tier):
    xs, logits = operands((3, 5), 4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernel("softmax_sum", tier)([x.requires_grad_() for x in xs], logits)
    assert [x.shape for x in saved] == [logits.shape]


@pytest.mark.parametrize("tier", TIERS)
def test_takes_the_softmax_exactly_once(tier):
    xs, logits = operands((4, 4), 6)
    once = kernel("softmax_sum", tier)(xs, logits)
    torch.testing.assert_close(once, kernel("weighted_sum", tier)(xs, torch.softmax(logits, 0)))
    assert not torch.allclose(once, kernel("weighted_sum", tier)(xs, logits), atol=1e-2)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("extreme", [[1e4, 0.0, -1e4], [-float("inf"), 0.0, 1.0], [80.0, 80.0, 80.0]])
def test_extreme_logits_stay_finite(tier, extreme):
    xs, _ = operands((4, 4), 3)
    assert_matches_reference("softmax_sum", tier, xs, torch.tensor(extreme, device=DEVICE))


@pytest.mark.parametrize("tier", TIERS)
def test_a_non_finite_operand_shows(tier):
    xs, logits = operands((4, 4), 3)
    xs[1][2, 2] = float("nan")
    y = kernel("softmax_sum", tier)(xs, logits)
    assert y.isnan().sum() == 1
    assert y[2, 2].isnan()


@pytest.mark.parametrize("tier", TIERS)
def test_scores_keep_their_dtype(tier):
    xs, logits = operands((4, 4), 3)
    logits = logits.double().requires_grad_()
    kernel("softmax_sum", tier)(xs, logits).sum().backward()
    assert logits.grad.dtype == torch.float64


@pytest.mark.parametrize("tier", TIERS)
def test_differentiating_twice_raises(tier):
    xs, logits = operands((4, 4), 3)
    y = kernel("softmax_sum", tier)(xs, logits.requires_grad_())
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(y.sum(), logits, create_graph=True)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("op", SUMS)
def test_passes_opcheck(op, tier):
    xs, scores = operands((3, 5, 7), 3)
    kernel(op, tier)
    arguments = ([x.requires_grad_() for x in xs], scores.requires_grad_())
    torch.library.opcheck(getattr(torch.ops.neuroexapt, f"{op}_{tier}").default, arguments)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("op", SUMS)
def test_is_compiled_without_graph_breaks(op, tier):
    sum_op = kernel(op, tier)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(lambda xs, scores: sum_op(xs, scores).relu(), fullgraph=True, backend=backend)
    xs, scores = operands((2, 3, 8), 4)
    grad_y = torch.randn(2, 3, 8, device=DEVICE)
    expected = gradients(lambda xs, scores: sum_op(xs, scores).relu(), xs, scores, grad_y)
    for result, exact in zip(gradients(compiled, xs, scores, grad_y), expected, strict=True):
        torch.testing.assert_close(result, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["ext", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gives_the_same_bits_every_time(tier, dtype):
    xs, logits = operands((64, 16, 32, 32), 8, dtype)
    grad_y = torch.randn_like(xs[0])
    first = gradients(kernel("softmax_sum", tier), xs, logits, grad_y)
    for _ in range(19):
        again = gradients(kernel("softmax_sum", tier), xs, logits, grad_y)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["ext", "triton"])
def test_can_be_captured_in_a_cuda_graph(tier):
    sum_op = kernel("softmax_sum", tier)
    xs, logits = operands((8, 16, 32, 32), 8)
    grad_y = torch.randn_like(xs[0])
    leaves = [x.requires_grad_() for x in (*xs, logits)]

    def step() -> tuple[Tensor, ...]:
        y = sum_op(leaves[:-1], leaves[-1])
        return (y.detach(), *torch.autograd.grad(y, leaves, grad_y))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():  # the replay must read the new values
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for result, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["ext", "triton"])
def test_runs_on_the_current_stream(tier):
    sum_op = kernel("softmax_sum", tier)
    xs, logits = operands((256, 16, 32, 32), 4)
    expected = sum_op([2 * x for x in xs], logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**7)
        for x in xs:
            x.mul_(2)
        result = sum_op(xs, logits)
    torch.cuda.synchronize()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["ext", "triton"])
def test_offsets_are_64_bits_wide(tier):
    """A wrapped offset would miss the last elements of a tensor of more than 2^31."""
    n = 2**31 + 5
    xs = [torch.full((n,), value, dtype=torch.bfloat16, device=DEVICE) for value in (1.0, 2.0)]
    xs[0][-1] = 5.0
    weights = torch.tensor([1.0, 1.0], device=DEVICE, requires_grad=True)
    y = kernel("weighted_sum", tier)(xs, weights)
    assert (y[0].item(), y[2**31].item(), y[-1].item()) == (3.0, 3.0, 7.0)
    (grad,) = torch.autograd.grad(y, weights, torch.ones_like(y))
    torch.testing.assert_close(grad.cpu(), torch.tensor([n + 4.0, 2.0 * n]), rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_both_tiers_agree_with_the_earlier_autograd_function():
    from neuroexapt.cuda_ops.softmax_sum import CUDA_AVAILABLE, SoftmaxSumFunction

    assert CUDA_AVAILABLE
    xs, logits = operands((8, 16, 16, 16), 4)
    earlier = SoftmaxSumFunction.apply(torch.stack(xs), logits)
    for tier in ("ext", "triton"):
        torch.testing.assert_close(kernel("softmax_sum", tier)(xs, logits), earlier)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_earlier_autograd_function_works_without_a_gpu():
    from neuroexapt.cuda_ops.softmax_sum import CUDA_AVAILABLE, SoftmaxSumFunction

    assert not CUDA_AVAILABLE
    xs, logits = operands((4, 4), 3)
    torch.testing.assert_close(
        SoftmaxSumFunction.apply(torch.stack(xs), logits), reference.softmax_sum(xs, logits)
    )
