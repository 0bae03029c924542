"""Which backends exist here, which one is chosen, and which function implements an op on each tier.

A backend is a device (``cpu``, ``cuda``, ``mps``) and a tier, the kind of kernel that runs on it:
``torch`` (PyTorch's own), ``triton`` or ``ext`` (this package's CUDA C++ extension). ``auto`` as a
tier lets the dispatch choose per call.
"""

import contextlib
import functools
import logging
import os
import textwrap
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from neuroexapt.backend.config import load_config
from neuroexapt.errors import BackendUnavailableError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A device and a tier; ``reason`` says why it is not ``available`` and is empty otherwise."""

    device: str
    tier: str
    available: bool
    reason: str

    @property
    def value(self) -> str:
        """How the backend is written: ``cpu``, ``cuda``, ``cuda:triton``, …"""
        return next(spec for spec, pair in _SPECS.items() if pair == (self.device, self.tier))

    @property
    def torch_device(self) -> torch.device:
        """The device on which tensors and modules of this backend live."""
        return torch.device(self.device)


@dataclass(frozen=True)
class Support:
    """Whether an implementation takes a call's arguments, and if not, why."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Implementation:
    """One op's function on one tier, with the check of a call's arguments."""

    fn: Callable[..., Any]
    supports: Callable[..., Support]


_SPECS = {
    "cpu": ("cpu", "torch"),
    "cuda": ("cuda", "auto"),
    "cuda:torch": ("cuda", "torch"),
    "cuda:triton": ("cuda", "triton"),
    "cuda:ext": ("cuda", "ext"),
    "mps": ("mps", "torch"),
}
IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {}
_context: ContextVar[str | None] = ContextVar("neuroexapt_backend", default=None)
_process_choice: str | None = None


def register_impl(op: str, tier: str, fn: Callable[..., Any], supports: Callable[..., Support]) -> None:
    """Let ``fn`` implement ``op`` on ``tier``; a later registration replaces an earlier one.

    ``fn`` and ``supports`` take the arguments of ``neuroexapt.functional``'s function of that name.
    """
    IMPLEMENTATIONS[op, tier] = Implementation(fn, supports)


def list_backends() -> tuple[Backend, ...]:
    """Every backend, with the reason for those that cannot run here.

    Each is probed by compiling and running a tiny kernel, once per process; the first call on a
    machine with a GPU may therefore build the CUDA extension.
    """
    return tuple(_probed(spec) for spec in _SPECS)


def get_available_backends() -> tuple[Backend, ...]:
    """The backends that can run here."""
    return tuple(backend for backend in list_backends() if backend.available)


def resolve(spec: str) -> Backend:
    """The backend that ``spec`` names; ``auto`` picks the best device.

    Raises:
        UserError: ``spec`` is no backend's name.
        BackendUnavailableError: it is one, but cannot run here.
    """
    if spec == "auto":
        return _best_device()
    if spec not in _SPECS:
        raise UserError(f"unknown backend {spec!r}; choose one of auto, {', '.join(_SPECS)}")
    backend = _probed(spec)
    if not backend.available:
        raise BackendUnavailableError(f"backend {spec!r} cannot run here: {backend.reason}")
    return backend


def set_backend(spec: str) -> Backend:
    """Choose the backend of this process; ``use_backend`` still goes before it."""
    global _process_choice
    backend = resolve(spec)
    _process_choice = spec
    return backend


@contextlib.contextmanager
def use_backend(spec: str) -> Iterator[Backend]:
    """Choose the backend inside the ``with`` block, then restore the former choice."""
    backend = resolve(spec)
    token = _context.set(spec)
    try:
        yield backend
    finally:
        _context.reset(token)


def get_backend() -> Backend:
    """The backend in force: ``use_backend``, ``set_backend``, ``NEUROEXAPT_BACKEND``, saved, auto."""
    return resolve(chosen_spec())


def chosen_spec() -> str:
    """What ``get_backend`` resolves."""
    return _context.get() or _process_choice or os.environ.get("NEUROEXAPT_BACKEND") or _saved_spec()


@functools.cache
def _saved_spec() -> str:
    return load_config().get("backend", "auto")


@functools.cache
def _best_device() -> Backend:
    for spec in ("cuda", "mps"):
        backend = _probed(spec)
        if backend.available:
            return backend
    logger.info("running on the CPU, which is slower: %s", _probed("cuda").reason)
    return _probed("cpu")


@functools.cache
def _probed(spec: str) -> Backend:
    device, tier = _SPECS[spec]
    reason = _probe_device(device) or probe_tier(tier)
    return Backend(device, tier, available=not reason, reason=reason)


@functools.cache
def _probe_device(device: str) -> str:
    """Empty when the device computes, else why it does not."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device != "cpu" and (accelerator is None or accelerator.type != device):
        return f"PyTorch finds no {device} device"
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:  # a driver that is there but does not work
        return _first_line(error)
    return ""


@functools.cache
def probe_tier(tier: str) -> str:
    """Empty when the tier's probe kernel compiled and ran on the GPU, else why it did not, logged once."""
    try:
        if tier == "triton":
            from neuroexapt.kernels.softmax_sum_triton import probe

            probe()
        elif tier == "ext":
            from neuroexapt.cuda_ops.softmax_sum import probe

            probe()
    except Exception as error:  # a broken toolchain fails in many ways, each of them a reason
        reason = _first_line(error)
        logger.warning("running without the %s kernels, which is slower: %s", tier, reason)
        return reason
    return ""


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return textwrap.shorten(line, width=120, placeholder=" …")
