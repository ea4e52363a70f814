"""How many of the last steps run on the float graph, by what they do to the finished image.

Near t = 0 the network's output is a small residue that INT8 hits hardest, and no later step corrects the error. Float
steps cost what the speed-up of INT8 saves, so each must earn its place. What is kept is a timestep and not a number of
steps, so that it holds for every sampler and step count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.backends import MixedSession
from qdm_deploy.building.quality import ReferenceRun
from qdm_deploy.errors import InputError
from qdm_deploy.metrics.error import psnr_per_image_db, sqnr_db
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import FloatSteps, QualityRow
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import StepTable

__all__ = [
    "LEAST_GAIN_DB",
    "Trial",
    "best_count",
    "counts_to_try",
    "float_below_of",
    "steps_below",
    "summary",
    "trial_of",
    "try_counts",
]

LEAST_GAIN_DB = 0.5
_LARGEST_SHARE = 10


@dataclass(frozen=True)
class Trial:
    """Numbers of float steps at the end of a run of ``steps`` steps, in rising order from 0, and what each reaches.

    Attributes:
        steps: of the measured run.
        score_db: for each number the mean PSNR of the finished images, or the SQNR of finished latents.
        automatic: made for a choice; otherwise the number was given.
    """

    steps: int
    score_db: Mapping[int, float]
    automatic: bool


def counts_to_try(steps: int) -> tuple[int, ...]:
    """0, 1, 2, 4, ... up to a tenth of the steps, but 1 at least; a run of one step has none to give away."""
    most = min(max(1, steps // _LARGEST_SHARE), steps - 1)
    counts = [0]
    while (following := max(1, 2 * counts[-1])) <= most:
        counts.append(following)
    return tuple(counts)


def best_count(score_db: Mapping[int, float]) -> int:
    """The smallest number of float steps after which the next one tried gains less than ``LEAST_GAIN_DB``."""
    counts = sorted(score_db)
    for count, following in pairwise(counts):
        if score_db[following] - score_db[count] < LEAST_GAIN_DB:
            return count
    return counts[-1]


def float_below_of(table: StepTable, count: int) -> int | None:
    """The timestep below which the last ``count`` steps of a run lie, half way to the step before them; None for 0.

    Raises:
        InputError: the run has no step left for INT8, or the number is negative.
    """
    if not 0 <= count < table.steps:
        raise InputError(
            f"{count} steps were to run in float, and a run has {table.steps}; choose 0 to {table.steps - 1}"
        )
    if count == 0:
        return None
    first_float, last_int8 = int(table.timesteps[-count]), int(table.timesteps[-count - 1])
    # Rounded up: larger than the one, and not larger than the other.
    return (first_float + last_int8 + 1) // 2


def steps_below(table: StepTable, float_below: int | None) -> int:
    """How many steps of a run are below the timestep."""
    return 0 if float_below is None else int((table.timesteps < float_below).sum())


def try_counts(
    reference: ReferenceRun,
    int8: StepSession,
    floating: StepSession,
    model: ModelSpec,
    *,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> Trial:
    """Finish the reference's seeds with every number of ``counts_to_try``, in its steps, and score each."""
    table, scores = reference.table, {}
    for count in counts_to_try(table.steps):
        below = float_below_of(table, count)
        samples = denoise(
            int8 if below is None else MixedSession(int8, floating, below), table, reference.seeds, model,
            conditioning=reference.conditioning, guidance=reference.guidance, batch_size=batch_size,
            description=f"Trying {count} float steps", progress=progress,
        )  # fmt: skip
        finished = reference.states[-1]
        scores[count] = (
            sqnr_db(finished, samples)
            if model.sample_kind == "latents"
            else fmean(psnr_per_image_db(finished, samples))
        )
    return Trial(table.steps, scores, automatic=True)


def trial_of(row: QualityRow, table: StepTable) -> Trial:
    """What the measurements of a run with a given number of float steps say about them."""
    alone = fmean(row.int8_psnr_db) if row.int8_psnr_db else row.int8_state_sqnr_db[-1]
    reached = row.psnr_mean_db if row.psnr_mean_db is not None else row.state_sqnr_final_db
    # No step of the measured run may be below: then both runs were the same one.
    return Trial(row.steps, {0: alone, steps_below(table, row.float_below): reached}, automatic=False)


def summary(
    trial: Trial, row: QualityRow, float_below: int | None, table: StepTable, speedup: float | None
) -> FloatSteps:
    """What a report says.

    Args:
        trial: what was measured.
        row: of the measured backend.
        float_below: what was chosen.
        table: steps of the sampler that the bundle is built for.
        speedup: float time over INT8 time of one step; None: not measured.
    """
    steps = steps_below(table, float_below)
    counts = tuple(sorted(trial.score_db))
    # A given number is tried against none, so that the larger of the two is the one in use.
    chosen = best_count(trial.score_db) if trial.automatic else counts[-1]
    return FloatSteps(
        automatic=trial.automatic,
        float_below=float_below,
        steps=steps,
        of_steps=table.steps,
        backend=row.backend,
        metric="psnr" if row.psnr_db else "sqnr",
        measured_steps=trial.steps,
        tried=counts,
        score_db=tuple(trial.score_db[count] for count in counts),
        gain_db=trial.score_db[chosen] - trial.score_db[0],
        time_ratio=None if speedup is None else 1 + steps / table.steps * (speedup - 1),
    )
