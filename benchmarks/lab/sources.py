"""Where calibration rows come from: the sources of PTQ4DM's table 2, and the timesteps of its table 3."""

import dataclasses
from pathlib import Path

import numpy as np
from lab.laboratory import BATCH, Laboratory
from lab.row import Skipped
from numpy.typing import NDArray

from examples.datasets import read_idx
from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.artifacts.calibration_set import CalibrationSet

__all__ = ["SINGLE_STEPS", "UNIFORM_STEPS", "one_timestep", "source_rows", "timestep_rows"]

# (b) compares equal numbers of rows, and one timestep costs a trajectory for each of its rows: half the usual steps.
UNIFORM_STEPS = 10
SINGLE_STEPS = {"first": 0.0, "middle": 0.5, "last": 1.0}


def source_rows(lab: Laboratory, source: str) -> CalibrationSet:
    """As many rows, timesteps and labels as the trajectory has, with another x_t: "noise", "images" or "forward".

    Raises:
        Skipped: real images are needed and there are none.
    """
    rows = lab.trajectory()
    generator = np.random.Generator(np.random.Philox(key=lab.seed))
    noise = generator.standard_normal(rows.sample.shape, dtype=np.float32)
    if source == "noise":
        return dataclasses.replace(rows, sample=noise, provenance={"source": source})
    images = real_images(lab, rows, generator)
    if source == "forward":
        # q(x_t | x_0), DDPM (arXiv 2006.11239), eq. 4
        level = lab.model.schedule.alphas_cumprod[rows.timestep].reshape(-1, 1, 1, 1)
        images = (np.sqrt(level) * images + np.sqrt(1 - level) * noise).astype(np.float32)
    return dataclasses.replace(rows, sample=images, provenance={"source": source})


def real_images(lab: Laboratory, rows: CalibrationSet, generator: np.random.Generator) -> NDArray[np.float32]:
    """x_0 for every row, [N, C, H, W] in [-1, 1]: one training image for each trajectory, of the trajectory's label."""
    folder = lab.settings.images
    if folder is None:
        raise Skipped("needs real images: give --images a folder with the IDX files of Fashion-MNIST")
    pictures, labels = _training_images(folder)
    if pictures.shape[1:] != lab.model.spec.sample_shape[1:] or lab.model.spec.sample_shape[0] != 1:
        raise Skipped(f"the images in {folder} are {pictures.shape[1:]}, the model's {lab.model.spec.sample_shape}")
    chosen: dict[int, int] = {}
    wanted = rows.conditioning.get("class_labels")
    for i, trajectory in enumerate(rows.seed.tolist()):
        if trajectory not in chosen:
            pool = np.arange(len(labels)) if wanted is None else np.flatnonzero(labels == wanted[i])
            chosen[trajectory] = int(generator.choice(pool))
    index = [chosen[trajectory] for trajectory in rows.seed.tolist()]
    return (pictures[index].astype(np.float32) / 127.5 - 1)[:, None]


def timestep_rows(lab: Laboratory, strategy: str) -> CalibrationSet:
    """The same number of rows of the model's own trajectories at "uniform", "ndtc", "first", "middle" or "last".

    "first" is pure noise, "last" the input of the last step of the sampler that calibrates.
    """
    uniform = SamplingPlan(samples=lab.settings.samples, steps=UNIFORM_STEPS)
    if strategy == "uniform":
        return lab.trajectory(uniform)
    count = len(lab.trajectory(uniform))
    if strategy == "ndtc":
        return lab.trajectory(SamplingPlan(strategy="ndtc", samples=lab.settings.samples, count=count))
    # One run of as many trajectories as rows serves all three; only their rows are kept.
    every = lab.kept("three timesteps", lambda: _three_timesteps(lab, count))
    return one_timestep(every, round(SINGLE_STEPS[strategy] * (lab.table.steps - 1)))


def _three_timesteps(lab: Laboratory, count: int) -> CalibrationSet:
    # Not by lab.trajectory: of all the steps that uniform draws, three are worth keeping.
    plan = SamplingPlan(samples=count, steps=lab.table.steps)
    every = collect_calibration_set(
        lab.model.checkpoint.unet, lab.model.spec, lab.table, plan, seed=lab.first, batch_size=BATCH
    )
    steps = [round(part * (lab.table.steps - 1)) for part in SINGLE_STEPS.values()]
    return _taken(every, np.isin(every.step, steps))


def one_timestep(calibration: CalibrationSet, step: int) -> CalibrationSet:
    """The rows of one step of the sampler."""
    return _taken(calibration, calibration.step == step)


def _taken(calibration: CalibrationSet, rows: NDArray[np.bool_]) -> CalibrationSet:
    return dataclasses.replace(
        calibration,
        sample=calibration.sample[rows],
        timestep=calibration.timestep[rows],
        seed=calibration.seed[rows],
        step=calibration.step[rows],
        conditioning={name: values[rows] for name, values in calibration.conditioning.items()},
    )


def _training_images(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    paths = [folder / f"train-{name}.gz" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise Skipped(f"needs real images: {folder} has no {' and no '.join(missing)}")
    return read_idx(paths[0]), read_idx(paths[1])
