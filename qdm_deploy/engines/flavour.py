"""The two TensorRT libraries that one builder serves, and everything that differs between them.

TensorRT builds for the GPU of this machine and measures its kernels there, so it needs that GPU and profits from a
timing cache. TensorRT-RTX compiles ahead of time for a compute capability and needs no GPU; it has no timing cache, and
it prints the compiled kernels in its log, where TensorRT must be asked through the engine inspector.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from qdm_deploy.engines.gpu import installed_gpu
from qdm_deploy.errors import EnvironmentProblem, InputError

__all__ = ["FLAVOURS", "Flavour", "flavour_of", "target_of"]


@dataclass(frozen=True)
class Flavour:
    """One TensorRT library.

    Attributes:
        backend: The name users know it by.
        module: The Python module, imported on first use.
        extra: The extra of this package that installs it.
        capabilities: Compute capabilities an engine can be cross-built for; empty when it can only build for the GPU at
            hand.
        default_sm: The capability taken when none is asked for.
        timing_cache: Whether kernel timings can be kept between builds.
        inspects: Whether the plan is loaded on the GPU for its layer list; otherwise the log holds the list.
        records_graphs: Whether a session leaves CUDA graphs to the library.
        oldest: The oldest version whose API is used, (major, minor).
    """

    backend: str
    module: str
    extra: str
    capabilities: tuple[str, ...]
    default_sm: str | None
    timing_cache: bool
    inspects: bool
    records_graphs: bool
    oldest: tuple[int, int]

    def load(self) -> Any:
        """The library's Python module.

        Raises:
            EnvironmentProblem: It is not installed, its native libraries cannot be loaded, or it is too old.
        """
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise EnvironmentProblem(
                f"the backend '{self.backend}' needs the Python module '{self.module}', which cannot be imported here "
                f"({error}); install it with: pip install 'qdm-deploy[{self.extra}]'"
            ) from error
        found = tuple(int(part) for part in str(module.__version__).split(".")[:2])
        if found < self.oldest:
            raise EnvironmentProblem(
                f"the backend '{self.backend}' needs {self.module} {'.'.join(map(str, self.oldest))} or newer, and "
                f"this is {module.__version__}; pip install --upgrade 'qdm-deploy[{self.extra}]'"
            )
        return module


FLAVOURS = {
    "tensorrt": Flavour(
        "tensorrt",
        "tensorrt",
        "tensorrt",
        (),
        None,
        timing_cache=True,
        inspects=True,
        records_graphs=False,
        oldest=(10, 13),
    ),
    "tensorrt-rtx": Flavour(
        "tensorrt-rtx",
        "tensorrt_rtx",
        "tensorrt-rtx",
        ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        "8.9",
        timing_cache=False,
        inspects=False,
        records_graphs=True,
        oldest=(1, 2),
    ),
}


def flavour_of(backend: str) -> Flavour:
    """The library behind a backend name; ``InputError`` for a name that is none."""
    if backend not in FLAVOURS:
        raise InputError(f"'{backend}' is not an engine backend; the engine backends are {', '.join(FLAVOURS)}")
    return FLAVOURS[backend]


def target_of(flavour: Flavour, sm: str | None) -> tuple[str | None, str]:
    """What an engine is built for: the compute capability to set, and the words that name the target in the cache key.

    Args:
        flavour: The library that builds.
        sm: A compute capability such as "8.9", or None for the library's default.

    Returns:
        The capability to hand to the builder (None: the GPU at hand) and the target's full name.

    Raises:
        InputError: The library cannot build for ``sm``.
        EnvironmentProblem: The library builds only for the GPU at hand and there is none.
    """
    if flavour.capabilities:
        chosen = flavour.default_sm if sm is None else sm
        if chosen not in flavour.capabilities:
            raise InputError(
                f"{flavour.backend} cannot build for compute capability '{chosen}'; "
                f"it builds for {', '.join(flavour.capabilities)}"
                + (" (Hopper, 9.0, is served by the backend 'tensorrt')" if chosen == "9.0" else "")
            )
        return chosen, f"SM {chosen}"
    gpu = installed_gpu(flavour.backend)
    if sm is not None and sm != gpu.capability:
        raise InputError(
            f"{flavour.backend} builds only for the GPU of this machine, {gpu.name} (compute capability "
            f"{gpu.capability}), not for '{sm}'; leave the capability out, or build on a machine that has such a GPU"
        )
    return None, f"{gpu.name}, SM {gpu.capability}, driver {gpu.driver}"
