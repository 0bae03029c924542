"""Copying many tensors at once, and a module's buffers for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each of ``sources`` into its target, all of a dtype in a few launches."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        pair = by_dtype.setdefault(target.dtype, ([], []))
        pair[0].append(target)
        pair[1].append(source)
    for target_list, source_list in by_dtype.values():
        torch._foreach_copy_(target_list, source_list)


@contextmanager
def buffers_copied(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside sees and changes copies of the buffers of ``module``, its running statistics.

    Unlike buffers that are put back (``backend.kernel_graph.buffers_kept``), these never count as changed
    since autograd saved them; but a graph that is captured inside goes on with the copies.
    """
    found = [
        (part._buffers, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    places = [(buffers, name) for buffers, name, _ in found]
    kept = [buffer for *_, buffer in found]
    copies = [torch.empty_like(buffer) for buffer in kept]
    copy_tensors(copies, kept)
    _put(places, copies)
    try:
        yield
    finally:
        _put(places, kept)


@contextmanager
def buffers_changed_if(condition: Tensor, module: nn.Module) -> Iterator[None]:
    """Whatever runs inside changes the buffers of ``module`` only if ``condition`` [] holds, which nothing
    waits for.
    """
    kept = list(module.buffers())
    with buffers_copied(module):
        yield
        changed = list(module.buffers())
    with torch.no_grad():
        copy_tensors(kept, [torch.where(condition, *pair) for pair in zip(changed, kept, strict=True)])


def _put(places: Sequence[tuple[dict[str, Tensor | None], str]], tensors: Sequence[Tensor]) -> None:
    for (buffers, name), tensor in zip(places, tensors, strict=True):
        buffers[name] = tensor
