"""Frechet difference of a plan to float on many seeds, by simulation: on a GPU ten thousand take minutes.

Float and the simulation of each target denoise the same seeds in PyTorch; the distance to real pictures is taken in the
features of the shipped classifier, the difference resampled over the seeds. `image PSNR` compares finished images.

    python benchmarks/simulated_frechet.py fashion.qdm --images 10000 --steps 50 --device cuda --save
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import finish, parser, say
from numpy.typing import NDArray

from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.build.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.build.simulation import TorchSession
from qdm_deploy.components.conditioning import conditioning_of
from qdm_deploy.evaluate.feature_classifier import SHIPPED, FeatureClassifier
from qdm_deploy.metrics.distribution import frechet_distance, gaussian_of
from qdm_deploy.metrics.error import psnr_per_image_db
from qdm_deploy.metrics.paired_distribution import frechet_difference
from qdm_deploy.runtime import denoise
from qdm_deploy.samplers import NoiseSchedule, step_table
from qdm_export.step_graph import StepGraph
from qdm_export.unet import load_checkpoint

# Seeds that no calibration uses.
FIRST_SEED = 2**41


def main() -> None:
    arguments = parser("Frechet difference of INT8 to float by simulation, on many seeds.")
    arguments.add_argument("bundle", type=Path, help="a bundle of the embedded model")
    arguments.add_argument("--targets", default="tensorrt", help="separated by commas")
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--batch", type=int, default=500)
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    given = arguments.parse_args()
    checkpoint = load_checkpoint(EMBEDDED_MODEL)
    spec, plan = checkpoint.spec, QuantizationPlan.load(Bundle.open(given.bundle).file("unet/plan.json").parent)
    table = step_table(NoiseSchedule.from_config(checkpoint.scheduler_config), "ddim", given.steps)
    classifier = FeatureClassifier(SHIPPED)
    real = gaussian_of(classifier.reference.features)
    seeds = range(FIRST_SEED, FIRST_SEED + given.images)

    def images(network: Any, name: str) -> tuple[NDArray[np.float32], float]:
        start = time.perf_counter()
        with TorchSession(StepGraph(network, spec).eval(), name, device=given.device) as session:
            samples = denoise(
                session, table, seeds, spec, conditioning=conditioning_of(spec, given.images), batch_size=given.batch
            )
        say(f"{name}: {given.images} images in {time.perf_counter() - start:.0f} s")
        return np.clip(samples, -1, 1), time.perf_counter() - start

    expected, seconds = images(checkpoint.unet, "float")
    features = classifier.run(expected).features
    distance = frechet_distance(real, gaussian_of(features))
    rows: list[dict[str, Any]] = [{"what": "float", "Frechet distance": distance, "seconds": seconds}]
    targets: list[Target] = given.targets.split(",")
    for target in targets:
        found, seconds = images(simulate(checkpoint.unet, plan, target), target)
        seen = classifier.run(found).features
        apart = frechet_difference(real, features, seen, resamples=500)
        psnr = float(np.mean(psnr_per_image_db(expected, found)))
        rows.append(
            {
                "what": target,
                "Frechet distance": frechet_distance(real, gaussian_of(seen)),
                "over float": apart.value,
                "low": apart.low,
                "high": apart.high,
                "image PSNR": psnr,
                "seconds": seconds,
            }
        )
    extra = {"images": given.images, "steps": given.steps, "sampler": "ddim", "classifier": classifier.id}
    if given.device != "cpu":
        extra["gpu"] = torch.cuda.get_device_name()
    columns = ["what", "Frechet distance", "over float", "low", "high", "image PSNR", "seconds"]
    finish("simulated-frechet", columns, rows, extra, save=given.save)


if __name__ == "__main__":
    main()
