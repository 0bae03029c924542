from typing import Any

import pytest

import neuroexapt
from tests.engine.tiny import tiny_settings


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished search, to be read only."""
    return neuroexapt.search(**tiny_settings(tmp_path_factory.mktemp("finished")))
