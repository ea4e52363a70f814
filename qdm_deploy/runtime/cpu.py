"""What this process may use of the CPU: cores, instruction sets."""

import math
import os
from pathlib import Path

__all__ = ["available_cores", "cpu_flags", "cpu_model", "saturates_int8"]

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(cgroup_quota: Path = _CGROUP_QUOTA) -> int:
    """Cores that this process may run on, at least 1: its CPU affinity, and no more than its cgroup's CPU quota.

    A container started with ``--cpus=2`` still sees every core of its host in ``os.cpu_count()``; a thread pool of that
    size spends the quota on waiting.

    Args:
        cgroup_quota: the cgroup v2 file ``cpu.max``: two words, microseconds (or ``max``) in each period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cgroup_quota.is_file():
        quota, _, period = cgroup_quota.read_text().partition(" ")
        if quota.strip() != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Instruction sets as Linux names them (``avx2``, ``amx_int8``...); empty where ``cpuinfo`` does not exist."""
    return frozenset(_field(cpuinfo, "flags").split())


def saturates_int8(flags: frozenset[str] | None = None) -> bool:
    """Whether an x86 CPU adds two products of u8 and s8 in 16 bits, so that large ones are cut off.

    AVX2 and the first AVX-512 CPUs do (``vpmaddubsw``: 255 * 127 * 2 is more than 32,767). VNNI and AMX add in 32 bits.
    A backend must then compute integer products in another way, or its results have little to do with the plan.

    Args:
        flags: instruction sets, as ``cpu_flags`` names them; empty where they are not known; None: this CPU's.
    """
    flags = cpu_flags() if flags is None else flags
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """The CPU's own name, or an empty string where ``cpuinfo`` does not exist."""
    return _field(cpuinfo, "model name")


def _field(cpuinfo: Path, key: str) -> str:
    if not cpuinfo.is_file():
        return ""
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
