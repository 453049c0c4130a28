"""Compile kernels by name, in a process of its own: `python -m edgeq.kernels.compile FOLDER
NAME...`.

The child imports Numba and LLVM's optimizer; the engine's process then needs neither. Each finished
name is printed.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import cfunc

from edgeq import blocks
from edgeq.errors import KernelError
from edgeq.kernels import activations, attention, cache, matmul, probe, rope, sync
from edgeq.kernels import isa as isas
from edgeq.kernels.words import SIGNATURE

__all__ = ["body", "compile_kernel"]


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
    for name in names:
        cache.write(Path(folder), name, *compile_kernel(name, isa))
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
