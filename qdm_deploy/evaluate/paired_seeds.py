"""The first seeds step by step: what B's network and B's samples differ by from A's."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.building.quality import network_output
from qdm_deploy.evaluate.evaluated_side import EvaluatedSide, KnownSamples, Run
from qdm_deploy.evaluate.options import EvaluateOptions
from qdm_deploy.evaluate.sample_cache import SampleCache, Tensors
from qdm_deploy.metrics.paired_steps import StepErrors, energies
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime import denoise

__all__ = ["PairedSeeds"]

# A piece holds four arrays of every step's samples at once: its seeds are as many as fit into this many bytes of one.
_PIECE_BYTES = 64 * 2**20
_PIECE_SEEDS = 16


class PairedSeeds:
    """Step-wise errors of the first ``options.paired`` seeds; kept in the cache, with the samples they end in.

    Args:
        run: what is sampled.
        a: the reference.
        b: the model that is judged.
    """

    def __init__(self, run: Run, a: EvaluatedSide, b: EvaluatedSide) -> None:
        self._run = run
        self._sides = (a, b)
        options: EvaluateOptions = run.options
        self._cache = SampleCache({"pair": [a.identity, b.identity]}, options.cache)
        each = run.table.steps * int(np.prod(run.model.sample_shape)) * 4
        size = max(1, min(_PIECE_SEEDS, _PIECE_BYTES // each))
        self._pieces = [slice(start, min(start + size, options.paired)) for start in range(0, options.paired, size)]

    def measure(self, progress: Progress = SILENT) -> tuple[StepErrors, StepErrors]:
        """Errors of the networks' outputs at A's samples, and of the samples after each step on B's own way.

        Raises:
            QdmError: what a session raises.
        """
        parts: list[Tensors] = []
        steps = self._run.table.steps
        with progress.task("The same seeds through A and B, step by step", self._run.options.paired) as advance:
            for rows in self._pieces:
                parts.append(self._piece(rows, progress))
                advance(rows.stop - rows.start)
        joined = {
            key: np.concatenate([part[key] for part in parts]).astype(np.float64) for key in _energy_shapes(steps)
        }
        return (
            StepErrors(joined["output_signal"], joined["output_noise"]),
            StepErrors(joined["sample_signal"], joined["sample_noise"]),
        )

    def finished(self, side: EvaluatedSide) -> KnownSamples:
        """The samples of one of the two sides, for ``make_samples``; after ``measure``."""
        return _Finished("a" if side is self._sides[0] else "b", self._pieces, self._piece)

    def _piece(self, rows: slice, progress: Progress = SILENT) -> Tensors:
        shape = self._run.model.sample_shape
        shapes = {**_energy_shapes(self._run.table.steps), "a": shape, "b": shape}
        return self._cache.tensors("steps", rows, shapes, lambda: self._make(rows), progress)

    def _make(self, rows: slice) -> Tensors:
        run, options = self._run, self._run.options
        sampling = run.sampling(rows)
        states: list[list[NDArray[np.float32]]] = []
        for side in self._sides:
            passed: list[NDArray[np.float32]] = []
            denoise(
                side.session, sampling, batch_size=options.batch_size,
                on_step=lambda step, sample, passed=passed: passed.append(sample),  # type: ignore[misc]
            )  # fmt: skip
            states.append(passed)
        inputs = np.stack([sampling.start(run.model.sample_shape), *states[0][:-1]])
        outputs = [network_output(side.session, sampling, inputs, options.batch_size, "") for side in self._sides]
        output, sample = energies(outputs[0], outputs[1]), energies(states[0], states[1])
        return {
            "output_signal": output[0], "output_noise": output[1], "sample_signal": sample[0],
            "sample_noise": sample[1], "a": states[0][-1], "b": states[1][-1],
        }  # fmt: skip


class _Finished(KnownSamples):
    def __init__(self, name: str, pieces: list[slice], read: Callable[[slice], Tensors]) -> None:
        self._name, self._pieces, self._read = name, pieces, read

    def first(self, rows: slice) -> NDArray[np.float32] | None:
        found = list(self._parts(rows))
        return np.concatenate(found) if found else None

    def _parts(self, rows: slice) -> Iterator[NDArray[np.float32]]:
        for piece in self._pieces:
            if piece.start < rows.stop and piece.stop > rows.start:
                here = slice(max(piece.start, rows.start) - piece.start, min(piece.stop, rows.stop) - piece.start)
                yield self._read(piece)[self._name][here]


def _energy_shapes(steps: int) -> dict[str, tuple[int, ...]]:
    return {f"{of}_{kind}": (steps,) for of in ("output", "sample") for kind in ("signal", "noise")}
