"""What Prometheus scrapes. Names start with ``qdm_``, units are seconds and rows, labels come from closed sets."""

from collections import deque
from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.serving.contract import Engine, FailureReason, RefusalReason

__all__ = ["Metrics"]

_OUTCOMES = ("finished", "cancelled", "deadline", "engine_error", "not_finite", "shutdown")
_REASONS = ("queue_full", "draining", "loading", "engine_dead")
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_RECENT = 120


class Metrics:
    """An engine's observer, with a registry of its own.

    Attributes:
        recent: rows, padding rows and seconds of the last runs of the session, oldest first.
        total_steps: runs of the session since the start.
    """

    def __init__(self, engine: Engine, bundle_id: str) -> None:
        self.registry = CollectorRegistry()
        self.recent: deque[tuple[int, int, float]] = deque(maxlen=_RECENT)
        self.total_steps = 0
        ProcessCollector(registry=self.registry)
        registry = self.registry
        self._requests = Counter("qdm_requests", "Admitted requests by how they ended.", ["outcome"], registry=registry)
        self._refusals = Counter(
            "qdm_admission_rejections", "Requests that were not admitted.", ["reason"], registry=registry
        )
        self._responses = Counter("qdm_http_responses", "Answers by status.", ["status"], registry=registry)
        self._images = Counter("qdm_images", "Images made.", registry=registry)
        self._duration = Histogram(
            "qdm_request_duration_seconds",
            "From submission to the end of a finished request, its wait included.",
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._queued = Histogram(
            "qdm_queue_duration_seconds", "Wait of a finished request.", buckets=_QUEUE_SECONDS, registry=registry
        )
        self._step = Histogram(
            "qdm_step_duration_seconds", "One run of the session.", buckets=_STEP_SECONDS, registry=registry
        )
        self._rows = Histogram(
            "qdm_batch_rows", "Rows that did work in one run of the session.", buckets=_ROWS, registry=registry
        )
        self._padding = Counter("qdm_batch_padding_rows", "Rows that only filled a batch.", registry=registry)
        self._steps = Counter("qdm_steps", "Runs of the session.", registry=registry)
        self._decode = Histogram(
            "qdm_decode_duration_seconds",
            "From samples to one request's encoded pictures.",
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._restarts = Counter("qdm_engine_restarts", "Restarts of the engine process.", registry=registry)
        for outcome in _OUTCOMES:
            self._requests.labels(outcome)
        for reason in _REASONS:
            self._refusals.labels(reason)
        registry.register(_EngineGauges(engine, bundle_id))
        engine.add_observer(self)

    def stepped(self, rows: int, padding_rows: int, seconds: float) -> None:
        """See ``Observer``."""
        self.recent.append((rows, padding_rows, seconds))
        self.total_steps += 1
        self._steps.inc()
        self._rows.observe(rows)
        self._padding.inc(padding_rows)
        self._step.observe(seconds)

    def refused(self, reason: RefusalReason) -> None:
        """See ``Observer``."""
        self._refusals.labels(reason).inc()

    def ended(
        self, outcome: Literal["finished"] | FailureReason, images: int, queue_seconds: float, seconds: float
    ) -> None:
        """See ``Observer``."""
        self._requests.labels(outcome).inc()
        self._images.inc(images)
        if outcome == "finished":
            self._queued.observe(queue_seconds)
            self._duration.observe(seconds)

    def restarted(self) -> None:
        """See ``Observer``."""
        self._restarts.inc()

    def decoded(self, seconds: float) -> None:
        """The pictures of one request were encoded."""
        self._decode.observe(seconds)

    def answered(self, status: int) -> None:
        """An HTTP answer was sent."""
        self._responses.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineGauges(Collector):
    """Reads the engine's state when it is asked, so that no gauge can go stale."""

    def __init__(self, engine: Engine, bundle_id: str) -> None:
        self._engine = engine
        self._bundle_id = bundle_id

    def collect(self) -> Iterable[Metric]:
        """The gauges now."""
        state = self._engine.state
        for name, text, value in (
            ("qdm_requests_running", "Requests with a row in the batch.", len(state.running)),
            ("qdm_requests_waiting", "Requests in the queue: scale on this.", state.waiting),
            ("qdm_requests_waiting_limit", "Requests that the queue holds.", state.max_waiting),
            ("qdm_rows_running", "Rows that take part in the next step.", state.running_rows),
            ("qdm_rows_limit", "Rows of the largest batch.", state.max_rows),
            ("qdm_ready", "1 while requests are admitted.", int(state.phase == "ready")),
            (
                "qdm_draining",
                "1 while running requests finish and no new one is admitted.",
                int(_draining(state.phase)),
            ),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        info = GaugeMetricFamily(
            "qdm_build_info", "What serves.", labels=["version", "model", "backend", "backend_version", "bundle_id"]
        )
        backend = state.backend
        info.add_metric(
            [
                installed_version() or "unknown",
                self._engine.model.name,
                str(backend.get("backend", "")),
                str(backend.get("version", "")),
                self._bundle_id,
            ],
            1,
        )
        yield info


def _draining(phase: str) -> bool:
    return phase == "draining"
