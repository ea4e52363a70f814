"""A classifier whose inner features say how alike two sets of pictures are; ONNX Runtime runs it.

Its folder holds ``classifier.onnx``, ``reference.safetensors`` (what it makes of real pictures) and ``card.json``.
``examples/train_classifier.py`` writes one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.errors import InputError
from qdm_deploy.runtime.cpu import available_cores

__all__ = ["SHIPPED", "ClassifierCard", "FeatureClassifier", "Features", "ReferenceFeatures"]

SHIPPED = Path(__file__).parents[1] / "data" / "fashion-classifier"
_GRAPH, _REFERENCE, _CARD = "classifier.onnx", "reference.safetensors", "card.json"
_OUTPUTS = ["logits", "features", "spatial"]
_BATCH = 250

FloatArray = NDArray[np.float32]


class ClassifierCard(BaseModel):
    """``card.json``: what the classifier takes, how well it does, and the hashes of the files beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    input_shape: tuple[int, int, int]
    classes: int
    train_images: int
    test_images: int
    held_out_images: int
    epochs: int
    test_accuracy: float
    sha256: dict[str, str]


class Features(NamedTuple):
    """What the classifier makes of N pictures, float32: logits [N, K], features [N, D], spatial [N, S]."""

    logits: FloatArray
    features: FloatArray
    spatial: FloatArray


@dataclass(frozen=True)
class ReferenceFeatures:
    """What it makes of two disjoint sets of real pictures, neither of which it was trained on; float32.

    Attributes:
        features, held_out_features: [N, D] of each set.
        spatial, held_out_spatial: mean [S] and covariance [S, S] of each set's spatial maps.
    """

    features: FloatArray
    held_out_features: FloatArray
    spatial: tuple[FloatArray, FloatArray]
    held_out_spatial: tuple[FloatArray, FloatArray]


class FeatureClassifier:
    """A classifier's folder, checked and loaded.

    Args:
        folder: holds the three files.
        threads: CPU threads; None takes the cores this process may use.

    Raises:
        InputError: a file is missing, damaged, or not what the card says.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self.folder = folder
        self.card = _read_card(folder)
        for name in (_GRAPH, _REFERENCE):
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}; give a folder that examples/train_classifier.py wrote")
            if sha256_of(folder / name) != self.card.sha256.get(name):
                raise InputError(f"{folder / name} is not the file that {_CARD} describes; train the classifier again")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.log_severity_level = 4
        try:
            self._session: Any = ort.InferenceSession(folder / _GRAPH, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise InputError(f"ONNX Runtime cannot load {folder / _GRAPH}: {error}") from error
        inputs = [item.name for item in self._session.get_inputs()]
        outputs = [item.name for item in self._session.get_outputs()]
        if inputs != ["images"] or sorted(outputs) != sorted(_OUTPUTS):
            raise InputError(
                f"{folder / _GRAPH} maps {', '.join(inputs)} to {', '.join(outputs)}; a classifier maps images to "
                f"{', '.join(_OUTPUTS)}"
            )
        self.reference = _read_reference(folder / _REFERENCE)

    @property
    def id(self) -> str:
        """SHA-256 of the graph."""
        return self.card.sha256[_GRAPH]

    def run(self, images: FloatArray) -> Features:
        """Pictures [N, C, H, W] float32 in [-1, 1] to their features.

        Raises:
            InputError: the pictures are not of the shape that the classifier takes.
        """
        if images.ndim != 4 or images.shape[1:] != self.card.input_shape or len(images) == 0:
            raise InputError(
                f"pictures of shape {list(images.shape)} do not fit the classifier in {self.folder}, which takes "
                f"[N, {', '.join(map(str, self.card.input_shape))}]"
            )
        parts = [
            self._session.run(_OUTPUTS, {"images": images[start : start + _BATCH]})
            for start in range(0, len(images), _BATCH)
        ]
        return Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _read_card(folder: Path) -> ClassifierCard:
    path = folder / _CARD
    try:
        return ClassifierCard.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); give a folder that examples/train_classifier.py wrote"
        ) from error
    except (ValidationError, ValueError) as error:
        raise InputError(f"{path} does not describe a classifier ({error})") from error


def _read_reference(path: Path) -> ReferenceFeatures:
    try:
        values = {name: value.astype(np.float32) for name, value in load_file(path).items()}
        return ReferenceFeatures(
            values["features"],
            values["held_out_features"],
            (values["spatial_mean"], values["spatial_covariance"]),
            (values["held_out_spatial_mean"], values["held_out_spatial_covariance"]),
        )
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} does not hold the features of real pictures ({error})") from error
