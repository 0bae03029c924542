from pathlib import Path

from neuroexapt.engine.run import how_to_resume


def test_what_goes_on_with_a_run_can_be_typed_as_it_is() -> None:
    run = Path("my runs/first")
    assert how_to_resume("search", run, "darts") == "neuroexapt search --resume 'my runs/first'"
    assert how_to_resume("evaluate", run, "mine").startswith("neuroexapt.evaluate(resume='my runs/first')")
