"""A bundle's step graph as a model repository of Triton Inference Server."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import new_directory
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.choices import one_of, within
from qdm_deploy.engines.onnx_files import data_files
from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.pipeline.triton_config import config_text, step_tensors
from qdm_deploy.pipeline.triton_readme import readme

__all__ = ["TritonExport", "export_triton"]

_MOST_ROWS = 1024


@dataclass(frozen=True)
class TritonExport:
    """A written model repository.

    Attributes:
        repository: its folder, for ``tritonserver --model-repository``.
        model: name of its model, the INT8 step.
        plan: file that must be built on the target machine before Triton can load the repository; None: there is none.
    """

    repository: Path
    model: str
    plan: Path | None


def export_triton(
    bundle: Path, out: Path, backend: str = "onnxruntime", max_batch: int = 16, *, force: bool = False
) -> TritonExport:
    """Write a model repository.

    Args:
        bundle: the bundle's folder.
        out: folder of the repository; must not exist, except with ``force``.
        backend: "onnxruntime" (CPU) or "tensorrt" (a plan, which has to be built on the target machine).
        max_batch: rows that Triton may put together; a guided image takes two.
        force: replace a repository of an earlier export.

    Raises:
        InputError: an unknown backend, a ``max_batch`` out of range, or ``out`` exists.
        BundleError: the bundle is damaged, or has no graph for the backend.
        EnvironmentProblem: the model is conditional, and the packages that rewrite its links are not installed.
    """
    one_of("backend", backend, ("onnxruntime", "tensorrt"))
    opened = Bundle.open(bundle)
    model = opened.pipeline
    within("max batch", max_batch, 2 if model.conditional else 1, _MOST_ROWS)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", model.name) + "_step"
    graph = opened.graph(backend)
    with new_directory(out, force=force, may_replace=_not_ours) as root:
        (root / name).mkdir()
        (root / name / "config.pbtxt").write_text(
            config_text(name, model.interface, backend, max_batch), encoding="utf-8"
        )
        # More than one file makes an ONNX model a folder; a plan takes only the place that its config names.
        target = root / name / "1" / ("model.onnx" if backend == "onnxruntime" else "source")
        target.mkdir(parents=True)
        _copy_graph(graph, target, model)
        if backend == "tensorrt":
            script = root / name / "build_plan.sh"
            script.write_text(_build_script(model, max_batch), encoding="utf-8")
            script.chmod(0o755)
        (root / "README.md").write_text(readme(opened, name, backend, max_batch), encoding="utf-8")
    return TritonExport(out, name, Path(out, name, "1", "model.plan") if backend == "tensorrt" else None)


def _copy_graph(graph: Path, folder: Path, model: PipelineSpec) -> None:
    """``model.onnx`` and its weights; the links of a conditional model become relative on the way."""
    for path in data_files(graph):
        shutil.copyfile(path, folder / path.name)
    if not model.conditional:
        shutil.copyfile(graph, folder / "model.onnx")
        return
    try:
        import onnx_ir as ir

        from qdm_export.relative_links import make_links_relative
    except ImportError as error:
        raise EnvironmentProblem(
            f"{model.name} is conditional, and its row links must be rewritten for Triton's batches, which needs the "
            f"build packages ({error}): pip install 'qdm-deploy[build]'"
        ) from error
    rewritten = ir.load(graph)
    make_links_relative(rewritten)
    ir.save(rewritten, folder / "model.onnx")


def _build_script(model: PipelineSpec, max_batch: int) -> str:
    def shapes(rows: int) -> str:
        inputs, _ = step_tensors(model.interface)
        return ",".join(f"{item.name}:{'x'.join(map(str, (rows, *item.shape)))}" for item in inputs)

    return f"""#!/bin/sh
# Builds the plan for the GPU of this machine; run it in the Triton container that will serve it, because a plan fits
# one version of TensorRT. The precision of every layer stands in the graph.
set -eu
cd "$(dirname "$0")/1"
trtexec --onnx=source/model.onnx --saveEngine=model.plan.tmp --stronglyTyped \\
  --minShapes={shapes(1)} \\
  --optShapes={shapes(max(1, max_batch // 2))} \\
  --maxShapes={shapes(max_batch)}
mv model.plan.tmp model.plan
"""


def _not_ours(folder: Path) -> str | None:
    """Why ``force`` may not replace a folder: it is no model repository of ours."""
    if not any(folder.iterdir()):
        return None
    text = folder / "README.md"
    if text.is_file() and "qdm-deploy export-triton" in text.read_text(encoding="utf-8", errors="replace"):
        return None
    return "is not a model repository of an earlier export"
