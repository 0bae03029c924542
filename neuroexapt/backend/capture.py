"""Capturing work in a CUDA graph, and getting over a capture that fails."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from neuroexapt.backend.candidates import free_launches

Captured = TypeVar("Captured")


def try_to_capture(capture: Callable[[], Captured]) -> tuple[Captured | None, str]:
    """What ``capture`` returns, or None and the reason why it failed; the device is usable either way."""
    stream, random = torch.cuda.current_stream(), torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = random.clone_state()
    try:
        with free_launches(), _no_garbage_collected():
            return capture(), ""
    except Exception as error:  # whatever the captured code raises, which shows again when it runs as it is
        torch.cuda.set_stream(stream)
        random.graphsafe_set_state(random_state)  # else it waits for the end of the capture for good
        # Ending a capture that broke off raises as well; what broke it came first.
        cause = error.__context__ or error
        return None, next(iter(str(cause).splitlines()), type(cause).__name__)


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """It may hold an earlier graph, and freeing that one breaks the capture of another."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
