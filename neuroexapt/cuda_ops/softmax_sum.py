"""``softmax_sum`` and ``weighted_sum`` in CUDA C++ (``csrc/softmax_sum.cu``), built on first use."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neuroexapt.backend import list_backends, register_impl
from neuroexapt.cuda_ops.arguments import addresses, current_stream
from neuroexapt.cuda_ops.build import extension
from neuroexapt.kernels import softmax_sum as shared


def _forward(xs: list[Tensor], scores: Tensor, y: Tensor, is_logits: bool) -> None:
    with torch.cuda.device(y.device):
        extension().softmax_sum_forward(
            addresses(*xs), scores.data_ptr(), y.data_ptr(), *_size_and_dtype(y), is_logits, current_stream()
        )


def _backward(
    grad_y: Tensor,
    xs: list[Tensor],
    scores: Tensor,
    grad_xs: list[Tensor | None],
    grad_scores: Tensor | None,
    is_logits: bool,
) -> None:
    kernels = extension()
    with torch.cuda.device(grad_y.device):
        partials = scores.new_empty(len(xs), kernels.MAX_SPLITS)
        kernels.softmax_sum_backward(
            grad_y.data_ptr(),
            addresses(*xs),
            scores.data_ptr(),
            addresses(*grad_xs),
            *addresses(grad_scores),
            partials.data_ptr(),
            *_size_and_dtype(grad_y),
            is_logits,
            current_stream(),
        )


def _size_and_dtype(x: Tensor) -> tuple[int, object]:
    return x.numel(), getattr(extension().DType, str(x.dtype).removeprefix("torch."))


softmax_sum, weighted_sum = shared.define_ops("ext", _forward, _backward)
register_impl("softmax_sum", "ext", softmax_sum, shared.supports)
register_impl("weighted_sum", "ext", weighted_sum, shared.supports)


def probe() -> None:
    """Build the extension and run a tiny sum on the GPU; raises where that fails."""
    shared.probe(weighted_sum)


class SoftmaxSumFunction:
    """Keeps callers of the earlier autograd function working; new code calls ``functional.softmax_sum``."""

    @staticmethod
    def apply(xs: Tensor | Sequence[Tensor], logits: Tensor) -> Tensor:
        """``Σ_k softmax(logits)_k · xs[k]``; ``xs``: [K, …] or a list, on any device."""
        from neuroexapt.functional import softmax_sum

        return softmax_sum(list(xs), logits)


def __getattr__(name: str) -> bool:
    """``CUDA_AVAILABLE``: whether the extension was built and ran, found out when first asked."""
    if name == "CUDA_AVAILABLE":
        return any(backend.value == "cuda:ext" and backend.available for backend in list_backends())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
