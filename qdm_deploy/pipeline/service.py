"""From a bundle to a running HTTP service; no torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.choices import within
from qdm_deploy.errors import EnvironmentProblem, InputError

if TYPE_CHECKING:
    from qdm_deploy.serving.http.settings import HttpSettings

__all__ = ["ServeOptions", "serve"]

KEY_VARIABLE = "QDM_API_KEY"
_MAX_ROWS = 1024
_MAX_WAITING = 100_000
_MAX_KEY_BYTES = 4096
_MIN_SECONDS, _MAX_SECONDS = 0.1, 86_400.0


@dataclass(frozen=True)
class ServeOptions:
    """What is served, on what, and how far.

    Attributes:
        bundle: the bundle's folder.
        host, port: where to listen; port 0 takes a free one.
        backend, precision, threads: what runs the steps.
        max_batch_rows: rows of the largest batch; a guided image takes two.
        max_waiting: requests that may wait for a row; one more gets ``queue_full_status``.
        lanes: sessions that share a batch, each with a copy of the weights; None takes two on a CPU, one on a GPU.
        deterministic: the same bits whatever shares the batch, at the price of always running a full one.
        request_timeout: seconds from submission to images, the wait included.
        drain_timeout: seconds that admitted requests get after SIGTERM.
        step_timeout: seconds after which a denoising step counts as hung, and the engine process is started again.
        load_timeout: seconds for the engine process to open the bundle, the build of engines on a GPU included; the
            probes of the container images wait as long.
        api_key_file: a file that holds the key; None takes the variable ``QDM_API_KEY``, if it is set.
        allow_unauthenticated: listen beyond this machine without a key.
        allowed_hosts: see ``HttpSettings``.
        max_images: in one request.
        max_steps: of one image.
        queue_full_status: 503 or 429.
        quiet: log warnings and errors only.
    """

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000
    backend: str = "auto"
    precision: Literal["int8", "float"] = "int8"
    threads: int | None = None
    max_batch_rows: int = 8
    max_waiting: int = 64
    lanes: int | None = None
    deterministic: bool = False
    request_timeout: float = 300.0
    drain_timeout: float = 30.0
    step_timeout: float = 60.0
    load_timeout: float = 1800.0
    api_key_file: Path | None = None
    allow_unauthenticated: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_images: int = 10
    max_steps: int = 1000
    queue_full_status: Literal[429, 503] = 503
    quiet: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        within("rows of a batch", self.max_batch_rows, 1, _MAX_ROWS)
        within("waiting requests", self.max_waiting, 0, _MAX_WAITING)
        if self.lanes is not None:
            within("lanes", self.lanes, 1, self.max_batch_rows)
        within("the step timeout in seconds", self.step_timeout, _MIN_SECONDS, _MAX_SECONDS)
        within("the load timeout in seconds", self.load_timeout, _MIN_SECONDS, _MAX_SECONDS)


def serve(options: ServeOptions, on_listening: Callable[[str, str, str], None] | None = None) -> int:
    """Serve a bundle until SIGTERM or SIGINT; see ``qdm_deploy.serving.http.server.run_server``.

    Args:
        options: what and where.
        on_listening: called with the URL, the model's name and the bundle's id once connections are taken.

    Returns:
        The exit code: 0 after a drain.

    Raises:
        EnvironmentProblem: the extra ``serve`` is not installed, or the address cannot be listened on.
        QdmError: the bundle, the backend or an option cannot be used.
    """
    try:
        from qdm_deploy.serving.http.server import run_server
        from qdm_deploy.serving.http.settings import check_servable
        from qdm_deploy.serving.http.translate import Makers
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"serving over HTTP needs the module {error.name!r}; install the extra: pip install 'qdm-deploy[serve]'"
        ) from error
    from qdm_deploy.serving.process_engine import ProcessEngine

    # Before the port is open: a damaged bundle must not look like a server that is still loading.
    bundle = Bundle.open(options.bundle)
    check_servable(bundle.pipeline)
    settings = _http_settings(options, bundle.id)
    makers = Makers.of_bundle(bundle, threads=options.threads)
    engine = ProcessEngine(
        bundle.path,
        backend=options.backend,
        precision=options.precision,
        threads=options.threads,
        max_rows=options.max_batch_rows,
        max_waiting=options.max_waiting,
        lanes=options.lanes,
        deterministic=options.deterministic,
        step_timeout=options.step_timeout,
        load_timeout=options.load_timeout,
    )

    def listening(url: str) -> None:
        if on_listening is not None:
            on_listening(url, bundle.pipeline.name, bundle.id)

    return run_server(engine, settings, makers=makers, on_listening=listening, quiet=options.quiet)


def _http_settings(options: ServeOptions, bundle_id: str) -> "HttpSettings":
    from qdm_deploy.serving.http.settings import HttpSettings

    return HttpSettings(
        bundle_id=bundle_id,
        precision=options.precision,
        host=options.host,
        port=options.port,
        api_key=_api_key(options.api_key_file),
        allow_unauthenticated=options.allow_unauthenticated,
        allowed_hosts=options.allowed_hosts,
        request_timeout=options.request_timeout,
        drain_timeout=options.drain_timeout,
        max_images=options.max_images,
        max_steps=options.max_steps,
        queue_full_status=options.queue_full_status,
    )


def _api_key(path: Path | None) -> str | None:
    """The key from its file or from the environment; a command line would show it to every user of the machine."""
    if path is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_BYTES + 1)
        key = content.decode("ascii").strip()
    except OSError as error:
        raise InputError(f"the API key file {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the API key file {path} holds more than ASCII characters") from error
    if len(content) > _MAX_KEY_BYTES:
        raise InputError(f"the API key file {path} is larger than {_MAX_KEY_BYTES} bytes; it holds one key")
    return key
