"""Gaussian noise as a pure function of (seed, step, position): no generator state, no batch, no order.

The same seed therefore gives the same image on every backend, alone or in any batch. The raw bits are Philox-4x64-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) keyed by the seed, with the use in the highest
word of the counter: 0 for the initial noise, i + 1 for step i; numpy keeps the bits of its bit generators fixed. The
normals are our own Box-Muller, because numpy does not promise to keep the stream of ``Generator.standard_normal``. It
runs in float64, so that a math library that differs in its last bit changes a float32 result about once in 10**8
values.
"""

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError

__all__ = ["initial_noise", "step_noise"]

_LAST_SEED = 2**63 - 1
_INITIAL_SLOT = 0


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The state that sampling starts from.

    Args:
        seeds: One seed per sample, 0 .. 2**63 - 1.
        shape: [C, H, W] of one sample.

    Returns:
        [B, C, H, W] float32 standard normal, owned by the caller. Row i depends on ``seeds[i]`` and ``shape`` alone.

    Raises:
        InputError: No seeds, or a seed out of range.
        ValueError: ``shape`` holds a size below 1.
    """
    return _noise(seeds, _INITIAL_SLOT, shape)


def step_noise(seeds: Sequence[int], step: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The noise that step ``step`` of the table adds.

    Args:
        seeds: One seed per sample, 0 .. 2**63 - 1.
        step: Index of the step in the table, from 0.
        shape: [C, H, W] of one sample.

    Returns:
        [B, C, H, W] float32 standard normal, owned by the caller; independent of ``initial_noise`` and other steps.

    Raises:
        InputError: No seeds, or a seed out of range.
        ValueError: ``step`` is negative, or ``shape`` holds a size below 1.
    """
    if step < 0:
        raise ValueError(f"step={step} is negative; give the index of the step in the table, from 0")
    return _noise(seeds, _INITIAL_SLOT + 1 + step, shape)


def _noise(seeds: Sequence[int], slot: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    if min(shape) < 1:
        raise ValueError(f"shape={shape} holds a size below 1; give [C, H, W] of one sample")
    if len(seeds) == 0:
        raise InputError("no seeds were given; give one seed per sample")
    for seed in seeds:
        if not 0 <= seed <= _LAST_SEED:
            raise InputError(f"seed {seed} is out of range; choose 0 .. {_LAST_SEED} (2**63 - 1)")
    noise = np.empty((len(seeds), math.prod(shape)), dtype=np.float32)
    # One sample at a time: its float64 temporaries stay in the cache, and memory does not grow with the batch.
    for row, seed in zip(noise, seeds, strict=True):
        _fill_normal(row, operator.index(seed), slot)
    return noise.reshape(len(seeds), *shape)


def _fill_normal(out: NDArray[np.float32], seed: int, slot: int) -> None:
    pairs = (out.size + 1) // 2
    key = np.array([seed, 0], dtype=np.uint64)
    counter = np.array([0, 0, 0, slot], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(2 * pairs) >> np.uint64(11)
    uniform = bits * 2.0**-53
    # In (0, 1], so that the logarithm is finite.
    radius = np.sqrt(-2.0 * np.log(uniform[0::2] + 2.0**-53))
    angle = 2.0 * math.pi * uniform[1::2]
    out[0::2] = radius * np.cos(angle)
    out[1::2] = (radius * np.sin(angle))[: out.size // 2]
