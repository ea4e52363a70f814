"""A small bundle, a way to forge its manifest, and disks that are full, read-only or another user's."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts import BundleWriter, Compatibility, Manifest, PipelineSpec, canonical_json
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.step_interface import StepInterface

FILES = {
    "model_index.json": b"{}",
    "scheduler/scheduler_config.json": b'{"num_train_timesteps": 1000}',
    "selftest/inputs.safetensors": b"inputs",
    "unet/float.onnx": b"float graph",
    "unet/onnxruntime.onnx": b"int8 graph",
    "unet/weights.bin": b"\x00\x7f\x80\xff",
}
DENOISER = Denoiser(interface=StepInterface.of((3, 8, 8), coefficients=13), num_train_timesteps=1000)
PIPELINE = PipelineSpec(name="tiny", components=(DENOISER,))


def fill(root: Path, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def publish(writer: BundleWriter, **changes: Any) -> Manifest:
    arguments: dict[str, Any] = {
        "name": "tiny",
        "pipeline": PIPELINE,
        "targets": ("onnxruntime",),
        "compatibility": Compatibility(opset=21, min_runtime="0.1"),
        "provenance": {"source": "a test", "samples": [1, 2.5, None, True]},
        "recipe": {},
    }
    return writer.publish(**(arguments | changes))


@pytest.fixture
def fill_bundle() -> Callable[..., None]:
    return fill


@pytest.fixture
def publish_bundle() -> Callable[..., Manifest]:
    return publish


@pytest.fixture
def write_bundle() -> Callable[..., Path]:
    """Writes a good bundle to a path; keywords are those of ``publish`` and ``force``."""

    def write(path: Path, *, force: bool = False, files: dict[str, bytes] = FILES, **changes: Any) -> Path:
        with BundleWriter(path, force=force) as writer:
            fill(writer.root, files)
            publish(writer, **changes)
        return path

    return write


@pytest.fixture
def bundle(tmp_path: Path, write_bundle: Callable[..., Path]) -> Path:
    return write_bundle(tmp_path / "tiny.qdm")


@pytest.fixture
def forge() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Edits a manifest as somebody would who knows the format: with the right bundle_id and the right layout."""

    def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
        path = bundle / "manifest.json"
        document = json.loads(path.read_bytes())
        del document["bundle_id"]
        edit(document)
        document["bundle_id"] = hashlib.sha256(canonical_json(document)).hexdigest()
        text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        path.write_bytes(text.encode())

    return change


@pytest.fixture
def foreign_folder() -> Iterator[tuple[Path, Callable[[], AbstractContextManager[None]]]]:
    """A folder that may not be written, with a block in which that holds for root too."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)

    @contextmanager
    def unprivileged() -> Iterator[None]:
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)

    yield folder, unprivileged
    folder.chmod(0o755)
    shutil.rmtree(folder)
