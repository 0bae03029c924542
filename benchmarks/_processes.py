"""Runs of ``neuroexapt`` side by side, each in a process of its own, shared out over the GPUs."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STOP_SECONDS = 20
"""How long a run may take to write its checkpoint when it is told to stop."""


@dataclass(frozen=True)
class Run:
    """``neuroexapt VERB`` in a folder of its own; one that broke off there goes on."""

    verb: str
    folder: Path
    options: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def seconds(self) -> float:
        """What its processes took so far, from start to end; NaN where somebody else started one."""
        return sum(record.get("seconds", math.nan) for record in self._processes)

    @property
    def commits(self) -> list[str]:
        """Of the code that its processes ran, in order."""
        return list(dict.fromkeys(record["commit"] for record in self._processes))

    @property
    def per_device(self) -> int:
        """The most runs, itself included, that shared the device of one of its processes."""
        if not self._processes:
            raise SystemExit(f"say in {self._processes_file} what ran in {self.folder}; --help tells how")
        return max(record["per_device"] for record in self._processes)

    @property
    def _processes(self) -> list[dict[str, Any]]:
        """Of each its commit and ``per_device``, and, where it was started here, seconds and options."""
        return read_records(self._processes_file)

    @property
    def _processes_file(self) -> Path:
        return self.folder.with_suffix(".processes.jsonl")

    def check(self) -> None:
        """End the script if the folder holds a run that was begun with other options."""
        for record in self._processes[:1] if self.was_begun or self.is_done else ():
            options = tuple(record.get("options", self.options))
            if options != self.options:
                raise SystemExit(
                    f"{self.folder} holds a run with other options, {' '.join(options)}: "
                    "give these, or another folder of --runs"
                )

    @property
    def was_begun(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.safetensors"))

    def command(self) -> Iterator[str]:
        yield from (sys.executable, "-m", "neuroexapt", self.verb)
        if self.was_begun:
            yield f"--resume={self.folder}"
        else:
            yield from (f"--out={self.folder}", "--overwrite", *self.options)

    def carry_out(self, gpu: str | None, deadline: float, **facts: Any) -> None:
        """To its end, or so far as the deadline lets it; ``gpu`` is one of ``visible_gpus``, ``facts`` are
        kept of the process."""
        mode = "a" if self.was_begun else "w"  # what ended before its first checkpoint counts for nothing
        environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        start, command = time.monotonic(), list(self.command())
        with open(self.folder.with_suffix(".log"), "a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                code = process.wait(max(0.0, deadline - start))
            except subprocess.TimeoutExpired:
                _stop(process)
                code = 0
        record = {"seconds": time.monotonic() - start, "options": self.options, **facts}
        with open(self._processes_file, mode) as processes:
            processes.write(json.dumps(record) + "\n")
        if code:
            raise SystemExit(f"{' '.join(command)} failed:\n{self.folder.with_suffix('.log').read_text()}")


def visible_gpus() -> list[str]:
    """What a process has to see, as CUDA_VISIBLE_DEVICES, to have each of the GPUs that this one sees."""
    count, chosen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (chosen.split(",") if chosen else [str(number) for number in range(count)])[:count]


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def carry_out_all(
    runs: Sequence[Run], jobs: int, deadline: float, describe: Callable[[Run], str], commit: str
) -> bool:
    """Whether all runs came to their end; those that had not yet go on, ``jobs`` at a time.

    One that fails is printed, and none is started after it. ``commit``: of the code that runs now.
    """
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        run.check()
        if not run.is_done:
            waiting.put(run)
    failures: list[SystemExit] = []
    gpus = visible_gpus()
    per_device = math.ceil(min(jobs, waiting.qsize()) / max(1, len(gpus)))

    def work(worker: int) -> None:
        gpu = gpus[worker % len(gpus)] if gpus else None
        while not failures and time.monotonic() < deadline:
            try:
                run = waiting.get_nowait()
                run.carry_out(gpu, deadline, commit=commit, per_device=per_device)
            except queue.Empty:
                return
            except SystemExit as failure:
                failures.append(failure)
                return
            print(f"{run.folder.name}: {describe(run)}, {run.seconds:.0f} s", flush=True)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        print(failures[0], file=sys.stderr)
    return all(run.is_done for run in runs)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
