"""A step graph in numpy: every row by itself, so bits do not depend on the batch; some labels are faults."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ConditioningInput, ModelSpec
from qdm_deploy.runtime.session import StepOutput
from qdm_deploy.samplers import NoiseSchedule

RAISES, NOT_A_NUMBER, NULL = 2, 3, 4
SHAPE = (1, 2, 2)
MODEL = ModelSpec(
    name="fake",
    sample_shape=SHAPE,
    num_train_timesteps=100,
    conditioning=(ConditioningInput(name="class_labels", dtype="int64", shape=()),),
    num_classes=4,
    null_label=NULL,
)
SCHEDULE = NoiseSchedule.from_config(
    {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}
)


class FakeSession:
    """Remembers the rows of each run, and what it was given last."""

    max_batch: int | None = None
    input_names = (
        "sample", "timestep", "coefficients", "noise", "previous_x0", "class_labels", "guidance", "unconditional_row",
        "owner_row",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.seen: dict[str, NDArray[Any]] = {}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        self.seen = {name: values.copy() for name, values in inputs.items()}
        self.rows.append(len(inputs["timestep"]))
        labels, x = inputs["class_labels"], inputs["sample"]
        if (labels == RAISES).any():
            raise RuntimeError("this label cannot be denoised")
        column = (-1, 1, 1, 1)
        e = 0.3 * x + (inputs["timestep"].reshape(column) / 100 + 0.1 * labels.reshape(column)).astype(np.float32)
        free = e[inputs["unconditional_row"]]
        e = free + inputs["guidance"].reshape(column) * (e - free)
        e[labels == NOT_A_NUMBER] = np.nan
        p, q, clip, a, b, c, d = (values.reshape(column) for values in inputs["coefficients"].T)
        x0 = np.maximum(np.minimum(p * x + q * e, clip), -clip)
        following = a * x + b * x0 + c * inputs["previous_x0"] + d * inputs["noise"]
        owner = inputs["owner_row"]
        return StepOutput(following[owner], x0[owner])

    def describe(self) -> dict[str, object]:
        return {"backend": "fake"}

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass
