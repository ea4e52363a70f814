"""What this machine can run, and what to install for the rest; versions are read from metadata, not by importing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qdm_deploy.runtime.cpu import available_cores, cpu_flags, cpu_model, saturates_int8

__all__ = ["MODULES", "Finding", "Machine", "Module", "examine"]

_GIB = 1 << 30
_MEMORY_WANTED = 2 * _GIB
_DISK_WANTED = 2 * _GIB
_SMI_SECONDS = 10


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        status: FAIL: qdm-deploy cannot run; WARN: something works less well or not at all; OK.
        detail: what was found.
        fix: what to do, empty when nothing is to be done.
    """

    name: str
    status: Literal["OK", "WARN", "FAIL"]
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Module:
    """A package that some part of qdm-deploy uses.

    Attributes:
        distributions: names under which it is installed, any of them is enough.
        module: what Python imports.
        gives: what works with it.
        install: how to get it.
        need: "required": nothing runs without it; "part": a backend or command is missing without it; "extra": a
            convenience.
    """

    distributions: tuple[str, ...]
    module: str
    gives: str
    install: str
    need: Literal["required", "part", "extra"] = "part"


MODULES = (
    Module(
        ("onnxruntime", "onnxruntime-gpu"), "onnxruntime", "backend onnxruntime", "pip install onnxruntime", "required"
    ),
    Module(("openvino",), "openvino", "backend openvino", "pip install 'qdm-deploy[openvino]'"),
    Module(("torch",), "torch", "build: calibration and export", "pip install 'qdm-deploy[build]'"),
    Module(("diffusers",), "diffusers", "build: reading checkpoints", "pip install 'qdm-deploy[build]'"),
    Module(("onnx",), "onnx", "build: export", "pip install 'qdm-deploy[build]'"),
    Module(
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "tensorrt",
        "backend tensorrt: GPU servers",
        "pip install 'qdm-deploy[tensorrt]'",
    ),
    Module(
        ("tensorrt-rtx", "tensorrt_rtx_cu13"),
        "tensorrt_rtx",
        "engines built without a GPU, and backend tensorrt-rtx on RTX GPUs",
        "pip install 'qdm-deploy[tensorrt-rtx]'",
    ),
    Module(
        ("cuda-bindings",),
        "cuda.bindings",
        "running engines: backends tensorrt and tensorrt-rtx",
        "pip install 'cuda-bindings>=13,<14'",
    ),
    Module(("nvidia-modelopt",), "modelopt", "import of ModelOpt calibrations", "pip install nvidia-modelopt", "extra"),
    Module(("polygraphy",), "polygraphy", "debugging of engines layer by layer", "pip install polygraphy", "extra"),
)

# What each CPU feature is good for, in the order in which kernels prefer them.
_CPU_FEATURES = {
    "amx_int8": "INT8 matrices",
    "avx512_vnni": "INT8",
    "avx_vnni": "INT8",
    "amx_bf16": "bf16 matrices",
    "avx512_bf16": "bf16",
    "avx2": "vectors",
}


@dataclass(frozen=True)
class Machine:
    """Where the machine tells about itself; the defaults are Linux's."""

    cpuinfo: Path = Path("/proc/cpuinfo")
    meminfo: Path = Path("/proc/meminfo")
    memory_limit: Path = Path("/sys/fs/cgroup/memory.max")
    nvidia_driver: Path = Path("/proc/driver/nvidia/version")
    nvidia_smi: str = "nvidia-smi"


def examine(cache_dir: Path, *, modules: Sequence[Module] = MODULES, machine: Machine | None = None) -> list[Finding]:
    """Look at everything; nothing is changed, and nothing missing makes it fail.

    Args:
        cache_dir: where engines are cached; need not exist yet.
        modules: packages to look for.
        machine: where to look; None is this machine.
    """
    machine = machine or Machine()
    return [
        _python(),
        _cpu(machine),
        _cores(),
        _memory(machine),
        *_cache(cache_dir),
        *(_module(module) for module in modules),
        _providers(),
        _gpu(machine),
    ]


def _python() -> Finding:
    return Finding("python", "OK", f"{sys.version.split()[0]}, {sys.executable}")


def _cpu(machine: Machine) -> Finding:
    flags = cpu_flags(machine.cpuinfo)
    model = cpu_model(machine.cpuinfo) or "unknown model"
    if not flags:
        return Finding("cpu", "WARN", f"{model}; its instruction sets cannot be read here")
    useful = [f"{flag} ({use})" for flag, use in _CPU_FEATURES.items() if flag in flags]
    detail = f"{model}: {', '.join(useful) or 'none of the instruction sets that INT8 needs'}"
    if saturates_int8(flags):
        return Finding(
            "cpu",
            "WARN",
            f"{detail}; this CPU's INT8 products saturate, so that exact INT8 is little faster than float here",
            "on a CPU with AVX-VNNI, AVX512-VNNI or AMX it is some 3 times as fast as float",
        )
    if not flags.intersection(("amx_int8", "avx512_vnni", "avx_vnni")):
        return Finding(
            "cpu", "WARN", detail, "INT8 may be no faster than float here; use a CPU with VNNI or AMX, or a GPU"
        )
    return Finding("cpu", "OK", detail)


def _cores() -> Finding:
    usable, present = available_cores(), os.cpu_count() or 1
    return Finding("cores", "OK", f"{usable} usable of {present}")


def _memory(machine: Machine) -> Finding:
    if not machine.meminfo.is_file():
        return Finding("memory", "WARN", "cannot be read here")
    lines = machine.meminfo.read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if machine.memory_limit.is_file() and (limit := machine.memory_limit.read_text().strip()) != "max":
        free = min(free, int(limit))
    detail = f"{free / _GIB:.1f} GiB available"
    if free < _MEMORY_WANTED:
        return Finding("memory", "WARN", detail, f"a build wants {_MEMORY_WANTED // _GIB} GiB or more")
    return Finding("memory", "OK", detail)


def _cache(cache_dir: Path) -> list[Finding]:
    """Whether the cache can be written, and the space on its disk."""
    there = next(folder for folder in (cache_dir, *cache_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    disk = Finding("disk", "OK", f"{free / _GIB:.1f} GiB free at {there}")
    if free < _DISK_WANTED:
        disk = Finding(
            "disk", "WARN", disk.detail, f"a build wants {_DISK_WANTED // _GIB} GiB or more; free some space"
        )
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return [Finding("cache", "OK", f"{cache_dir} can be written"), disk]
    problem = (
        f"{cache_dir} cannot be written: {there} is {'read-only for this user' if there.is_dir() else 'not a folder'}"
    )
    return [Finding("cache", "WARN", problem, "choose another cache folder, or engines are built anew each time"), disk]


def _module(module: Module) -> Finding:
    versions = [f"{name} {found}" for name in module.distributions if (found := _version(name)) is not None]
    present = _importable(module.module)
    if present:
        return Finding(module.module, "OK", f"{', '.join(versions) or 'version unknown'}: {module.gives}")
    if module.need == "extra":
        return Finding(module.module, "OK", f"not installed; optional, for {module.gives}")
    missing: Literal["FAIL", "WARN"] = "FAIL" if module.need == "required" else "WARN"
    return Finding(module.module, missing, f"not installed, so no {module.gives}", module.install)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _providers() -> Finding:
    """Execution providers in the installed ONNX Runtime; the one import here, light beside the others of the list."""
    try:
        import onnxruntime
    except ImportError as error:
        return Finding(
            "onnxruntime providers", "FAIL", f"onnxruntime cannot be imported: {error}", "pip install onnxruntime"
        )
    names = onnxruntime.get_available_providers()
    return Finding("onnxruntime providers", "OK", ", ".join(names))


def _gpu(machine: Machine) -> Finding:
    """GPU and driver, asked of nvidia-smi, or of the kernel module where that is missing."""
    none = Finding("gpu", "WARN", "no NVIDIA GPU: the CPU backends work, tensorrt does not")
    program = shutil.which(machine.nvidia_smi)
    if program is None:
        if not machine.nvidia_driver.is_file():
            return none
        loaded = machine.nvidia_driver.read_text(errors="replace").splitlines()[0]
        return Finding("gpu", "WARN", f"driver without nvidia-smi: {loaded}", "in a container: run it with --gpus all")
    query = [program, "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("gpu", "WARN", f"nvidia-smi does not answer: {error}", "check the NVIDIA driver")
    if answer.returncode != 0:
        said = (answer.stdout or answer.stderr).strip().splitlines()
        return Finding(
            "gpu", "WARN", f"nvidia-smi fails: {said[0] if said else answer.returncode}", "check the NVIDIA driver"
        )
    gpus = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return Finding("gpu", "OK", "; ".join(gpus)) if gpus else none
