"""Stopping cleanly on SIGINT and SIGTERM: the running step ends, the state is saved, then the run stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was stopped by a signal after saving its state; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Remembers the first signal; a second one stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def _on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = signal_number

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals inside the block. Outside the main thread Python has no say over signals."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
