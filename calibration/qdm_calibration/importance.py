"""How much an error of the network at each step matters for the finished sample, measured.

Later steps correct part of an early error, and how much follows from no formula that knows the sampler alone. So a
trajectory is run beside copies of itself, each of which gets a little noise on the network's output at one step and
runs freely from there. What is found is kept by timestep, so that it holds for other step counts too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.errors import CheckFailed
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.samplers import apply_step, step_noise
from qdm_deploy.samplers.sampling import Sampling

if TYPE_CHECKING:
    from qdm_calibration.collect import Network

__all__ = ["MOST_STEPS", "SEEDS", "StepImportance", "disturbance", "measure_importance"]

# Trajectories that are enough to average over.
SEEDS = 4
MOST_STEPS = 25


@dataclass(frozen=True)
class StepImportance:
    """What an error of the network's output does to the finished sample.

    Attributes:
        timesteps: [N] int64, those that were measured, rising.
        absolute: [N] float64, mean squared change of the finished sample per unit of noise power; mean 1.
        power: [N] float64, mean square of the network's output (its noise prediction alone).
    """

    timesteps: NDArray[np.int64]
    absolute: NDArray[np.float64]
    power: NDArray[np.float64]

    def at(self, timesteps: NDArray[np.int64]) -> NDArray[np.float64]:
        """``absolute`` of the nearest measured timestep, in the shape of ``timesteps``: weights for noise powers."""
        return self.absolute[self._nearest(timesteps)]

    def over(self, edges: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights for noise relative to the signal, of timestep bins with the edges [M + 1]; [M] float64, mean 1.

        The same relative noise is less of an absolute one where the network's output is small, as it is near t = 0.
        """
        each = (self.absolute * self.power)[self._nearest(np.arange(edges[0], edges[-1]))]
        mean = np.add.reduceat(each, edges[:-1] - edges[0]) / np.diff(edges)
        weights: NDArray[np.float64] = mean / mean.mean()
        return weights

    def _nearest(self, timesteps: NDArray[np.int64]) -> NDArray[np.intp]:
        nearest: NDArray[np.intp] = np.abs(self.timesteps - np.asarray(timesteps)[..., None]).argmin(axis=-1)
        return nearest


def measure_importance(
    network: "Network",
    denoiser: Denoiser,
    sampling: Sampling,
    *,
    measured_steps: int = 10,
    relative_size: float = 0.01,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> StepImportance:
    """Disturb single steps of free runs, and compare what comes out.

    A copy is the trajectory itself until its step comes, so it starts there: a run costs about half of
    ``measured_steps`` + 2 trajectories for each seed.

    Args:
        network: the full-precision U-Net.
        denoiser: its shapes and conditions.
        sampling: trajectories to average over; four seeds are enough.
        measured_steps: how many steps to disturb, evenly over the run, the first and the last among them.
        relative_size: RMS of the noise relative to that of the (guided) output; small, so that it acts linearly, and
            far above what float32 rounds.
        batch_size: rows per forward pass.
        progress: where to report.

    Raises:
        InputError: the sampling does not fit the model.
        CheckFailed: a sample became NaN or infinite.
    """
    from qdm_calibration.collect import guided_output

    sampling.check(denoiser.interface)
    table, seeds, shape = sampling.table, list(sampling.seeds), denoiser.sample_shape
    count, channels = len(seeds), shape[0]
    steps = np.unique(np.linspace(0, table.steps - 1, min(measured_steps, table.steps)).round().astype(np.int64))
    # The first rows are the trajectories themselves; row i belongs to seed owner[i].
    owner = originals = np.arange(count)
    x = sampling.start(shape)
    history = np.zeros((count, 3 * channels, *shape[1:]), np.float32)
    sizes = np.zeros((len(steps), count))
    power = np.zeros((len(steps), count))
    with progress.task("Measuring step importance", table.steps) as advance:
        for step, timestep in enumerate(table.timesteps.tolist()):
            added = np.flatnonzero(steps == step)
            if len(added):
                x, history = (np.concatenate([values, values[:count]]) for values in (x, history))
                owner = np.concatenate([owner, originals])
            output = np.concatenate(
                [
                    guided_output(
                        network, x[rows], float(timestep), sampling.conditioning.take(owner[rows]), sampling.guidance
                    )
                    for rows in (slice(start, start + batch_size) for start in range(0, len(x), batch_size))
                ]
            )
            for place in added.tolist():
                own = output[-count:, :channels]
                power[place] = _mean_square(own)
                noise = np.stack([disturbance(seed, step, shape) for seed in seeds])
                # An output of nothing but zeros has no size to be relative to.
                noise *= relative_size * np.sqrt(np.where(power[place] > 0, power[place], 1.0)).reshape(-1, 1, 1, 1)
                output[-count:, :channels] = own + noise.astype(np.float32)
                sizes[place] = _mean_square(noise)
            coefficients = np.repeat(table.coefficients[step : step + 1], len(x), axis=0)
            drawn = step_noise(seeds, step, shape)[owner]
            x, _, history = apply_step(coefficients, x, output, history, drawn)
            advance()
    copies = x[count:].reshape(len(steps), count, *shape)
    change = np.stack([_mean_square(copy - x[:count].astype(np.float64)) for copy in copies])
    mean = (change / sizes).mean(axis=1)
    if not np.isfinite(mean).all():
        raise CheckFailed(
            "a sample became NaN or infinite when the network's output was disturbed at a single step; check the "
            "checkpoint and its scheduler configuration"
        )
    # Where clipping hides every change, no step matters more than another.
    mean = mean / mean.mean() if mean.any() else np.ones(len(mean))
    timesteps = np.floor(table.timesteps[steps]).astype(np.int64)
    rising = np.argsort(timesteps)
    return StepImportance(timesteps[rising], mean[rising], power.mean(axis=1)[rising])


def disturbance(seed: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The unit Gaussian noise on the network's output at one step of one seed's trajectory."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    return generator.standard_normal(shape)


def _mean_square(values: NDArray[Any]) -> NDArray[np.float64]:
    """Of each row, [B] float64."""
    mean: NDArray[np.float64] = (values.astype(np.float64) ** 2).reshape(len(values), -1).mean(axis=1)
    return mean
