"""A request as the engine runs it: checked against the model, with its sampler's table and its rows of conditioning."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.errors import InputError
from qdm_deploy.runtime.rows import Conditioning, conditioning_rows
from qdm_deploy.samplers import NoiseSchedule, StepTable, step_table
from qdm_deploy.serving.contract import GenerationRequest

__all__ = ["Job", "JobMaker", "preview_steps"]

_LAST_SEED = 2**63 - 1
# A table of 50 steps is 2 kB, and what clients ask for differs in few ways; but eta is any number they like.
_KEPT_TABLES = 32


@dataclass(frozen=True, eq=False)
class Job:
    """What a request means to the engine.

    Attributes:
        request_id: unique among the jobs that are alive.
        seeds: one image each.
        table: the sampler's steps; requests may share one.
        guidance: scale of classifier-free guidance.
        rows_each: rows of one image, 2 when it is guided.
        labels: [N * rows_each] int64, or None.
        states: [rows_each, L, D] float32 that all images share, or None.
        preview_after: steps (from 1) after which x0 is shown.
        deadline: on the clock that the scheduler is given; None is never.
    """

    request_id: str
    seeds: tuple[int, ...]
    table: StepTable
    guidance: float = 1.0
    rows_each: int = 1
    labels: NDArray[np.int64] | None = None
    states: NDArray[np.float32] | None = None
    preview_after: frozenset[int] = frozenset()
    deadline: float | None = None

    def conditioning(self, image: int) -> dict[str, NDArray[Any]]:
        """The conditioning inputs of one image's rows."""
        rows: dict[str, NDArray[Any]] = {}
        if self.labels is not None:
            rows["class_labels"] = self.labels[image * self.rows_each : (image + 1) * self.rows_each]
        if self.states is not None:
            rows["encoder_hidden_states"] = self.states
        return rows


class JobMaker:
    """Turns requests into jobs, or refuses them.

    Both processes use it: one to refuse early, the other to run; they need not send each other tables.

    Args:
        model: shapes and conditioning.
        schedule: the noise schedule that the model was trained with.
        max_rows: rows of the largest batch.
    """

    def __init__(self, model: ModelSpec, schedule: NoiseSchedule, max_rows: int) -> None:
        self._model = model
        self._max_rows = max_rows

        def table(sampler: str, steps: int, eta: float) -> StepTable:
            return step_table(schedule, sampler, steps, eta=eta, learned_variance=model.learned_variance)

        self._table: Callable[[str, int, float], StepTable] = lru_cache(_KEPT_TABLES)(table)

    def job(self, request: GenerationRequest, deadline: float | None = None) -> Job:
        """The job of a request; ``deadline`` is its own, as a time.

        Raises:
            InputError: the request does not fit the model, or one of its images needs more rows than there are.
        """
        _check_numbers(request)
        twin = request.guidance != 1.0
        if twin and not self._model.conditional:
            raise InputError(
                f"the model {self._model.name!r} is unconditional, so a guidance scale of {request.guidance} means "
                "nothing; leave it at 1"
            )
        if twin and self._max_rows < 2:
            raise InputError("guidance takes two rows an image and this engine runs one; set guidance to 1")
        table = self._table(request.sampler, request.steps, request.eta)
        labels = self._labels(request, twin)
        return Job(
            request.request_id,
            request.seeds,
            table,
            request.guidance,
            2 if twin else 1,
            labels.get("class_labels"),
            labels.get("encoder_hidden_states"),
            preview_steps(request.previews, table.steps),
            deadline,
        )

    def _labels(self, request: GenerationRequest, twin: bool) -> dict[str, NDArray[Any]]:
        """Labels of all images, and the text states once, because all images share them."""
        states, null = request.encoder_hidden_states, request.null_hidden_states
        for name, value in (("encoder_hidden_states", states), ("null_hidden_states", null)):
            if value is not None and not np.isfinite(value).all():
                raise InputError(f"{name} of the request {request.request_id} holds NaN or infinity")
        if request.class_labels is not None and len(request.class_labels) != len(request.seeds):
            raise InputError(
                f"{len(request.class_labels)} class labels were given for {len(request.seeds)} images; give one each"
            )
        wanted = {item.name for item in self._model.conditioning}
        count = len(request.seeds) if "class_labels" in wanted or request.class_labels is not None else 1
        # Text states are one row here; with labels beside them they would be one for each image, so a view will do.
        shared = None if states is None else np.broadcast_to(states, (count, *states.shape))
        given = Conditioning(
            None if request.class_labels is None else np.array(request.class_labels, np.int64), shared, None, null
        )
        rows = conditioning_rows(self._model, given, count, twin)
        if "encoder_hidden_states" in rows:
            rows["encoder_hidden_states"] = rows["encoder_hidden_states"][: 2 if twin else 1]
        return rows


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """After which steps (from 1) x0 is shown: ``previews`` of them, evenly, never the last, which is the image."""
    wanted = min(previews, steps - 1)
    return frozenset(round((index + 1) * steps / (wanted + 1)) for index in range(wanted))


def _check_numbers(request: GenerationRequest) -> None:
    """What the samplers and the model do not check themselves."""
    if not request.request_id:
        raise InputError("the request has no id; give it one that no other request has")
    if not request.seeds:
        raise InputError("no seeds were given; give one seed for each image")
    for seed in request.seeds:
        if not 0 <= seed <= _LAST_SEED:
            raise InputError(f"seed {seed} is out of range; choose 0 .. {_LAST_SEED} (2**63 - 1)")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(request.guidance)):
            raise InputError(f"the guidance scale is {request.guidance}; give a finite number, 1 for none")
    if request.previews < 0:
        raise InputError(f"{request.previews} previews were asked for; give 0 or more")
    if request.deadline is not None and not request.deadline > 0:
        raise InputError(f"the deadline is {request.deadline} seconds; give more than 0, or none")
