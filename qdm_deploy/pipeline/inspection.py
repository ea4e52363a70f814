"""What is inside a bundle; no torch, no session."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.manifest import Manifest
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import InputError
from qdm_deploy.report.model import Report, RewriteRow

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """A bundle's identity and its plan.

    Attributes:
        noise_shares: part of the noise of the INT8 layers that each adds, by layer; empty where the build did not
            measure it.
        rewrites: what was done to each target's graph.
    """

    bundle_id: str
    model: PipelineSpec
    plan: QuantizationPlan
    manifest: Manifest
    noise_shares: Mapping[str, float] = field(default_factory=dict)
    rewrites: tuple[RewriteRow, ...] = ()


def inspect(bundle: Path) -> Inspection:
    """Open a bundle and read its plan.

    Raises:
        BundleError: the bundle is damaged.
    """
    opened = Bundle.open(bundle)
    plan = QuantizationPlan.load(opened.file("unet/plan.json").parent)
    report = _report(opened)
    if report is None:
        return Inspection(opened.id, opened.pipeline, plan, opened.manifest)
    shares = {row.name: row.noise_share for row in report.layers if row.noise_share is not None}
    return Inspection(opened.id, opened.pipeline, plan, opened.manifest, shares, report.rewrites)


def _report(bundle: Bundle) -> Report | None:
    if all(entry.path != "report.json" for entry in bundle.manifest.files):
        return None
    try:
        return Report.from_json(bundle.file("report.json").read_bytes())
    except InputError:
        return None  # A report of another version: the plan can be shown all the same.
