"""The numpy reference of one update."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.samplers import apply_step

ONE = np.ones((1, 1, 1, 1), dtype=np.float32)


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def test_update_by_hand() -> None:
    # x0 = clip(2*1 + 3*1, 4) = 4; next = 1*1 + 10*4 + 100*1 + 1000*2.
    following, x0 = apply_step(row(2, 3, 4, 1, 10, 100, 1000), ONE, ONE, ONE, 2 * ONE)
    assert (x0.item(), following.item()) == (4.0, 2141.0)


@pytest.mark.parametrize(("output", "expected"), [(5.0, 1.5), (-5.0, -1.5), (0.25, 0.25)])
def test_clip_is_symmetric(output: float, expected: float) -> None:
    _, x0 = apply_step(row(0, 1, 1.5, 0, 0, 0, 0), ONE, output * ONE, ONE, ONE)
    assert x0.item() == expected


@pytest.mark.parametrize(("share", "expected"), [(-1.0, 2.0), (1.0, 8.0), (0.0, 4.0)])
def test_learned_variance_interpolates_the_logarithm(share: float, expected: float) -> None:
    # Standard deviations 2 and 8, so log-variances 2 ln 2 and 2 ln 8; half-way is 4.
    coefficients = row(0, 0, 1, 0, 0, 0, 1, 2 * np.log(2), 2 * np.log(8))
    output = np.concatenate([ONE, share * ONE], axis=1)
    following, _ = apply_step(coefficients, ONE, output, ONE, ONE)
    assert following.item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([7, 9]))
def test_rows_are_independent_and_inputs_untouched(seed: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, 2, 4, 5)
    coefficients = rng.normal(size=(3, columns)).astype(np.float32)
    coefficients[:, 2] = np.abs(coefficients[:, 2])
    sample, previous_x0, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    output = rng.normal(size=(3, 2 if columns == 7 else 4, 4, 5)).astype(np.float32)
    copies = [array.copy() for array in (coefficients, sample, output, previous_x0, noise)]
    batch = apply_step(coefficients, sample, output, previous_x0, noise)
    for index in range(3):
        alone = apply_step(*(array[index : index + 1] for array in (coefficients, sample, output, previous_x0, noise)))
        assert all(np.array_equal(one[index : index + 1], other) for one, other in zip(batch, alone, strict=True))
    assert all(array.dtype == np.float32 and array.shape == shape for array in batch)
    inputs = (coefficients, sample, output, previous_x0, noise)
    assert all(np.array_equal(array, copy) for array, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("shape", [(1, 8), (2, 7), (7,)])
def test_coefficients_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"coefficients has shape {text}; for 1 samples give \[1, 7 or 9\]"):
        apply_step(np.zeros(shape, dtype=np.float32), ONE, ONE, ONE, ONE)


@pytest.mark.parametrize(("columns", "channels", "needed"), [(7, 2, 1), (9, 1, 2)])
def test_output_channels_that_do_not_fit_are_refused(columns: int, channels: int, needed: int) -> None:
    output = np.zeros((1, channels, 1, 1), dtype=np.float32)
    match = f"model_output has {channels} channels; {columns} coefficients and a sample of 1 channels need {needed}"
    with pytest.raises(ValueError, match=match):
        apply_step(np.zeros((1, columns), dtype=np.float32), ONE, output, ONE, ONE)
