"""Kernels: all machine code that inference runs, compiled for this CPU on first use and cached on
disk.

`load(names)` gives addresses. What an op computes stands in matmul.py, activations.py and
attention.py; how a format's bytes become lanes in codes.py; what differs between instruction sets
in isa/.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache as once
from pathlib import Path
from types import ModuleType
from typing import IO

from edgeq import memory
from edgeq.errors import KernelError
from edgeq.kernels import cache, link
from edgeq.kernels import isa as isas

__all__ = ["load", "missing"]

CHILD_BYTES = 300 << 20  # memory of a process that compiles, and some to spare
Progress = Callable[
    [str, int, int], None
]  # kernel just compiled, how many are done, how many there are


_mapper, _llvm = once(link.Loader), once(cache.Loader)


def _add(symbol: str, code: bytes) -> int:
    """Address of a function of an object file, by LLVM where the system refuses link.py."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return _mapper().add(symbol, code)
    return _llvm().add(symbol, code)


def missing(names: Iterable[str], isa: ModuleType) -> list[str]:
    """Kernels that must be compiled before they can be loaded."""
    return [name for name in dict.fromkeys(names) if cache.read(cache.folder(isa), name) is None]


def load(names: Iterable[str], isa: ModuleType, progress: Progress | None = None) -> dict[str, int]:
    """Address of each kernel; compiles what the cache lacks, two at a time where memory and
    processors suffice, and reports it through `progress`.

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
    address = _add(*entry) if entry else 0
    if not address:
        raise KernelError(
            f"kernel {name}: no code in {cache.folder(isa)}: is the disk full, or the "
            "folder open to others?"
        )
    return address


def _compile(names: list[str], isa: ModuleType, progress: Progress | None) -> None:
    done = 0
    if progress:
        progress("", 0, len(names))
    at_once = max(min(2, len(names), os.cpu_count() or 1, memory.available() // CHILD_BYTES), 1)
    shares = [names[i::at_once] for i in range(at_once)]
    with contextlib.ExitStack() as stack:
        # Files, not pipes: a child that says a lot would wait for a reader of its errors.
        errors = [stack.enter_context(_text_file()) for _ in shares]
        children = []
        for share, file in zip(shares, errors):
            children.append(stack.enter_context(_child(share, file, isa)))
            stack.callback(children[-1].kill)
        for child in children:
            assert child.stdout is not None
            for line in child.stdout:
                done += 1
                if progress:
                    progress(line.strip(), done, len(names))
        for child, file in zip(children, errors):
            if child.wait():
                why = _killed(child.returncode) or _last_line(file)
                why = why or f"exit code {child.returncode}"
                raise KernelError(f"compiling kernels for {isa.NAME} failed: {why}")


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    lines = file.read().strip().splitlines()
    return lines[-1] if lines else ""


def _killed(code: int) -> str:
    """What an exit code says about a signal, nothing where there was none: -9, or 137 from a shell
    and from compile.py.
    """
    number = -code if code < 0 else code - 128
    if number == 9:
        advice = "not enough memory? close other programs or add swap (zram)"
        return f"killed by signal 9: {advice}"
    return f"killed by signal {number}" if number > 0 else ""


def _child(names: list[str], errors: IO[str], isa: ModuleType) -> subprocess.Popen[str]:
    # -P: a numba.py in the current folder is not ours to run.
    module = ["-P", "-m", "edgeq.kernels.compile"]
    command = [sys.executable, *module, str(cache.folder(isa)), *names]
    env = {**os.environ, "EDGEQ_ISA": isa.NAME, "PYTHONPATH": _search_path()}
    env["NUMBA_CPU_NAME"], env["NUMBA_CPU_FEATURES"] = isas.target(isa)
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)


def _search_path() -> str:
    """Where this process finds modules, without the current folder unless edgeq is there."""
    home, here = Path(__file__).resolve().parents[2], Path(".").resolve()
    places = [Path(place).resolve() for place in sys.path]
    kept = [place for place in places if place != here or place == home]
    return os.pathsep.join(map(str, kept if home in kept else [home, *kept]))
