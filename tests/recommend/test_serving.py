import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from neuroexapt.recommend import IntegratedController, create_integrated_controller
from neuroexapt.recommend.serving.app import create_app
from neuroexapt.recommend.serving.body_limit import BodyLimit
from neuroexapt.recommend.serving.schemas import Limits
from tests.recommend.tiny import TinyRecommender

LIMITS = Limits(history=20, recommendations=25, requests=3, body_bytes=2000, queue=2)


def make_controller() -> IntegratedController:
    serving = {"strategies": ["eager"], "max_batch_size": 4}
    return create_integrated_controller({"model": TinyRecommender(), "device": "cpu", "serving": serving})


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(make_controller(), LIMITS)) as client:
        yield client


def test_recommend_answers_as_the_controller_does(client):
    body = {"user_id": "ada", "session_id": 7, "history": [1, 2, 3], "num_recommendations": 5}
    answer = client.post("/recommend", json={**body, "exclude_seen": True})
    assert answer.status_code == 200
    expected = make_controller().infer_with_optimal_strategy("ada", [1, 2, 3], 5, 7, exclude_seen=True)
    assert {**answer.json(), "inference_time_ms": 0} == {**expected, "inference_time_ms": 0}


def test_recommend_batch_answers_each(client):
    bodies = [{"user_id": i, "history": [i], "timestamps": [i]} for i in (1, 2, 3)]
    answer = client.post("/recommend_batch", json={"requests": bodies})
    assert answer.status_code == 422  # the queue holds two
    assert "at most 2 items" in answer.json()["error"]
    answer = client.post("/recommend_batch", json={"requests": bodies[:2]})
    assert answer.status_code == 200
    alone = [client.post("/recommend", json=body).json() for body in bodies[:2]]
    found = answer.json()["answers"]
    assert [entry["user_id"] for entry in found] == [1, 2]
    for ours, theirs in zip(found, alone, strict=True):
        assert [r["item_id"] for r in ours["recommendations"]] == [
            r["item_id"] for r in theirs["recommendations"]
        ]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 422, "body: Field required"),
        (b"{", 422, "body.1: JSON decode error: Expecting property name"),
        (b"[]", 422, "body: Input should be a valid dictionary"),
        (b'{"history": "abc"}', 422, "body.history: Input should be a valid list"),
        (b'{"history": null}', 422, "body.history"),
        (b"{}", 422, "body.history: Field required"),
        (b'{"history": [1.5]}', 422, "body.history.0"),
        (b'{"history": ["1"]}', 422, "body.history.0"),
        (b'{"history": [NaN]}', 422, "body.history.0"),
        (b'{"history": [Infinity]}', 422, "body.history.0"),
        (b'{"history": [1e400]}', 422, "body.history.0"),
        (b'{"history": [' + b"9" * 1000 + b"]}", 422, ""),
        (b'{"history": [31]}', 422, "item ids are integers from 1 to 30, not 31"),
        (b'{"history": [-1]}', 422, "not -1"),
        (b'{"history": [' + b",".join([b"1"] * 21) + b"]}", 422, "at most 20 items"),
        (b'{"history": [1], "timestamps": [1, 2]}', 422, "a history of 1 items has as many timestamps"),
        (b'{"history": [1, 2], "timestamps": [2, 1]}', 422, "timestamps decrease"),
        (b'{"history": [1], "timestamps": [1e300]}', 422, "body.timestamps"),
        (b'{"history": [1], "num_recommendations": 26}', 422, "less than or equal to 25"),
        (b'{"history": [1], "num_recommendations": 0}', 422, "greater than or equal to 1"),
        (b'{"history": [1], "exclude_seen": "yes"}', 422, "body.exclude_seen"),
        (b'{"history": [1], "user_id": {}}', 422, "body.user_id"),
        (b'{"history": [1], "user_id": "\\ud800"}', 422, "body.user_id"),
        (b'{"history": [1], "histroy": []}', 422, "body.histroy: Extra inputs"),
        (b"\xff\xfe\x00", 400, "error parsing the body"),
        (b'{"history": [' + b"1," * 1000 + b"1]}", 413, "the body exceeds 2000 bytes"),
    ],
)
def test_malformed_calls_get_4xx_with_one_reason(client, body, status, reason):
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, [*answer.json()]) == (status, ["error"])
    assert reason in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_body_nested_deeply_is_refused_at_whatever_depth(client):
    body = b'{"history": ' + b"[" * 1900
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]


def test_other_calls_are_refused_too(client):
    assert client.get("/recommend").status_code == 405
    assert client.get("/nothing").json() == {"error": "Not Found"}
    answer = client.post("/recommend", content=b"{", headers={"content-type": "Application/JSON"})
    assert answer.status_code == 422
    answer = client.post("/recommend", content=b"history=1", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert answer.json() == {"error": "send JSON, with the header content-type: application/json"}
    too_many = client.post("/recommend_batch", json={"requests": [{"history": []}] * 4})
    assert (too_many.status_code, too_many.json()["error"].partition(":")[0]) == (422, "body.requests")


def test_a_body_in_chunks_is_limited_as_well(client):
    answer = client.post("/recommend", content=(b"x" * 100 for _ in range(30)))
    assert answer.status_code == 413


def test_a_body_that_never_ends_is_not_waited_for():
    sent = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    limit = BodyLimit(pytest.fail, largest=10, seconds=0.01)
    asyncio.run(limit({"type": "http"}, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"]) == {"error": "the body did not arrive within 0.01 s"}


def test_health_tells_what_is_served(client):
    answer = client.get("/health").json()
    assert answer == {"status": "ok", "num_items": 30, "max_length": 6, "waiting_requests": 0}


def test_metrics_count_calls_without_a_line_for_every_path_tried():
    with TestClient(create_app(make_controller(), LIMITS)) as client:
        client.post("/recommend", json={"history": [1]})
        client.post("/recommend", json={"history": [99]})
        for path in ("/a", "/b"):
            client.get(path)
        text = client.get("/metrics").text
    assert 'recommender_calls_total{path="/recommend",status="200"} 1.0' in text
    assert 'recommender_calls_total{path="/recommend",status="422"} 1.0' in text
    assert 'recommender_calls_total{path="other",status="404"} 2.0' in text
    assert 'recommender_inferences_total{strategy="eager"} 1.0' in text
    assert 'recommender_call_seconds_count{path="/recommend"} 2.0' in text


class HeldController:
    """Answers once it is let go."""

    largest_batch = 4

    def __init__(self) -> None:
        self.inner, self.go, self.sizes = make_controller(), threading.Event(), []
        self.model, self.make_request, self.warm_up = self.inner.model, self.inner.make_request, int

    def infer_batch(self, requests):
        self.go.wait(10)
        self.sizes.append(len(requests))
        return self.inner.infer_batch(requests)


def test_requests_that_wait_are_answered_together_and_too_many_are_refused():
    controller = HeldController()
    with TestClient(create_app(controller, LIMITS)) as client, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client.post, "/recommend", json={"history": [1]})]
        _wait_for(lambda: client.get("/health").json()["waiting_requests"] == 0)
        time.sleep(0.2)  # the first is being computed
        calls += [pool.submit(client.post, "/recommend", json={"history": [2]}) for _ in range(2)]
        _wait_for(lambda: client.get("/health").json()["waiting_requests"] == 2)
        refused = client.post("/recommend", json={"history": [3]})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json() == {"error": "too many requests are waiting; try again in a second"}
        controller.go.set()
        assert [call.result().status_code for call in calls] == [200, 200, 200]
    assert controller.sizes == [1, 2]


def test_a_failing_batch_fails_its_own_requests_only(client, monkeypatch):
    controller = make_controller()
    with TestClient(create_app(controller, LIMITS), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patched:
            patched.setattr(IntegratedController, "infer_batch", _broken)
            answer = client.post("/recommend", json={"history": [1]})
            assert answer.status_code == 500
            assert answer.json() == {"error": "the server failed; its log says how"}
        assert client.post("/recommend", json={"history": [1]}).status_code == 200
        assert 'recommender_calls_total{path="/recommend",status="500"} 1.0' in client.get("/metrics").text


def test_a_batch_of_which_one_is_refused_is_not_computed():
    controller = make_controller()
    with TestClient(create_app(controller, LIMITS)) as client:
        answer = client.post("/recommend_batch", json={"requests": [{"history": [1]}, {"history": [31]}]})
        assert (answer.status_code, answer.json()["error"][:8]) == (422, "item ids")
    assert controller.get_comprehensive_stats()["requests"] == 0


def test_a_batch_that_the_queue_has_no_room_for_is_refused_as_a_whole():
    controller = HeldController()
    with TestClient(create_app(controller, LIMITS)) as client, ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.post, "/recommend", json={"history": [1]})]
        time.sleep(0.2)  # it is being computed
        calls += [pool.submit(client.post, "/recommend", json={"history": [2]})]
        _wait_for(lambda: client.get("/health").json()["waiting_requests"] == 1)
        refused = client.post("/recommend_batch", json={"requests": [{"history": [3]}] * 2})
        assert refused.status_code == 429
        controller.go.set()
        assert [call.result().status_code for call in calls] == [200, 200]
    assert controller.sizes == [1, 1]


def _broken(*_):
    raise RuntimeError("out of order")


def _wait_for(condition, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_answers_fit_the_published_schema(client):
    from neuroexapt.recommend.serving.schemas import Answer

    answer = client.post("/recommend", json={"history": [1]})
    assert Answer.model_validate_json(answer.content).model_dump() == json.loads(answer.content)


def test_the_schema_names_the_form_of_refusals(client):
    schema = client.get("/openapi.json").json()
    for path in ("/recommend", "/recommend_batch"):
        responses = schema["paths"][path]["post"]["responses"]
        assert [*responses] == ["200", "400", "408", "413", "415", "422", "429", "500"]
        for status in [*responses][1:]:
            reference = responses[status]["content"]["application/json"]["schema"]["$ref"]
            assert reference.endswith("/Refusal")
