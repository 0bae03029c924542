"""One stretch of training, step by step: progress, records, checkpoints, resumption, clean stops.

A run is a sequence of phases (``search``, then ``inherit`` and ``scratch``; or ``evaluate``). Every phase has
a checkpoint file of its own, so that resuming a run means going through its phases again: what is finished is
loaded, what was under way goes on at its step, the rest starts.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.device import peak_memory_bytes, reset_peak_memory
from neuroexapt.engine.events import Events
from neuroexapt.engine.interrupt import Interrupted, StopRequest
from neuroexapt.engine.progress import Progress
from neuroexapt.engine.run import RunFolder
from neuroexapt.errors import UserError

LOOK_STEPS, LOOK_SECONDS = 10, 0.5
"""The losses are looked at after so many steps or so long."""
GPU_LAG = 10
"""On a GPU the newest steps are left out of the look, so that the device has work meanwhile."""


class Phase(ABC):
    """What is trained. ``parameters`` are checked before every checkpoint: one with NaN in it is worth
    nothing.
    """

    name: str
    epochs: int
    steps_per_epoch: int
    device: torch.device

    @abstractmethod
    def metric_names(self, epoch: int) -> Sequence[str]:
        """Names of what ``steps`` yields in this epoch."""

    @abstractmethod
    def steps(self, epoch: int, start: int) -> Iterator[Tensor]:
        """Take the steps ``start``, ``start + 1``, … of ``epoch``; yield after each its metrics, [M] on the
        device.
        """

    @abstractmethod
    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """What to record of the epoch besides the means of the metrics."""

    def time_is_over(self, seconds: float) -> bool:
        """Whether an epoch ends after the step under way, since the phase has taken ``seconds``."""
        return False

    def reason_to_stop(self, record: dict[str, Any], seconds: float) -> str:
        """Why the phase ends after the epoch of ``record``, having taken ``seconds``; empty if it goes on."""
        return ""

    def figures(self, record: dict[str, Any]) -> dict[str, Any]:
        """Figures of the epoch that ``record`` describes, by name."""
        return {}

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Session:
    """What the phases of one invocation share. ``identity`` is what a checkpoint must agree with to be
    resumed.
    """

    run: RunFolder
    identity: dict[str, Any]
    progress: Progress
    stop: StopRequest
    checkpoint_seconds: float
    how_to_resume: str


@dataclass
class Position:
    """How far a phase has come: the next step, the sums of the epoch's metrics so far, the seconds that the
    phase has taken, over all its invocations, and had taken when the epoch began.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0
    epoch_began: float = 0.0
    finished: bool = False


class PhaseRunner:
    """Carries one phase from wherever its checkpoint stands to its end."""

    def __init__(self, phase: Phase, session: Session) -> None:
        self.phase = phase
        self.session = session
        self.checkpoint = session.run.checkpoint(phase.name)
        self.position = Position()
        self.events = Events(session.run.tensorboard / phase.name)
        self._pending: list[_OnTheWay] = []
        self._lag = GPU_LAG if phase.device.type == "cuda" else 0
        self._clock = self._saved_at = self._looked_at = time.monotonic()

    def run(self) -> float:
        """Train to the end; seconds that the phase has taken over all its invocations."""
        self._restore()
        if self.position.finished:
            return self.position.seconds
        self.events.start(self.position.epoch * self.phase.steps_per_epoch + self.position.step)
        reset_peak_memory(self.phase.device)
        self._clock = self._saved_at = self._looked_at = time.monotonic()
        with self.session.progress.phase(self.phase.name, self.phase.epochs, self.phase.steps_per_epoch):
            while not self.position.finished:
                self._run_epoch(self.position.epoch)
        self.events.close()
        return self.position.seconds

    def _restore(self) -> None:
        run, name = self.session.run, self.phase.name
        if self.checkpoint.exists():
            state = load_checkpoint(self.checkpoint)
            check_identity(state["identity"], self.session.identity, self.checkpoint)
            self.phase.load_state_dict(state["phase"])
            # Earlier versions did not keep when an epoch began, and counted it from the resumption on.
            self.position = Position(**{"epoch_began": state["position"]["seconds"], **state["position"]})
            _set_rng_state(state["rng"], self.phase.device)
            run.rewind(name, self.position.epoch)
        else:
            run.rewind(name, 0)
            self._save()

    def _run_epoch(self, epoch: int) -> None:
        started, first_step = time.monotonic(), self.position.step
        names = self.phase.metric_names(epoch)
        self.position.sums = self.position.sums or [0.0] * len(names)
        for metrics in self.phase.steps(epoch, first_step):
            self._pending.append(_OnTheWay(metrics))
            self.position.step += 1
            self._after_step(names)
            if self.phase.time_is_over(self._elapsed()):
                break
        self._look_at_metrics(names)
        steps = self.position.step - first_step
        rate = steps / max(time.monotonic() - started, 1e-9)

        record = self._record(epoch, names)
        elapsed = self._elapsed()
        timing = {
            "seconds": elapsed - self.position.epoch_began,
            "steps_per_second": rate,
            "peak_memory_bytes": peak_memory_bytes(self.phase.device),
        }
        self.session.run.append(self.session.run.metrics, record)
        self.session.run.append(self.session.run.timing, {"phase": self.phase.name, "epoch": epoch, **timing})
        self.events.epoch(record, timing, self.phase.figures(record))
        self.session.progress.end_epoch(record, timing)
        reason = self.phase.reason_to_stop(record, elapsed)
        if reason:
            self.session.progress.say(f"{self.phase.name} stops after epoch {epoch + 1}: {reason}")
        is_last = bool(reason) or epoch + 1 == self.phase.epochs
        self.position = Position(
            epoch + 1, seconds=self.position.seconds, epoch_began=elapsed, finished=is_last
        )
        self._save()

    def _elapsed(self) -> float:
        """Seconds that the phase has taken over all its invocations."""
        return self.position.seconds + time.monotonic() - self._clock

    def _after_step(self, names: Sequence[str]) -> None:
        now = time.monotonic()
        stopping = self.session.stop.signal_number is not None
        due = now - self._saved_at > self.session.checkpoint_seconds
        if stopping or due:
            self._look_at_metrics(names)
            self._save()
        elif len(self._pending) >= LOOK_STEPS + self._lag or now - self._looked_at > LOOK_SECONDS:
            self._look_at_metrics(names, leave=self._lag)
        if stopping:
            self._stop()

    def _record(self, epoch: int, names: Sequence[str]) -> dict[str, Any]:
        steps = self.position.step
        means = {name: total / steps for name, total in zip(names, self.position.sums, strict=True)}
        taken = epoch * self.phase.steps_per_epoch + steps
        record = {"phase": self.phase.name, "epoch": epoch, "step": taken, **means}
        record |= self.phase.end_epoch(epoch)
        self._check_finite({k: v for k, v in record.items() if isinstance(v, float)}, steps - 1)
        return record

    def _look_at_metrics(self, names: Sequence[str], *, leave: int = 0) -> None:
        """Read the metrics of all steps but the newest, refuse non-finite ones, add the rest up in order."""
        self._looked_at = time.monotonic()
        count = len(self._pending) - leave
        if count <= 0:
            return
        first = self.position.step - len(self._pending)
        looked, self._pending = self._pending[:count], self._pending[count:]
        for step, metrics in enumerate(looked, first):
            row = metrics.read()
            values = dict(zip(names, row, strict=True))
            self._check_finite(values, step)
            self.position.sums = [total + value for total, value in zip(self.position.sums, row, strict=True)]
            self.events.step(values, self.position.epoch * self.phase.steps_per_epoch + step)
        self.session.progress.step(self.position.epoch, first + count, values)

    def _check_finite(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} became {value} in phase {self.phase.name}, epoch {self.position.epoch}, "
                    f"step {step}; the last good state is in {self.checkpoint}. Lower --learning-rate and "
                    "start anew, or look for bad values in the data"
                )

    def _save(self) -> None:
        now = time.monotonic()
        self.position.seconds += now - self._clock
        norm = torch.nn.utils.get_total_norm(self.phase.parameters())
        self._check_finite({"norm of the parameters": float(norm)}, self.position.step)
        save_checkpoint(
            self.checkpoint,
            {
                "identity": self.session.identity,
                "phase": self.phase.state_dict(),
                "position": vars(self.position),
                "rng": _rng_state(self.phase.device),
            },
        )
        self._clock = self._saved_at = now

    def _stop(self) -> None:
        number = self.session.stop.signal_number
        assert number is not None
        raise Interrupted(
            f"stopped in phase {self.phase.name}, epoch {self.position.epoch}, step {self.position.step}; "
            f"everything is saved. Continue with: {self.session.how_to_resume}",
            number,
        )


class _OnTheWay:
    """Metrics of a step, [M], on their way to the host: reading them waits for no later step."""

    def __init__(self, metrics: Tensor) -> None:
        self._values = metrics.to("cpu", non_blocking=metrics.is_cuda)
        self._arrived = torch.cuda.current_stream().record_event() if metrics.is_cuda else None

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


def check_identity(saved: dict[str, Any], current: dict[str, Any], path: Any) -> None:
    """Refuse a checkpoint that was made with other settings or other data."""
    different = [k for k in {**saved, **current} if saved.get(k) != current.get(k)]
    if different:
        changes = ", ".join(f"{k} was {saved.get(k)!r} and is {current.get(k)!r}" for k in different)
        raise UserError(f"{path} does not belong to this run: {changes}. Start anew with another --out")


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
