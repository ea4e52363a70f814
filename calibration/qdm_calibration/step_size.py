"""Activation scales learned block by block, after the weights are final (LSQ, Esser et al. 2020, section 2).

Only s is trained: z, k, r and every weight code stay. Rounding passes gradients straight through; blocks see the float
network's inputs and are asked for its outputs. Scales end as float16, and are kept only where the block's error on rows
that were not trained on falls.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor, nn

from qdm_calibration.adaround import RoundedLayer
from qdm_calibration.blocks import Batch, Block, blocks_of, run_until
from qdm_calibration.finished_blocks import FinishedBlocks
from qdm_calibration.layers import layer_of
from qdm_calibration.ranges import float16_exact
from qdm_calibration.reconstruct import ReconstructOptions, held_out, rounded, rounded_twin
from qdm_calibration.rows import chosen_rows
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.progress import SILENT, Progress

__all__ = ["learn_step_sizes"]

_POWER = 2.4  # PTQ4DM, table 4
_LEARNING_RATE = 4e-4  # of log s, so that one rate suits scales of every size


def learn_step_sizes(
    network: nn.Module,
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    options: ReconstructOptions,
    *,
    progress: Progress = SILENT,
) -> QuantizationPlan:
    """The plan with activation scales learned for the output of their block.

    A tensor that layers of several blocks read keeps its scale. Arguments and errors are those of ``reconstruct``; of
    ``options``, the learning rate and the regularizer are not used.
    """
    rows = chosen_rows(calibration.timestep, options.rows, options.seed)
    twin = rounded_twin(network, plan)
    bins = torch.from_numpy(plan.bin_of_timestep()[calibration.timestep[rows]])
    blocks = blocks_of(network, plan, options.unit)
    finished = FinishedBlocks.of("steps", network, plan, calibration, asdict(options), folder=options.folder)
    scales: dict[str, float] = {}
    notes: dict[str, str] = {}
    with progress.task("Learning activation scales", len(blocks) * options.iterations) as advance:
        for number, block in enumerate(blocks):
            own = _own_groups(block, blocks)
            if not own:
                advance(options.iterations)
                continue
            arrays, errors = finished.read(block.name)
            if arrays is None:
                inputs, target = run_until(network, block.name, calibration, rows)
                layers = [rounded(twin, item.name) for item in block.layers]
                generator = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
                learned, errors = _learn(
                    _block_error(layer_of(twin, block.name), layers, inputs, target, bins),
                    {group: [layer for layer in layers if layer.plan.layer.input_group == group] for group in own},
                    len(rows),
                    options,
                    generator,
                    advance,
                )
                arrays = {group: np.array([value], dtype=np.float32) for group, value in learned.items()}
                finished.write(block.name, arrays, errors)
            else:
                advance(options.iterations)
            if errors["learned"] < errors["before"]:
                fall = 10 / _POWER * math.log10(errors["before"] / max(errors["learned"], 1e-30)) * 2
                for group, value in arrays.items():
                    scales[group] = float(value[0])
                    notes[group] = (
                        f"; learned for the output of {block.name}, whose held-out error fell by {fall:.2f} dB"
                    )
    return replace(
        plan,
        layers=tuple(
            replace(
                layer,
                scale=scales[group],
                notes={**layer.notes, "s": layer.notes.get("s", "") + notes[group]},
            )
            if layer.precision == "int8" and (group := layer.layer.input_group) in scales
            else layer
            for layer in plan.layers
        ),
    )


def _own_groups(block: Block, blocks: tuple[Block, ...]) -> list[str]:
    """Input tensors that no other block's layers read."""
    groups = dict.fromkeys(layer.layer.input_group for layer in block.layers)
    others = {layer.layer.input_group for other in blocks if other is not block for layer in other.layers}
    return [group for group in groups if group not in others]


def _block_error(
    module: nn.Module, layers: list[RoundedLayer], inputs: Batch, target: Tensor, bins: Tensor
) -> Callable[[Tensor], Tensor]:
    def error(index: Tensor) -> Tensor:
        for layer in layers:
            layer.quantize_input = True
            layer.time_bin = bins[index]
        batch = inputs.rows(index)
        output: Tensor = module(*batch.args, **batch.kwargs)
        return (output - target[index]).abs().pow(_POWER).mean()

    return error


def _learn(
    error: Callable[[Tensor], Tensor],
    groups: Mapping[str, list[RoundedLayer]],
    rows: int,
    options: ReconstructOptions,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> tuple[dict[str, float], dict[str, float]]:
    """Scales by group, exact in float16, and the held-out error before and after."""
    train, held = held_out(rows)

    def judged() -> float:
        with torch.no_grad():
            return float(np.mean([float(error(part)) for part in torch.split(held, 16)]))

    start = {group: layers[0].plan.scale for group, layers in groups.items()}
    before = judged()
    logs = {group: torch.zeros((), requires_grad=True) for group in groups}
    optimizer = torch.optim.Adam(list(logs.values()), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations)
    for _ in range(options.iterations):
        index = train[torch.randint(len(train), (min(options.batch_size, len(train)),), generator=generator)]
        for group, layers in groups.items():
            for layer in layers:
                layer.scale = start[group] * logs[group].exp()
        optimizer.zero_grad()
        error(index).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance(1)
    learned = {group: float16_exact(start[group] * math.exp(float(logs[group].detach()))) for group in groups}
    for group, layers in groups.items():
        for layer in layers:
            layer.scale = torch.tensor(learned[group])
    return learned, {"before": before, "learned": judged()}
