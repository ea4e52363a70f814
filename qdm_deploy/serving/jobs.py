"""A request as the engine runs it: checked against the model, with its sampler's table."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.components.sampling import table_for
from qdm_deploy.errors import InputError
from qdm_deploy.samplers import NoiseSchedule, StepTable
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.serving.contract import GenerationRequest

__all__ = ["Job", "JobMaker", "preview_steps"]

_LAST_SEED = 2**63 - 1
# A table of 50 steps is 3 kB, and what clients ask for differs in few ways; but eta is any number they like.
_KEPT_TABLES = 32


@dataclass(frozen=True, eq=False)
class Job:
    """What a request means to the engine.

    Attributes:
        request_id: unique among the jobs that are alive.
        sampling: its images; requests may share a table.
        preview_after: steps (from 1) after which x0 is shown.
        deadline: on the clock that the scheduler is given; None is never.
    """

    request_id: str
    sampling: Sampling
    preview_after: frozenset[int] = frozenset()
    deadline: float | None = None

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.sampling)

    @property
    def steps(self) -> int:
        """Runs of the session that an image takes."""
        return self.sampling.table.steps

    @property
    def rows_each(self) -> int:
        """Rows of one image: 2 when it is guided."""
        return self.sampling.rows_each


class JobMaker:
    """Turns requests into jobs, or refuses them.

    Both processes use it: one to refuse early, the other to run; they need not send each other tables.

    Args:
        model: shapes and conditions.
        schedule: the noise schedule that the model was trained with.
        max_rows: rows of the largest batch.
    """

    def __init__(self, model: PipelineSpec, schedule: NoiseSchedule, max_rows: int) -> None:
        self._model = model
        self._max_rows = max_rows

        def table(sampler: str, steps: int, eta: float) -> StepTable:
            return table_for(model.denoiser, schedule, sampler, steps, eta)

        self._table: Callable[[str, int, float], StepTable] = lru_cache(_KEPT_TABLES)(table)

    def job(self, request: GenerationRequest, deadline: float | None = None) -> Job:
        """The job of a request; ``deadline`` is its own, as a time.

        Raises:
            InputError: the request does not fit the model, or one of its images needs more rows than there are.
        """
        _check_numbers(request)
        sampling = Sampling(
            table=self._table(request.sampler, request.steps, request.eta),
            seeds=request.seeds,
            conditioning=request.conditioning,
            guidance=request.guidance,
            guidance_rescale=request.guidance_rescale,
        )
        sampling.check(self._model.interface)
        self._model.denoiser.check_limits(request.conditioning.own)
        if sampling.rows_each > self._max_rows:
            raise InputError("guidance takes two rows an image and this engine runs one; set guidance to 1")
        after = preview_steps(request.previews, sampling.table.steps)
        return Job(request.request_id, sampling, after, deadline)


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """After which steps (from 1) x0 is shown: ``previews`` of them, evenly, never the last, which is the image."""
    wanted = min(previews, steps - 1)
    return frozenset(round((index + 1) * steps / (wanted + 1)) for index in range(wanted))


def _check_numbers(request: GenerationRequest) -> None:
    """What the samplers and the model do not check themselves."""
    if not request.request_id:
        raise InputError("the request has no id; give it one that no other request has")
    for seed in request.seeds:
        if not 0 <= seed <= _LAST_SEED:
            raise InputError(f"seed {seed} is out of range; choose 0 .. {_LAST_SEED} (2**63 - 1)")
    if request.previews < 0:
        raise InputError(f"{request.previews} previews were asked for; give 0 or more")
    if request.deadline is not None and not request.deadline > 0:
        raise InputError(f"the deadline is {request.deadline} seconds; give more than 0, or none")
