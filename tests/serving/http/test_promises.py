"""The promises of docs/serving.md that HTTP keeps, on the toy engine; each test names its promise."""

import base64
import io
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

GENERATIONS = "/v1/images/generations"


def until(condition: Any, seconds: float = 10) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it did not happen"
        time.sleep(0.005)


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def test_r1_every_request_gets_one_answer_whatever_the_engine_does(serve: Any, toy: Any) -> None:
    server = serve(toy.ToyEngine(max_waiting=4, step_seconds=0.002))
    stop = threading.Event()

    def break_it() -> None:
        for reason in ("engine_error", "not_finite") * 20:
            if stop.wait(0.02):
                return
            server.engine.fault = reason

    with ThreadPoolExecutor(13) as pool, server.client(limits=httpx.Limits(max_connections=20)) as client:
        pool.submit(break_it)
        bodies = [{"n": 1 + i % 3, "seed": i, "num_inference_steps": 5 + i % 20} for i in range(100)]
        answers = list(pool.map(lambda body: client.post(GENERATIONS, json=body), bodies))
        stop.set()
    assert {answer.status_code for answer in answers} <= {200, 500, 503}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 100
    admitted = [answer for answer in answers if answer.status_code != 503]
    assert metric(server.url, "qdm_requests_total") == len(admitted)
    assert metric(server.url, "qdm_admission_rejections_total") == 100 - len(admitted)
    for body, answer in zip(bodies, answers, strict=True):
        if answer.status_code == 200:
            assert [image["seed"] for image in answer.json()["data"]] == [body["seed"] + i for i in range(body["n"])]
    assert server.engine.state.running == ()


def test_r2_an_error_of_one_request_leaves_the_next_as_it_was(serve: Any) -> None:
    server = serve()
    wish = {"seed": 5, "num_inference_steps": 10}
    before = server.generate(wish).json()["data"]
    for reason, status, retry in (
        ("not_finite", 500, "false"),
        ("engine_error", 500, "true"),
        ("shutdown", 503, "true"),
    ):
        server.engine.fault = reason
        answer = server.generate({"seed": 6, "num_inference_steps": 10})
        assert answer.status_code == status
        assert answer.headers["x-should-retry"] == retry
        assert server.generate(wish).json()["data"] == before


def test_r2_an_error_inside_a_stream_is_its_last_event(serve: Any, toy: Any) -> None:
    server = serve(toy.ToyEngine(step_seconds=0.01))
    wish = {"num_inference_steps": 50, "stream": True, "partial_images": 16}
    with server.client() as client, client.stream("POST", GENERATIONS, json=wish) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: image_generation.partial_image"
        server.engine.fault = "engine_error"
        rest = [line for line in lines if line]
    assert rest[-2] == "event: error"
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_error"


@pytest.mark.parametrize("status", [503, 429])
def test_r4_a_full_queue_refuses_and_says_when_to_come_back(serve: Any, toy: Any, status: int) -> None:
    server = serve(toy.ToyEngine(max_rows=2, max_waiting=3, step_seconds=0.02), queue_full_status=status)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda i: server.generate({"seed": i, "num_inference_steps": 20}), range(20)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 20 - 2 - 3 - 2 <= len(refused) <= 15
    for answer in refused:
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.headers["retry-after"] == "2"
        assert answer.headers["x-should-retry"] == "true"


def test_r5_a_burst_is_refused_before_any_work(serve: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy.ToyEngine(max_rows=1, max_waiting=0, step_seconds=0.05)
    server = serve(engine)
    engine.phase = "draining"  # nothing is admitted, so that all of what is done is done for refused requests
    monkeypatch.setattr(toy, "initial_noise", lambda *_: pytest.fail("work for a refused request"))
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda _: client.post(GENERATIONS, json={"n": 1}).status_code, range(300)))
    assert codes == [503] * 300
    assert engine.steps_run == 0
    assert metric(server.url, "qdm_admission_rejections_total") == 300
    assert metric(server.url, "qdm_decode_duration_seconds_count") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_r6_a_client_that_leaves_frees_its_rows_within_a_step(serve: Any, toy: Any, stream: bool) -> None:
    server = serve(toy.ToyEngine(max_rows=1, step_seconds=0.05))
    body = json.dumps({"num_inference_steps": 100, "stream": stream, "seed": 1}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: server.engine.steps_run >= 2)
    connection.close()
    at_close = server.engine.steps_run
    until(lambda: server.engine.state.running == ())
    assert server.engine.steps_run <= at_close + 2  # the one under way, and one while the socket's end travels
    assert server.generate({"num_inference_steps": 1}).status_code == 200
    assert metric(server.url, "qdm_requests_total") == 2
    assert 'qdm_requests_total{outcome="cancelled"} 1.0' in httpx.get(f"{server.url}/metrics").text


def test_r7_sigterm_finishes_what_was_admitted_and_refuses_the_rest(toy_process: Any) -> None:
    server = toy_process(step_seconds=0.05, max_rows=8)
    server.wait_until_ready()
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.url, timeout=20) as client:
        wish = {"num_inference_steps": 30}
        running = [pool.submit(client.post, GENERATIONS, json={**wish, "seed": i}) for i in range(8)]
        until(lambda: client.get("/v1/engine").json()["running_rows"] == 8)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/live").status_code == 200
        late = client.post(GENERATIONS, json=wish)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        assert "retry-after" in late.headers
        assert metric(server.url, "qdm_draining") == 1
        for future in running:
            (image,) = future.result().json()["data"]
            Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))).verify()
    assert server.process.wait(10) == 0
    assert [event["message"] for event in server.events if "server" in event["logger"]] == [
        "listening", "ready", "signal", "draining", "ended",
    ]  # fmt: skip


def test_r7_a_stream_that_has_begun_is_finished_too(toy_process: Any) -> None:
    server = toy_process(step_seconds=0.02)
    server.wait_until_ready()
    wish = {"num_inference_steps": 50, "stream": True, "partial_images": 10}
    with httpx.stream("POST", server.url + GENERATIONS, json=wish, timeout=20) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: image_generation.partial_image"
        server.process.send_signal(signal.SIGTERM)
        names = [line for line in lines if line.startswith("event: ")]
    assert names == ["event: image_generation.partial_image"] * 9 + ["event: image_generation.completed"]
    assert server.process.wait(10) == 0


def test_r7_a_drain_ends_in_time_and_fails_what_is_left(toy_process: Any) -> None:
    server = toy_process(step_seconds=0.1, drain_timeout=0.5)
    server.wait_until_ready()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, server.url + GENERATIONS, json={"num_inference_steps": 100}, timeout=20)
        until(lambda: httpx.get(f"{server.url}/v1/engine").json()["running_rows"] == 1)
        server.process.send_signal(signal.SIGTERM)
        answer = running.result()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert server.process.wait(10) == 0


def test_r7_a_second_signal_ends_at_once(toy_process: Any) -> None:
    server = toy_process(step_seconds=0.1)
    server.wait_until_ready()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, server.url + GENERATIONS, json={"num_inference_steps": 100}, timeout=20)
        until(lambda: httpx.get(f"{server.url}/v1/engine").json()["running_rows"] == 1)
        server.process.send_signal(signal.SIGINT)
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        begun = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM
        assert time.perf_counter() - begun < 2
        with pytest.raises(httpx.TransportError):
            running.result()


def test_r7_sigterm_while_the_engine_loads(toy_process: Any) -> None:
    server = toy_process(load_seconds=60)
    answer = httpx.get(f"{server.url}/health/ready")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "loading"
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    assert httpx.post(server.url + GENERATIONS, json={}).json()["error"]["code"] == "loading"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0


def test_r8_a_dead_engine_is_neither_live_nor_ready(serve: Any) -> None:
    server = serve()
    for phase, live, ready in (("restarting", 200, 503), ("dead", 503, 503), ("ready", 200, 200)):
        server.engine.phase = phase
        for route, status in (("live", live), ("ready", ready)):
            for path in (f"/health/{route}", f"/v2/health/{route}"):
                probed = httpx.get(server.url + path)
                assert probed.status_code == status, (phase, path)
                assert ("retry-after" in probed.headers) == (status == 503)
        if phase == "dead":
            answer = server.generate()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_dead"


def test_r14_a_request_that_takes_too_long_gets_504_and_its_rows_are_free(serve: Any, toy: Any) -> None:
    server = serve(toy.ToyEngine(max_rows=1, step_seconds=0.05), request_timeout=0.4)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda i: server.generate({"seed": i, "num_inference_steps": 100}), range(2)))
    for answer in answers:  # one was running, the other had waited all the time
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
        assert answer.elapsed.total_seconds() < 3
    assert server.generate({"num_inference_steps": 1}).status_code == 200
