"""Where calibration rows come from: the sources of PTQ4DM's table 2, and the timesteps of its table 3."""

import dataclasses
from pathlib import Path

import numpy as np
from lab.laboratory import BATCH, Laboratory, Skipped
from numpy.typing import NDArray

from examples.datasets import read_idx
from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.artifacts.calibration_set import CalibrationSet

# (b) compares equal numbers of rows, and one timestep costs a trajectory for each of its rows: half the usual steps.
UNIFORM_STEPS = 10
SINGLE_STEPS = {"first": 0.0, "middle": 0.5, "last": 1.0}


def source_rows(lab: Laboratory, source: str) -> CalibrationSet:
    """As many rows, timesteps and labels as the trajectory has, with x_t of another source.

    Args:
        lab: of one calibration seed.
        source: "trajectory", or "noise", "images" (x_0 of training pictures) or "forward" (q(x_t | x_0) of these).

    Raises:
        Skipped: real images are needed and there are none.
    """
    rows = lab.trajectory()
    if source == "trajectory":
        return rows
    generator = np.random.Generator(np.random.Philox(key=lab.seed))
    noise = generator.standard_normal(rows.sample.shape, dtype=np.float32)
    if source == "noise":
        return dataclasses.replace(rows, sample=noise, provenance={"source": source})
    images = _real_images(lab, rows, generator)
    if source == "forward":
        # DDPM (arXiv 2006.11239), eq. 4
        level = lab.model.schedule.alphas_cumprod[rows.timestep].reshape(-1, 1, 1, 1)
        images = (np.sqrt(level) * images + np.sqrt(1 - level) * noise).astype(np.float32)
    return dataclasses.replace(rows, sample=images, provenance={"source": source})


def _real_images(lab: Laboratory, rows: CalibrationSet, generator: np.random.Generator) -> NDArray[np.float32]:
    """x_0 for every row, [N, C, H, W] in [-1, 1]: one training image for each trajectory, of the trajectory's label."""
    folder = Path(lab.settings.images)
    if not lab.settings.images:
        raise Skipped("needs real images: give --images a folder with the IDX files of Fashion-MNIST")
    paths = [folder / f"train-{name}.gz" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise Skipped(f"needs real images: {folder} has no {' and no '.join(missing)}")
    pictures, labels = map(read_idx, paths)
    if (1, *pictures.shape[1:]) != tuple(lab.model.spec.sample_shape):
        raise Skipped(f"the images in {folder} are {pictures.shape[1:]}, the model's {lab.model.spec.sample_shape}")
    chosen: dict[int, int] = {}
    for label, trajectory in zip(rows.conditioning["class_labels"].tolist(), rows.seed.tolist(), strict=True):
        if trajectory not in chosen:
            chosen[trajectory] = int(generator.choice(np.flatnonzero(labels == label)))
    index = [chosen[trajectory] for trajectory in rows.seed.tolist()]
    return (pictures[index].astype(np.float32) / 127.5 - 1)[:, None]


def timestep_rows(lab: Laboratory, strategy: str) -> CalibrationSet:
    """The same number of rows of the model's own trajectories at "uniform", "ndtc", "first", "middle" or "last".

    "first" is pure noise, "last" the input of the last step of the sampler that calibrates.
    """
    uniform = SamplingPlan(samples=lab.settings.calibration_samples, steps=UNIFORM_STEPS)
    if strategy == "uniform":
        return lab.trajectory(uniform)
    count = len(lab.trajectory(uniform))
    if strategy == "ndtc":
        return lab.trajectory(SamplingPlan(strategy="ndtc", samples=lab.settings.calibration_samples, count=count))
    # One run of as many trajectories as rows serves all three; only their rows are kept.
    steps = {name: round(part * (lab.table.steps - 1)) for name, part in SINGLE_STEPS.items()}

    def three_timesteps() -> CalibrationSet:
        every = collect_calibration_set(
            lab.model.checkpoint.unet, lab.model.checkpoint.denoiser, lab.sampling(count),
            SamplingPlan(samples=count, steps=lab.table.steps), batch_size=BATCH,
        )  # fmt: skip
        return _taken(every, np.isin(every.step, list(steps.values())))

    every = lab.shared("three timesteps", three_timesteps)
    return _taken(every, every.step == steps[strategy])


def _taken(calibration: CalibrationSet, rows: NDArray[np.bool_]) -> CalibrationSet:
    return dataclasses.replace(
        calibration,
        **{name: getattr(calibration, name)[rows] for name in ("sample", "timestep", "seed", "step")},
        conditioning={name: values[rows] for name, values in calibration.conditioning.items()},
    )
