"""The service as a Ray Serve application, for those who run Ray: the same engine and routes, one of each per replica.

    from qdm_deploy.serving.ray import application
    serve.run(application("fashion.qdm", replicas=2))

Ray's proxy balances, and Ray replaces dead replicas. A request whose replica dies gets an error and can be repeated:
500 or 503 from the proxy, or 408 from the next replica, where the dead one had taken its body (Ray 2.60 hands such a
request on, but keeps no copy). Needs the extras ``serve`` and ``ray``. Ray's own control ports know no keys: keep them
inside a trusted network.
"""

import os
from pathlib import Path
from typing import Any, Literal

from qdm_deploy.errors import EnvironmentProblem

__all__ = ["application"]


def application(
    bundle: str | Path,
    *,
    replicas: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    backend: str = "auto",
    precision: Literal["int8", "float"] = "int8",
    threads: int | None = None,
    max_batch_rows: int = 8,
    max_waiting: int = 64,
    deterministic: bool = False,
    request_timeout: float = 300.0,
    drain_timeout: float = 30.0,
    allow_unauthenticated: bool = False,
) -> Any:
    """The application, for ``ray.serve.run``.

    Args:
        bundle: the bundle's folder, under this path on every node.
        replicas: engines, each with a process of its own.
        cpus: cores that Ray reserves for a replica.
        gpus: GPUs that Ray reserves for a replica.
        backend: as ``ProcessEngine`` takes it.
        precision: as ``ProcessEngine`` takes it.
        threads: CPU threads of a replica's session.
        max_batch_rows: rows of the largest batch.
        max_waiting: requests that may wait for a row, in each replica.
        deterministic: the same bits whatever shares the batch.
        request_timeout: seconds from submission to images.
        drain_timeout: seconds that admitted requests get when a replica is stopped.
        allow_unauthenticated: answer without a key. Otherwise the variable ``QDM_API_KEY`` holds it, on every node.

    Raises:
        EnvironmentProblem: Ray or the extra ``serve`` is not installed.
    """
    try:
        from ray import serve

        from qdm_deploy.serving.http.app import create_app
        from qdm_deploy.serving.http.settings import HttpSettings
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"serving with Ray needs the module {error.name!r}; install the extras: pip install 'qdm-deploy[serve,ray]'"
        ) from error

    class Replica:
        """One engine; Ray makes it on a node and calls the methods below."""

        async def __init__(self) -> None:  # type: ignore[misc]  # Ray awaits it
            from qdm_deploy.artifacts.bundle import Bundle
            from qdm_deploy.serving.http.translate import Makers
            from qdm_deploy.serving.process_engine import ProcessEngine

            opened = Bundle.open(Path(bundle))
            self._makers = Makers.of_bundle(opened, threads=threads)
            self._settings = HttpSettings(
                bundle_id=opened.id,
                precision=precision,
                host="0.0.0.0",  # noqa: S104 - Ray's proxy listens; this only says that others may call
                api_key=os.environ.get("QDM_API_KEY"),
                allow_unauthenticated=allow_unauthenticated,
                request_timeout=request_timeout,
                drain_timeout=drain_timeout,
            )
            self._engine = ProcessEngine(
                opened.path,
                backend=backend,
                precision=precision,
                threads=threads,
                max_rows=max_batch_rows,
                max_waiting=max_waiting,
                deterministic=deterministic,
            )
            await self._engine.start()

        def __serve_build_asgi_app__(self) -> Any:
            return create_app(self._engine, self._settings, self._makers)

        def check_health(self) -> None:
            """Have Ray replace a replica whose engine has given up."""
            if self._engine.state.phase == "dead":
                raise RuntimeError("the engine has given up")

        async def __del__(self) -> None:
            await self._engine.drain(drain_timeout)

    deployment = serve.deployment(
        name="qdm-deploy",
        num_replicas=replicas,
        # The engine's own queue refuses with a clear answer; Ray's limits stand well behind it.
        max_ongoing_requests=4 * (max_batch_rows + max_waiting),
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=drain_timeout + 5,
        health_check_period_s=2,
    )
    return deployment(serve.ingress()(Replica)).bind()
