"""Compile kernels by name, in a process of its own: `python -m edgeq.kernels.compile FOLDER
NAME...`.

The child imports Numba and LLVM's optimizer; the engine's process then needs neither. Each finished
name is printed.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import cfunc

from edgeq import blocks, memory
from edgeq.errors import KernelError
from edgeq.kernels import activations, attention, cache, matmul, probe, rope, sync
from edgeq.kernels import isa as isas
from edgeq.kernels.words import SIGNATURE

__all__ = ["body", "compile_kernel"]

SHORT = 1 << 30  # bytes of free memory below which no kernel may leave anything behind
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies


def body(name: str, isa: ModuleType) -> Any:
    """The Python body of a kernel: its name is an op, or op/formats, or op/number, or op/types."""
    op, _, variant = name.partition("/")
    by_formats: dict[str, Any] = {
        "matvec": matmul.matvec,
        "matmul": matmul.matmul,
        "gated": matmul.gated,
        "embed": activations.embed,
    }
    by_number = {"prepare": activations.prepare}
    by_types: dict[str, Any] = {
        "attend": attention.attend,
        "rope": rope.rope,
    }  # of the KV cache, after numbers
    single = {
        "gather": activations.gather,
        "walk": sync.walk,
        "lead": sync.lead,
        "serve": sync.serve,
        "probe_read": probe.probe_read,
        "probe_dot": probe.probe_dot,
    }
    if op in by_formats:
        return by_formats[op](isa, *map(blocks.get, variant.split(".")))
    if op in by_number:
        return by_number[op](isa, int(variant))
    if op in by_types:
        *numbers, k, v = variant.split(".")
        return by_types[op](isa, *map(int, numbers), k, v)
    if op in single:
        return single[op](isa)
    raise KernelError(f"kernel {name!r}: unknown")


def compile_kernel(name: str, isa: ModuleType) -> tuple[str, bytes]:
    """(symbol, object code)."""
    # No fastmath here: Numba would put it on emitted arithmetic too, whose rounding tricks rely on
    # order.
    compiled = cfunc(SIGNATURE, error_model="numpy")(body(name, isa))
    _, _, (code, _) = compiled._library.serialize_using_object_code()
    if b"numba_unpickle" in code:  # its body can raise: it would need the interpreter
        raise KernelError(f"kernel {name}: compiles to code that can raise a Python exception")
    return compiled.native_name, code


def main(folder: str, *names: str) -> None:
    """Compile kernels into a folder of the cache."""
    isa = isas.choose()
    cfunc(SIGNATURE)(_nothing)  # what every compilation needs is there before the first fork
    do = _apart if sys.platform == "linux" and memory.available() < SHORT else _here
    for name in names:
        do(partial(_store, Path(folder), name, isa))
        print(name, flush=True)


def _store(folder: Path, name: str, isa: ModuleType) -> None:
    cache.write(folder, name, *compile_kernel(name, isa))


def _nothing(args, thread, threads):
    pass


def _here(work: Callable[[], None]) -> None:
    work()


def _apart(work: Callable[[], None]) -> None:
    """Do it in a forked process: LLVM and Numba keep some 10 MB of every kernel, too much in the
    end for a board with 512 MB.
    """
    parent, child = os.getpid(), os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.exit(code if code > 0 else 128 - code)  # as shells do; else it has said why
        return
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # not killed before
            work()
            code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
