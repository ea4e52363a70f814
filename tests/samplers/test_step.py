"""The numpy reference of one update."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.samplers import COEFFICIENTS, HISTORY, LEARNED_VARIANCE_COEFFICIENTS, apply_step, column

ONE = np.ones((1, 1, 1, 1), dtype=np.float32)
NO_HISTORY = np.zeros((1, HISTORY, 1, 1), dtype=np.float32)


def row(learned: bool = False, **columns: float) -> np.ndarray:
    """One row of coefficients; columns that are not named are zero."""
    names = LEARNED_VARIANCE_COEFFICIENTS if learned else COEFFICIENTS
    return np.array([[columns.get(name, 0.0) for name in names]], dtype=np.float32)


def test_update_by_hand() -> None:
    # x0 = clip(2*1 + 3*1, 4) = 4; next = 1*1 + 10*4 + 100*1 + 1000*2 + 1e4*3 + 1e5*4 + 1e6*5.
    coefficients = row(p=2, q=3, clip=4, a=1, b=10, g=100, d=1000, c0=1e4, c1=1e5, c2=1e6, u=0.5, v=7, w=20)
    history = np.array([3, 4, 5], dtype=np.float32).reshape(1, 3, 1, 1)
    following, x0, next_history = apply_step(coefficients, ONE, ONE, history, 2 * ONE)
    assert (x0.item(), following.item()) == (4.0, 5_432_141.0)
    # push = 0.5*4 + 7*1 + 20*3.
    assert next_history.ravel().tolist() == [69.0, 3.0, 4.0]


def test_the_names_of_the_columns() -> None:
    assert COEFFICIENTS == ("p", "q", "clip", "a", "b", "g", "c0", "c1", "c2", "d", "u", "v", "w")
    assert (*COEFFICIENTS, "log_var_min", "log_var_max") == LEARNED_VARIANCE_COEFFICIENTS
    assert [column(name) for name in LEARNED_VARIANCE_COEFFICIENTS] == list(range(15))
    with pytest.raises(ValueError, match="not in tuple"):
        column("c")


def test_history_keeps_the_channels_of_each_tensor_together() -> None:
    sample = np.arange(2, dtype=np.float32).reshape(1, 2, 1, 1)
    history = np.arange(10, 16, dtype=np.float32).reshape(1, 6, 1, 1)
    coefficients = row(q=1, clip=100, c0=1, u=1)
    following, _, next_history = apply_step(coefficients, sample, sample + 50, history, sample)
    assert following.ravel().tolist() == [10.0, 11.0]
    assert next_history.ravel().tolist() == [50.0, 51.0, 10.0, 11.0, 12.0, 13.0]


@pytest.mark.parametrize(("output", "expected"), [(5.0, 1.5), (-5.0, -1.5), (0.25, 0.25)])
def test_clip_is_symmetric_and_leaves_the_output_itself(output: float, expected: float) -> None:
    following, x0, _ = apply_step(row(q=1, clip=1.5, g=1), ONE, output * ONE, NO_HISTORY, ONE)
    assert (x0.item(), following.item()) == (expected, output)


@pytest.mark.parametrize(("share", "expected"), [(-1.0, 2.0), (1.0, 8.0), (0.0, 4.0)])
def test_learned_variance_interpolates_the_logarithm(share: float, expected: float) -> None:
    # Standard deviations 2 and 8, so log-variances 2 ln 2 and 2 ln 8; half-way is 4.
    coefficients = row(learned=True, clip=1, d=1, log_var_min=2 * np.log(2), log_var_max=2 * np.log(8))
    output = np.concatenate([ONE, share * ONE], axis=1)
    following, _, _ = apply_step(coefficients, ONE, output, NO_HISTORY, ONE)
    assert following.item() == pytest.approx(expected, rel=1e-6)


def test_the_output_that_is_pushed_has_no_variance() -> None:
    output = np.concatenate([3 * ONE, 9 * ONE], axis=1)
    _, _, history = apply_step(row(learned=True, clip=1, v=1, g=1), ONE, output, NO_HISTORY, ONE)
    assert history.ravel().tolist() == [3.0, 0.0, 0.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([13, 15]))
def test_rows_are_independent_and_inputs_untouched(seed: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, 2, 4, 5)
    coefficients = rng.normal(size=(3, columns)).astype(np.float32)
    coefficients[:, column("clip")] = np.abs(coefficients[:, column("clip")])
    sample, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    history = rng.normal(size=(3, 6, 4, 5)).astype(np.float32)
    output = rng.normal(size=(3, 2 if columns == 13 else 4, 4, 5)).astype(np.float32)
    inputs = (coefficients, sample, output, history, noise)
    copies = [array.copy() for array in inputs]
    batch = apply_step(*inputs)
    for index in range(3):
        alone = apply_step(*(array[index : index + 1] for array in inputs))
        assert all(np.array_equal(one[index : index + 1], other) for one, other in zip(batch, alone, strict=True))
    assert all(array.dtype == np.float32 for array in batch)
    assert [array.shape for array in batch] == [shape, shape, (3, 6, 4, 5)]
    assert all(np.array_equal(array, copy) for array, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("shape", [(1, 8), (2, 13), (13,)])
def test_coefficients_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"coefficients has shape {text}; for 1 samples give \[1, 13 or 15\]"):
        apply_step(np.zeros(shape, dtype=np.float32), ONE, ONE, NO_HISTORY, ONE)


@pytest.mark.parametrize(("columns", "channels", "needed"), [(13, 2, 1), (15, 1, 2)])
def test_output_channels_that_do_not_fit_are_refused(columns: int, channels: int, needed: int) -> None:
    output = np.zeros((1, channels, 1, 1), dtype=np.float32)
    match = f"model_output has {channels} channels; {columns} coefficients and a sample of 1 channels need {needed}"
    with pytest.raises(ValueError, match=match):
        apply_step(np.zeros((1, columns), dtype=np.float32), ONE, output, NO_HISTORY, ONE)


def test_a_history_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"history has shape \(1, 1, 1, 1\); for this sample give \(1, 3, 1, 1\)"):
        apply_step(row(), ONE, ONE, ONE, ONE)
