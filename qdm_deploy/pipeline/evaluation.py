"""Is the INT8 model as good as its reference? The same seeds through both, side by side and beside real pictures."""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import new_file
from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.errors import InputError
from qdm_deploy.pipeline import sample_cache
from qdm_deploy.pipeline.conditioning import conditioning_of, read_hidden_states
from qdm_deploy.pipeline.distribution_rows import distribution_rows
from qdm_deploy.pipeline.evaluate_options import EvaluateOptions
from qdm_deploy.pipeline.quality import network_output, reference_run
from qdm_deploy.pipeline.sample_cache import SampleCache, chunks_of
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.bootstrap import mean_interval
from qdm_deploy.report.evaluation import DistributionRow, Evaluation, PairedRow, Side, frechet_sentence
from qdm_deploy.report.metrics import psnr_per_image_db, sqnr_per_step_db
from qdm_deploy.report.ssim import SSIM_WINDOW, ssim_per_image
from qdm_deploy.runtime import Conditioning, StepSession, denoise, open_session
from qdm_deploy.runtime.feature_classifier import SHIPPED, FeatureClassifier, Features
from qdm_deploy.runtime.images import to_pictures
from qdm_deploy.samplers import NoiseSchedule, StepTable, step_table

__all__ = ["evaluate"]

FP32 = "fp32"


@dataclass(frozen=True)
class _Run:
    """What both sides have in common."""

    options: EvaluateOptions
    model: ModelSpec
    table: StepTable
    conditioning: Conditioning | None

    def seeds(self, rows: slice) -> range:
        return range(self.options.seed + rows.start, self.options.seed + rows.stop)

    def shown(self, rows: slice) -> Conditioning | None:
        if self.conditioning is None:
            return None
        labels, states = self.conditioning.class_labels, self.conditioning.encoder_hidden_states
        return replace(
            self.conditioning,
            class_labels=None if labels is None else labels[rows],
            encoder_hidden_states=None if states is None else states[rows],
        )


@dataclass(frozen=True)
class _Side:
    """One model that runs, and where its samples are kept."""

    name: str
    session: StepSession
    cache: SampleCache
    card: Side


def evaluate(options: EvaluateOptions, progress: Progress = SILENT) -> Evaluation:
    """Sample from both models with the same seeds and compare them, seed by seed and as sets.

    Samples and features are kept in the cache as they are made, so a run that was interrupted goes on.

    Raises:
        InputError: the two do not run the same model, the bundle is compared with itself, or the classifier does not
            fit the model; before any work.
        QdmError: see ``qdm_deploy.errors``.
    """
    bundle = Bundle.open(options.bundle)
    reference = bundle if options.against == FP32 else _other(bundle, options)
    model = bundle.model
    classifier, notes = _classifier(model, options)
    count = options.paired if classifier is None else max(options.num, options.paired)
    table = step_table(
        NoiseSchedule.from_config(bundle.scheduler_config()),
        options.sampler,
        options.steps,
        learned_variance=model.learned_variance,
    )
    states = read_hidden_states(options.conditioning_file)
    run = _Run(options, model, table, conditioning_of(model, count, hidden_states=states))
    with ExitStack() as stack:
        precision: Literal["int8", "float"] = "float" if options.against == FP32 else "int8"
        a = _open(stack, "A", reference, precision, options)
        b = _open(stack, "B", bundle, "int8", options)
        from_a, from_b = (_samples(run, side, count, progress) for side in (a, b))
        errors = _output_errors(run, a.session, b.session, progress)
        rows: tuple[DistributionRow, ...] = ()
        if classifier is not None:
            labels = None if run.conditioning is None else run.conditioning.class_labels
            rows = distribution_rows(
                classifier,
                _features(classifier, a, from_a[: options.num], model, progress),
                _features(classifier, b, from_b[: options.num], model, progress),
                None if labels is None else np.asarray(labels[: options.num], dtype=np.int64),
                progress,
            )
    paired, more = _paired_rows(model, from_a[: options.paired], from_b[: options.paired], errors)
    result = Evaluation(
        a=a.card,
        b=b.card,
        images=options.num if rows else 0,
        paired_seeds=options.paired,
        sampler=options.sampler,
        steps=options.steps,
        seed=options.seed,
        guidance=options.guidance,
        classifier=None if classifier is None else classifier.id,
        classifier_accuracy=None if classifier is None else classifier.card.test_accuracy,
        paired=paired,
        distribution=rows,
        verdict=frechet_sentence(rows[0], options.num) if rows else None,
        notes=(*notes, *more),
    )
    if options.out is not None:
        with new_file(options.out) as temporary:
            temporary.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return result


def _other(bundle: Bundle, options: EvaluateOptions) -> Bundle:
    path = Path(options.against)
    if not path.exists():
        raise InputError(f"there is nothing to compare with at {path}; give {FP32}, or the folder of another bundle")
    other = Bundle.open(path)
    if other.id == bundle.id:
        raise InputError(f"{path} and {options.bundle} are the same bundle; give {FP32}, or another bundle")
    if other.model.sample_shape != bundle.model.sample_shape or other.model.conditioning != bundle.model.conditioning:
        raise InputError(
            f"{options.bundle} makes {bundle.model.sample_shape} and {path} {other.model.sample_shape}, or their "
            "conditioning differs: only bundles of the same kind of model can be compared"
        )
    if other.scheduler_config() != bundle.scheduler_config():
        raise InputError(
            f"{options.bundle} and {path} have different schedulers, so the same seeds do not mean the same steps"
        )
    return other


def _classifier(model: ModelSpec, options: EvaluateOptions) -> tuple[FeatureClassifier | None, list[str]]:
    """The classifier whose features are used, or None and why."""
    if options.features is not None:
        found = FeatureClassifier(options.features, threads=options.threads)
        if found.card.input_shape != model.sample_shape or model.sample_kind != "pixels":
            raise InputError(
                f"the classifier in {options.features} takes pictures {list(found.card.input_shape)}, and "
                f"{options.bundle} makes {model.sample_kind} {list(model.sample_shape)}; give one that fits, or none"
            )
        return found, []
    shipped = FeatureClassifier(SHIPPED, threads=options.threads)
    card = shipped.card
    if model.sample_kind == "pixels" and (model.sample_shape, model.num_classes) == (card.input_shape, card.classes):
        return shipped, [f"Features are those of the shipped {card.data} classifier."]
    why = f"the shipped one is for pictures {list(card.input_shape)} of {card.classes} classes"
    return None, [f"Only paired metrics: no classifier was given, and {why}."]


def _open(
    stack: ExitStack, name: str, bundle: Bundle, precision: Literal["int8", "float"], options: EvaluateOptions
) -> _Side:
    session = stack.enter_context(open_session(bundle, options.backend, precision=precision, threads=options.threads))
    backend = dict(session.describe())
    states = options.conditioning_file
    identity = {
        "bundle": bundle.id,
        "precision": precision,
        "backend": {key: str(value) for key, value in backend.items() if key != "threads"},
        "sampler": options.sampler,
        "steps": options.steps,
        "seed": options.seed,
        "guidance": options.guidance,
        "conditioning": None if states is None else hashlib.sha256(states.read_bytes()).hexdigest(),
    }
    card = Side(bundle=str(bundle.path), bundle_id=bundle.id, precision=precision, backend=backend)
    return _Side(f"{name} ({backend['backend']} {precision})", session, SampleCache(identity, options.cache), card)


def _samples(run: _Run, side: _Side, count: int, progress: Progress) -> NDArray[np.float32]:
    """[N, C, H, W] samples of the first ``count`` seeds, made or read in pieces."""

    def make(rows: slice) -> dict[str, NDArray[np.float32]]:
        samples = denoise(
            side.session, run.table, run.seeds(rows), run.model, conditioning=run.shown(rows),
            guidance=run.options.guidance, batch_size=run.options.batch_size,
            description=f"{side.name}: images {rows.start + 1} to {rows.stop} of {count}", progress=progress,
        )  # fmt: skip
        return {"samples": samples}

    shapes = {"samples": run.model.sample_shape}
    parts = [
        side.cache.tensors("samples", rows, shapes, lambda rows=rows: make(rows), progress)["samples"]  # type: ignore[misc]
        for rows in chunks_of(count, sample_cache.CHUNK_IMAGES)
    ]
    return np.concatenate(parts)


def _features(
    classifier: FeatureClassifier, side: _Side, samples: NDArray[np.float32], model: ModelSpec, progress: Progress
) -> Features:
    """The classifier's view of the samples as the pictures that users get: 8 bits for each pixel."""

    def make(rows: slice) -> dict[str, NDArray[np.float32]]:
        pictures = to_pictures(samples[rows], model).astype(np.float32) / 127.5 - 1.0
        channels_first = (
            pictures[:, None] if pictures.ndim == 3 else np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
        )
        return classifier.run(channels_first)._asdict()

    shapes = {"logits": (-1,), "features": (-1,), "spatial": (-1,)}
    name = f"features-{classifier.id[:16]}"
    parts = []
    with progress.task(f"{side.name}: features", len(samples)) as advance:
        for rows in chunks_of(len(samples), sample_cache.CHUNK_IMAGES):
            parts.append(side.cache.tensors(name, rows, shapes, lambda rows=rows: make(rows), progress))  # type: ignore[misc]
            advance(rows.stop - rows.start)
    return Features(*(np.concatenate([part[key] for part in parts]) for key in Features._fields))


def _output_errors(run: _Run, a: StepSession, b: StepSession, progress: Progress) -> list[float]:
    """Per seed, SQNR in dB of B's network output, mean over the steps as in a report; both are fed A's samples."""
    options = run.options
    errors: list[float] = []
    with progress.task("The networks' outputs at each step", options.paired) as advance:
        for rows in chunks_of(options.paired, options.batch_size):
            reference = reference_run(
                a, run.table, run.seeds(rows), run.model, conditioning=run.shown(rows), guidance=options.guidance,
                batch_size=options.batch_size,
            )  # fmt: skip
            outputs = network_output(
                b, run.table, reference.inputs, run.model, reference.conditioning, options.guidance,
                options.batch_size, "",
            )  # fmt: skip
            for i in range(outputs.shape[1]):
                one = slice(i, i + 1)
                errors.append(fmean(sqnr_per_step_db(reference.outputs[:, one], outputs[:, one])))
            advance(rows.stop - rows.start)
    return errors


def _paired_rows(
    model: ModelSpec, a: NDArray[np.float32], b: NDArray[np.float32], errors: list[float]
) -> tuple[tuple[PairedRow, ...], list[str]]:
    found: dict[str, tuple[float, ...]] = {"model output SQNR (dB)": tuple(errors)}
    notes = []
    if model.sample_kind == "latents":
        notes.append("No PSNR and no SSIM: the samples are latents.")
    else:
        found["image PSNR (dB)"] = psnr_per_image_db(a, b)
        if min(model.sample_shape[1:]) >= SSIM_WINDOW:
            found["image SSIM"] = ssim_per_image(a, b)
        else:
            notes.append(f"No SSIM: its window needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW}.")
    rows = []
    for metric, values in found.items():
        interval = mean_interval(values)
        rows.append(
            PairedRow(metric=metric, mean=interval.value, low=interval.low, high=interval.high, worst=min(values))
        )
    return tuple(rows), notes
