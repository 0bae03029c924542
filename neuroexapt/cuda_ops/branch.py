"""A second branch of launches, beside those of the current stream.

A step is a chain of launches, and many of them leave a part of the GPU idle: all of it between two of them,
most of it while the last blocks of one run. What the chain waits for later can run there.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor

_active: ContextVar["Branch | None"] = ContextVar("active branch", default=None)


class Branch:
    """Launches of ours in ``with branch:`` are put off, to run beside all that follows the block.

    ``start`` hands them to a stream of their own, on which they wait for what the current stream was given
    up to the end of the last block. Launch what is waited for most between the two: a GPU begins with what
    comes first. After ``join`` the current stream waits for them. Both do nothing where nothing is left.

    The first launch after ``join`` must not be an early one: what precedes it is no kernel.

    Memory is the current stream's, which hands it out again once it is free: what the launches read and write
    must be kept until the join. What our launchers allocate in the block is.
    """

    is_one = True

    def __init__(self) -> None:
        self._put_off: list[Callable[[int], None]] = []
        self._kept: list[Tensor] = []
        self._fork: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None  # where something runs that was not waited for
        self._outer: Token[Branch | None] | None = None

    def __enter__(self) -> None:
        self._outer = _active.set(self)

    def __exit__(self, *_exception: object) -> None:
        assert self._outer is not None
        _active.reset(self._outer)
        self._fork = torch.cuda.current_stream().record_event()

    def keep(self, *tensors: Tensor) -> None:
        """Until the join."""
        self._kept += tensors

    def start(self) -> None:
        if not self._put_off:
            return
        assert self._fork is not None
        self._stream = _second_stream(torch.cuda.current_device())
        self._stream.wait_event(self._fork)
        for run in self._put_off:
            run(self._stream.cuda_stream)
        self._put_off.clear()

    def join(self) -> None:
        self.start()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._stream = None
        self._kept.clear()


class NoBranch:
    """For launchers that know no branches: all runs when it is its turn."""

    is_one = False

    def __enter__(self) -> None: ...
    def __exit__(self, *_exception: object) -> None: ...
    def keep(self, *tensors: Tensor) -> None: ...
    def start(self) -> None: ...
    def join(self) -> None: ...


def launch(launcher: Callable[..., None], *arguments: Any) -> None:
    """``launcher(*arguments, stream)``, on the current stream or put off."""
    branch = _active.get()
    if branch is None:
        launcher(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        branch._put_off.append(functools.partial(launcher, *arguments))


def launch_early(launcher: Callable[..., None], *arguments: Any) -> None:
    """``launcher(*arguments, early, stream)``: early (``csrc/launch.cuh``) but for what is put off."""
    launch(launcher, *arguments, _active.get() is None)


def kept(tensor: Tensor) -> Tensor:
    """The tensor itself, which the branch keeps whose block this is."""
    if (branch := _active.get()) is not None:
        branch.keep(tensor)
    return tensor


@functools.cache
def _second_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
