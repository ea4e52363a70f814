"""FID, Inception score and sFID, with torch-fidelity's Inception-v3 and weights from a file that the user has.

torch-fidelity offers the features of FID and of the Inception score. Those of sFID (Nash, Menick, Dieleman and
Battaglia 2021, section 5) are none of its layers: they are read inside its network, the first 7 channels of
``mixed_6/conv`` (``Mixed_6d.branch1x1`` here), 7 x 17 x 17 values, as in the evaluator of guided-diffusion.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.errors import EnvironmentProblem, InputError
from qdm_deploy.evaluate import sample_cache
from qdm_deploy.evaluate.evaluated_side import EvaluatedSide, Run, pictures_of, sample_pieces
from qdm_deploy.evaluate.sample_cache import SampleCache, Tensors, chunks_of
from qdm_deploy.metrics.distribution import frechet_distance, gaussian_of
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.evaluation import DistributionRow

__all__ = ["Inception", "inception_rows", "real_pictures"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_SPATIAL_CHANNELS = 7
_BATCH = 25
_SHAPES = {"features": (2048,), "logits": (1008,), "spatial": (7 * 17 * 17,)}
_NO_INTERVAL = "a draw takes a root of a 2000x2000 matrix for each side, and thousands are needed"


class Inception:
    """torch-fidelity's Inception-v3.

    Args:
        weights: its state as a safetensors file.

    Raises:
        EnvironmentProblem: torch-fidelity is not installed.
        InputError: the file does not hold that network's weights.
    """

    def __init__(self, weights: Path) -> None:
        if find_spec("torch_fidelity") is None or find_spec("torch") is None:
            raise EnvironmentProblem(
                "--inception-weights needs torch-fidelity, which is not installed: pip install 'qdm-deploy[fid]', or "
                "leave the option out"
            )
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from torch_fidelity import feature_extractor_inceptionv3 as library

        try:
            tensors = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{weights} cannot be read as safetensors ({error})") from error
        # Given a path, the library would unpickle it; given none, it would fetch one. So its fetch is ours meanwhile.
        fetch = library.load_state_dict_from_url
        library.load_state_dict_from_url = lambda *_, **__: tensors
        try:
            network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except RuntimeError as error:
            raise InputError(
                f"{weights} does not hold the weights of torch-fidelity's Inception-v3 ({str(error).splitlines()[-1]})"
            ) from error
        finally:
            library.load_state_dict_from_url = fetch
        self._network: Any = network
        self._spatial: list[Any] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, made: self._spatial.append(made))
        self.id = sha256_of(weights)

    def run(self, pictures: NDArray[np.uint8]) -> Tensors:
        """Pictures [N, C, H, W] to float32 features [N, 2048], logits [N, 1008] and spatial [N, 2023]; grey is RGB."""
        import torch

        parts: list[tuple[NDArray[np.float32], ...]] = []
        for rows in chunks_of(len(pictures), _BATCH):
            self._spatial.clear()
            colours = np.broadcast_to(pictures[rows], (len(pictures[rows]), 3, *pictures.shape[2:])).copy()
            with torch.inference_mode():
                features, logits = self._network(torch.from_numpy(colours))
            spatial = self._spatial[0][:, :_SPATIAL_CHANNELS].flatten(1)
            parts.append((features.numpy(), logits.numpy(), spatial.numpy()))
        return dict(zip(_SHAPES, (np.concatenate(column) for column in zip(*parts, strict=True)), strict=True))


def real_pictures(folder: Path, model: PipelineSpec) -> list[Path]:
    """The picture files in a folder and the folders in it, in alphabetical order.

    Raises:
        InputError: there are none, or the model makes none.
    """
    if model.makes != "pixels":
        raise InputError(f"{model.name} makes {model.makes}, which are no pictures; leave --inception-weights out")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if len(found) < 2:
        raise InputError(f"{folder} holds {len(found)} pictures; give a folder of real ones ({', '.join(_SUFFIXES)})")
    return found


def inception_rows(
    inception: Inception,
    run: Run,
    a: EvaluatedSide,
    b: EvaluatedSide,
    real: Sequence[Path],
    progress: Progress = SILENT,
) -> tuple[DistributionRow, ...]:
    """FID, Inception score (10 splits) and sFID of the first ``options.num`` samples of A and B.

    Raises:
        InputError: a real picture cannot be read, or is not of the model's size.
    """
    import torch
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    made = [_joined(inception, _generated(run, side, progress), side.cache, side.name, run.options.num, progress)
            for side in (a, b)]  # fmt: skip
    cache = SampleCache({"pictures": [sha256_of(path) for path in real]}, run.options.cache)
    known = _joined(inception, _read(real, run.model), cache, "real pictures", len(real), progress)
    rows = []
    for metric, key in (("FID", "features"), ("sFID", "spatial")):
        whole = gaussian_of(known[key])
        root = whole.root
        values = [frechet_distance(whole, gaussian_of(side[key]), first_root=root) for side in made]
        rows.append(DistributionRow(metric=metric, a=values[0], b=values[1], why_no_interval=_NO_INTERVAL))
    scores = [float(isc_features_to_metric(torch.from_numpy(side["logits"]))[KEY_METRIC_ISC_MEAN]) for side in made]
    why = "it is a mean over 10 fixed parts of the pictures"
    rows.insert(1, DistributionRow(metric="Inception score", a=scores[0], b=scores[1], why_no_interval=why))
    return tuple(rows)


def _joined(
    inception: Inception,
    pieces: Iterator[tuple[slice, NDArray[np.uint8]]],
    cache: SampleCache,
    name: str,
    count: int,
    progress: Progress,
) -> Tensors:
    parts = []
    with progress.task(f"{name}: Inception-v3", count) as advance:
        for rows, pictures in pieces:

            def make(pictures: NDArray[np.uint8] = pictures) -> Tensors:
                return inception.run(pictures)

            parts.append(cache.tensors(f"inception-{inception.id[:16]}", rows, _SHAPES, make, progress))
            advance(rows.stop - rows.start)
    return {key: np.concatenate([part[key] for part in parts]) for key in _SHAPES}


def _generated(run: Run, side: EvaluatedSide, progress: Progress) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    return (
        (rows, pictures_of(samples, run.model)) for rows, samples in sample_pieces(run, side, run.options.num, progress)
    )


def _read(paths: Sequence[Path], model: PipelineSpec) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    for rows in chunks_of(len(paths), sample_cache.CHUNK_IMAGES):
        yield rows, np.stack([_picture(path, model) for path in paths[rows]])


def _picture(path: Path, model: PipelineSpec) -> NDArray[np.uint8]:
    """[C, H, W], as large as the model's own; resizing would change the score (Parmar, Zhang and Zhu 2022)."""
    channels, height, width = model.sample_shape
    try:
        with Image.open(path) as picture:
            values = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error})") from error
    if values.shape[:2] != (height, width):
        raise InputError(
            f"{path} has {values.shape[1]}x{values.shape[0]} pixels and {model.name} makes {width}x{height}; give real "
            "pictures of that size"
        )
    return values[None] if channels == 1 else np.ascontiguousarray(values.transpose(2, 0, 1))
