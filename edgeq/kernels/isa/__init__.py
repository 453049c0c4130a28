"""Instruction sets: one file each, chosen once per process.

A module states its NAME, its RANK among those a machine can run, the features it NEEDS (LLVM's
names), the CPU that EDGEQ_ISA compiles for, and the words: `dot`, `lookup`, `shifted`, `flags`,
`from_f16`, `to_f16`, `pause`. Where neighbouring lanes are added cheaply (`ACROSS`) rows keep their
own order, and there is a word more: `sums`.
"""

import os
import platform
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from edgeq.errors import KernelError

__all__ = ["available", "choose", "host_features", "modules"]


@cache
def modules() -> dict[str, ModuleType]:
    """All instruction sets by name, best first."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
    found = [import_module(f"{__name__}.{name}") for name in names]
    return {m.NAME: m for m in sorted(found, key=lambda m: -m.RANK)}


@cache
def host_features() -> frozenset[str]:
    """LLVM's names of the features of this CPU.

    On Arm the operating system may hide the list from LLVM: 64-bit Arm always has NEON.
    """
    import llvmlite.binding as llvm

    given = os.environ.get("NUMBA_CPU_FEATURES")
    if given:
        return frozenset(f[1:] for f in given.split(",") if f.startswith("+"))
    features = {name for name, there in llvm.get_host_cpu_features().items() if there}
    if machine() == "aarch64":
        features |= {"neon"} | ({"dotprod"} if "asimddp" in _proc_features() else set())
    return frozenset(features)


def machine() -> str:
    """x86_64 or aarch64."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _proc_features() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = [line.partition(":")[2] for line in text.splitlines() if line.startswith("Features")]
    return set(" ".join(lines).split())


def available() -> list[ModuleType]:
    """Instruction sets that this machine can run, best first."""
    here = [m for m in modules().values() if machine() in m.CPU]
    return [m for m in here if host_features() >= m.NEEDS]


def choose(name: str | None = None) -> ModuleType:
    """The instruction set to use: `name`, else EDGEQ_ISA, else the best that runs here.

    Raises KernelError for a name that is unknown or does not run on this CPU.
    """
    name = name or os.environ.get("EDGEQ_ISA")
    usable = available()
    if not name:
        return usable[0]
    for m in usable:
        if name == m.NAME:
            return m
    names = ", ".join(m.NAME for m in usable)
    raise KernelError(f"EDGEQ_ISA: {name!r} does not run on this CPU: expected one of {names}")
