"""Requests that share batches on real backends, beside the same requests alone.

The model is a tiny U-Net in INT8 with attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.backends import OnnxRuntimeSession, open_session
from qdm_deploy.samplers import NoiseSchedule
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.jobs import JobMaker
from qdm_deploy.serving.loading import load, open_bundle_session
from qdm_deploy.serving.scheduler import Scheduler
from qdm_deploy.serving.settings import Settings
from qdm_deploy.serving.stepper import Done, Stepper
from tests.serving.engine.fake import labels

BACKENDS = ("onnxruntime", "openvino")
ROWS = 6
NULL = 3  # of the tiny U-Net
# Signal to noise of an image in a shared batch, against the image alone in a batch of one. Integer sums are exact, so
# what differs is the order of float sums (norms, attention), and where that moves a value over the border between two
# codes. Measured: see the page on step-level batching in docs/adr.
TOLERANCE_DB = {"onnxruntime": 60.0, "openvino": 30.0}

TARGET = GenerationRequest(
    "target", (7, 8), sampler="dpmpp-2m", steps=8, conditioning=labels((0, 2), NULL), guidance=2.0
)
NEIGHBOURS = [
    GenerationRequest("a", (1, 2, 3), sampler="ddpm", steps=11, conditioning=labels((0, 1, 2), NULL)),
    GenerationRequest("b", (4,), sampler="ddim", steps=3, conditioning=labels((1,), NULL), guidance=5.0),
    GenerationRequest("c", (5, 6), sampler="euler", steps=6, conditioning=labels((2, 2), NULL)),
]
# As far out as a request can be: what is not clipped overflows to infinity or NaN.
EXTREME = [
    GenerationRequest("far", (1, 2), sampler="ddpm", steps=20, conditioning=labels((0, 1), NULL), guidance=3e38),
    GenerationRequest("far too", (3,), sampler="ddim", steps=20, conditioning=labels((2,), NULL), guidance=-3e38),
]


@contextmanager
def engine(bundle: Path, backend: str, *, deterministic: bool, threads: int = 2) -> Iterator[Any]:
    """Runs the engine without its process: what each request ended with, when they come every other step."""
    opened = Bundle.open(bundle, check="sizes")
    settings = Settings(str(bundle), backend, threads=threads, max_rows=ROWS, deterministic=deterministic)
    maker = JobMaker(opened.pipeline, NoiseSchedule.from_config(opened.scheduler_config()), ROWS)
    with ExitStack() as sessions:
        loaded = load(opened, settings, open_bundle_session, sessions)

        def run(requests: Sequence[GenerationRequest]) -> dict[str, Any]:
            stepper = Stepper(Scheduler(ROWS, opened.pipeline.interface), loaded.runner)
            waiting, done, step = list(requests), {}, 0
            while waiting or stepper.scheduler.alive:
                if waiting and step % 2 == 0:
                    stepper.scheduler.submit(maker.job(waiting.pop(0)))
                stepper.begin(0.0)
                done |= {item.request_id: item.samples for item in stepper.run() if isinstance(item, Done)}
                step += 1
            return done

        yield run


def signal_to_noise_db(reference: Any, other: Any) -> float:
    noise = float(np.square(reference.astype(np.float64) - other).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(reference.astype(np.float64)).sum() / noise))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_images_have_the_same_bits_whatever_runs_beside_them(
    unet: Path, backend: str, alone: Any
) -> None:
    with engine(unet, backend, deterministic=True) as run:
        by_itself = run([TARGET])["target"]
        for requests in ([TARGET, *NEIGHBOURS], [*NEIGHBOURS, TARGET], [NEIGHBOURS[2], TARGET, NEIGHBOURS[1]]):
            np.testing.assert_array_equal(run(requests)["target"], by_itself)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(run([*EXTREME, TARGET])["target"], by_itself)
    # And they are those of ``denoise`` in a batch of that size: a lane's, half of the rows, rounded up to pairs.
    with open_session(Bundle.open(unet, check="sizes"), backend, threads=1) as session:
        np.testing.assert_array_equal(alone(unet, session, TARGET, copies=2), by_itself)


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_otherwise_they_differ_by_less_than_the_stated_tolerance(unet: Path, backend: str, alone: Any) -> None:
    with engine(unet, backend, deterministic=False) as run:
        shared = run([*NEIGHBOURS, TARGET])
        with np.errstate(all="ignore"):
            shared["target among extremes"] = run([*EXTREME, TARGET])["target"]
    with open_session(Bundle.open(unet, check="sizes"), backend, threads=2) as session:
        for request in (TARGET, *NEIGHBOURS):
            reference = alone(unet, session, request)
            assert np.isfinite(reference).all()
            found = signal_to_noise_db(reference, shared[request.request_id])
            assert found > TOLERANCE_DB[backend], request.request_id
        assert signal_to_noise_db(alone(unet, session, TARGET), shared["target among extremes"]) > TOLERANCE_DB[backend]


@pytest.mark.parametrize(
    ("backend", "threads", "lanes"), [("tensorrt", 8, 1), ("onnxruntime", 8, 2), ("openvino", 1, 1)]
)
def test_lanes_by_default(linear: Path, backend: str, threads: int, lanes: int) -> None:
    opened = Bundle.open(linear, check="sizes")
    given: list[int] = []

    def open_(bundle: Bundle, settings: Settings, threads: int, sizes: int) -> OnnxRuntimeSession:
        given.append(threads)
        return OnnxRuntimeSession(bundle.graph("onnxruntime"), threads=1)

    with ExitStack() as sessions:
        loaded = load(opened, Settings(str(linear), backend, threads=threads, max_rows=4), open_, sessions)
    assert (loaded.backend["lanes"], loaded.max_rows) == (lanes, 4)
    assert given == ([threads] if lanes == 1 else [threads // 2, threads // 2, threads])
