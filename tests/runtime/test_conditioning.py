"""Labels by name or number, text states from a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qdm_deploy.artifacts.model_spec import ConditioningInput, ModelSpec
from qdm_deploy.components.conditioning import conditioning_of, label_number, read_hidden_states
from qdm_deploy.errors import InputError

SHAPE = (1, 8, 8)
LABELS = ConditioningInput(name="class_labels", dtype="int64", shape=())
STATES = ConditioningInput(name="encoder_hidden_states", dtype="float32", shape=(3, 4))
CLASSES = ModelSpec(
    name="shop", sample_shape=SHAPE, num_train_timesteps=10, conditioning=(LABELS,), num_classes=3,
    labels=("Shirt", "Bag", "1"), null_label=3,
)  # fmt: skip
UNNAMED = ModelSpec(name="plain", sample_shape=SHAPE, num_train_timesteps=10, conditioning=(LABELS,), num_classes=12)
TEXT = ModelSpec(name="text", sample_shape=SHAPE, num_train_timesteps=10, conditioning=(STATES,))
NOTHING = ModelSpec(name="nothing", sample_shape=SHAPE, num_train_timesteps=10)


@pytest.mark.parametrize(("label", "number"), [("Shirt", 0), ("bag", 1), ("0", 0), ("2", 2), ("1", 1)])
def test_a_label_is_found_by_number_first_then_by_name(label: str, number: int) -> None:
    assert label_number(CLASSES, label) == number


@pytest.mark.parametrize(
    ("model", "label", "message"),
    [
        (CLASSES, "3", r"unknown label '3'; choose one of Shirt, Bag, 1"),
        (CLASSES, "bagg", r"unknown label 'bagg' \(did you mean Bag\?\)"),
        (CLASSES, "-1", r"unknown label '-1'"),
        (UNNAMED, "12", r"unknown label '12'; plain has the classes 0 to 11"),
        (UNNAMED, "bag", r"unknown label 'bag'; plain has the classes 0 to 11"),
        (NOTHING, "0", r"nothing is not class-conditional; leave --label out"),
        (TEXT, "0", r"text is not class-conditional; leave --label out"),
    ],
)
def test_an_unknown_label_is_refused(model: ModelSpec, label: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        label_number(model, label)
    with pytest.raises(InputError, match=message):
        conditioning_of(model, 2, label=label, hidden_states={"encoder_hidden_states": np.zeros((1, 3, 4))})


def test_classes_take_turns_unless_one_is_asked_for() -> None:
    everything: Any = conditioning_of(CLASSES, 5)
    one: Any = conditioning_of(CLASSES, 2, label="bag")
    assert everything.class_labels.tolist() == [0, 1, 2, 0, 1]
    assert one.class_labels.tolist() == [1, 1]
    assert conditioning_of(NOTHING, 5) is None


def test_states_take_turns(tmp_path: Path) -> None:
    states = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    save_file({"encoder_hidden_states": states, "unconditional_hidden_states": states[0]}, tmp_path / "s")
    given: Any = conditioning_of(TEXT, 3, hidden_states=read_hidden_states(tmp_path / "s"))
    assert given.encoder_hidden_states.dtype == np.float32
    np.testing.assert_array_equal(given.encoder_hidden_states, states[[0, 1, 0]])
    np.testing.assert_array_equal(given.null_hidden_states, states[0])
    assert read_hidden_states(None) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"text is conditioned on encoder_hidden_states \[3, 4\]; give a safetensors file with them"),
        ({"encoder_hidden_states": (2, 4)}, r"encoder_hidden_states has shape \[2, 4\]; text takes \[N, 3, 4\]"),
        ({"encoder_hidden_states": (2, 3, 5)}, r"has shape \[2, 3, 5\]; text takes \[N, 3, 4\]"),
        ({"encoder_hidden_states": (0, 3, 4)}, r"has shape \[0, 3, 4\]; text takes \[N, 3, 4\]"),
        (
            {"encoder_hidden_states": (2, 3, 4), "unconditional_hidden_states": (1, 3, 4)},
            r"unconditional_hidden_states has shape \[1, 3, 4\]; text takes \[3, 4\]",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(values: dict[str, tuple[int, ...]] | None, message: str) -> None:
    states = None if values is None else {name: np.zeros(shape) for name, shape in values.items()}
    with pytest.raises(InputError, match=message):
        conditioning_of(TEXT, 2, hidden_states=states)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"states holds nothing; a conditioning file holds encoder_hidden_states \[N, L, D\]"),
        ({"prompt_embeds": 1.0}, r"states holds prompt_embeds; a conditioning file holds"),
        ({"encoder_hidden_states": 1.0, "extra": 1.0}, r"states holds encoder_hidden_states, extra; a conditioning"),
        ({"encoder_hidden_states": float("nan")}, r"encoder_hidden_states in .*states holds NaN or infinity"),
    ],
)
def test_a_file_with_something_else_is_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    save_file({name: np.full((1, 3, 4), value, np.float32) for name, value in tensors.items()}, tmp_path / "states")
    with pytest.raises(InputError, match=message):
        read_hidden_states(tmp_path / "states")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no conditioning file .*absent"):
        read_hidden_states(tmp_path / "absent")
    (tmp_path / "broken").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match=r"broken cannot be read as safetensors"):
        read_hidden_states(tmp_path / "broken")


def test_turns_are_taken_by_the_index_in_the_run() -> None:
    later: Any = conditioning_of(CLASSES, 3, first=7)
    assert later.class_labels.tolist() == [1, 2, 0]
    states = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    text: Any = conditioning_of(TEXT, 2, first=3, hidden_states={"encoder_hidden_states": states})
    np.testing.assert_array_equal(text.encoder_hidden_states, states[[1, 0]])
