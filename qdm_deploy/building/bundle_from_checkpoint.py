"""From a checkpoint to a verified bundle: the stages in order, each a typed value made from the one before.

Everything is written into a folder beside the bundle's final name and renamed at the end, so an interrupted or failed
build leaves nothing behind.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qdm_deploy.artifacts.bundle import BundleWriter
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.building.calibrate import calibrated_plan, calibration_given
from qdm_deploy.building.engine_audit import audit_row
from qdm_deploy.building.measure import measure
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.publish import BuildResult, publish
from qdm_deploy.components.encoders import open_encoder
from qdm_deploy.components.prompt_lists import read_prompts
from qdm_deploy.components.sampling import SamplingMaker, SamplingOptions
from qdm_deploy.engines.cache import EngineCache
from qdm_deploy.engines.flavour import FLAVOURS, target_of
from qdm_deploy.errors import EnvironmentProblem, InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import EngineRow, RewriteRow

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdm_export.targets import Emission
    from qdm_export.unet import Checkpoint

__all__ = ["EMBEDDED_MODEL", "build"]

EMBEDDED_MODEL = Path(__file__).parents[1] / "data" / "ddpm-fashion-mnist"
_DEFAULT_ENGINES = ("8.9",)


@dataclass
class Stages:
    """Wall seconds of every stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def build(options: BuildOptions, progress: Progress = SILENT) -> BuildResult:
    """Quantize a model and write a bundle.

    Raises:
        QdmError: see ``qdm_deploy.errors``; whatever is raised, nothing is left at ``options.out``.
    """
    _require_build_extra()
    engines = _engines(options, progress)
    stages = Stages()
    with BundleWriter(options.out, force=options.force) as writer, ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="qdm-deploy-")))
        checkpoint, maker = _load(options, writer.root, stages, progress)
        run = maker.run
        options = replace(options, sampler=run.sampler, steps=run.steps, guidance=run.guidance)  # for the record
        given = calibration_given(options, checkpoint, maker)
        with stages.stage("export"):
            progress.say(f"Exporting {checkpoint.spec.name} to ONNX")
            from qdm_export.float_graph import export_float_graph

            float_graph = export_float_graph(checkpoint)
            whole = float_graph  # what the float reference is written from
            if options.concat_scales == "split":
                from qdm_export.split_concat import split_checkpoint

                checkpoint, float_graph = split_checkpoint(checkpoint, float_graph, progress)
            if checkpoint.decoder is not None:
                from qdm_export.decoder import save_decoder

                progress.say("Exporting its decoder")
                save_decoder(checkpoint.decoder, writer.root / checkpoint.decoder.spec.name)
        calibrated = calibrated_plan(options, checkpoint, maker, given, float_graph, stages.stage, progress)
        plan = calibrated.plan
        rewrites = _emit(options, plan, float_graph, whole, writer.root / "unet", stages, progress)
        rows = _build_engines(engines, writer.root / "unet" / "tensorrt.onnx", plan, stages, progress)
        measured = measure(
            options, checkpoint, plan, maker, float_graph, writer.root / "unet", scratch, stages.stage, progress
        )
        return publish(options, writer, checkpoint, calibrated, measured, rows, rewrites, stages.seconds)


def _require_build_extra() -> None:
    missing = [
        name
        for name in ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript")
        if find_spec(name) is None
    ]
    if missing:
        raise EnvironmentProblem(
            f"building needs {', '.join(missing)}, which this environment lacks; install them with "
            "pip install 'qdm-deploy[build]'"
        )


def _engines(options: BuildOptions, progress: Progress) -> tuple[str, ...]:
    """Compute capabilities to build for; the default gives way where the module is missing, a wish does not."""
    wanted = _DEFAULT_ENGINES if options.engines is None else options.engines
    if not wanted or "tensorrt" not in options.targets:
        return ()
    for sm in wanted:
        target_of(FLAVOURS["tensorrt-rtx"], sm)  # refuses what the library cannot build for
    if find_spec("tensorrt_rtx") is None:
        if options.engines is not None:
            raise EnvironmentProblem(
                "engines were asked for, and the module tensorrt_rtx is missing; install it with "
                "pip install 'qdm-deploy[tensorrt-rtx]', or build with --no-engines"
            )
        progress.say("No TensorRT-RTX here, so no engine is built (pip install 'qdm-deploy[tensorrt-rtx]')")
        return ()
    EngineCache().prepare()  # an unwritable cache is told now, not after the calibration
    return wanted


def _load(options: BuildOptions, root: Path, stages: Stages, progress: Progress) -> tuple["Checkpoint", SamplingMaker]:
    with stages.stage("load"):
        progress.say("Loading the model")
        import torch

        from qdm_export.unet import load_checkpoint

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        checkpoint = load_checkpoint(options.model if options.model is not None else EMBEDDED_MODEL)
        asked = SamplingOptions(
            sampler=options.sampler,
            steps=options.steps,
            guidance=options.guidance,
            conditioning_file=options.conditioning_file,
        )
    measuring = None
    if checkpoint.texts:
        from qdm_export.text_encoder import export_text_encoder

        if options.prompts_file is not None:
            measuring = read_prompts(options.prompts_file).every_second(1)
        with stages.stage("text"):
            for model in checkpoint.texts:
                progress.say(f"Exporting {model.spec.name}")
                export_text_encoder(model, root)
    elif options.prompts_file is not None:
        raise InputError(f"{checkpoint.spec.name} takes no prompts; leave the file {options.prompts_file} out")
    encoder = open_encoder(checkpoint.spec, options.conditioning_file, root=root, prompts=measuring)
    return checkpoint, SamplingMaker(checkpoint.spec, checkpoint.scheduler_config, asked, encoder)


def _emit(
    options: BuildOptions,
    plan: QuantizationPlan,
    float_graph: "ir.Model",
    whole: "ir.Model",
    folder: Path,
    stages: Stages,
    progress: Progress,
) -> tuple[RewriteRow, ...]:
    """Write the graphs and the plan; returns what was done to each graph."""
    from qdm_export.check import check_onnx
    from qdm_export.float_graph import save_graph
    from qdm_export.shared_weights import save_with_shared_weights
    from qdm_export.targets import FORMS, emit, emit_float

    rows: list[RewriteRow] = []

    def noted(emission: "Emission", target: Target | Literal["float"]) -> "ir.Model":
        rows.extend(
            RewriteRow(
                target=target,
                name=each.name,
                done=each.done,
                expected=each.expected,
                missed=tuple(map(str, each.missed)),
                left=each.rules,
            )
            for each in emission.rewrites
        )
        return emission.model

    with stages.stage("emit"):
        folder.mkdir()
        # The graphs share one file, and TensorRT reads no INT4: with its codes in the file, INT4 beside them only adds.
        packed = "tensorrt" not in options.targets
        with progress.task("Writing graphs", len(options.targets) + 1) as advance:

            def graphs() -> Iterator[tuple[Path, "ir.Model"]]:
                for target in options.targets:
                    form = FORMS[target]
                    form = replace(form, packed_weights=packed and form.packed_weights)
                    emission = emit(float_graph, plan, target, rest=options.rest, form=form)
                    yield folder / f"{target}.onnx", noted(emission, target)
                    advance()

            save_with_shared_weights(graphs(), folder / "weights.bin")
            save_graph(noted(emit_float(whole), "float"), folder / "float.onnx", weights="float.data")
            advance()
        for name in (*options.targets, "float"):
            check_onnx(folder / f"{name}.onnx")
        plan.save(folder)
    return tuple(rows)


def _build_engines(
    engines: tuple[str, ...], graph: Path, plan: QuantizationPlan, stages: Stages, progress: Progress
) -> tuple[EngineRow, ...]:
    rows = []
    with stages.stage("engines"):
        for sm in engines:
            row, _ = audit_row(graph, plan, backend="tensorrt-rtx", sm=sm, progress=progress)
            rows.append(row)
    return tuple(rows)
