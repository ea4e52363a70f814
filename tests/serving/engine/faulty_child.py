"""An engine process whose session fails for some labels: ``python faulty_child.py FD``."""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.runtime.session import StepOutput
from qdm_deploy.serving.child import main

NOT_A_NUMBER, HANGS, RAISES, NO_MEMORY = 1, 2, 3, 4


class Faulty(OnnxRuntimeSession):
    def run(self, inputs: Mapping[str, Any]) -> StepOutput:
        labels = inputs["class_labels"]
        if (labels == HANGS).any():
            time.sleep(600)
        if (labels == RAISES).any():
            raise RuntimeError("this label cannot be denoised")
        if (labels == NO_MEMORY).any():
            raise MemoryError
        # A step of a real model takes longer than one of this.
        time.sleep(float(os.environ.get("STEP_SECONDS", "0.01")))
        result = super().run(inputs)
        result.next_sample[labels == NOT_A_NUMBER] = np.nan
        return result


if __name__ == "__main__":
    sys.exit(
        main(sys.argv[1:], lambda bundle, settings, threads, sizes: Faulty(bundle.graph("onnxruntime"), threads=1))
    )
