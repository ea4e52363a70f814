"""What a build does where memory is short for the model's size: fewer rows and sessions at a time, the same report."""

from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.building import measure


def test_sessions_are_opened_one_at_a_time_and_batches_shrink(
    quick_build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_TOGETHER_BYTES", 0)
    monkeypatch.setattr(measure, "_SPEED_BYTES", 0)
    monkeypatch.setattr(measure, "_CHECK_BYTES", 0)
    open_now: list[Any] = []
    most = 0

    def counted(kind: Any) -> Any:
        class Counted(kind):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                nonlocal most
                super().__init__(*arguments, **options)
                open_now.append(self)
                most = max(most, len(open_now))

            def close(self) -> None:
                super().close()
                if self in open_now:
                    open_now.remove(self)

        return Counted

    monkeypatch.setattr(measure, "OnnxRuntimeSession", counted(OnnxRuntimeSession))
    monkeypatch.setattr(measure, "OpenVinoSession", counted(OpenVinoSession))
    report = quick_build(tmp_path / "one.qdm").report
    assert most == 1
    assert open_now == []
    assert [(row.backend, row.precision, row.batch) for row in report.speed] == [
        (backend, precision, 1) for backend in ("onnxruntime", "openvino") for precision in ("float", "int8")
    ]
    assert report.speedup is not None
    assert all(row.ok for row in report.checks)
