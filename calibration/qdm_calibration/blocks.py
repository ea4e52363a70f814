"""The units of reconstruction, in execution order, and what flows into and out of them.

A residual block or an attention is one unit, because its layers' errors mix before anything else reads them; every
other layer is a unit of its own (BRECQ, Li et al. 2021, section 3.2).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdm_calibration.layers import layer_of
from qdm_calibration.rows import in_batches, run_rows
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import CalibrationError

__all__ = ["Batch", "Block", "blocks_of", "run_until"]

# By name, so that calibration needs no diffusers. The outermost one on a layer's path is its unit.
_UNITS = {"ResnetBlock2D", "Attention", "BasicTransformerBlock"}


@dataclass(frozen=True)
class Block:
    """One unit.

    Attributes:
        name: as layers are named.
        layers: its INT8 layers in execution order.
    """

    name: str
    layers: tuple[LayerPlan, ...]


@dataclass(frozen=True)
class Batch:
    """Arguments of one module for N rows; tensors have the row as first axis, everything else is constant."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def rows(self, index: Tensor) -> "Batch":
        """Those rows, [n] int64."""
        return Batch(
            tuple(_taken(value, index) for value in self.args),
            {name: _taken(value, index) for name, value in self.kwargs.items()},
        )

    @classmethod
    def joined(cls, parts: list["Batch"]) -> "Batch":
        """Consecutive rows as one batch."""
        return cls(
            tuple(_cat(list(values)) for values in zip(*(part.args for part in parts), strict=True)),
            {name: _cat([part.kwargs[name] for part in parts]) for name in parts[0].kwargs},
        )


def blocks_of(
    network: nn.Module,
    plan: QuantizationPlan,
    unit: Literal["block", "layer"] = "block",
) -> tuple[Block, ...]:
    """The units that hold INT8 layers, in execution order of their first layer; "layer": every layer is one."""
    if unit == "layer":
        return tuple(Block(layer.name, (layer,)) for layer in plan.quantized)
    members: dict[str, list[LayerPlan]] = {}
    for layer in plan.quantized:
        members.setdefault(_unit(network, layer.name), []).append(layer)
    return tuple(Block(name, tuple(layers)) for name, layers in members.items())


def run_until(
    network: nn.Module,
    name: str,
    calibration: CalibrationSet,
    rows: NDArray[np.int64],
    *,
    before: Callable[[NDArray[np.int64]], None] | None = None,
    batch_size: int = 32,
) -> tuple[Batch, Tensor]:
    """Input and output of the unit of that name for those rows; what comes behind it is not computed.

    Args:
        network: takes (sample, timestep, **conditioning).
        name: of the unit.
        calibration: the network's inputs.
        rows: which of them, [N] int64.
        before: called with the rows of each batch before they run.
        batch_size: rows per pass.

    Raises:
        CalibrationError: the network does not reach it.
    """
    inputs: list[Batch] = []
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # Modules may write into their input later (in-place activations), but this one has just ended the pass.
        inputs.append(Batch(args, dict(kwargs)))
        outputs.append(output)
        raise _Reached

    handle = layer_of(network, name).register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for index in in_batches(rows, batch_size):
                if before is not None:
                    before(index)
                try:
                    run_rows(network, calibration, index)
                except _Reached:
                    continue
                raise CalibrationError(f"{name} is never reached, so it cannot be reconstructed; check the network")
    finally:
        handle.remove()
    return Batch.joined(inputs), torch.cat(outputs)


class _Reached(Exception):
    """The module has run; the rest of the pass is of no use."""


def _unit(network: nn.Module, name: str) -> str:
    parts = name.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if type(layer_of(network, path)).__name__ in _UNITS:
            return path
    return name


def _taken(value: Any, index: Tensor) -> Any:
    return value[index] if isinstance(value, Tensor) else value


def _cat(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]
