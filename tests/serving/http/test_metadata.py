"""What is served, how it is doing, its page, and what is logged."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from qdm_deploy.serving.contract import Engine

METRICS = [
    "qdm_requests_total",
    "qdm_admission_rejections_total",
    "qdm_requests_running",
    "qdm_requests_waiting",
    "qdm_request_duration_seconds_count",
    "qdm_queue_duration_seconds_count",
    "qdm_step_duration_seconds_count",
    "qdm_batch_rows_bucket",
    "qdm_batch_rows_sum",
    "qdm_batch_padding_rows_total",
    "qdm_steps_total",
    "qdm_images_total",
    "qdm_decode_duration_seconds_count",
    "qdm_engine_restarts_total",
    "qdm_build_info",
    "qdm_draining",
    "process_resident_memory_bytes",
]


def test_the_toy_keeps_the_contract(toy: Any) -> None:
    engine: Engine = toy.ToyEngine()
    assert engine.model.name == "toy"


def test_models(served: Any) -> None:
    with served.client() as client:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        (model,) = listed["data"]
        assert model["id"] == "toy"
        assert model["labels"] == ["shirt", "bag", "boot"]
        assert (model["size"], model["max_steps"], model["bundle_id"]) == ("10x8", 100, "ab12")
        assert client.get("/v1/models/toy").json() == model


def test_open_inference_protocol(served: Any) -> None:
    with served.client() as client:
        assert client.get("/v2").json()["name"] == "qdm-deploy"
        assert client.get("/v2/health/live").json() == {"live": True}
        assert client.get("/v2/health/ready").json() == {"ready": True}
        assert client.get("/v2/models/toy/ready").status_code == 200
        model = client.get("/v2/models/toy").json()
        assert (model["name"], model["versions"], model["platform"]) == ("toy", ["ab12"], "onnx_numpy")


def test_metrics_say_how_full_the_batches_were(serve: Any) -> None:
    server = serve()
    assert server.generate({"n": 4, "num_inference_steps": 7}).status_code == 200
    text = httpx.get(f"{server.url}/metrics").text
    values = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    names = {name.partition("{")[0] for name in values}
    assert set(METRICS) <= names
    assert float(values["qdm_steps_total"]) == 7
    assert float(values["qdm_batch_rows_sum"]) == 28
    assert float(values['qdm_batch_rows_bucket{le="4.0"}']) - float(values['qdm_batch_rows_bucket{le="3.0"}']) == 7
    assert float(values["qdm_batch_padding_rows_total"]) == 28
    assert float(values["qdm_images_total"]) == 4
    assert float(values['qdm_requests_total{outcome="finished"}']) == 1


def test_the_engine_shows_its_batch(serve: Any, toy: Any) -> None:
    server = serve(toy.ToyEngine(step_seconds=0.02))
    wish = {"n": 2, "num_inference_steps": 60, "guidance_scale": 3, "stream": True, "partial_images": 5}
    with server.client() as client, client.stream("POST", "/v1/images/generations", json=wish) as answer:
        lines = answer.iter_lines()
        next(lines)
        state = client.get("/v1/engine").json()
    (running,) = state["running"]
    assert (running["rows"], running["steps"]) == (4, 60)
    assert 10 <= running["step"] <= 60
    assert state["running_rows"] == 4
    assert state["recent_steps"][-1]["rows"] == 4
    assert state["total_steps"] >= 10


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(served: Any) -> None:
    with served.client() as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
        assert len(named) == 3
        for path in named:
            file = client.get(path)
            assert file.status_code == 200
            assert "http://" not in file.text.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in file.text
            assert "innerHTML" not in file.text
        # Inline code would be blocked by the policy, and every id that the scripts look up exists.
        assert not re.search(r"<script(?![^>]*src)|\son\w+=|style=", page.text)
        scripts = client.get("/page/app.js").text + client.get("/page/batch.js").text
        looked_up = set(re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', scripts))
        assert looked_up
        assert looked_up <= set(re.findall(r'id="([\w-]+)"', page.text))


@pytest.mark.slow
def test_the_page_runs_in_a_browser_under_its_own_policy(served: Any, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium, so the page's scripts are not tried")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", f"{served.url}/",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    page = done.stdout
    assert re.search(r'<h1 id="model">toy</h1>', page), done.stderr[-2000:]
    assert re.search(r'id="phase"[^>]*>ready<', page)
    assert re.findall(r"<option[^>]*>([^<]+)</option>", page)[:4] == ["in turn, by the seed", "shirt", "bag", "boot"]
    assert page.count('class="empty"') == 8  # one cell for each row of the batch
    assert "CONSOLE" not in done.stderr  # neither an exception nor something that the policy blocked


def test_log_lines_are_json_without_prompts_or_keys(toy_process: Any) -> None:
    key = "a-key-of-some-length"
    server = toy_process(api_key=key)
    headers = {"authorization": f"Bearer {key}"}
    server.wait_until_ready()
    body = {"prompt": "boot", "num_inference_steps": 1, "user": "somebody@example.org"}
    answer = httpx.post(f"{server.url}/v1/images/generations?q=hidden", json=body, headers=headers)
    assert answer.status_code == 200
    server.process.terminate()
    assert server.process.wait(10) == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    (request,) = [line for line in lines if line.get("path") == "/v1/images/generations"]
    assert request["request_id"] == answer.headers["x-request-id"]
    assert (request["status"], request["method"], request["client"]) == (200, "POST", "127.0.0.1")
    for secret in (key, "boot", "somebody", "hidden"):
        assert secret not in server.log


def test_the_openapi_document_names_our_statuses_and_limits(serve: Any) -> None:
    server = serve(max_images=4, max_steps=20)
    document = httpx.get(f"{server.url}/openapi.json").json()
    responses = document["paths"]["/v1/images/generations"]["post"]["responses"]
    assert {"200", "400", "413", "429", "500", "503", "504"} <= set(responses)
    assert "422" not in json.dumps(document)
    fields = document["components"]["schemas"]["GenerationBody"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == 4
    assert fields["num_inference_steps"]["anyOf"][0]["maximum"] == 20
    assert document["components"]["schemas"]["GenerationBody"]["additionalProperties"] is False


@pytest.mark.slow
def test_r12_schemathesis_finds_no_5xx_and_no_violation_of_the_schema(serve: Any) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    server = serve(max_steps=10, max_images=2)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.body:  # elsewhere nothing can be wrong
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=60,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def every_answer_fits(case: Any) -> None:
                nonlocal checked
                response = case.call()
                checked += 1
                assert response.status_code < 500, (case.as_curl_command(), response.text)
                checks = [content_type_conformance, response_schema_conformance, status_code_conformance]
                case.validate_response(response, checks=[*checks, negative_data_rejection])

            every_answer_fits()
    assert checked > 300
