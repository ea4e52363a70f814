"""Every error that qdm-deploy raises for a reason a user can act on.

    QdmError                          exit code
    ├── InputError (ValueError)       2   an argument that cannot be used: unknown sampler, steps out of range
    ├── ModelError                    2   the model folder cannot be used: missing, truncated, unknown block
    ├── CalibrationError              2   calibration data or statistics that cannot be used: empty, NaN, layer not met
    ├── ExportError                   70  the exported graph is not what the plan asked for
    ├── EngineError                   4   a TensorRT engine could not be built or run
    │   └── EngineRefused             4   the library refuses to load an engine, which another one may cure
    ├── BundleError                   3   a bundle is damaged, incomplete, too new, or leaves its folder
    ├── EnvironmentProblem            4   something this machine lacks: a module, a GPU, a writable cache
    ├── ResourceProblem               5   disk or memory ran out
    ├── TryAgain                      75  stopped early because it was asked to; the same command goes on
    └── CheckFailed                   1   everything ran, and a check found a problem

A message says what was given, what is allowed and what to do. Wrong use of the Python API by a programmer stays
``TypeError``/``ValueError``.
"""

__all__ = [
    "BundleError",
    "CalibrationError",
    "CheckFailed",
    "EngineError",
    "EngineRefused",
    "EnvironmentProblem",
    "ExportError",
    "InputError",
    "ModelError",
    "QdmError",
    "ResourceProblem",
    "TryAgain",
]


class QdmError(Exception):
    """Base of all errors above; ``exit_code`` is what the command line returns for it."""

    exit_code = 70


class InputError(QdmError, ValueError):
    """An argument cannot be used."""

    exit_code = 2


class ModelError(QdmError):
    """The model folder cannot be used."""

    exit_code = 2


class CalibrationError(QdmError):
    """Calibration data or statistics cannot be used."""

    exit_code = 2


class ExportError(QdmError):
    """The exported graph is not what the plan asked for."""

    exit_code = 70


class EngineError(QdmError):
    """A TensorRT engine could not be built or run."""

    exit_code = 4


class EngineRefused(EngineError):
    """The library refuses to load an engine: built by another version, for another GPU, or damaged."""


class BundleError(QdmError):
    """A bundle is damaged, incomplete, too new, or leaves its folder."""

    exit_code = 3


class EnvironmentProblem(QdmError):
    """This machine lacks something that the command needs."""

    exit_code = 4


class ResourceProblem(QdmError):
    """Disk or memory ran out."""

    exit_code = 5


class TryAgain(QdmError):
    """Stopped early because a scheduler asked for it; the same command goes on from there (EX_TEMPFAIL)."""

    exit_code = 75


class CheckFailed(QdmError):
    """Everything ran, and a check found a problem."""

    exit_code = 1
