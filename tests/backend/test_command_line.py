import json

import pytest
import torch
from typer.testing import CliRunner

from neuroexapt.backend import registry
from neuroexapt.backend.config import load_config
from neuroexapt.cli.backend import backend_app
from neuroexapt.errors import BackendUnavailableError, UserError
from neuroexapt.kernels import reference


def run(*arguments: str):
    return CliRunner().invoke(backend_app, arguments)


def test_info_lists_every_backend():
    shown = json.loads(run("info", "--json").stdout)
    assert [row["backend"] for row in shown["backends"]] == [b.value for b in registry.list_backends()]
    text = run("info").stdout
    assert all(row["backend"] in text and row["reason"] in text for row in shown["backends"])
    assert f"* {shown['chosen']} " in text


def test_set_saves_the_choice():
    assert json.loads(run("set", "cpu", "--json").stdout)["backend"] == "cpu"
    assert load_config() == {"backend": "cpu"}
    assert "cpu is saved in" in run("set", "cpu").stdout


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("tpu", UserError),
        pytest.param(
            "cuda:ext",
            BackendUnavailableError,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_set_refuses_what_cannot_run(name, error):
    assert isinstance(run("set", name).exception, error)
    assert load_config() == {}


def test_test_succeeds_where_every_op_is_right():
    checks = json.loads(run("test", "cpu", "--json").stdout)
    assert all(check["ok"] for check in checks)
    result = run("test", "cpu")
    assert result.exit_code == 0
    assert result.stdout.count("ok ") == len(checks)


def test_test_exits_with_1_where_an_op_is_wrong(monkeypatch):
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", dict(registry.IMPLEMENTATIONS))
    doubled = registry.Implementation(
        lambda x: 2 * reference.global_avg_pool(x), lambda x: registry.Support(True)
    )
    registry.IMPLEMENTATIONS["global_avg_pool", "torch"] = doubled
    result = run("test", "cpu")
    assert result.exit_code == 1
    assert "FAILED global_avg_pool" in result.stdout


def test_benchmark_shows_a_time_for_each_backend():
    (row, *_) = json.loads(run("benchmark", "--duration", "0.1", "--workload", "avg_pool", "--json").stdout)
    assert (row["backend"], row["status"]) == ("cpu", "ok")
    assert " ms (" in run("benchmark", "--duration", "0.1", "--workload", "avg_pool").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="measuring takes a minute on a GPU")
def test_optimize_saves_only_when_told_to():
    assert "nothing to measure" in run("optimize").stdout
    assert load_config() == {}
    assert json.loads(run("optimize", "--apply", "--json").stdout)["crossovers"] == []
    assert "tuning" in load_config()
