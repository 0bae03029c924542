import contextlib
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from neuroexapt.cli.app import app, run_command
from neuroexapt.core.genotypes import RECOMMENDERS
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.spaces.seqrec import SEQREC


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"num_items": 30, "max_length": 6, "has_times": False, "channels": 8, "layers": 1}
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    SequenceRecommender(SEQREC.network(RECOMMENDERS["SASRec"], **sizes), torch.arange(31)).save(path)
    return path


@pytest.fixture
def server(model):
    """A server of ``model`` and its address."""
    command = [sys.executable, "-m", "neuroexapt", "serve-recommender", str(model), "--port=0"]
    options = ["--device=cpu", "--strategies=eager, captured", "--max-batch=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *options], **pipes, text=True) as process:
        try:
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.kill()


def test_the_server_answers_until_it_is_told_to_stop(server):
    process, address = server

    def recommend(body: dict) -> dict:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{address}/recommend", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    answer = recommend({"history": [1, 2], "num_recommendations": 3})
    assert [entry["rank"] for entry in answer["recommendations"]] == [1, 2, 3]
    with pytest.raises(urllib.error.HTTPError, match="422"):
        recommend({})
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert "without strategy captured: " in process.stderr.read()


def test_what_keeps_it_from_starting_is_one_line(model, tmp_path, capsys):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        for arguments, reason in (
            ([model, f"--port={port}"], f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            ([model, "--strategies=quick"], "unknown strategy 'quick'"),
            ([tmp_path / "none.safetensors"], "no checkpoint at"),
        ):
            assert run_command(app, ["serve-recommender", "--device=cpu", *map(str, arguments)]) == 2
            assert reason in capsys.readouterr().err
