"""The end of a build: self-test, report, verdict, manifest."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdm_deploy.artifacts.bundle import BundleWriter
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.manifest import Compatibility
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.building.calibrate import Calibrated
from qdm_deploy.building.measure import Measured, trajectory_inputs
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.selftest import answers, distance_db, write_selftest
from qdm_deploy.components.pictures import to_pictures
from qdm_deploy.report.html import render
from qdm_deploy.report.machine import library_versions, machine_card
from qdm_deploy.report.model import EngineRow, LayerRow, Report, RewriteRow, SizeBlock, Thresholds
from qdm_deploy.report.pictures import ReportPictures
from qdm_deploy.report.verdict import decide
from qdm_deploy.runtime.cpu import saturates_int8

if TYPE_CHECKING:
    from qdm_export.unet import Checkpoint

__all__ = ["BuildResult", "publish"]

_LEAST_PSNR_DB = 30.0
# Versions before this one do not know this bundle layout.
_MIN_RUNTIME = "0.1.0"
_SATURATES = (
    "The INT8 products of the CPU that built this saturate, so that exact INT8 is little faster than float on it. "
    "Judge the speed on a CPU with VNNI or AMX."
)


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle and what was measured on the way."""

    bundle: Path
    bundle_id: str
    report: Report


def publish(
    options: BuildOptions,
    writer: BundleWriter,
    checkpoint: "Checkpoint",
    calibrated: Calibrated,
    measured: Measured,
    engines: tuple[EngineRow, ...],
    rewrites: tuple[RewriteRow, ...],
    seconds: Mapping[str, float],
) -> BuildResult:
    """Write what is left to write and seal the bundle."""
    root = writer.root
    recipe = _recipe(options)
    report = _report(options, checkpoint, calibrated, measured, engines, rewrites, seconds, root, recipe)
    _write_selftest(root, checkpoint, measured)
    (root / "scheduler").mkdir()
    _write_json(root / "scheduler" / "scheduler_config.json", dict(checkpoint.scheduler_config))
    if checkpoint.model_index:
        _write_json(root / "model_index.json", dict(checkpoint.model_index))
    (root / "report.json").write_text(report.to_json(), encoding="utf-8")
    (root / "report.html").write_text(render(report, _pictures(checkpoint, measured)), encoding="utf-8")
    if not options.float_graph:
        (root / "unet" / "float.onnx").unlink()
        (root / "unet" / "float.data").unlink(missing_ok=True)
    manifest = writer.publish(
        name=checkpoint.spec.name,
        pipeline=checkpoint.spec,
        targets=options.targets,
        compatibility=Compatibility(opset=_opset(root / "unet"), min_runtime=_MIN_RUNTIME),
        provenance={
            "source": checkpoint.spec.name,
            "weights_sha256": checkpoint.weights_sha256,
            "calibration": dict(calibrated.calibration.provenance),
            "tools": library_versions(),
        },
        recipe=recipe,
    )
    return BuildResult(options.out, manifest.bundle_id, report)


def _opset(folder: Path) -> int:
    """The highest that a graph of the bundle needs: a bfloat16 convolution needs a newer one than the rest."""
    import onnx

    graphs = [onnx.load(path, load_external_data=False) for path in folder.glob("*.onnx")]
    return max(int(entry.version) for graph in graphs for entry in graph.opset_import if not entry.domain)


def _recipe(options: BuildOptions) -> dict[str, Any]:
    """The options that shape the bundle, as JSON; no path of this machine among them."""
    left_out = {"out", "force", "threads", "command", "save_calibration"}
    recipe: dict[str, Any] = {}
    for name, value in asdict(options).items():
        if name not in left_out:
            recipe[name] = value.name if isinstance(value, Path) else value
    if options.model is not None:
        recipe["model"] = Path(options.model).name
    plain: dict[str, Any] = json.loads(json.dumps(recipe))
    return plain


def _report(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    calibrated: Calibrated,
    measured: Measured,
    engines: tuple[EngineRow, ...],
    rewrites: tuple[RewriteRow, ...],
    seconds: Mapping[str, float],
    root: Path,
    recipe: dict[str, Any],
) -> Report:
    thresholds = Thresholds(
        min_psnr_db=_needed_psnr(options, checkpoint),
        min_eps_sqnr_db=options.min_eps_sqnr_db,
        min_speedup=options.min_speedup,
    )
    plan, budgeted = calibrated.plan, calibrated.budgeted
    unet = root / "unet"
    weights = (unet / "weights.bin").stat().st_size
    parameters = sum(parameter.numel() for parameter in checkpoint.unet.parameters())
    return Report(
        created=datetime.now(UTC),
        command=options.command,
        versions=library_versions(),
        machine=machine_card(),
        model={**checkpoint.spec.model_dump(mode="json"), "parameters": parameters, "version": installed_version()},
        recipe=recipe,
        seeds=_seeds(calibrated.calibration, measured),
        plan_summary=dict(plan.summary()),
        layers=tuple(LayerRow.from_plan(layer, budgeted.shares.get(layer.name)) for layer in plan.layers),
        inputs=calibrated.inputs,
        noise=budgeted.noise,
        rewrites=rewrites,
        warnings=budgeted.warnings + ((_SATURATES,) if saturates_int8() else ()),
        quality=measured.quality,
        speed=measured.speed,
        speedup=measured.speedup,
        size=SizeBlock(
            float_bytes=sum(path.stat().st_size for path in unet.glob("float.*")),
            int8_bytes={target: (unet / f"{target}.onnx").stat().st_size + weights for target in options.targets},
        ),
        engines=engines,
        checks=measured.checks,
        stage_seconds=dict(seconds),
        verdict=decide(
            quality=measured.quality,
            speedup=measured.speedup,
            engines=engines,
            checks=measured.checks,
            thresholds=thresholds,
        ),
    )


def _needed_psnr(options: BuildOptions, checkpoint: "Checkpoint") -> float:
    """Of latent models none by default: guided trajectories part, and a picture may be another and as good."""
    if options.min_psnr_db is not None:
        return options.min_psnr_db
    return _LEAST_PSNR_DB if checkpoint.spec.makes == "pixels" else 0.0


def _seeds(calibration: CalibrationSet, measured: Measured) -> dict[str, tuple[int, int]]:
    """First and last seed of what was calibrated with and of what was judged."""
    verdict = measured.reference.sampling.seeds
    return {
        "calibration": (int(calibration.seed.min()), int(calibration.seed.max())),
        "verdict": (int(min(verdict)), int(max(verdict))),
    }


def _write_selftest(root: Path, checkpoint: "Checkpoint", measured: Measured) -> None:
    unet = root / "unet"
    inputs = trajectory_inputs(checkpoint.denoiser, measured.reference)
    with OnnxRuntimeSession(unet / "float.onnx") as session:
        expected = answers(session, inputs)
    reached: dict[str, float] = {}
    for row in measured.quality:
        if row.backend == "simulation":
            continue
        opener = OpenVinoSession if row.backend == "openvino" else OnnxRuntimeSession
        with opener(unet / f"{row.target}.onnx") as session:
            got = answers(session, inputs)
        reached[row.backend] = distance_db(expected, got)
    write_selftest(root / "selftest", inputs, expected, reached)


def _pictures(checkpoint: "Checkpoint", measured: Measured) -> ReportPictures | None:
    shape = checkpoint.spec.picture_shape
    if measured.shown is None or shape is None or shape[0] not in (1, 3):
        return None
    shown = next((row for row in measured.quality if row.backend == measured.backend), measured.quality[0])
    seeds = measured.reference.sampling.seeds
    return ReportPictures.from_arrays(
        to_pictures(measured.shown, checkpoint.spec),
        to_pictures(measured.pictures[shown.target], checkpoint.spec),
        [f"seed {seed} · {value:.1f} dB" for seed, value in zip(seeds, shown.psnr_db, strict=True)],
        quantized_name=shown.label,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
