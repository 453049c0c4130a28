"""Kernels: all machine code that inference runs, compiled for this CPU on first use and cached on
disk.

`load(names)` gives addresses. What an op computes stands in matmul.py, activations.py and
attention.py; how a format's bytes become lanes in codes.py; what differs between instruction sets
in isa/.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache as once
from types import ModuleType

from edgeq.errors import KernelError
from edgeq.kernels import cache
from edgeq.kernels import isa as isas

__all__ = ["load", "missing"]

Progress = Callable[
    [str, int, int], None
]  # kernel just compiled, how many are done, how many there are


@once
def _loader() -> cache.Loader:
    return cache.Loader()


def missing(names: Iterable[str], isa: ModuleType) -> list[str]:
    """Kernels that must be compiled before they can be loaded."""
    return [name for name in dict.fromkeys(names) if cache.read(cache.folder(isa), name) is None]


def load(names: Iterable[str], isa: ModuleType, progress: Progress | None = None) -> dict[str, int]:
    """Address of each kernel; compiles what the cache lacks, two at a time, and reports it through
    `progress`.

    Raises KernelError when a kernel cannot be compiled.
    """
    names = list(dict.fromkeys(names))
    absent = missing(names, isa)
    if absent:
        _compile(absent, isa, progress)
    return {name: _address(name, isa) for name in names}


@once
def _address(name: str, isa: ModuleType) -> int:
    entry = cache.read(cache.folder(isa), name)
    address = _loader().add(*entry) if entry else 0
    if not address:
        raise KernelError(
            f"kernel {name}: no code in {cache.folder(isa)} after compiling it: is the disk full?"
        )
    return address


def _compile(names: list[str], isa: ModuleType, progress: Progress | None) -> None:
    done = 0
    if progress:
        progress("", 0, len(names))
    shares = [names[i::2] for i in range(min(2, len(names), os.cpu_count() or 1))]
    children = [_child(share, isa) for share in shares]
    try:
        for child in children:
            assert child.stdout is not None
            for line in child.stdout:
                done += 1
                if progress:
                    progress(line.strip(), done, len(names))
        for child in children:
            _, errors = child.communicate()
            if child.returncode:
                last = errors.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
                raise KernelError(f"compiling kernels for {isa.NAME} failed: {last[0]}")
    finally:
        for child in children:
            child.kill()
            child.communicate()


def _child(names: list[str], isa: ModuleType) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgeq.kernels.compile", str(cache.folder(isa)), *names]
    env = {**os.environ, "EDGEQ_ISA": isa.NAME}
    if os.environ.get("EDGEQ_ISA"):
        env.setdefault("NUMBA_CPU_NAME", isa.CPU[isas.machine()])
        env.setdefault("NUMBA_CPU_FEATURES", "")
    path = [p for p in sys.path if p] + [os.environ.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
