"""Which of two sets of weights of the demo model makes pictures closer to real ones.

Both float models denoise the same seeds (DDIM, on OpenVINO, or in PyTorch on a GPU); the Frechet distance is taken in
the features of the shipped Fashion-MNIST classifier, its difference resampled over the seeds.

    python benchmarks/demo_weights.py OLD_MODEL_FOLDER --save
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench import finish, parser, say
from made_pictures import features_of_made

from qdm_deploy.backends import OpenVinoSession
from qdm_deploy.build.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.build.simulation import TorchSession
from qdm_deploy.evaluate.feature_classifier import SHIPPED, FeatureClassifier, Features
from qdm_deploy.metrics.distribution import frechet_distance, gaussian_of
from qdm_deploy.metrics.paired_distribution import frechet_difference
from qdm_deploy.samplers import NoiseSchedule, step_table
from qdm_export.float_graph import export_float_graph, save_graph
from qdm_export.step_graph import StepGraph
from qdm_export.targets import emit_float
from qdm_export.unet import load_checkpoint


def made_by(model: Path, count: int, steps: int, classifier: FeatureClassifier, device: str) -> tuple[Features, str]:
    """The classifier's view of ``count`` pictures, and the digest of the weights."""
    checkpoint = load_checkpoint(model)
    table = step_table(NoiseSchedule.from_config(checkpoint.scheduler_config), "ddim", steps)
    if device != "cpu":
        with TorchSession(StepGraph(checkpoint.unet, checkpoint.spec).eval(), "float", device=device) as session:
            return features_of_made(session, table, checkpoint.spec, count, classifier, 500), checkpoint.weights_sha256
    with tempfile.TemporaryDirectory() as folder:
        save_graph(emit_float(export_float_graph(checkpoint)), Path(folder) / "float.onnx", weights="float.data")
        with OpenVinoSession(Path(folder) / "float.onnx", precision="f32", mode="throughput") as compiled:
            return features_of_made(compiled, table, checkpoint.spec, count, classifier), checkpoint.weights_sha256


def main() -> None:
    arguments = parser("Frechet distance of the embedded weights beside that of others.")
    arguments.add_argument("other", type=Path, help="diffusers folder of the weights to compare with")
    arguments.add_argument("--images", type=int, default=2000)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    given = arguments.parse_args()
    classifier = FeatureClassifier(SHIPPED)
    real = gaussian_of(classifier.reference.features)
    labels = np.arange(given.images) % classifier.card.classes
    rows: list[dict[str, Any]] = []
    features = {}
    for name, model in (("other", given.other), ("embedded", EMBEDDED_MODEL)):
        say(f"{name}: denoising {given.images} seeds")
        found, digest = made_by(model, given.images, given.steps, classifier, given.device)
        features[name] = found.features
        rows.append(
            {
                "weights": name,
                "sha256": digest[:12],
                "Frechet distance": frechet_distance(real, gaussian_of(found.features)),
                "asked-for label": float((found.logits.argmax(axis=1) == labels).mean()),
            }
        )
    difference = frechet_difference(real, features["other"], features["embedded"], resamples=500)
    extra = {"images": given.images, "steps": given.steps, "sampler": "ddim", "classifier": classifier.id}
    extra |= {"embedded minus other": [difference.value, difference.low, difference.high]}
    print(f"embedded - other: {difference.value:.2f} ({difference.low:.2f} to {difference.high:.2f})")
    finish("demo-weights", ["weights", "sha256", "Frechet distance", "asked-for label"], rows, extra, save=given.save)


if __name__ == "__main__":
    main()
