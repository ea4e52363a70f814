"""Better weight codes, block by block in execution order, with nothing but calibration inputs.

Each block sees the input that the already reconstructed blocks before it give, and is asked for the output that the
float network gives on its own input, so later blocks make up for what earlier ones got wrong (BRECQ, Li et al. 2021;
Q-Diffusion, Li et al. 2023). A block whose error on rows that were not trained on does not fall keeps nearest
rounding.

Memory: one block's inputs and outputs on at most ``ReconstructOptions.rows`` rows, and the network's weights once more.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdm_calibration.adaround import RoundedLayer
from qdm_calibration.blocks import Batch, Block, blocks_of, run_until
from qdm_calibration.finished_blocks import FinishedBlocks
from qdm_calibration.layers import layer_of, put_layer, sharing_copy
from qdm_calibration.rows import chosen_rows
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Advance, Progress

__all__ = ["ReconstructOptions", "reconstruct", "rounded_twin"]

# The paper's schedule (20 % warm-up, beta from 20 to 2, one lambda) is for 20 000 iterations. In some hundred it leaves
# half of the weights undecided, and rounding those hard loses what was learned; so the pull reaches all weights sooner
# and grows until they are decided.
_WARM_UP = 0.1  # part of the iterations without the regularizer
_BETA_START, _BETA_END = 3.0, 2.0
_GROWTH = 100.0  # of lambda, from the end of the warm-up to the last iteration
_HELD_OUT = 5  # every fifth row judges, and is not trained on
_CHECK_EVERY = 50
_DECIDED = 0.999  # part of all weights with h at 0 or 1 at which nothing more can change


@dataclass(frozen=True)
class ReconstructOptions:
    """How long, on what, and how the rounding is learned.

    Attributes:
        iterations: at most, per block (``Weights.iterations`` of a recipe).
        rows: calibration rows to work on, spread over the timesteps; every fifth of them only judges.
        batch_size: rows per iteration.
        learning_rate: of Adam, for alpha; high, because the iterations are few.
        regularizer: weight of the pull towards 0 or 1 (lambda), to begin with. Both terms are relative, so that it
            means the same in every block: the error to that of nearest rounding, the pull to the number of weights.
        unit: what is learned together: "block", or "layer" for the comparison with it.
        seed: of the choice of rows and batches.
        quantize_inputs: train with activations as deployed rather than in floating point.
        folder: where finished blocks are kept; a run with the same plan, network, calibration set and options goes on
            behind them. None keeps nothing.
    """

    iterations: int
    rows: int = 160
    batch_size: int = 16
    learning_rate: float = 5e-2
    regularizer: float = 1.0
    unit: Literal["block", "layer"] = "block"
    seed: int = 0
    quantize_inputs: bool = False
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.unit not in ("block", "layer"):
            raise InputError(f"the unit of reconstruction {self.unit!r} is not known; choose 'block' or 'layer'")
        if not 1 <= self.iterations <= 100_000:
            raise InputError(f"{self.iterations} iterations per block were asked for; allowed are 1 to 100000")
        if self.rows < 2 or self.batch_size < 1:
            raise InputError(
                f"{self.rows} rows in batches of {self.batch_size} were asked for; give at least 2 rows (one judges) "
                "and batches of at least 1"
            )
        if not (self.learning_rate > 0 and self.regularizer >= 0):
            raise InputError(
                f"learning rate {self.learning_rate} must be positive and regularizer {self.regularizer} not negative"
            )


def reconstruct(
    network: nn.Module,
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    options: ReconstructOptions,
    *,
    progress: Progress = SILENT,
) -> QuantizationPlan:
    """The plan with weight codes that were rounded for the output of their block.

    Args:
        network: the float network; takes (sample, timestep, **conditioning).
        plan: its scales stay, its codes are where the search starts.
        calibration: network inputs.
        options: how.
        progress: where to report.

    Raises:
        InputError: fewer than two calibration rows.
        CalibrationError: a block is never reached.
    """
    rows = chosen_rows(calibration.timestep, options.rows, options.seed)
    if len(rows) < 2:
        raise InputError("the calibration set has one row; reconstruction needs at least 2, one of them to judge")
    twin = rounded_twin(network, plan)
    bins = plan.bin_of_timestep()
    blocks = blocks_of(network, plan, options.unit)
    finished = FinishedBlocks.of("weights", network, plan, calibration, asdict(options), folder=options.folder)
    changed: dict[str, LayerPlan] = {}

    def set_bins(index: NDArray[np.int64]) -> None:
        for layer in layers_in(twin):
            layer.time_bin = torch.from_numpy(bins[calibration.timestep[index]])

    for layer in layers_in(twin):
        layer.quantize_input = options.quantize_inputs
    with progress.task("Reconstructing weights", len(blocks) * options.iterations) as advance:
        for number, block in enumerate(blocks):
            layers = [rounded(twin, item.name) for item in block.layers]
            arrays, errors = finished.read(block.name)
            if arrays is None:
                inputs, _ = run_until(twin, block.name, calibration, rows, before=set_bins)
                _, target = run_until(network, block.name, calibration, rows)
                generator = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
                time_bin = torch.from_numpy(bins[calibration.timestep[rows]])
                work = _Work(layer_of(twin, block.name), layers, inputs, target, time_bin)
                errors = _learn(work, options, generator, advance)
                arrays = {layer.plan.name: layer.numpy_codes() for layer in layers}
                finished.write(block.name, arrays, errors)
            else:
                for layer in layers:
                    layer.codes = torch.from_numpy(arrays[layer.plan.name]).float()
                advance(options.iterations)
            for layer in layers:
                changed[layer.plan.name] = _replanned(layer, block, errors)
    return replace(plan, layers=tuple(changed.get(layer.name, layer) for layer in plan.layers))


def rounded_twin(network: nn.Module, plan: QuantizationPlan) -> nn.Module:
    """A copy of ``network`` with a ``RoundedLayer`` in place of every INT8 layer; float weights are shared."""
    twin = sharing_copy(network)
    for layer in plan.quantized:
        put_layer(twin, layer.name, RoundedLayer(layer_of(twin, layer.name), layer))
    return twin.eval()


def layers_in(module: nn.Module) -> list[RoundedLayer]:
    """The replaced layers of a twin."""
    return [layer for layer in module.modules() if isinstance(layer, RoundedLayer)]


def rounded(twin: nn.Module, name: str) -> RoundedLayer:
    """The replaced layer of that name."""
    layer = layer_of(twin, name)
    if not isinstance(layer, RoundedLayer):
        raise ValueError(f"{name} was not replaced")
    return layer


@dataclass(frozen=True)
class _Work:
    """One block with its data; row i of everything belongs together."""

    module: nn.Module
    layers: Sequence[RoundedLayer]
    inputs: Batch
    target: Tensor
    time_bin: Tensor

    def residual(self, index: Tensor) -> Tensor:
        """Output minus target for those rows."""
        for layer in self.layers:
            layer.time_bin = self.time_bin[index]
        batch = self.inputs.rows(index)
        output: Tensor = self.module(*batch.args, **batch.kwargs)
        return output - self.target[index]

    def error(self, index: Tensor) -> float:
        """Mean squared error on those rows."""
        with torch.no_grad():
            return float(np.mean([float(self.residual(part).square().mean()) for part in torch.split(index, 16)]))


def _learn(work: _Work, options: ReconstructOptions, generator: torch.Generator, advance: Advance) -> dict[str, float]:
    """Round the block's weights; returns the held-out error of nearest rounding and of what it ends with."""
    train, held = held_out(len(work.target))
    nearest, unit = work.error(held), max(work.error(train), 1e-30)
    alphas = [layer.begin() for layer in work.layers]
    weights = sum(alpha.numel() for alpha in alphas)
    optimizer = torch.optim.Adam(alphas, lr=options.learning_rate)
    done = 0
    for iteration in range(options.iterations):
        index = train[torch.randint(len(train), (min(options.batch_size, len(train)),), generator=generator)]
        optimizer.zero_grad()
        loss = work.residual(index).square().mean() / unit
        passed = _passed(iteration, options.iterations)
        if passed is not None:
            beta = _BETA_START + (_BETA_END - _BETA_START) * passed
            strength = options.regularizer / weights * _GROWTH**passed
            for layer in work.layers:
                pull = (1 - (2 * layer.choice() - 1).abs().pow(beta)).sum()
                loss = loss + strength * pull
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done += 1
        advance()
        if passed is not None and done % _CHECK_EVERY == 0 and _decided(work.layers) >= _DECIDED:
            break
    advance(options.iterations - done)
    for layer in work.layers:
        layer.end()
    learned = work.error(held)
    if not learned < nearest:
        for layer in work.layers:
            layer.round_to_nearest()
    return {"nearest": nearest, "learned": learned}


def held_out(rows: int) -> tuple[Tensor, Tensor]:
    """Indices of the rows to train on and of those that judge, every fifth."""
    everything = torch.arange(rows)
    judges = everything % _HELD_OUT == 1
    return everything[~judges], everything[judges]


def _passed(iteration: int, iterations: int) -> float | None:
    """How far the regularizer's schedule is, from 0 to 1; None while it is off."""
    done = iteration / max(iterations - 1, 1)
    return None if done < _WARM_UP else (done - _WARM_UP) / (1 - _WARM_UP)


def _decided(layers: Sequence[RoundedLayer]) -> float:
    with torch.no_grad():
        choices = [layer.choice() for layer in layers]
    return sum(int(((h == 0) | (h == 1)).sum()) for h in choices) / sum(h.numel() for h in choices)


def _replanned(layer: RoundedLayer, block: Block, errors: dict[str, float]) -> LayerPlan:
    plan = layer.plan
    nearest, learned = errors["nearest"], errors["learned"]
    fall = 10 * float(np.log10(max(nearest, 1e-30) / max(learned, 1e-30)))
    if not learned < nearest:
        note = f"rounded to nearest: learned rounding left the held-out error of {block.name} at {fall:+.1f} dB"
        return replace(plan, notes={**plan.notes, "w": note})
    difference = layer.steps - layer.codes
    noise = float((difference * layer.unit).double().square().sum())
    signal = float((layer.steps * layer.unit).double().square().sum())
    return replace(
        plan,
        weight_codes=layer.numpy_codes(),
        weight_sqnr_db=10 * float(np.log10(signal / noise)) if noise else None,
        notes={
            **plan.notes,
            "w": f"learned rounding: the held-out error of {block.name} fell by {fall:.1f} dB against nearest rounding",
        },
    )
