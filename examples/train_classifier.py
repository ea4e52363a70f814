"""Train the small Fashion-MNIST classifier whose features `qdm-deploy evaluate` compares pictures in.

    python examples/train_classifier.py FOLDER_WITH_IDX_FILES OUT_FOLDER

Trains on the first 50,000 training pictures only: the other 10,000 and the 10,000 test pictures stay unseen, so that
the distance between these two real sets is a fair floor. Needs the build extra (torch, onnx).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from datasets import read_pictures
from safetensors.numpy import save_file
from torch import nn

from qdm_deploy.artifacts.files import sha256_of

HELD_OUT = 10_000
FEATURES = 64
SPATIAL_CHANNELS = 8


def read_set(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 1, 28, 28] float32 in [-1, 1] and labels [N] int64; ``name`` is train or t10k."""
    pictures, labels = read_pictures(folder, size=28, name=name)
    return pictures.float() / 127.5 - 1.0, labels


class Classifier(nn.Module):
    """Three convolutions and two linear layers; returns logits, features and a spatial map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2))
        self.third = nn.Sequential(nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.features = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 9, FEATURES), nn.SiLU())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images [B, 1, 28, 28] to logits [B, 10], features [B, 64], spatial [B, 7 * 7 * 8].

        The spatial map is the third convolution's, with each 8 neighbouring channels averaged into one.
        """
        maps = self.third(self.second(self.first(images)))
        features = self.features(maps)
        spatial = maps.reshape(-1, SPATIAL_CHANNELS, 64 // SPATIAL_CHANNELS, 7, 7).mean(dim=2).flatten(1)
        return self.head(self.dropout(features)), features, spatial


def train(model: Classifier, images: torch.Tensor, labels: torch.Tensor, epochs: int, batch: int = 128) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    start = time.perf_counter()
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for index in range(len(images) // batch):
            rows = order[index * batch : (index + 1) * batch]
            pictures = images[rows]
            if torch.rand((), generator=generator) < 0.5:
                pictures = pictures.flip(3)
            loss = nn.functional.cross_entropy(model(pictures)[0], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / (len(images) // batch):.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def run_onnx(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"images": images[i : i + 500].numpy()}) for i in range(0, len(images), 500)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train-images-idx3-ubyte.gz and its three companions")
    parser.add_argument("out", type=Path, help="folder to write the classifier to")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images, labels = read_set(options.data, "train")
    test_images, test_labels = read_set(options.data, "t10k")
    model = Classifier()
    train(model, images[:-HELD_OUT], labels[:-HELD_OUT], options.epochs)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "classifier.onnx"
    program = torch.onnx.export(
        model,
        (test_images[:2],),
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["logits", "features", "spatial"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    # The exporter writes source lines and paths of the machine that trained into every node.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.graph.metadata_props.clear()
    program.model.metadata_props.clear()
    program.save(str(path), external_data=False)

    logits, features, spatial = run_onnx(path, test_images)
    accuracy = float((logits.argmax(1) == test_labels.numpy()).mean())
    _, held_features, held_spatial = run_onnx(path, images[-HELD_OUT:])
    reference = {"features": features.astype(np.float16), "held_out_features": held_features.astype(np.float16)}
    for name, values in (("spatial", spatial), ("held_out_spatial", held_spatial)):
        reference[f"{name}_mean"] = values.mean(axis=0, dtype=np.float64).astype(np.float32)
        reference[f"{name}_covariance"] = np.cov(values.astype(np.float64), rowvar=False).astype(np.float32)
    save_file(reference, options.out / "reference.safetensors")
    card = {
        "data": "Fashion-MNIST",
        "input_shape": [1, 28, 28],
        "classes": 10,
        "train_images": len(images) - HELD_OUT,
        "test_images": len(test_images),
        "held_out_images": HELD_OUT,
        "epochs": options.epochs,
        "test_accuracy": accuracy,
        "sha256": {name: sha256_of(options.out / name) for name in ("classifier.onnx", "reference.safetensors")},
    }
    (options.out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(f"test accuracy {accuracy:.4f}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
