"""Whether a bundle is what was built, and works here; no torch."""

from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle, check_bundle
from qdm_deploy.backends import open_session
from qdm_deploy.building.selftest import run_selftest
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import CheckRow

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """All findings on the files (none: intact), and the self-test on the chosen backend, run only on intact files."""

    findings: tuple[str, ...]
    selftest: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found and the self-test passed."""
        return not self.findings and all(row.ok for row in self.selftest)


def verify(bundle: Path, backend: str = "auto", progress: Progress = SILENT) -> Verification:
    """Check the closed file set and every hash, then run the self-test vectors.

    Raises:
        BundleError: the self-test of an intact bundle cannot be read.
        EnvironmentProblem: the backend is not installed.
    """
    progress.say("Hashing files")
    findings = tuple(check_bundle(bundle))
    if findings:
        return Verification(findings, ())
    opened = Bundle.open(bundle)
    with open_session(opened, backend, progress=progress) as session:
        name = str(session.describe()["backend"])
        progress.say(f"Running the self-test on {name}")
        return Verification((), (run_selftest(opened, session, name),))
