"""FID, Inception score and sFID with the real network and made-up weights; without torch-fidelity, what is said."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.errors import EnvironmentProblem, InputError
from qdm_deploy.evaluate.inception import Inception, real_pictures
from qdm_deploy.pipeline import EvaluateOptions, evaluate

needs_library = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="needs the extra fid (torch-fidelity)")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the right names and shapes."""
    import torch
    from safetensors.torch import save_file
    from torch_fidelity import feature_extractor_inceptionv3 as library

    class Empty(library.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
            return None

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        network = Empty("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten real pictures of the tiny model's size, in folders."""
    generator = np.random.default_rng(0)
    for index in range(10):
        folder = tmp_path / "real" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (10, 10), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "real"


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_the_library_the_message_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"pip install 'qdm-deploy\[fid\]'"):
        Inception(tmp_path / "w.safetensors")


def test_a_folder_without_pictures_is_refused(labels: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").touch()
    with pytest.raises(InputError, match="holds 1 pictures; give a folder of real ones"):
        real_pictures(tmp_path, Bundle.open(labels).pipeline)


@needs_library
@pytest.mark.slow  # Inception-v3 on 299x299 pixels
def test_all_three_scores_are_in_the_result(labels: Path, weights: Path, pictures: Path, tmp_path: Path) -> None:
    asked = EvaluateOptions(
        bundle=labels, cache=tmp_path / "cache", num=12, paired=2, steps=2, backend="onnxruntime", threads=1,
        inception_weights=weights, real_images=pictures,
    )  # fmt: skip
    found = evaluate(asked)
    rows = {row.metric: row for row in found.distribution}
    assert list(rows) == ["FID", "Inception score", "sFID"]
    assert all(row.why_no_interval and row.low is None for row in rows.values())
    assert any(f"beside the 10 pictures in {pictures}" in note for note in found.notes)
    assert found.verdict.startswith("Beside A"), "a row without an interval decides nothing"
    assert evaluate(asked) == found

    inception = Inception(weights)
    real = np.stack(
        [np.asarray(Image.open(path))[None] for path in real_pictures(pictures, Bundle.open(labels).pipeline)]
    )
    assert {name: value.shape for name, value in inception.run(real).items()} == {
        "features": (10, 2048), "logits": (10, 1008), "spatial": (10, 2023),
    }  # fmt: skip


@needs_library
def test_our_frechet_distance_is_the_fid_of_the_library() -> None:
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    from qdm_deploy.metrics.distribution import frechet_distance, gaussian_of

    generator = np.random.default_rng(0)
    sides = [generator.normal(size=(60, 20)) * scale + shift for scale, shift in ((1, 0), (1.5, 0.2))]
    expected = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(side)) for side in sides), False)
    ours = frechet_distance(*(gaussian_of(side) for side in sides))
    assert ours == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


@needs_library
def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "w.safetensors"
    save_file({"fc.bias": np.zeros(3, np.float32)}, path)
    with pytest.raises(InputError, match=r"w\.safetensors does not hold the weights of torch-fidelity's Inception-v3"):
        Inception(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"w\.safetensors cannot be read as safetensors"):
        Inception(path)
