"""What of INT8's error is the same in all images, and what the choices against it are worth, on the embedded model.

Finished images of the same seeds from INT8 and from float, DDIM, on OpenVINO. `mean shift` is how much brighter INT8's
images are on average (of 255), `shared %` the part of the squared error that is the same for every image, `Frechet` the
difference of the distances to real images in the features of the shipped classifier, with its interval over the seeds.
`reversed` is that difference with the errors' sign turned round: where the two are opposite, the error has a direction
and is not noise. `weights alone` rounds the weights and leaves activations in float.

    python benchmarks/systematic_error.py --save
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import FIRST_SEED, Case, case, finish, parser, say, write_float, write_graph
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.backends import OpenVinoSession
from qdm_deploy.components.conditioning import conditioning_of
from qdm_deploy.evaluate.feature_classifier import SHIPPED, FeatureClassifier
from qdm_deploy.metrics.distribution import gaussian_of
from qdm_deploy.metrics.paired_distribution import frechet_difference
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import step_table
from qdm_export.float_graph import export_float_graph

WEIGHTS_ALONE = "weights alone"
_UNCORRECTED = {"output_correction": "none"}
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "no output correction": _UNCORRECTED,
    WEIGHTS_ALONE: _UNCORRECTED,
    "bias correction": {"bias_correction": "auto"},
    "bias correction, no output correction": {"bias_correction": "auto", **_UNCORRECTED},
    "squared-error ranges": {"ranges": "mse"},
    "squared-error ranges, no output correction": {"ranges": "mse", **_UNCORRECTED},
    "W4": {"weight_bits": 4},
    "W4, no output correction": {"weight_bits": 4, **_UNCORRECTED},
}


def with_rounded_weights(model: Case, plan: QuantizationPlan) -> Case:
    """The float model with the plan's weights: codes times scales, and the factors k that were folded into them."""
    network = copy.deepcopy(model.checkpoint.unet)
    for layer in plan.quantized:
        weight = network.get_submodule(f"unet.{layer.name}").weight
        rows = (-1, *(1,) * (weight.ndim - 1))
        values = layer.codes.reshape(weight.shape) * layer.weight_scales.astype(np.float64).reshape(rows)
        if layer.inverse_k is not None:
            values *= layer.inverse_k.reshape(1, -1, *(1,) * (weight.ndim - 2))
        weight.data = torch.from_numpy(values.astype(np.float32))
    checkpoint = replace(model.checkpoint, unet=network)
    return replace(model, checkpoint=checkpoint, graph=export_float_graph(checkpoint))


def main() -> None:
    arguments = parser("The part of INT8's error that has a direction, on the embedded model.")
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0, help="calibration seed")
    arguments.add_argument("--plans", default=",".join(PLANS), help="separated by commas")
    given = arguments.parse_args()
    model = case("fashion", samples=16, seed=given.seed << 20)
    spec, table = model.checkpoint.spec, step_table(model.schedule, "ddim", given.steps)
    classifier = FeatureClassifier(SHIPPED)
    real = gaussian_of(classifier.reference.features)

    def images(session: StepSession) -> NDArray[np.float32]:
        seeds = range(FIRST_SEED, FIRST_SEED + given.images)
        with session:
            samples = denoise(session, table, seeds, spec, conditioning=conditioning_of(spec, given.images))
        return np.clip(samples, -1, 1)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        say(f"float: denoising {given.images} seeds")
        expected = images(OpenVinoSession(write_float(model, folder / "float"), precision="f32", mode="throughput"))
        features = classifier.run(expected).features
        for name in given.plans.split(","):
            say(f"{name}: planning, denoising")
            plan, place = model.built(**PLANS[name]), folder / name
            if name == WEIGHTS_ALONE:
                graph, precision = write_float(with_rounded_weights(model, plan), place), "f32"
            else:
                graph, precision = write_graph(model, plan, "openvino", place), "auto"
            found = images(OpenVinoSession(graph, precision=precision, mode="throughput"))  # type: ignore[arg-type]
            error = found.astype(np.float64) - expected
            apart = frechet_difference(real, features, classifier.run(found).features, resamples=300)
            turned = classifier.run(np.clip(expected - error, -1, 1).astype(np.float32)).features
            squared = (error**2).reshape(given.images, -1).mean(axis=1)
            rows.append(
                {
                    "plan": name,
                    "image PSNR": float((10 * np.log10(4 / squared)).mean()),
                    "mean shift": float(127.5 * error.mean()),
                    "shared %": float(100 * (error.mean(axis=0) ** 2).mean() / squared.mean()),
                    "Frechet": apart.value,
                    "low": apart.low,
                    "high": apart.high,
                    "reversed": frechet_difference(real, features, turned, resamples=2).value,
                    "corrected": plan.output_correction is not None,
                }
            )
    columns = ["plan", "image PSNR", "mean shift", "shared %", "Frechet", "low", "high", "reversed", "corrected"]
    extra = {"images": given.images, "steps": given.steps, "sampler": "ddim", "calibration_seed": given.seed}
    finish("systematic-error", columns, rows, extra, save=given.save)


if __name__ == "__main__":
    main()
