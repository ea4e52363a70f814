"""Which GPU this machine has, asked of the driver itself: no CUDA toolkit, no context, no GPU memory."""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.errors import EnvironmentProblem

__all__ = ["Gpu", "driver_release", "installed_gpu"]

_DRIVER = Path("/proc/driver/nvidia/version")

# CUdevice_attribute values of cuda.h; they have never changed.
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU.

    Attributes:
        name: Product name.
        capability: Compute capability, such as "9.0".
        driver: Its driver: the release where the kernel module tells it, and the CUDA version it serves, such as
            "580.65.06 (CUDA 13.0)".
    """

    name: str
    capability: str
    driver: str


def installed_gpu(backend: str) -> Gpu:
    """The first GPU that CUDA sees here.

    Args:
        backend: What needs it, for the message.

    Raises:
        EnvironmentProblem: There is no NVIDIA driver, or it offers no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EnvironmentProblem(
            f"the backend '{backend}' works on a GPU, and this machine has no NVIDIA driver ({error}); use a GPU "
            "machine (in a container: --gpus all). Without one, `qdm-deploy engine build --backend tensorrt-rtx` still "
            "builds, and the backends onnxruntime and openvino run"
        ) from error

    def call(function: str, *arguments: object) -> None:
        code = getattr(driver, function)(*arguments)
        if code:
            raise EnvironmentProblem(
                f"the backend '{backend}' needs a GPU, and the NVIDIA driver answers {function} with CUDA error "
                f"{code}; check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )

    call("cuInit", 0)
    device, major, minor, version = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, device)
    call("cuDriverGetVersion", ctypes.byref(version))
    cuda = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    release = driver_release(_DRIVER)
    names = f"{release} ({cuda})" if release else cuda
    return Gpu(name.value.decode("utf-8", "replace"), f"{major.value}.{minor.value}", names)


def driver_release(report: Path) -> str | None:
    """The driver's release, such as "580.65.06", from the kernel module's own report; None where there is none."""
    if not report.is_file():
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", report.read_text(errors="replace"))
    return match[1] if match else None
