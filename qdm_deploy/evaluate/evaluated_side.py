"""One of the two models of an evaluation: its samples and their features, in pieces that a cache keeps."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.backends import open_session
from qdm_deploy.components.pictures import to_pictures
from qdm_deploy.components.sampling import SamplingMaker, run_settings
from qdm_deploy.evaluate import sample_cache
from qdm_deploy.evaluate.feature_classifier import FeatureClassifier, Features
from qdm_deploy.evaluate.options import EvaluateOptions
from qdm_deploy.evaluate.sample_cache import SampleCache, chunks_of
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.evaluation import Side
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import StepTable
from qdm_deploy.samplers.sampling import Sampling

__all__ = [
    "EvaluatedSide",
    "KnownSamples",
    "Run",
    "features_of",
    "make_samples",
    "open_side",
    "pictures_of",
    "sample_pieces",
]


@dataclass(frozen=True)
class Run:
    """What both sides have in common."""

    options: EvaluateOptions
    maker: SamplingMaker

    @property
    def model(self) -> PipelineSpec:
        """The model."""
        return self.maker.pipeline

    @property
    def table(self) -> StepTable:
        """The sampler's steps."""
        return self.maker.table

    def sampling(self, rows: slice) -> Sampling:
        """The samples of some seeds."""
        seeds = range(self.options.seed + rows.start, self.options.seed + rows.stop)
        return self.maker.make(seeds, first=rows.start)


@dataclass(frozen=True)
class EvaluatedSide:
    """A model that runs.

    Attributes:
        name: what people read.
        session: runs it.
        identity: everything that its samples depend on, as plain JSON.
        cache: keeps them, under that identity.
        card: what a result says about it.
    """

    name: str
    session: StepSession
    identity: dict[str, object]
    cache: SampleCache
    card: Side


def open_side(
    stack: ExitStack, name: str, bundle: Bundle, precision: Literal["int8", "float"], options: EvaluateOptions
) -> EvaluatedSide:
    """Open one of the models; ``stack`` closes it.

    Raises:
        QdmError: what ``open_session`` raises.
    """
    session = stack.enter_context(
        open_session(bundle, options.backend, precision=precision, threads=options.threads, mode="throughput")
    )
    backend = dict(session.describe())
    states = options.conditioning_file
    run = run_settings(options, bundle.pipeline, bundle.scheduler_config())
    identity: dict[str, object] = {
        "content": _content(bundle, precision, str(backend["backend"])),
        "model": bundle.pipeline.denoiser.model_dump(mode="json"),
        "scheduler": bundle.scheduler_config(),
        "precision": precision,
        # As little as the batch size do threads and mode decide what is computed.
        "backend": {key: str(value) for key, value in backend.items() if key not in ("threads", "mode")},
        "sampler": run.sampler,
        "steps": run.steps,
        "seed": options.seed,
        "eta": options.eta,
        "guidance": run.guidance,
        "guidance rescale": options.guidance_rescale,
        "texts": _texts(bundle),
        "conditioning": None if states is None else hashlib.sha256(states.read_bytes()).hexdigest(),
    }
    card = Side(bundle=bundle.path.name, bundle_id=bundle.id, precision=precision, backend=backend)
    name = f"{name} ({backend['backend']} {precision})"
    return EvaluatedSide(name, session, identity, SampleCache(identity, options.cache), card)


def _texts(bundle: Bundle) -> dict[str, str]:
    """Hashes of what reads prompts, which decides the conditions."""
    folders = {name for each in bundle.pipeline.text_encoders for name in (each.name, each.tokenizer)}
    return {
        entry.path: entry.sha256 for entry in bundle.manifest.files if PurePosixPath(entry.path).parts[0] in folders
    }


def _content(bundle: Bundle, precision: Literal["int8", "float"], backend: str) -> dict[str, str]:
    """Hashes of the files that a side runs.

    Bundles of one checkpoint have the same float graph, so its samples serve all of them.
    """
    kind = "float" if precision == "float" else backend
    found = {}
    for entry in bundle.manifest.files:
        stem = PurePosixPath(entry.path).stem
        # The float graph's weights are in a file of their own; all INT8 graphs share another one.
        weights = entry.role == "weights" and (stem == "float") == (kind == "float")
        if weights or (entry.role == "graph" and stem == kind):
            found[entry.path] = entry.sha256
    return found


class KnownSamples:
    """Samples of the first seeds that another part of the evaluation has made; here there are none."""

    def first(self, rows: slice) -> NDArray[np.float32] | None:
        """[m, C, H, W] samples of the first m of some rows; None where not even the first row is known."""
        return None


def make_samples(run: Run, side: EvaluatedSide, count: int, known: KnownSamples, progress: Progress = SILENT) -> None:
    """See to it that the cache holds the samples of the first ``count`` seeds.

    Args:
        run: what to sample.
        side: the model.
        count: how many seeds.
        known: samples that there are already; they are copied and not made again.
        progress: advances by one for each image that had to be made, so that it knows the time left.
    """
    missing = [rows for rows in _chunks(count) if not side.cache.holds("samples", rows)]
    if not missing:
        return
    with progress.task(f"{side.name}: images", sum(rows.stop - rows.start for rows in missing)) as advance:
        for rows in missing:
            _samples(run, side, rows, count, known, progress)
            advance(rows.stop - rows.start)


def sample_pieces(
    run: Run, side: EvaluatedSide, count: int, progress: Progress = SILENT
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The samples that ``make_samples`` made, [n, C, H, W] at a time, so that memory does not grow with ``count``."""
    for rows in _chunks(count):
        yield rows, _samples(run, side, rows, count, KnownSamples(), progress)


def _chunks(count: int) -> Iterator[slice]:
    return chunks_of(count, sample_cache.CHUNK_IMAGES)


def _samples(
    run: Run, side: EvaluatedSide, rows: slice, count: int, known: KnownSamples, progress: Progress
) -> NDArray[np.float32]:
    def make() -> dict[str, NDArray[np.float32]]:
        done = known.first(rows)
        rest = slice(rows.start + (0 if done is None else len(done)), rows.stop)
        parts = [] if done is None else [done]
        if rest.stop > rest.start:
            parts.append(
                denoise(
                    side.session, run.sampling(rest), batch_size=run.options.batch_size,
                    description=f"{side.name}: images {rest.start + 1} to {rest.stop} of {count}", progress=progress,
                )
            )  # fmt: skip
        return {"samples": np.concatenate(parts)}

    return side.cache.tensors("samples", rows, {"samples": run.model.sample_shape}, make, progress)["samples"]


def pictures_of(samples: NDArray[np.float32], model: PipelineSpec) -> NDArray[np.uint8]:
    """[n, C, H, W] pictures as users get them, 8 bits for each pixel."""
    pictures = to_pictures(samples, model)
    return pictures[:, None] if pictures.ndim == 3 else np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))


def features_of(
    run: Run, side: EvaluatedSide, classifier: FeatureClassifier, count: int, progress: Progress = SILENT
) -> Features:
    """The classifier's view of the first ``count`` pictures."""
    shapes = {"logits": (-1,), "features": (-1,), "spatial": (-1,)}
    name = f"features-{classifier.id[:16]}"
    parts = []
    with progress.task(f"{side.name}: features", count) as advance:
        for rows, samples in sample_pieces(run, side, count, progress):

            def make(samples: NDArray[np.float32] = samples) -> dict[str, NDArray[np.float32]]:
                return classifier.run(pictures_of(samples, run.model).astype(np.float32) / 127.5 - 1.0)._asdict()

            parts.append(side.cache.tensors(name, rows, shapes, make, progress))
            advance(rows.stop - rows.start)
    return Features(*(np.concatenate([part[key] for part in parts]) for key in Features._fields))
