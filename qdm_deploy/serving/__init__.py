"""Serving a bundle: step-level continuous batching, and HTTP."""

from qdm_deploy.serving.process_engine import ProcessEngine
from qdm_deploy.serving.restarts import RestartPolicy

__all__ = ["ProcessEngine", "RestartPolicy"]
