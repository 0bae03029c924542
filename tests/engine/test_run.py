from pathlib import Path

import pytest

from neuroexapt.engine.run import RunFolder, how_to_resume
from neuroexapt.errors import UserError


def test_what_goes_on_with_a_run_can_be_typed_as_it_is() -> None:
    run = Path("my runs/first")
    assert how_to_resume("search", run, "darts") == "neuroexapt search --resume 'my runs/first'"
    assert how_to_resume("evaluate", run, "mine").startswith("neuroexapt.evaluate(resume='my runs/first')")


@pytest.mark.parametrize("config", ["[]", '{"model_type": "bert"}'])
def test_a_folder_with_the_config_of_something_else_holds_no_run(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"holds no run: there is no config\.json of one in it"):
        RunFolder.open(tmp_path)
