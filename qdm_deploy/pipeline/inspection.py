"""What is inside a bundle; no torch, no session."""

from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.manifest import Manifest
from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.artifacts.plan import QuantizationPlan

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """A bundle's identity and its plan."""

    bundle_id: str
    model: ModelSpec
    plan: QuantizationPlan
    manifest: Manifest


def inspect(bundle: Path) -> Inspection:
    """Open a bundle and read its plan.

    Raises:
        BundleError: the bundle is damaged.
    """
    opened = Bundle.open(bundle)
    plan = QuantizationPlan.load(opened.file("unet/plan.json").parent)
    return Inspection(opened.id, opened.model, plan, opened.manifest)
