"""In which order a branch hands its launches to which stream."""

import pytest
import torch

from neuroexapt.cuda_ops import branch as branches
from neuroexapt.cuda_ops.branch import Branch, kept, launch


class Stream:
    """Notes what it is given."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.cuda_stream = name  # what launchers take

    def record_event(self) -> str:
        self.log.append(f"{self.name}: fork")
        return "fork"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name}: wait for {event}")

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name}: wait for {other.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    log: list[str] = []
    main, side = Stream("main", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(branches, "_second_stream", lambda device: side)
    return log


def test_runs_beside_what_follows_its_block(log):
    def run(name: str, stream: str) -> None:
        log.append(f"{stream}: {name}")

    branch = Branch()
    launch(run, "before")
    with branch:
        launch(run, "first")
        launch(run, "second")
    launch(run, "beside")
    branch.start()
    branch.start()
    launch(run, "beside, too")
    branch.join()
    launch(run, "after")
    branch.join()
    assert log == [
        *("main: before", "main: fork", "main: beside"),
        *("side: wait for fork", "side: first", "side: second"),
        *("main: beside, too", "main: wait for side", "main: after"),
    ]


def test_keeps_memory_until_the_join(log):
    branch, x = Branch(), torch.zeros(1)
    with branch:
        assert kept(x) is x
        launch(lambda stream: None)
    assert any(tensor is x for tensor in branch._kept)
    branch.join()
    assert not branch._kept
    kept(x)
    assert not branch._kept


def test_waits_for_the_end_of_the_last_block(log):
    branch = Branch()
    for _ in range(2):
        with branch:
            launch(lambda stream: log.append(f"{stream}: work"))
    branch.join()
    assert log == [
        *("main: fork", "main: fork"),
        *("side: wait for fork", "side: work", "side: work", "main: wait for side"),
    ]
