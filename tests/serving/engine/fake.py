"""A step graph in numpy: every row by itself, so bits do not depend on the batch; some labels are faults."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import Denoiser, LabelTable, PipelineSpec
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.runtime.session import StepOutput
from qdm_deploy.samplers import NoiseSchedule, apply_step
from qdm_deploy.samplers.columns import COEFFICIENTS
from qdm_deploy.samplers.conditioning import Conditioning

RAISES, NOT_A_NUMBER, NULL = 2, 3, 4
SHAPE = (1, 2, 2)
INTERFACE = StepInterface.of(SHAPE, [TensorSpec(name="class_labels", dtype="int64")], coefficients=len(COEFFICIENTS))
MODEL = PipelineSpec(
    name="fake",
    components=(
        Denoiser(interface=INTERFACE, num_train_timesteps=100, limits={"class_labels": NULL + 1}),
        LabelTable(input="class_labels", num_classes=NULL, null_label=NULL),
    ),
)
SCHEDULE = NoiseSchedule.from_config(
    {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}
)


def labels(numbers: Sequence[int], null: int = NULL) -> Conditioning:
    """Class labels, an image each, as the encoder of a model with that null label makes them."""
    return Conditioning({"class_labels": np.array(numbers, np.int64)}, {"class_labels": np.array([null], np.int64)})


class FakeSession:
    """Remembers the rows of each run, and what it was given last."""

    max_batch: int | None = None
    interface = INTERFACE

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
        following, x0, history = apply_step(
            inputs["coefficients"], inputs["sample"], e, inputs["history"], inputs["noise"]
        )
        owner = inputs["owner_row"]
        return StepOutput(following[owner], x0[owner], history[owner])

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
