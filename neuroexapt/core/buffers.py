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
def buffers_changed_if(conditions: Sequence[Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever runs inside changes the buffers of each module only if its condition [] holds, which nothing
    waits for.
    """
    of_each = [
        condition for condition, module in zip(conditions, modules, strict=True) for _ in module.buffers()
    ]
    kept = [buffer for module in modules for buffer in module.buffers()]
    with buffers_copied(nn.ModuleList(modules)):
        yield
        changed = [buffer for module in modules for buffer in module.buffers()]
    for dtype in dict.fromkeys(buffer.dtype for buffer in kept):
        found = [three for three in zip(of_each, changed, kept, strict=True) if three[2].dtype == dtype]
        _copy_where(*map(list, zip(*found, strict=True)))


@torch.no_grad()
def _copy_where(conditions: list[Tensor], sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy each of ``sources`` into its target if its condition holds, all in a few launches."""
    sizes = [target.numel() for target in targets]
    holds = torch.cat([c.expand(size) for c, size in zip(conditions, sizes, strict=True)])
    new, old = (torch.cat([x.flatten() for x in xs]) for xs in (sources, targets))
    values = torch.where(holds, new, old)
    torch._foreach_copy_([target.view(-1) for target in targets], values.split(sizes))


def _put(places: Sequence[tuple[dict[str, Tensor | None], str]], tensors: Sequence[Tensor]) -> None:
    for (buffers, name), tensor in zip(places, tensors, strict=True):
        buffers[name] = tensor
