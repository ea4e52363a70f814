"""What the same seeds say about B beside A: step by step, image by image, and to a classifier."""

import numpy as np

from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.evaluate.evaluated_side import EvaluatedSide, Run, sample_pieces
from qdm_deploy.evaluate.feature_classifier import Features
from qdm_deploy.metrics.bootstrap import mean_interval
from qdm_deploy.metrics.error import psnr_per_image_db
from qdm_deploy.metrics.paired_steps import SqnrCurve, StepErrors, sqnr_curve
from qdm_deploy.metrics.ssim import SSIM_WINDOW, ssim_per_image
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.evaluation import PairedRow, StepRow
from qdm_deploy.samplers import StepTable

__all__ = ["image_rows", "label_row", "notes_on_steps", "step_rows"]


def step_rows(
    table: StepTable, output: StepErrors, sample: StepErrors
) -> tuple[tuple[PairedRow, ...], tuple[StepRow, ...]]:
    """The errors of ``PairedSeeds.measure`` in decibels: in two rows, and at each step."""
    outputs, samples = sqnr_curve(output), sqnr_curve(sample)
    seeds = len(output.signal)
    last = sqnr_curve(StepErrors(sample.signal[:, -1:], sample.noise[:, -1:]))
    steps = tuple(
        StepRow(
            timestep=int(timestep),
            output=one.value,
            output_low=one.low,
            output_high=one.high,
            sample=other.value,
            sample_low=other.low,
            sample_high=other.high,
        )
        for timestep, one, other in zip(table.timesteps.tolist(), outputs.steps, samples.steps, strict=True)
    )
    return (
        _of_curve("model output SQNR, mean over steps (dB)", outputs, seeds),
        _of_curve("finished sample SQNR (dB)", last, seeds),
    ), steps


def _of_curve(metric: str, curve: SqnrCurve, seeds: int) -> PairedRow:
    mean = curve.mean
    return PairedRow(metric=metric, seeds=seeds, mean=mean.value, low=mean.low, high=mean.high, worst=curve.worst)


def image_rows(
    run: Run, a: EvaluatedSide, b: EvaluatedSide, count: int, progress: Progress = SILENT
) -> tuple[PairedRow, ...]:
    """PSNR and SSIM of the finished images of the first ``count`` seeds; none for latents."""
    if run.model.makes == "latents":
        return ()
    psnr: list[float] = []
    ssim: list[float] = []
    with progress.task("Comparing images", count) as advance:
        for (rows, one), (_, other) in zip(
            sample_pieces(run, a, count, progress), sample_pieces(run, b, count, progress), strict=True
        ):
            psnr += psnr_per_image_db(one, other)
            if _has_ssim(run.model):
                ssim += ssim_per_image(one, other)
            advance(rows.stop - rows.start)
    return tuple(
        _mean(metric, values) for metric, values in (("image PSNR (dB)", psnr), ("image SSIM", ssim)) if values
    )


def label_row(a: Features, b: Features) -> PairedRow:
    """How often the classifier gives the images of one seed the same label."""
    same = a.logits.argmax(axis=1) == b.logits.argmax(axis=1)
    return _mean("same label", same.astype(np.float64).tolist())


def _mean(metric: str, values: list[float]) -> PairedRow:
    found = mean_interval(values)
    return PairedRow(
        metric=metric, seeds=len(values), mean=found.value, low=found.low, high=found.high, worst=min(values)
    )


def _has_ssim(model: PipelineSpec) -> bool:
    return min(model.sample_shape[1:]) >= SSIM_WINDOW


def notes_on_steps(model: PipelineSpec) -> list[str]:
    """What a reader has to know about rows that are missing."""
    notes = []
    if model.makes == "latents":
        notes.append("No PSNR and no SSIM: the samples are latents.")
    elif not _has_ssim(model):
        notes.append(f"No SSIM: its window needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW}.")
    return notes
