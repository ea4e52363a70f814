"""Every answer that is not a success has OpenAI's shape, names the field, and says what to do."""

import gzip
import json
import socket
import time
from typing import Any

import httpx
import pytest

from qdm_deploy.artifacts.pipeline_spec import Denoiser, PipelineSpec, StatesFile
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.errors import InputError
from qdm_deploy.serving.http.errors import ErrorDocument
from qdm_deploy.serving.http.settings import HttpSettings, check_servable

GENERATIONS = "/v1/images/generations"


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    ErrorDocument.model_validate_json(answer.content)
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "1 to 10"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": "x" * 4001}, "prompt", "4001"),
        ({"prompt": "sofa"}, "prompt", "'sofa' is no label of toy; ask for one of shirt, bag, boot, or 0 to 2"),
        ({"prompt": "3"}, "prompt", "'3' is no label"),
        ({"class_label": -1}, "class_label", "greater"),
        ({"class_label": "", "prompt": ""}, "class_label", "no label"),
        ({"prompt": "bag", "class_label": "boot"}, "class_label", "give one of them"),
        ({"negative_prompt": "blurry"}, "negative_prompt", "takes no text"),
        ({"size": "1024x1024"}, "size", "10x8"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"output_compression": 50}, "output_compression", "lossless"),
        ({"output_format": "webp", "output_compression": 101}, "output_compression", "100"),
        ({"partial_images": 2}, "partial_images", "stream"),
        ({"stream": True, "partial_images": 17}, "partial_images", "16"),
        ({"seed": -1}, "seed", "greater"),
        ({"seed": 2**63}, "seed", "less"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "9223372036854775807"),
        ({"num_inference_steps": 101}, "num_inference_steps", "1 to 100"),
        ({"sampler": "plms"}, "sampler", "ddim"),
        ({"eta": 0.5, "sampler": "euler"}, "eta", "ddim"),
        ({"guidance_scale": 101}, "guidance_scale", "100"),
        ({"n": 9, "guidance_scale": 1.0}, None, "9 rows"),
        ({"scheduler": "ddim"}, "scheduler", "unknown field"),
        ({"__proto__": 1}, "__proto__", "unknown field"),
    ],
)
def test_a_value_that_cannot_be_used(served: Any, body: dict[str, Any], param: str | None, says: str) -> None:
    error = error_of(served.generate(body), 400)
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


def test_another_model(served: Any) -> None:
    error = error_of(served.generate({"model": "dall-e-3"}), 404)
    assert error["code"] == "model_not_found"
    assert "'dall-e-3'" in error["message"]
    with served.client() as client:
        for path in ("/v1/models/x", "/v2/models/x", "/v2/models/x/ready"):
            assert error_of(client.get(path), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b'"text"', b'{"n": NaN}', b'{"eta": Infinity}', b'{"guidance_scale": 1e999}',
        b'{"n": ' + b"9" * 400 + b"}", b'{"n": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 50_000,
        b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "\xff\xfe"}', b"\x00" * 100, b'{"n": 1, "n": "x"}',
    ],
    ids=range(18),
)  # fmt: skip
def test_r12_a_body_that_is_not_what_it_should_be(served: Any, body: bytes) -> None:
    with served.client() as client:
        answer = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
        error_of(answer, 400)
        assert client.get("/health/ready").status_code == 200


def test_r12_other_content_types_and_encodings(served: Any) -> None:
    body = json.dumps({"n": 1}).encode()
    with served.client() as client:
        error_of(client.post(GENERATIONS, content=body, headers={"content-type": "text/plain"}), 400)
        error_of(client.post(GENERATIONS, content=body), 400)
        bomb = gzip.compress(b" " * 50_000_000)
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        begun = time.perf_counter()
        assert error_of(client.post(GENERATIONS, content=bomb, headers=headers), 415)["code"] == "unsupported_encoding"
        assert time.perf_counter() - begun < 2


def test_r12_a_body_that_is_too_large_announced_or_not(serve: Any) -> None:
    server = serve(max_body_bytes=10_000)
    headers = {"content-type": "application/json"}
    with server.client() as client:
        error = error_of(client.post(GENERATIONS, content=b" " * 10_001, headers=headers), 413)
        assert "10000" in error["message"]
        chunks = (b" " * 100 for _ in range(3000))
        assert error_of(client.post(GENERATIONS, content=chunks, headers=headers), 413)["code"] == "request_too_large"
        assert client.post(GENERATIONS, content=b"{}".ljust(10_000), headers=headers).status_code == 200
    # Where nothing reads the body, it still may not grow for ever.
    endless = (
        b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" + b"5\r\nabcde\r\n" * 20
    )
    assert b"connection: close" in server.raw(endless).lower()


def test_r12_slow_headers_and_slow_bodies_are_cut_off(serve: Any) -> None:
    server = serve(body_timeout=0.3)
    for data in (
        b"",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: loc",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{",
    ):
        begun = time.perf_counter()
        received = server.raw(data)
        assert received.startswith(b"HTTP/1.1 408"), received
        assert b'"error"' in received
        assert time.perf_counter() - begun < 3
    # A second request on a connection is watched as the first one.
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /v2 HT")
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        assert b"HTTP/1.1 408" in received


def test_r12_a_reader_that_takes_nothing_is_dropped(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdm_deploy.serving.http.protocol._LimitedProtocol.reader_timeout", 0.3)
    server = serve()
    wanted = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 800
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(wanted)
        end = time.perf_counter() + 15
        while not server.connections:
            assert time.perf_counter() < end
        while server.connections:
            assert time.perf_counter() < end, "a reader that takes nothing keeps its connection"
            time.sleep(0.05)
    # One that takes its time, but something all the time, gets everything.
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(wanted + b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answers = 0
        while chunk := connection.recv(1 << 17):
            answers += chunk.count(b"HTTP/1.1 200")
            time.sleep(0.002)
    assert answers >= 795  # a status line may be torn by the border between two chunks


@pytest.mark.parametrize(
    "data",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["line", "no-host", "long-header", "length", "chunk", "tls"],
)
def test_r12_what_is_not_http_is_answered_in_the_same_shape(serve: Any, data: bytes) -> None:
    received = serve(body_timeout=0.5).raw(data)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400", b"HTTP/1.1 405", b"HTTP/1.1 408")), received
    ErrorDocument.model_validate_json(body)


def test_r12_more_connections_than_allowed(serve: Any) -> None:
    server = serve(max_connections=2)
    with server.client() as first, server.client() as second:
        assert first.get("/v2").status_code == second.get("/v2").status_code == 200
        received = server.raw(b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in received.lower()


def test_paths_and_methods(served: Any) -> None:
    with served.client() as client:
        error_of(client.get("/v1/images/edits"), 404)
        error_of(client.get("/page/../settings.py"), 404)
        error_of(client.get("/page/%2e%2e/settings.py"), 404)
        assert error_of(client.get(GENERATIONS), 405)["code"] == "method_not_allowed"
        assert client.get(GENERATIONS).headers["allow"] == "POST"
        error_of(client.request("BREW", "/v2"), 405)
        for path in ("/shutdown", "/v2/repository/index", "/docs", "/v2/models/toy/load", "/v2/models/toy/infer"):
            error_of(client.post(path, json={}), 404)


def test_an_api_key_guards_everything_but_health_and_the_empty_page(serve: Any) -> None:
    key = "0123456789abcdef"
    server = serve(api_key=key)
    good = {"authorization": f"Bearer {key}"}
    with server.client() as client:
        routes = [path for path in client.get("/openapi.json", headers=good).json()["paths"] if "{" not in path]
        assert {"/v1/engine", "/metrics", GENERATIONS} <= set(routes)
        for path in routes:
            status = client.get(path).status_code
            assert (status != 401) == ("/health" in path), path
        assert client.get("/").status_code == 200
        for given in (
            {},
            {"authorization": f"Bearer {key}x"},
            {"authorization": key},
            {"authorization": "Bearer \xe9"},
        ):
            encoded = {name: value.encode("latin-1") for name, value in given.items()}
            error = error_of(client.post(GENERATIONS, json={}, headers=encoded), 401)
            assert error["code"] == "invalid_api_key"
            assert key not in error["message"]
        assert client.post(GENERATIONS, json={"num_inference_steps": 1}, headers=good).status_code == 200


def test_a_name_that_another_site_controls_does_not_reach_a_local_server(serve: Any) -> None:
    server = serve(allowed_hosts=("Images.lan",))
    with server.client() as client:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "images.LAN"):
            assert client.get("/v2", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000"):
            assert host.split(":")[0] in error_of(client.get("/v2", headers={"host": host}), 403)["message"]
        # Probes name the pod's address.
        assert client.get("/health/live", headers={"host": "10.1.2.3"}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 is reachable from other machines"),  # noqa: S104
        ({"host": "example.org"}, "host example.org"),
        ({"api_key": "short"}, "has 5 characters"),
        ({"api_key": "white space and \n line"}, "printable"),
        ({"port": 70_000}, "port 70000"),
        ({"request_timeout": 0.0}, "0.0 s"),
        ({"request_timeout": float("nan")}, "nan s"),
        ({"max_images": 0}, "limit of 0"),
    ],
)
def test_settings_that_would_be_unsafe_or_cannot_work(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        HttpSettings(**settings)


def test_models_without_pictures_are_refused_at_the_start(toy: Any) -> None:
    def of(name: str, *conditions: TensorSpec, **given: Any) -> PipelineSpec:
        denoiser = Denoiser(interface=StepInterface.of((4, 8, 8), conditions, coefficients=13), num_train_timesteps=10)
        encoders = [StatesFile(inputs=tuple(spec.name for spec in conditions))] if conditions else []
        return PipelineSpec(name=name, components=(denoiser, *encoders), **given)

    with pytest.raises(InputError, match="the samples of the model 'deep' are latents"):
        check_servable(of("deep", makes="latents"))
    with pytest.raises(InputError, match="wordy is conditioned on encoder_hidden_states"):
        check_servable(of("wordy", TensorSpec(name="encoder_hidden_states", row_shape=(77, 16))))
    with pytest.raises(InputError, match="4 channels"):
        check_servable(of("wide"))
    check_servable(toy.LABELLED)


def test_a_fault_of_ours_is_told_without_its_text(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()

    def broken(request: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.engine, "submit", broken)
    answer = server.generate()
    error = error_of(answer, 500)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    assert answer.headers["x-should-retry"] == "false"
