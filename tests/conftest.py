"""What every test may use: where the repository is, the rule for GPU tests, hypothesis without a clock."""

from pathlib import Path

import pytest
from hypothesis import settings

# Reproducible, and indifferent to how busy the machine is.
settings.register_profile("qdm", deadline=None, derandomize=True)
settings.load_profile("qdm")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where the NVIDIA driver offers no device."""
    if item.get_closest_marker("gpu") and not Path("/dev/nvidiactl").exists():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]
