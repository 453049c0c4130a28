"""Compiled kernels on disk, as plain object code: one file per kernel in a folder per CPU,
instruction set and source.

A second start maps what the first one compiled and imports neither Numba nor a compiler. An entry
that is missing, cut short, altered or somebody else's is compiled again, never fatal. The folder is
made private (0700), and only what nobody else could have written is read: object code is as trusted
as edgeq itself.
"""

import contextlib
import ctypes
import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeq.data import find
from edgeq.errors import KernelError
from edgeq.kernels import host, store
from edgeq.kernels import isa as isas

__all__ = ["Loader", "folder", "read", "recall", "remember", "write"]

MAGIC = b"edgeq kernel 1\n"


@cache
def folder(isa: ModuleType) -> Path:
    """Folder of the kernels for this CPU, instruction set, source and compiler."""
    return store.root() / f"kernels-{_digest(isa)}"


def _digest(isa: ModuleType) -> str:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    blocks = [here.parent / "blocks.py", here.parent / "blockformat.py"]
    for path in sorted([*here.rglob("*.py"), *find("formats").glob("*.toml"), *blocks]):
        digest.update(path.read_bytes())
    facts = [isa.NAME, isas.machine(), sys.version.split()[0], *isas.target(isa)]
    facts += [host.version("llvmlite"), host.version("numba"), host.name(), host.features()]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:20]


def _file(where: Path, name: str) -> Path:
    return where / (name.replace("/", "-") + ".o")


def _seal(name: str, symbol: str, code: bytes) -> str:
    """Digest of everything that an entry says, its name too."""
    return hashlib.sha256(f"{name}\n{symbol}\n".encode() + code).hexdigest()


def write(where: Path, name: str, symbol: str, code: bytes) -> None:
    """Store a compiled kernel in a folder; complete or not at all. Raises OSError."""
    head = {"symbol": symbol, "bytes": len(code), "sha256": _seal(name, symbol, code)}
    store.write(_file(where, name), MAGIC + json.dumps(head).encode() + b"\n" + code)


def read(where: Path, name: str) -> tuple[str, bytes] | None:
    """(symbol, object code), or None when there is no sound entry of this user's own."""
    try:
        data = store.own(_file(where, name))
        if not data.startswith(MAGIC):
            return None
        line, _, code = data[len(MAGIC) :].partition(b"\n")
        head = json.loads(line)
        symbol = str(head["symbol"])
        return (symbol, code) if head["sha256"] == _seal(name, symbol, code) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(name: str, isa: ModuleType, values: dict[str, Any]) -> None:
    """Keep what was measured on this machine; a cache that cannot be written is no error."""
    with contextlib.suppress(KernelError):
        store.keep(folder(isa) / f"{name}.json", values)


def recall(name: str, isa: ModuleType) -> dict[str, Any] | None:
    """What was kept under this name, None where there is nothing of the kind."""
    return store.kept(folder(isa) / f"{name}.json")


class Loader:
    """Maps object code into the process by LLVM, where link.py cannot; the code lives as long as
    the loader.

    Each object has an engine of its own: kernels compiled in different processes may use the same
    symbol.
    """

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._llvm = llvm
        self._engines: list[Any] = []

    def add(self, symbol: str, code: bytes) -> int:
        """Address of the function `symbol` of an object file."""
        llvm = self._llvm
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        # Its sections side by side: 32-bit offsets between them must reach.
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engines.append(engine)
        return int(engine.get_function_address(symbol))


def callable_at(address: int) -> Any:
    """Python function of a kernel; calling it releases the interpreter lock."""
    word = ctypes.c_ssize_t
    return ctypes.CFUNCTYPE(None, word, word, word)(address)
