"""What an engine build refuses before it starts the builder; whole engines are in test_embedded_model.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qdm_deploy.pipeline
from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.engines.engine import engine_from_onnx
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


def test_float_steps_get_an_engine_too(
    labels: Path, reseal: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds real engines: needs the extra 'tensorrt-rtx'")
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path / "cache"))
    bundle = tmp_path / "mixed.qdm"
    shutil.copytree(labels, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest |= {"schema_version": "1.1", "float_below": 20}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    reseal(bundle)
    built = build_engine(bundle, sm="8.9")
    # What a session asks for, for either graph, is there already.
    opened = Bundle.open(bundle)
    for graph, path in (("tensorrt", built.path), ("float", built.float_path)):
        found = engine_from_onnx(opened.graph(graph), sm="8.9", planned=())
        assert (found.path, found.from_cache) == (path, True)


def test_there_must_be_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere is not a folder"):
        build_engine(tmp_path / "nowhere")


def test_the_package_has_what_it_lists_and_nothing_else() -> None:
    for name in qdm_deploy.pipeline.__all__:
        assert getattr(qdm_deploy.pipeline, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'deploy'"):
        qdm_deploy.pipeline.deploy  # noqa: B018 - the access is the test
