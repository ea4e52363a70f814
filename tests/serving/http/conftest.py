"""Real servers on 127.0.0.1: with the toy engine in this process, to be tampered with, or in a process of their own."""

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from qdm_deploy.artifacts.bundle import BundleWriter
from qdm_deploy.artifacts.manifest import Compatibility
from qdm_deploy.serving.http.app import create_app
from qdm_deploy.serving.http.protocol import protocol_class
from qdm_deploy.serving.http.settings import HttpSettings

ROOT = Path(__file__).parents[3]
TOY = Path(__file__).with_name("toy_engine.py")


def _load_toy() -> Any:
    spec = importlib.util.spec_from_file_location("toy_engine", TOY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_engine"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy() -> Any:
    """The module ``toy_engine``."""
    return _load_toy()


class Served:
    """A server in a thread of this process; ``engine`` may be changed while it runs."""

    def __init__(self, engine: Any, settings: HttpSettings) -> None:
        self.engine = engine
        self.app = create_app(engine, settings)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, http=protocol_class(settings.body_timeout, settings.max_connections), ws="none", log_config=None,
            access_log=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(listener)))
        self._up = threading.Event()

    async def _run(self, listener: socket.socket) -> None:
        await self.engine.start()
        serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        while not self._server.started:
            await asyncio.sleep(0.001)
        self._up.set()
        await serving
        await self.engine.close()
        await asyncio.sleep(0)
        listener.close()

    def __enter__(self) -> "Served":
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def connections(self) -> int:
        """Connections that the server holds."""
        return len(self._server.server_state.connections)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)

    def generate(self, body: object = None, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/images/generations", json={} if body is None else body, **options)

    def raw(self, data: bytes, *, wait: float = 5.0) -> bytes:
        """What comes back on a connection of its own until the server closes it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
            return received


@pytest.fixture
def serve(toy: Any) -> Iterator[Callable[..., Served]]:
    """Starts a server; keywords are those of ``HttpSettings``, ``engine`` is a toy engine."""
    with ExitStack() as running:

        def start(engine: Any = None, **settings: Any) -> Served:
            return running.enter_context(Served(engine or toy.ToyEngine(), HttpSettings(**settings)))

        yield start


@pytest.fixture(scope="module")
def served(toy: Any) -> Iterator[Served]:
    """One server for the tests of a module that leave it as it is."""
    with Served(toy.ToyEngine(), HttpSettings(bundle_id="ab12")) as running:
        yield running


def environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "calibration", "export"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


class ServerProcess:
    """A server in a process of its own, up when the URL has been printed."""

    def __init__(self, command: list[str], log: Path, **options: Any) -> None:
        self._log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(), cwd=ROOT, **options
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def wait_until_ready(self, seconds: float = 60) -> None:
        transport = httpx.HTTPTransport(retries=3)
        with httpx.Client(base_url=self.url, transport=transport, timeout=5) as client:
            for _ in range(int(seconds * 20)):
                assert self.process.poll() is None, self.log
                if client.get("/health/ready").status_code == 200:
                    return
                threading.Event().wait(0.05)
        raise AssertionError(f"not ready within {seconds} s: {self.log}")


@contextmanager
def process_of(command: list[str], log: Path, **options: Any) -> Iterator[ServerProcess]:
    server = ServerProcess(command, log, **options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(10)
        assert server.process.stdout is not None
        server.process.stdout.close()


@pytest.fixture
def toy_process(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server process on the toy engine; keywords of ``HttpSettings`` and ``ToyEngine``."""
    with ExitStack() as running:

        def start(**settings: Any) -> ServerProcess:
            command = [sys.executable, str(TOY), json.dumps({"port": 0, **settings})]
            return running.enter_context(process_of(command, tmp_path / f"{len(os.listdir(tmp_path))}.log"))

        yield start


@pytest.fixture
def serve_bundle(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts ``qdm-deploy serve BUNDLE`` with more arguments; quiet, so that stdout is the URL."""
    with ExitStack() as running:

        def start(bundle: Path, *arguments: str) -> ServerProcess:
            command = [
                sys.executable,
                "-m",
                "qdm_deploy.cli.main",
                "serve",
                str(bundle),
                "--port",
                "0",
                "--threads",
                "1",
            ]
            name = tmp_path / f"{len(os.listdir(tmp_path))}.log"
            return running.enter_context(process_of([*command, "-q", *arguments], name))

        yield start


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional bundle whose network is linear, so that it starts at once: [3, 4, 4], 5 labels."""
    from tests.runtime.conftest import write_tiny

    folder = tmp_path_factory.mktemp("served")
    tiny = write_tiny(folder / "step.onnx", conditional=True)
    labels = tiny.spec.encoder.model_copy(update={"labels": ("shirt", "bag", "boot", "coat", "dress")})
    model = tiny.spec.model_copy(update={"name": "served", "components": (tiny.spec.denoiser, labels)})
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}
    with BundleWriter(folder / "served.qdm") as writer:
        for name in ("unet", "scheduler"):
            (writer.root / name).mkdir()
        shutil.copyfile(tiny.graph, writer.root / "unet/onnxruntime.onnx")
        (writer.root / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
        writer.publish(
            name="served", pipeline=model, targets=("onnxruntime",), provenance={}, recipe={},
            compatibility=Compatibility(opset=21, min_runtime="0.1.0"),
        )  # fmt: skip
    return folder / "served.qdm"


@pytest.fixture
def invoke_cli() -> Callable[..., Any]:
    """Runs a command line in this process."""
    from click.testing import CliRunner

    from qdm_deploy.cli.main import cli

    return lambda *arguments: CliRunner().invoke(cli, list(arguments))
