import pytest

from tests.report.made_up_run import MadeUpRun


@pytest.fixture
def new_run(tmp_path) -> MadeUpRun:
    return MadeUpRun(tmp_path / "my-run")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> MadeUpRun:
    """For tests that only read it."""
    run = MadeUpRun(tmp_path_factory.mktemp("runs") / "finished")
    run.search(3)
    run.train("inherit", [0.95, 0.98])
    run.train("scratch", [0.7, 0.91])
    run.finish()
    return run
