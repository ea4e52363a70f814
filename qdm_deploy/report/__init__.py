"""What was measured, whether it is good enough to ship, and the page that shows it."""

from qdm_deploy.report.html import render
from qdm_deploy.report.machine import library_versions, machine_card
from qdm_deploy.report.model import (
    CheckRow,
    EngineRow,
    LayerRow,
    QualityRow,
    Report,
    RewriteRow,
    SizeBlock,
    SpeedRow,
    Thresholds,
    Verdict,
)
from qdm_deploy.report.pictures import ReportPictures, Triplet
from qdm_deploy.report.verdict import decide

__all__ = [
    "CheckRow",
    "EngineRow",
    "LayerRow",
    "QualityRow",
    "Report",
    "ReportPictures",
    "RewriteRow",
    "SizeBlock",
    "SpeedRow",
    "Thresholds",
    "Triplet",
    "Verdict",
    "decide",
    "library_versions",
    "machine_card",
    "render",
]
