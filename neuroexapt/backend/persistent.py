"""A module whose pass is one launch: the CUDA graph of it, replayed."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from neuroexapt.backend.capture import try_to_capture
from neuroexapt.backend.kernel_graph import buffers_kept, new_kernel_graph
from neuroexapt.backend.registry import chosen_spec, use_backend

logger = logging.getLogger(__name__)


class PersistentKernel(nn.Module):
    """``module`` with the same results, its kernels replayed with one launch on a GPU.

    Captured in training mode, forward and backward are one launch each; in evaluation mode forward is, for
    calls without gradients. ``captured`` says whether it is, ``reason`` why not. A call that differs from
    the sample (shape, dtype, device, need of gradients, mode) runs the module as it is. Every backward pass
    writes the gradients to the same memory, so clear them before the next, as ``zero_grad`` does.

    Args:
        module: a MixedOp, a cell, a whole network, …; parameters and buffers stay its own. It must not wait
            for the device, as ``.item()`` does.
        sample_inputs: tensors like those of later calls. Capturing runs the module on them; its buffers are
            left as they were.
        backend: runs the module's ops; ``auto`` leaves the choice in force.

    Raises:
        UserError: ``backend`` is no backend's name.
        BackendUnavailableError: it is one, but cannot run here.
    """

    def __init__(self, module: nn.Module, sample_inputs: Sequence[Tensor], backend: str = "auto") -> None:
        super().__init__()
        self.module = module
        self.train(module.training)
        self._backend = chosen_spec() if backend == "auto" else backend
        self._sample = tuple(sample_inputs)
        self._captured_training = module.training
        with use_backend(self._backend):
            self._replay, self.reason = self._capture()
        if self._replay is None:
            logger.info("%s runs as it is: %s", type(module).__name__, self.reason)

    @property
    def captured(self) -> bool:
        """Whether calls like the sample are replayed."""
        return self._replay is not None

    @property
    def num_launches(self) -> int | None:
        """Launches of a forward pass on a GPU, None on other devices."""
        return 1 if self.captured else new_kernel_graph(self.module, self._sample, self._backend).launches

    def forward(self, *inputs: Tensor) -> Any:
        if self._replay is None or not self._like_the_sample(inputs):
            with use_backend(self._backend):
                return self.module(*inputs)
        # Copied, since the next replay writes to the same memory.
        return tree_map(torch.clone, self._replay(*inputs))

    def _like_the_sample(self, inputs: tuple[Tensor, ...]) -> bool:
        same_mode = self.module.training == self._captured_training
        wants_gradients = torch.is_grad_enabled() and not self._captured_training
        return same_mode and not wants_gradients and _kind(inputs) == _kind(self._sample)

    def _capture(self) -> tuple[Callable[..., Any] | None, str]:
        elsewhere = {x.device.type for x in self._sample} - {"cuda"}
        if elsewhere:
            return None, f"a CUDA graph needs inputs on a GPU, not on {', '.join(sorted(elsewhere))}"
        with torch.set_grad_enabled(self._captured_training), buffers_kept(self.module):
            return try_to_capture(self._graphed)

    def _graphed(self) -> Callable[..., Any]:
        # It replaces the `forward` of what it is given and writes later inputs to the sample's memory.
        shell = _Shell(self.module).train(self._captured_training)
        own = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in self._sample)
        torch.cuda.make_graphed_callables(shell, own, allow_unused_input=True)
        return shell.forward


class _Shell(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _kind(tensors: Sequence[Tensor]) -> list[tuple]:
    return [(x.shape, x.dtype, x.device, x.requires_grad) for x in tensors]
