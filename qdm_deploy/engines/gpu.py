"""Which GPU this machine has, asked of the driver itself: no CUDA toolkit, no context, no GPU memory."""

import ctypes
from dataclasses import dataclass

from qdm_deploy.errors import EnvironmentProblem

__all__ = ["Gpu", "installed_gpu"]

# CUdevice_attribute values of cuda.h; they have never changed.
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU: product name, compute capability ("9.0"), CUDA version of its driver ("13.0")."""

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
            f"the backend '{backend}' builds on the GPU it will run on, and this machine has no NVIDIA driver "
            f"({error}); run it on a GPU machine (in a container: with --gpus all), or cross-build with the backend "
            "'tensorrt-rtx'"
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
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode("utf-8", "replace"), f"{major.value}.{minor.value}", cuda)
