"""Sample calls of every op, the small searches' inner loop as a workload, and comparison with fp64."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuroexapt.backend.dispatch import dispatch
from neuroexapt.errors import UserError
from neuroexapt.kernels import reference

SUMS = ("softmax_sum", "weighted_sum")
OPS = (*SUMS, "sepconv", "avg_pool", "max_pool", "global_avg_pool")
CHANNELS = 16
# Of an fp32, fp16 and bf16 result, relative to the largest value of the fp64 result.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass
class Call:
    """An op's name and the arguments of one call."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """The call's tensors, those of a list one by one."""
        flat = [x for arg in self.args for x in (arg if isinstance(arg, list) else [arg])]
        return [x for x in flat if isinstance(x, Tensor)]


def pictures(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random pictures [B, 16, side, side] of about ``elements`` elements, at most 32 pixels a side."""
    side = min(32, max(4, int((elements // CHANNELS) ** 0.5)))
    batch = max(1, elements // (CHANNELS * side * side))
    return torch.randn(batch, CHANNELS, side, side, dtype=dtype, device=device, requires_grad=True)


def sample_call(op: str, elements: int, dtype: torch.dtype, device: torch.device, operands: int = 8) -> Call:
    """A call of ``op`` on tensors of about ``elements`` elements, every gradient wanted."""
    make = functools.partial(torch.randn, dtype=dtype, device=device, requires_grad=True)
    x = pictures(elements, dtype, device)
    if op in SUMS:
        xs = [torch.randn_like(x).requires_grad_() for _ in range(operands)]
        return Call(op, (xs, torch.randn(operands, device=device, requires_grad=True)))
    if op == "sepconv":
        return Call(op, (x, make(CHANNELS, 1, 3, 3), make(CHANNELS, CHANNELS, 1, 1)))
    if op in ("avg_pool", "max_pool"):
        return Call(op, (x, 3))
    return Call(op, (x,))


def forward_backward(run: Callable[[], Tensor], inputs: Iterable[Tensor]) -> list[Tensor]:
    """The result of ``run`` and the gradients of its sum of squares with respect to ``inputs``."""
    y = run()
    return [y.detach(), *torch.autograd.grad(y, list(inputs), y.detach())]


def run_call(call: Call) -> list[Tensor]:
    """Result and gradients of a call, by whatever implementation the dispatch chooses."""
    return forward_backward(lambda: dispatch(call.op, *call.args, **call.kwargs), call.tensors())


def error_of(call: Call, results: list[Tensor]) -> float:
    """The largest error of ``run_call``'s results against the reference in fp64, relative to its size."""
    args = tuple(_in_fp64(arg) for arg in call.args)
    exact_call = Call(call.op, args, call.kwargs)
    op = getattr(reference, call.op)
    exact = forward_backward(lambda: op(*args, **call.kwargs), exact_call.tensors())
    return max(relative_error(a, b) for a, b in zip(results, exact, strict=True))


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The largest deviation, as a fraction of the largest value; NaN where either holds one."""
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Keep convolutions in fp32 from being rounded to TF32, which PyTorch does by default."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    allowed, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = allowed


def mixed_op(device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[], list[Tensor]]:
    """Forward and backward of one edge of a search: seven candidates and their relaxed sum."""
    x = pictures(64 * CHANNELS * 32 * 32 if device.type == "cuda" else 2**15, dtype, device)
    kernels = {k: torch.randn(CHANNELS, 1, k, k, device=device, requires_grad=True) for k in (3, 5)}
    pointwise = torch.randn(CHANNELS, CHANNELS, 1, 1, device=device, requires_grad=True)
    logits = torch.randn(7, device=device, requires_grad=True)

    def forward() -> Tensor:
        convolutions = [
            dispatch("sepconv", x, kernels[k], pointwise, stride=1, dilation=d, relu=True)
            for k in (3, 5)
            for d in (1, 2)
        ]
        pools = [dispatch("avg_pool", x, 3, 1), dispatch("max_pool", x, 3, 1)]
        return dispatch("softmax_sum", [x, *pools, *convolutions], logits)

    return lambda: forward_backward(forward, [x, *kernels.values(), pointwise, logits])


def _in_fp64(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_in_fp64(x) for x in arg]
    return arg.detach().double().requires_grad_() if isinstance(arg, Tensor) else arg


def workload(name: str, device: torch.device) -> Callable[[], list[Tensor]]:
    """A zero-argument function that runs ``mixed_op`` or one op forward and backward."""
    if name == "mixed_op":
        return mixed_op(device)
    if name in OPS:
        call = sample_call(name, 2**20 if device.type == "cuda" else 2**15, torch.float32, device)
        return lambda: run_call(call)
    raise UserError(f"unknown workload {name!r}; choose one of mixed_op, {', '.join(OPS)}")
