"""The environment card: what a measurement ran on, and nothing that names the machine or its owner."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import JsonValue

from qdm_deploy.runtime.cpu import available_cores, cpu_flags, cpu_model

__all__ = ["library_versions", "machine_card"]

_CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that decide which INT8 and half-precision kernels a runtime takes.
_FLAGS = ("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")
_LIBRARIES = (
    "qdm-deploy",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "diffusers",
    "onnx",
)


def machine_card(cpuinfo: Path = _CPUINFO) -> dict[str, JsonValue]:
    """CPU, usable and present cores, instruction sets, architecture and operating system, as JSON.

    Args:
        cpuinfo: Linux's description of the CPU; where it does not exist the CPU's name is "unknown".
    """
    present = cpu_flags(cpuinfo)
    return {
        "cpu": cpu_model(cpuinfo) or "unknown",
        "cores_usable": available_cores(),
        "cores_present": os.cpu_count() or 1,
        "instruction_sets": [flag for flag in _FLAGS if flag in present],
        "architecture": platform.machine(),
        "os": _operating_system(),
        "kernel": platform.release(),
    }


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that results depend on; none of them is imported for it."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
