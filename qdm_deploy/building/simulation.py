"""A step session that runs the plan in PyTorch: what a target without a runtime on this machine would compute."""

import copy
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.runtime.session import StepOutput

if TYPE_CHECKING:
    from qdm_export.step_graph import StepGraph

__all__ = ["TorchSession"]


class TorchSession:
    """Runs a ``StepGraph`` module, float or simulated, behind the interface of the compiled backends."""

    def __init__(self, step: "StepGraph", name: str, *, device: str = "cpu") -> None:
        """``step`` in eval mode, which runs on ``device``; ``name`` says what it computes."""
        self._step = step
        if device != "cpu":
            import torch

            # An integer product of 8-bit codes would survive TF32; what stays float in the plan would not.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            # A copy: its weights are often those of the network that it was made from.
            self._step = copy.deepcopy(step).to(device)
        self._name = name
        self._device = device

    @property
    def max_batch(self) -> int | None:
        """No limit of its own."""
        return None

    @property
    def interface(self) -> StepInterface:
        """The step graph's inputs and outputs."""
        return self._step.interface

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """One step."""
        import torch

        with torch.inference_mode():
            names = self.interface.input_names
            given = [torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self._device) for name in names]
            results = dict(zip(self.interface.output_names, self._step(*given), strict=True))
        return StepOutput(**{name: value.cpu().numpy() for name, value in results.items()})

    def describe(self) -> dict[str, object]:
        """What runs."""
        import torch

        return {
            "backend": "simulation",
            "graph": self._name,
            "version": torch.__version__,
            "device": self._device,
            "threads": torch.get_num_threads(),
        }

    def close(self) -> None:
        """Nothing to free."""

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to free."""
