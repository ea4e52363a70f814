"""Small real builds; the same model is exported once per session, by the real exporter."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from qdm_deploy.artifacts.files import canonical_json
from qdm_deploy.pipeline import BuildOptions, BuildResult, build
from qdm_export import float_graph
from qdm_export.unet import Checkpoint

# As little of everything as still runs every stage.
QUICK: dict[str, Any] = {
    "steps": 8,
    "calibration_samples": 4,
    "calibration_steps": 8,
    "step_bins": 2,
    "ranges": "minmax",
    "channel_scales": "none",
    "keep_fp": "none",
    "verify_samples": 2,
    "verify_steps": 4,
    "engines": (),
    "min_speedup": 0.0,
}

QuickBuild = Callable[..., BuildResult]


@pytest.fixture(scope="session")
def quick_options() -> dict[str, Any]:
    """``BuildOptions`` of a build that takes seconds; add ``out`` and ``model``."""
    return QUICK


@pytest.fixture(scope="session")
def quick_build(tiny: Any) -> QuickBuild:
    """Builds one of the tiny models; keywords are those of ``BuildOptions``."""

    exporter = float_graph.export_float_graph

    def export_once(checkpoint: Checkpoint) -> ir.Model:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(float_graph, "export_float_graph", exporter)
            graph: ir.Model = tiny.float_graph(checkpoint.spec.name)
        return graph.clone()

    def run(out: Path, name: str = "labels", **changes: Any) -> BuildResult:
        options = BuildOptions(**{**QUICK, "out": out, "model": str(tiny.folder(name)), **changes})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(float_graph, "export_float_graph", export_once)
            return build(options)

    return run


@pytest.fixture(scope="session")
def labels_build(quick_build: QuickBuild, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """The class-conditional model with all targets, calibrated with guidance; its calibration set lies beside it."""
    folder = tmp_path_factory.mktemp("labels")
    return quick_build(folder / "labels.qdm", guidance=1.5, command="a test", save_calibration=folder / "calibration")


@pytest.fixture
def labels(labels_build: BuildResult) -> Path:
    """Its folder; copy it before you change it."""
    return labels_build.bundle


@pytest.fixture(scope="session")
def rgb_build(quick_build: QuickBuild, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """The unconditional model: one target, no float graph, a given calibration set, thresholds out of reach."""
    folder = tmp_path_factory.mktemp("rgb")
    tiny.calibration("rgb").save(folder / "rgb.calibration")
    return quick_build(
        folder / "rgb.qdm", "rgb", targets=("onnxruntime",), float_graph=False, min_psnr_db=200.0, min_speedup=999.0,
        calibration_file=folder / "rgb.calibration", sampler="ddim",
    )  # fmt: skip


@pytest.fixture
def rgb(rgb_build: BuildResult) -> Path:
    """Its folder."""
    return rgb_build.bundle


@pytest.fixture(scope="session")
def text_states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditioning file for the text model, three prompts and the empty one."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("states") / "states.safetensors"
    states = generator.standard_normal((3, 77, 16), dtype=np.float32)
    save_file({"encoder_hidden_states": states, "unconditional_hidden_states": states[0] * 0.1}, path)
    return path


@pytest.fixture(scope="session")
def reseal() -> Callable[[Path], None]:
    """Makes the manifest of a changed bundle right again, as somebody would who knows the format."""

    def run(bundle: Path) -> None:
        path = bundle / "manifest.json"
        document = json.loads(path.read_bytes())
        del document["bundle_id"]
        for entry in document["files"]:
            content = (bundle / entry["path"]).read_bytes()
            entry["size"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        document["bundle_id"] = hashlib.sha256(canonical_json(document)).hexdigest()
        path.write_text(json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    return run
