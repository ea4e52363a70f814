"""What the shipped classifier sees in the pictures that a session makes; for Frechet distances on few or many seeds."""

import numpy as np
from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.components.conditioning import conditioning_of

from qdm_deploy.components.pictures import to_pictures
from qdm_deploy.evaluate.feature_classifier import FeatureClassifier, Features
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import StepTable

__all__ = ["features_of_made"]


def features_of_made(
    session: StepSession,
    table: StepTable,
    spec: ModelSpec,
    count: int,
    classifier: FeatureClassifier,
    batch_size: int = 16,
) -> Features:
    """Of the pictures of seeds 0 .. count - 1, all classes in turn."""
    samples = denoise(
        session, table, range(count), spec, conditioning=conditioning_of(spec, count), batch_size=batch_size
    )
    return classifier.run(to_pictures(samples, spec)[:, None].astype(np.float32) / 127.5 - 1.0)
