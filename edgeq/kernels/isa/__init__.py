"""Instruction sets: one file each, chosen once per process.

A module states its NAME, its RANK among those a machine can run, the features it NEEDS (LLVM's
names), the CPU that EDGEQ_ISA compiles for together with these, sizes (WIDTH, TILE_COLS, UNIT,
OFFSET) and the words, all of which `portable` has and explains: others define those that they do
better. Where neighbouring lanes are added cheaply (`ACROSS`) rows keep their own order, and there
are more words: `sums`, `neighbours`, `missing` and `signed` (neon), and where UNIT is 8 `quads`
(i8mm).
"""

import ctypes
import os
import platform
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from edgeq.errors import KernelError, RequestError
from edgeq.kernels import host

__all__ = [
    "available",
    "choose",
    "host_features",
    "modules",
    "named",
    "needed",
    "oldest",
    "target",
]

# Where Linux tells a program what an Arm CPU has: vector entry and bit, by LLVM's name (Linux:
# arch/arm64/include/uapi/asm/hwcap.h). /proc/cpuinfo is another machine's under an emulator.
HWCAPS = {"dotprod": (16, 20), "i8mm": (26, 13)}


@cache
def modules() -> dict[str, ModuleType]:
    """All instruction sets by name, best first."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
    found = [import_module(f"{__name__}.{name}") for name in names]
    return {m.NAME: m for m in sorted(found, key=lambda m: -m.RANK)}


def named(name: str, where: str) -> ModuleType:
    """The instruction set of another machine, as a file says; `where` names the file.

    Raises RequestError for an unknown name.

    >>> named("neon", "board.toml").RANK
    10
    >>> named("i8mm2", "board.toml")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    edgeq.errors.RequestError: board.toml: isa = 'i8mm2': expected one of ...
    """
    if name not in modules():
        raise RequestError(f"{where}: isa = {name!r}: expected one of {', '.join(modules())}")
    return modules()[name]


@cache
def host_features() -> frozenset[str]:
    """LLVM's names of the features of this CPU.

    On Arm LLVM knows only what /proc/cpuinfo says: 64-bit Arm always has NEON.
    """
    given = os.environ.get("NUMBA_CPU_FEATURES")
    if given:
        return frozenset(f[1:] for f in given.split(",") if f.startswith("+"))
    features = {f[1:] for f in host.features().split(",") if f.startswith("+")}
    if machine() == "aarch64":
        features |= {"neon"} | {name for name in HWCAPS if _has(*HWCAPS[name])}
    return frozenset(features)


def machine() -> str:
    """x86_64 or aarch64."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _has(entry: int, bit: int) -> bool:
    if sys.platform != "linux":
        return False
    auxiliary = ctypes.CDLL(None).getauxval
    auxiliary.argtypes, auxiliary.restype = [ctypes.c_ulong], ctypes.c_ulong
    return bool(auxiliary(entry) >> bit & 1)


def target(isa: ModuleType) -> tuple[str, str]:
    """LLVM's name of the CPU to compile for, and its features: what NUMBA_CPU_NAME and
    NUMBA_CPU_FEATURES say; else, with EDGEQ_ISA, `oldest`; else this CPU.
    """
    name, features = (os.environ.get(f"NUMBA_CPU_{word}") for word in ("NAME", "FEATURES"))
    if os.environ.get("EDGEQ_ISA"):
        default = oldest(isa)
    else:  # what LLVM does not see in a CPU that it does not know was found otherwise
        default = host.name(), ",".join(filter(None, [host.features(), needed(isa)]))
    return name or default[0], features or default[1]


def oldest(isa: ModuleType) -> tuple[str, str]:
    """Name and features of a CPU that has no more than all that have what an instruction set needs:
    code for it runs wherever `available` says so.
    """
    return isa.CPU[machine() if machine() in isa.CPU else next(iter(isa.CPU))], needed(isa)


def needed(isa: ModuleType) -> str:
    """The features an instruction set needs, as LLVM takes them."""
    return ",".join(f"+{name}" for name in sorted(isa.NEEDS))


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
