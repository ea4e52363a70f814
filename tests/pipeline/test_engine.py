"""What an engine build refuses before it starts the builder; whole engines are in test_embedded_model.py."""

from pathlib import Path
from typing import Any

import pytest

import qdm_deploy.pipeline
from qdm_deploy.errors import BundleError, InputError
from qdm_deploy.pipeline import build_engine


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("rgb", {}, BundleError, r"no graph for 'tensorrt'; it has: onnxruntime\. Build it with that target"),
        ("labels", {"sm": "6.1"}, InputError, r"cannot build for compute capability '6\.1'"),
        ("labels", {"backend": "tensorrt-rt"}, InputError, r"'tensorrt-rt' is not an engine backend"),
        ("labels", {"profile": (4, 2, 16)}, InputError, r"4.*2.*16"),
    ],
)
def test_an_impossible_engine_is_refused(
    request: pytest.FixtureRequest, name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_engine(request.getfixturevalue(name), **changes)


def test_there_must_be_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere is not a folder"):
        build_engine(tmp_path / "nowhere")


def test_the_package_has_what_it_lists_and_nothing_else() -> None:
    for name in qdm_deploy.pipeline.__all__:
        assert getattr(qdm_deploy.pipeline, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'deploy'"):
        qdm_deploy.pipeline.deploy  # noqa: B018 - the access is the test
