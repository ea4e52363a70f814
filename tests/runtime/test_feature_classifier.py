"""The shipped classifier, and folders that are none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.errors import InputError
from qdm_deploy.evaluate.feature_classifier import SHIPPED, FeatureClassifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "classifier"))


def sign(folder: Path) -> None:
    """Makes the card's hashes right again."""
    card = json.loads((folder / "card.json").read_bytes())
    card["sha256"] = {name: sha256_of(folder / name) for name in card["sha256"]}
    (folder / "card.json").write_text(json.dumps(card))


def test_the_shipped_classifier_is_small_and_knows_real_pictures() -> None:
    classifier = FeatureClassifier(SHIPPED, threads=1)
    assert (SHIPPED / "classifier.onnx").stat().st_size < 600_000
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 6_000_000
    assert classifier.card.test_accuracy > 0.91
    reference = classifier.reference
    assert reference.features.shape == reference.held_out_features.shape == (10_000, 64)
    assert reference.spatial[1].shape == reference.held_out_spatial[1].shape == (392, 392)
    # Two sets of the same kind of picture, but not the same pictures.
    assert not np.array_equal(reference.features, reference.held_out_features)
    assert np.allclose(reference.features.mean(0), reference.held_out_features.mean(0), atol=0.1)


def test_a_picture_has_the_same_features_in_any_batch() -> None:
    classifier = FeatureClassifier(SHIPPED, threads=1)
    images = np.random.default_rng(0).uniform(-1, 1, (260, 1, 28, 28)).astype(np.float32)
    found = classifier.run(images)
    assert (found.logits.shape, found.features.shape, found.spatial.shape) == ((260, 10), (260, 64), (260, 392))
    alone = classifier.run(images[255:256])
    for together, single in zip(found, alone, strict=True):
        assert np.allclose(together[255], single[0], atol=1e-4)
    with pytest.raises(InputError, match=r"pictures of shape \[2, 1, 10, 10\] do not fit .* takes \[N, 1, 28, 28\]"):
        classifier.run(np.zeros((2, 1, 10, 10), np.float32))


def test_a_missing_or_changed_file_is_refused(folder: Path) -> None:
    with (folder / "reference.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"reference\.safetensors is not the file that card\.json describes"):
        FeatureClassifier(folder)
    (folder / "classifier.onnx").unlink()
    with pytest.raises(InputError, match=r"has no classifier\.onnx; give a folder that"):
        FeatureClassifier(folder)
    (folder / "card.json").write_text('{"data": "x"}')
    with pytest.raises(InputError, match=r"card\.json does not describe a classifier"):
        FeatureClassifier(folder)
    (folder / "card.json").unlink()
    with pytest.raises(InputError, match=r"card\.json cannot be read \(No such file"):
        FeatureClassifier(folder)


def test_what_the_card_describes_but_is_no_classifier_is_refused(folder: Path) -> None:
    import onnx

    graph = folder / "classifier.onnx"
    model = onnx.load(graph)
    del model.graph.output[2]
    onnx.save(model, graph)
    sign(folder)
    with pytest.raises(InputError, match="maps images to logits, features; a classifier maps images to logits,"):
        FeatureClassifier(folder)
    graph.write_bytes(b"no graph")
    sign(folder)
    with pytest.raises(InputError, match=r"ONNX Runtime cannot load .*classifier\.onnx"):
        FeatureClassifier(folder)
    shutil.copy(SHIPPED / "classifier.onnx", graph)
    (folder / "reference.safetensors").write_bytes(b"no tensors")
    sign(folder)
    with pytest.raises(InputError, match="does not hold the features of real pictures"):
        FeatureClassifier(folder)
