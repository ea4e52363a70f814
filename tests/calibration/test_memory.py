"""Peak memory of the statistics pass, measured in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

_PEAK = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from qdm_export.unet import load_checkpoint
from qdm_calibration.statistics import collect_statistics
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.topology import Layer, Topology

torch.set_num_threads(1)
samples = int(sys.argv[2])
network = load_checkpoint(Path(sys.argv[1])).unet
convs = [(n, m) for n, m in network.unet.named_modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels >= 16]
topology = Topology(tuple(
    Layer(n, "conv", tuple(m.weight.shape), n, (m.in_channels,), False, tuple(m.stride), (0, 0, 0, 0), (28, 28))
    for n, m in convs
))
rng = np.random.default_rng(0)
data = CalibrationSet(
    rng.standard_normal((samples, 1, 28, 28), dtype=np.float32), np.arange(samples) % 8 * 125,
    np.arange(samples), np.arange(samples) % 8, {"class_labels": np.arange(samples) % 10},
)
collect_statistics(network, topology, data, 1000, batch_size=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_samples(repository: Path) -> None:
    model = repository / "qdm_deploy" / "data" / "ddpm-fashion-mnist"
    peaks = {}
    for samples in (16, 256):
        ran = subprocess.run(
            [sys.executable, "-c", _PEAK, str(model), str(samples)],
            check=True,
            capture_output=True,
            text=True,
            cwd=repository,
        )
        peaks[samples] = int(ran.stdout.split()[-1]) / 1024
    print("peak RSS, MiB:", peaks)
    assert peaks[256] < 1.1 * peaks[16]
