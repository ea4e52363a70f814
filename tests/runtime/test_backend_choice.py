import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts.bundle import Bundle, BundleWriter
from qdm_deploy.artifacts.cache_folder import cache_folder
from qdm_deploy.artifacts.manifest import Compatibility
from qdm_deploy.backends import OnnxRuntimeSession, choose_backend, open_session
from qdm_deploy.backends.choice import Candidate, choose, fastest
from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.progress import Advance
from qdm_deploy.runtime.session import StepOutput

CANDIDATES: list[Candidate] = [("openvino", "int8"), ("onnxruntime", "int8"), ("onnxruntime", "float")]


class Heard:
    """A progress that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        yield lambda steps=1: None

    def say(self, message: str) -> None:
        self.lines.append(message)


class Slowed(OnnxRuntimeSession):
    """A real session that takes longer."""

    def __init__(self, graph: Path, seconds: float) -> None:
        super().__init__(graph, threads=1)
        self.seconds = seconds

    def run(self, inputs: Mapping[str, Any]) -> StepOutput:
        time.sleep(self.seconds)
        return super().run(inputs)


@pytest.fixture(scope="module")
def bundle(labelled: Any, folder: Path) -> Bundle:
    path = folder / "choice.qdm"
    with BundleWriter(path) as writer:
        (writer.root / "unet").mkdir()
        for target in ("onnxruntime", "openvino", "float"):
            shutil.copyfile(labelled.graph, writer.root / "unet" / f"{target}.onnx")
        writer.publish(
            name="tiny",
            pipeline=labelled.spec,
            targets=["onnxruntime", "openvino"],
            compatibility=Compatibility(opset=21, min_runtime="0.1.0"),
            provenance={},
            recipe={},
        )
    return Bundle.open(path)


def test_the_fastest_is_taken_and_ties_go_to_the_first() -> None:
    choice = fastest({("openvino", "int8"): 10.0, ("onnxruntime", "int8"): 9.9, ("onnxruntime", "float"): 30.0})
    assert (choice.backend, choice.precision) == ("openvino", "int8")
    choice = fastest({("openvino", "int8"): 10.0, ("onnxruntime", "int8"): 5.0})
    assert (choice.backend, choice.precision) == ("onnxruntime", "int8")
    assert choice.milliseconds == {"openvino int8": 10.0, "onnxruntime int8": 5.0}
    assert choice.reason == ("onnxruntime int8 is the fastest here: 5.0 ms a step at batch 4; openvino int8 10.0 ms")


def test_int8_that_does_not_pay_is_told() -> None:
    choice = fastest({("onnxruntime", "int8"): 20.0, ("onnxruntime", "float"): 10.0})
    assert choice.precision == "float"
    assert "INT8 does not pay on this machine" in choice.reason
    assert "does not pay" not in fastest({("onnxruntime", "int8"): 10.0, ("onnxruntime", "float"): 20.0}).reason


def test_measured_once_then_remembered(bundle: Bundle, tmp_path: Path) -> None:
    opened: list[Candidate] = []
    delays = {CANDIDATES[0]: 0.05, CANDIDATES[1]: 0.0, CANDIDATES[2]: 0.05}

    def session(candidate: Candidate) -> Slowed:
        opened.append(candidate)
        return Slowed(bundle.graph("float"), delays[candidate])

    first, again, other = Heard(), Heard(), Heard()
    choice = choose(bundle, CANDIDATES, session, ["v1"], folder=tmp_path, progress=first)
    assert (choice.backend, choice.precision) == CANDIDATES[1]
    assert opened == CANDIDATES
    assert len(first.lines) == 2
    assert first.lines[1] == choice.reason
    assert choose(bundle, CANDIDATES, session, ["v1"], folder=tmp_path, progress=again) == choice
    assert opened == CANDIDATES
    assert again.lines == [choice.reason]
    # Another version of a backend, other candidates or another thread count are another question.
    choose(bundle, CANDIDATES, session, ["v2"], folder=tmp_path, progress=other)
    assert opened == CANDIDATES * 2
    choose(bundle, CANDIDATES[1:], session, ["v1"], folder=tmp_path)
    choose(bundle, CANDIDATES, session, ["v1"], threads=7, folder=tmp_path)
    assert len(opened) == 11


@pytest.mark.parametrize("damage", ["{}", "not json", None])
def test_a_damaged_memory_is_measured_again(bundle: Bundle, tmp_path: Path, damage: str | None) -> None:
    def session(candidate: Candidate) -> Slowed:
        return Slowed(bundle.graph("float"), 0.0)

    choice = choose(bundle, CANDIDATES[1:], session, [], folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    if damage is None:  # a choice that is no longer among the candidates
        damage = json.dumps({**json.loads(kept.read_text()), "backend": "tensorrt"})
    kept.write_text(damage)
    again = choose(bundle, CANDIDATES[1:], session, [], folder=tmp_path)
    assert set(again.milliseconds) == set(choice.milliseconds)
    assert json.loads(kept.read_text())["backend"] == "onnxruntime"


def test_a_machine_that_cannot_remember_still_chooses(bundle: Bundle, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    choice = choose(
        bundle, CANDIDATES[1:], lambda candidate: Slowed(bundle.graph("float"), 0.0), [], folder=blocked / "choices"
    )
    assert choice.backend == "onnxruntime"


def test_a_user_without_a_home_chooses_and_is_told_where_caches_need_a_place(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "QDM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    choice = choose(bundle, CANDIDATES[1:], lambda candidate: Slowed(bundle.graph("float"), 0.0), [])
    assert choice.backend == "onnxruntime"
    with pytest.raises(EnvironmentProblem, match="QDM_CACHE_DIR"):
        cache_folder("engines")


def test_a_folder_in_the_place_of_a_memory_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    def session(candidate: Candidate) -> Slowed:
        return Slowed(bundle.graph("float"), 0.0)

    choose(bundle, CANDIDATES[1:], session, [], folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.unlink()
    kept.mkdir()
    assert choose(bundle, CANDIDATES[1:], session, [], folder=tmp_path).backend == "onnxruntime"
    assert kept.is_dir()


def test_open_session_chooses_among_what_there_is(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path))
    assert choose_backend(bundle, "onnxruntime", "int8") == ("onnxruntime", "int8")
    assert not os.listdir(tmp_path)
    backend, precision = choose_backend(bundle, "onnxruntime", "auto", threads=1)
    (kept,) = (tmp_path / "choices").iterdir()
    assert set(json.loads(kept.read_text())["milliseconds"]) == {"onnxruntime int8", "onnxruntime float"}
    with open_session(bundle, "onnxruntime", precision="auto", threads=1) as session:
        known = session.describe()
    graph = bundle.graph("float" if precision == "float" else backend)
    assert known["graph_sha256"] == next(
        entry.sha256 for entry in bundle.manifest.files if bundle.path / entry.path == graph
    )
