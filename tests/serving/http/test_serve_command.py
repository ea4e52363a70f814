"""``qdm-deploy serve`` and ``healthcheck`` on a real bundle: the engine's process and all."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from qdm_deploy.errors import BundleError
from qdm_deploy.pipeline import ServeOptions, serve

GENERATIONS = "/v1/images/generations"
ROOT = Path(__file__).parents[3]


def qdm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "calibration", "export"))
    command = [sys.executable, "-m", "qdm_deploy.cli.main", *arguments]
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=variables, cwd=ROOT)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def stopped(child: int) -> Iterator[None]:
    """The process does not run meanwhile; and is not left behind like that."""
    os.kill(child, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGCONT)


def waiting(url: str) -> int:
    return int(httpx.get(f"{url}/v1/engine").json()["waiting"])


def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it did not happen"
        time.sleep(0.01)


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.perf_counter() + seconds
    while alive(pid) and time.perf_counter() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_the_openai_client_gets_images_and_sigterm_ends_with_0(serve_bundle: Any, bundle: Path) -> None:
    server = serve_bundle(bundle)
    server.wait_until_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["served"]
        extra = {"seed": 5, "num_inference_steps": 4, "guidance_scale": 2.0}
        made = client.images.generate(model="served", prompt="boot", n=2, extra_body=extra)
        assert made.data is not None
        pictures = [Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))) for image in made.data]
        assert [picture.size for picture in pictures] == [(4, 4), (4, 4)]
        stream = client.images.generate(
            model="served", prompt="boot", stream=True, partial_images=2, extra_body={"num_inference_steps": 6}
        )
        kinds = [event.type for event in stream]
        assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        with pytest.raises(openai.BadRequestError, match="'sofa' is no label of served") as caught:
            client.images.generate(model="served", prompt="sofa")
        assert caught.value.param == "prompt"
        with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
            client.images.generate(model="other", prompt="boot")
    healthy = qdm("healthcheck", server.url, "--json")
    assert healthy.returncode == 0
    assert json.loads(healthy.stdout)["ready"] is True
    (child,) = children(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert gone(child)
    dead = qdm("healthcheck", server.url)
    assert dead.returncode == 1
    assert "refused" in dead.stdout


@pytest.mark.slow
def test_the_openai_client_waits_and_tries_again_when_the_queue_is_full(serve_bundle: Any, bundle: Path) -> None:
    server = serve_bundle(bundle, "--max-batch-rows", "1", "--max-waiting", "1")
    server.wait_until_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=8) as client:

        def generate(seed: int) -> int:
            made = client.images.generate(prompt="bag", extra_body={"seed": seed, "num_inference_steps": 100})
            assert made.data is not None
            return len(made.data)

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(generate, range(18))) == [1] * 18
    text = httpx.get(f"{server.url}/metrics").text
    assert 'qdm_requests_total{outcome="finished"} 18.0' in text
    assert 'qdm_admission_rejections_total{reason="queue_full"} 0.0' not in text


def test_r8_kill_9_of_the_engine_answers_everything_and_comes_back(serve_bundle: Any, bundle: Path) -> None:
    server = serve_bundle(bundle)
    server.wait_until_ready()
    (child,) = children(server.process.pid)
    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=server.url, timeout=60) as client, stopped(child):
        pending = [pool.submit(client.post, GENERATIONS, json={"n": 4, "seed": i}) for i in range(4)]
        until(lambda: waiting(server.url) == 4)
        os.kill(child, signal.SIGKILL)
        until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/live").status_code == 200
        for future in pending:
            answer = future.result()
            assert answer.status_code in (200, 500, 503), answer.text
            if answer.status_code == 200:
                assert len(answer.json()["data"]) == 4
            else:
                assert answer.json()["error"]["code"] in ("engine_error", "loading")
    server.wait_until_ready()
    (successor,) = children(server.process.pid)
    assert successor != child
    assert "qdm_engine_restarts_total 1.0" in httpx.get(f"{server.url}/metrics").text
    assert httpx.post(server.url + GENERATIONS, json={}, timeout=30).status_code == 200


def test_r8_kill_9_of_the_server_leaves_no_engine_behind(serve_bundle: Any, bundle: Path) -> None:
    server = serve_bundle(bundle)
    server.wait_until_ready()
    (child,) = children(server.process.pid)
    server.process.kill()
    server.process.wait(10)
    assert gone(child)


def test_r7_a_second_signal_leaves_no_engine_behind(serve_bundle: Any, bundle: Path) -> None:
    server = serve_bundle(bundle, "--max-batch-rows", "1")
    server.wait_until_ready()
    (child,) = children(server.process.pid)
    with ThreadPoolExecutor(2) as pool, stopped(child):
        pending = [pool.submit(httpx.post, server.url + GENERATIONS, json={}, timeout=30) for _ in range(2)]
        until(lambda: waiting(server.url) == 2)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM
        for future in pending:
            with pytest.raises(httpx.TransportError):
                future.result()
        assert gone(child)  # though it could not see its parent go


@pytest.mark.parametrize("file", ["manifest.json", "scheduler/scheduler_config.json", "unet/onnxruntime.onnx"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_r10_a_damaged_bundle_is_refused_before_the_port_is_open(
    bundle: Path, tmp_path: Path, file: str, damage: str
) -> None:
    copy = tmp_path / "copy.qdm"
    shutil.copytree(bundle, copy)
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(BundleError, match=r"copy\.qdm"):
        serve(ServeOptions(copy, port=0), on_listening=lambda *_: pytest.fail("it listens"))


def test_r10_an_extra_file_ends_the_command_with_3(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qdm"
    shutil.copytree(bundle, copy)
    (copy / "unet/extra.onnx").write_bytes(b"x")
    done = qdm("serve", str(copy), "--port", "0")
    assert done.returncode == 3
    assert "extra.onnx" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 is reachable"),  # noqa: S104
        (["--max-batch-rows", "0"], "rows of a batch"),
        (["--step-timeout", "0"], "the step timeout in seconds is 0.0"),
        (["--load-timeout", "nan"], "the load timeout in seconds is nan"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_options_that_serve_refuses(
    invoke_cli: Callable[..., Any], bundle: Path, arguments: list[str], says: str
) -> None:
    result = invoke_cli("serve", str(bundle), "--port", "0", *arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(("backend", "code"), [("abacus", 2), ("tensorrt", 3)])
def test_an_engine_that_cannot_start_ends_the_command(bundle: Path, backend: str, code: int) -> None:
    done = qdm("serve", str(bundle), "--port", "0", "--backend", backend)
    assert done.returncode == code, done.stderr
    assert backend in done.stderr.splitlines()[-1]


def test_what_the_engine_is_given_arrives(bundle: Path) -> None:
    done = qdm("serve", str(bundle), "--port", "0", "--threads", "0")
    assert done.returncode == 2
    assert "0 threads cannot run anything" in done.stderr
    done = qdm("serve", str(bundle), "--port", "0", "--load-timeout", "0.1")
    assert done.returncode == 4
    assert "did not load the bundle within 0.1 s" in done.stderr


def test_a_port_that_is_taken(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = qdm("serve", str(bundle), "--port", port)
    assert done.returncode == 4
    assert f"port {port} cannot be listened on" in done.stderr


def test_without_the_extra_serve_says_what_to_install(bundle: Path) -> None:
    program = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from qdm_deploy.cli.main import cli; cli.main(['serve', sys.argv[1], '--port', '0'])"
    )
    path = os.pathsep.join(str(ROOT / part) for part in (".", "calibration", "export"))
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 4
    assert "pip install 'qdm-deploy[serve]'" in done.stderr


def test_a_key_comes_from_a_file_or_the_environment(serve_bundle: Any, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text("0123456789abcdef\n")
    server = serve_bundle(bundle, "--api-key-file", str(tmp_path / "key.txt"))
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    headers = {"authorization": "Bearer 0123456789abcdef"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    short = qdm("serve", str(bundle), "--port", "0", QDM_API_KEY="short")
    assert short.returncode == 2
    assert "has 5 characters" in short.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ftp://127.0.0.1"], 2, "no URL"),
        (["http://127.0.0.1:1", "--timeout", "0"], 2, "0.0 s"),
        (["http://127.0.0.1:1"], 1, "refused"),
    ],
)
def test_healthcheck_without_a_server(
    invoke_cli: Callable[..., Any], arguments: list[str], code: int, says: str
) -> None:
    result = invoke_cli("healthcheck", *arguments)
    assert result.exit_code == code
    assert says in result.output


def test_healthcheck_tells_loading_from_ready(serve: Any, invoke_cli: Callable[..., Any]) -> None:
    server = serve()
    server.engine.phase = "loading"
    answer = invoke_cli("healthcheck", server.url)
    assert answer.exit_code == 1
    assert "the engine is loading" in answer.output
    assert invoke_cli("healthcheck", server.url, "--live").exit_code == 0
    server.engine.phase = "ready"
    assert invoke_cli("healthcheck", server.url, "-q").output == ""


def test_healthcheck_does_not_wait_for_a_body(invoke_cli: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        asked = pool.submit(invoke_cli, "healthcheck", f"http://127.0.0.1:{port}", "--timeout", "0.3")
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 503 x\r\ncontent-length: 9\r\n\r\n")
            answer = asked.result(10)
    assert answer.exit_code == 1
    assert "HTTP 503" in answer.output


@pytest.mark.slow
def test_r4_ten_times_too_much_for_a_minute_leaves_memory_flat(serve_bundle: Any, bundle: Path) -> None:
    server = serve_bundle(bundle, "--max-batch-rows", "4", "--max-waiting", "8", "--request-timeout", "30")
    server.wait_until_ready()
    stop, codes, slowest = threading.Event(), [], [0.0]

    def flood(worker: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                begun = time.perf_counter()
                answer = client.post(GENERATIONS, json={"n": 4, "num_inference_steps": 100, "seed": worker})
                codes.append(answer.status_code)
                if answer.status_code == 200:
                    slowest[0] = max(slowest[0], time.perf_counter() - begun)

    def memory() -> float:
        def resident(pid: int) -> int:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        return sum(map(resident, [server.process.pid, *children(server.process.pid)])) / 2**20

    threads = [threading.Thread(target=flood, args=(worker,)) for worker in range(40)]
    for thread in threads:
        thread.start()
    samples = []
    for _ in range(12):
        time.sleep(5)
        samples.append(memory())
    stop.set()
    for thread in threads:
        thread.join(60)
    assert set(codes) == {200, 503}
    assert codes.count(503) > codes.count(200)
    assert samples[-1] - samples[2] < 8, samples  # MiB, after 15 s of warming up
    assert slowest[0] < 30
    text = httpx.get(f"{server.url}/metrics").text
    assert f'qdm_requests_total{{outcome="finished"}} {float(codes.count(200))}' in text
    assert f'qdm_admission_rejections_total{{reason="queue_full"}} {float(codes.count(503))}' in text
