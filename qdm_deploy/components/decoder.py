"""From finished samples to values in [-1, 1] that are pictures: as they are, or through the bundle's decoder; no torch.

One latent sample is decoded at a time, so a picture does not depend on those beside it and memory does not grow with
their number. Pictures above a size are decoded in tiles that overlap and are blended, as diffusers does it.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.pipeline_spec import Decoder, PipelineSpec
from qdm_deploy.backends.onnxruntime.session import session_options
from qdm_deploy.backends.openvino.graph import import_openvino, read_graph
from qdm_deploy.errors import BundleError, CheckFailed, InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime.cpu import available_cores, cpu_flags

__all__ = ["LatentDecoder", "NoDecoder", "SampleDecoder", "decoder_in", "open_decoder", "refuse_latents"]

# Pixels of a picture above which it is decoded in tiles, and the side of a tile: diffusers' for Stable Diffusion.
_WHOLE = 1024 * 1024
_TILE = 512
_OVERLAP = 0.25
_GRAPH = "model.onnx"
# Shapes for which a compiled graph is kept: tiles at the edges are smaller.
_KEPT_SHAPES = 4


class SampleDecoder(ABC):
    """Makes pictures of samples. Not thread-safe."""

    @abstractmethod
    def decode(self, samples: NDArray[np.float32], *, progress: Progress = SILENT) -> NDArray[np.float32]:
        """Pictures of finished samples.

        Args:
            samples: [N, C, h, w] float32, as ``denoise`` gives them.
            progress: advances by one for each picture.

        Returns:
            [N, channels, H, W] float32, in [-1, 1] or a little beyond.

        Raises:
            InputError: the samples do not fit the decoder.
            CheckFailed: the samples or what was made of them hold NaN or infinity.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back the backend's memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class NoDecoder(SampleDecoder):
    """Of a model of pixels: its samples are pictures."""

    def decode(self, samples: NDArray[np.float32], *, progress: Progress = SILENT) -> NDArray[np.float32]:
        """The samples."""
        return samples

    def close(self) -> None:
        """Nothing to give back."""


class LatentDecoder(SampleDecoder):
    """A decoder's graph on a CPU backend, in float32.

    Args:
        graph: its ONNX file.
        spec: what it takes.
        backend: "openvino", or ONNX Runtime for every other one.
        threads: None takes the cores this process may use.
        whole: pixels of a picture above which it is decoded in tiles.
        tile: side of a tile in pixels.

    Raises:
        BundleError: the graph cannot be loaded.
        EnvironmentProblem: the backend is not installed.
    """

    def __init__(
        self,
        graph: Path,
        spec: Decoder,
        *,
        backend: str = "onnxruntime",
        threads: int | None = None,
        whole: int = _WHOLE,
        tile: int = _TILE,
    ) -> None:
        self._spec, self._whole = spec, whole
        self._tile = max(tile // spec.factor, 4)
        opener = _OpenVinoGraph if backend == "openvino" else _OnnxRuntimeGraph
        self._graph: _OpenVinoGraph | _OnnxRuntimeGraph | None = opener(graph, threads or available_cores())

    def decode(self, samples: NDArray[np.float32], *, progress: Progress = SILENT) -> NDArray[np.float32]:
        """Decode one after the other; ``SampleDecoder.decode`` says what it takes and raises."""
        graph = self._graph
        if graph is None:
            raise ValueError("this LatentDecoder is closed")
        spec = self._spec
        if samples.ndim != 4 or samples.shape[1] != spec.latent_channels or samples.dtype != np.float32:
            raise InputError(
                f"latents are {samples.dtype} {list(samples.shape)}; the decoder takes float32 "
                f"[N, {spec.latent_channels}, h, w]"
            )
        _check_finite(samples, "latents are")
        count, _, height, width = samples.shape
        shape = spec.picture_shape((spec.latent_channels, height, width))
        pictures = np.empty((count, *shape), np.float32)
        in_tiles = shape[1] * shape[2] > self._whole
        with progress.task("Decoding latents", count) as advance:
            for index in range(count):
                one = np.ascontiguousarray(samples[index : index + 1])
                pictures[index] = (self._in_tiles(graph, one) if in_tiles else graph.run(one))[0]
                advance()
        _check_finite(pictures, "pictures that the decoder made are")
        return pictures

    def close(self) -> None:
        """Give back the backend's memory."""
        self._graph = None

    def _in_tiles(
        self, graph: "_OpenVinoGraph | _OnnxRuntimeGraph", latents: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Decode in tiles with an overlap of a quarter, blended linearly (diffusers' ``tiled_decode``)."""
        factor, tile = self._spec.factor, self._tile
        stride = int(tile * (1 - _OVERLAP))
        blend, kept = int(tile * factor * _OVERLAP), tile * factor - int(tile * factor * _OVERLAP)
        rows: list[NDArray[np.float32]] = []
        above: list[NDArray[np.float32]] = []
        for top in range(0, latents.shape[2], stride):
            tiles = [
                graph.run(np.ascontiguousarray(latents[:, :, top : top + tile, left : left + tile])).copy()
                for left in range(0, latents.shape[3], stride)
            ]
            row = []
            for column, one in enumerate(tiles):
                if above:
                    _blend(above[column], one, blend, axis=2)
                if column:
                    _blend(tiles[column - 1], one, blend, axis=3)
                row.append(one[:, :, :kept, :kept])
            rows.append(np.concatenate(row, axis=3))
            above = tiles
        return np.concatenate(rows, axis=2)


def open_decoder(bundle: Bundle, backend: str = "onnxruntime", *, threads: int | None = None) -> SampleDecoder:
    """What makes pictures of a bundle's samples.

    Args:
        bundle: an opened bundle.
        backend: the one that the steps run on, not "auto".
        threads: CPU threads; None takes the cores this process may use.

    Raises:
        InputError: the model makes latents, and the bundle has no decoder.
        BundleError: the decoder cannot be loaded.
    """
    refuse_latents(bundle.pipeline)
    if bundle.pipeline.decoder is not None:
        bundle.file(f"{bundle.pipeline.decoder.name}/{_GRAPH}")
    opened = decoder_in(bundle.pipeline, bundle.path, backend, threads=threads)
    return NoDecoder() if opened is None else opened


def decoder_in(
    pipeline: PipelineSpec, root: Path, backend: str = "onnxruntime", *, threads: int | None = None
) -> SampleDecoder | None:
    """The same of a bundle's folder that need not be sealed yet; None where nothing makes pictures of its latents."""
    spec = pipeline.decoder
    if spec is None:
        return NoDecoder() if pipeline.makes == "pixels" else None
    return LatentDecoder(root / spec.name / _GRAPH, spec, backend=backend, threads=threads)


def refuse_latents(model: PipelineSpec) -> None:
    """Refuse a model of whose samples nothing makes pictures.

    Raises:
        InputError: it makes latents, and has no decoder.
    """
    if model.picture_shape is None:
        raise InputError(
            f"the samples of the model {model.name!r} are latents, and its bundle has no decoder to make pictures of "
            "them; build it from a folder with its autoencoder (vae/ or vqvae/), or save them as arrays"
        )


class _OnnxRuntimeGraph:
    def __init__(self, graph: Path, threads: int) -> None:
        import onnxruntime as ort

        options = session_options()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise BundleError(f"ONNX Runtime cannot load {graph}: {error}. Verify the bundle") from error

    def run(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        image: NDArray[np.float32] = self._session.run(["image"], {"latents": latents})[0]
        return image


class _OpenVinoGraph:
    """Compiled anew for each shape, which runs faster than one graph for all."""

    def __init__(self, graph: Path, threads: int) -> None:
        self._core, self._graph = import_openvino().Core(), graph
        self._options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
        }
        try:
            self._model = read_graph(graph, cpu_flags())
        except Exception as error:  # the reader's errors share no base class
            raise BundleError(f"OpenVINO cannot load {graph}: {error}. Verify the bundle") from error
        self._requests: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def run(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        request = self._requests.pop(latents.shape, None) or self._compiled(latents.shape)
        self._requests[latents.shape] = request
        while len(self._requests) > _KEPT_SHAPES:
            self._requests.popitem(last=False)
        image: NDArray[np.float32] = request.infer({"latents": latents})[0]
        return image

    def _compiled(self, shape: tuple[int, ...]) -> Any:
        model = self._model.clone()
        model.reshape({"latents": list(shape)})
        try:
            return self._core.compile_model(model, "CPU", self._options).create_infer_request()
        except RuntimeError as error:
            raise BundleError(f"OpenVINO cannot compile {self._graph} for {list(shape)}: {error}") from error


def _blend(before: NDArray[np.float32], after: NDArray[np.float32], extent: int, *, axis: int) -> None:
    """Fade from the end of one tile into the beginning of the next, in place."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if not extent:
        return
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    share = (np.arange(extent, dtype=np.float32) / extent).reshape(shape)
    first = after[(slice(None),) * axis + (slice(None, extent),)]
    last = before[(slice(None),) * axis + (slice(-extent, None),)]
    first[:] = last * (1 - share) + first * share


def _check_finite(values: NDArray[np.float32], what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3)))
    if len(bad):
        raise CheckFailed(
            f"{len(bad)} of {len(values)} {what} NaN or infinite, the first number {bad[0]}; try --precision float"
        )
