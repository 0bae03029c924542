"""The load that the server is measured under."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from neuroexapt.recommend import create_integrated_controller
from neuroexapt.recommend.serving.app import create_app
from tests.recommend.tiny import TinyRecommender

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serve_recommender as load


@pytest.fixture(scope="module")
def client():
    serving = {"strategies": ["eager"], "max_batch_size": 1}
    config = {"model": TinyRecommender(), "device": "cpu", "serving": serving}
    with TestClient(create_app(create_integrated_controller(config))) as client:
        yield client


def test_one_request_in_ten_is_malformed_and_all_are_the_same_every_time(client):
    requests = list(itertools.islice(load.bodies(30, 6), 150))
    assert requests == list(itertools.islice(load.bodies(30, 6), 150))
    assert [malformed for _, malformed in requests] == [number % 10 == 0 for number in range(1, 151)]
    assert {body for body, malformed in requests if malformed} == {*load.MALFORMED}
    for body, malformed in requests[:20]:
        answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
        assert load._problem(answer.status_code, answer.content, malformed) is None


@pytest.mark.parametrize("body", load.MALFORMED)
def test_what_is_malformed_is_refused(client, body):
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert load._problem(answer.status_code, answer.content, malformed=True) is None
    assert load._problem(answer.status_code, answer.content, malformed=False) is not None


def test_wrong_answers_are_seen():
    right = {"recommendations": [{"rank": rank} for rank in range(1, 11)]}
    short = {"recommendations": [{"rank": 1}]}
    assert load._problem(200, json.dumps(right).encode(), malformed=False) is None
    assert load._problem(200, json.dumps(short).encode(), malformed=False) == "ranks [1]"
    assert load._problem(200, json.dumps(right).encode(), malformed=True) == "malformed, but 200"
    assert load._problem(500, b'{"error": "?"}', malformed=True) == "malformed, but 500"
    assert load._problem(422, b"{}", malformed=True) == "malformed, but 422"


def test_the_aim_is_missed_by_a_wrong_answer_or_by_a_hundredth_that_is_late():
    outcome = load.Outcome(rate=100, seconds=1, latencies_ms=[1.0] * 197 + [19.0] * 3, resident_mib=[1.0])
    assert outcome.kept_the_aim
    assert outcome.figures()["p99"] == pytest.approx(19.0)
    outcome.latencies_ms[-3:] = [21.0] * 3
    assert not outcome.kept_the_aim
    outcome.latencies_ms[:] = [1.0] * 100
    outcome.wrong["500"] += 1
    assert not outcome.kept_the_aim
