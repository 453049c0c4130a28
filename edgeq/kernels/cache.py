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
import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeq.data import find
from edgeq.errors import KernelError
from edgeq.kernels import isa as isas

__all__ = [
    "Loader",
    "folder",
    "keep",
    "kept",
    "places",
    "read",
    "recall",
    "refused",
    "remember",
    "root",
    "write",
]

MAGIC = b"edgeq kernel 1\n"


def root() -> Path:
    """The first of `places` that can be used; it is made.

    Raises KernelError when none can.
    """
    found = places()
    for path in found:
        with contextlib.suppress(OSError):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not refused(path):
            return path
    raise KernelError(
        f"no place for compiled kernels: {found[0]} and {found[1]} cannot be written, or others "
        "can write there: set EDGEQ_CACHE to a folder of your own"
    )


def places() -> list[Path]:
    """Folder `edgeq` in EDGEQ_CACHE, else in the user's cache folder; for where that is not
    writable, or others could write in it, a fixed one among the temporary files.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [Path(os.environ.get("EDGEQ_CACHE") or home).absolute() / "edgeq", _temporary()]


def refused(path: Path) -> str:
    """Why a folder cannot hold compiled kernels, nothing where it can; one that is shared is left
    as it is.
    """
    try:
        status = path.lstat()
    except OSError:
        return "cannot be made"
    if not stat.S_ISDIR(status.st_mode):
        return "not a folder"
    if not _private(status):
        return f"of user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}: not yours alone"
    return "" if os.access(path, os.W_OK | os.X_OK) else "not writable"


def _temporary() -> Path:
    name = f"edgeq-{os.getuid()}" if os.name == "posix" else "edgeq"
    return Path(tempfile.gettempdir()).absolute() / name


def _private(status: os.stat_result) -> bool:
    """Whether only this user can have written what is there."""
    if os.name != "posix":
        return True
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022


@cache
def folder(isa: ModuleType) -> Path:
    """Folder of the kernels for this CPU, instruction set, source and compiler."""
    return root() / f"kernels-{_digest(isa)}"


def _digest(isa: ModuleType) -> str:
    from edgeq.kernels import host

    digest = hashlib.sha256()
    here = Path(__file__).parent
    blocks = [here.parent / "blocks.py", here.parent / "blockformat.py"]
    for path in sorted([*here.rglob("*.py"), *find("formats").glob("*.toml"), *blocks]):
        digest.update(path.read_bytes())
    facts = [isa.NAME, isas.machine(), sys.version.split()[0]]
    facts += [host.version("llvmlite"), host.version("numba"), host.name(), host.features()]
    facts += [os.environ.get(name, "") for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:20]


def _file(where: Path, name: str) -> Path:
    return where / (name.replace("/", "-") + ".o")


def _seal(name: str, symbol: str, code: bytes) -> str:
    """Digest of everything that an entry says, its name too."""
    return hashlib.sha256(f"{name}\n{symbol}\n".encode() + code).hexdigest()


def write(where: Path, name: str, symbol: str, code: bytes) -> None:
    """Store a compiled kernel in a folder; complete or not at all."""
    path = _file(where, name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    head = {"symbol": symbol, "bytes": len(code), "sha256": _seal(name, symbol, code)}
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(MAGIC + json.dumps(head).encode() + b"\n" + code)
    os.replace(file.name, path)


def read(where: Path, name: str) -> tuple[str, bytes] | None:
    """(symbol, object code), or None when there is no sound entry of this user's own."""
    try:
        data = _own(_file(where, name))
        if not data.startswith(MAGIC):
            return None
        line, _, code = data[len(MAGIC) :].partition(b"\n")
        head = json.loads(line)
        symbol = str(head["symbol"])
        return (symbol, code) if head["sha256"] == _seal(name, symbol, code) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own(path: Path) -> bytes:
    """Bytes of a file, none when others could have written it or put it there. Raises OSError."""
    if not _private(path.parent.lstat()):
        return b""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with open(fd, "rb") as file:
        return file.read() if _private(os.fstat(fd)) else b""


def remember(name: str, isa: ModuleType, values: dict[str, Any]) -> None:
    """Keep what was measured on this machine; a cache that cannot be written is no error."""
    with contextlib.suppress(KernelError):
        keep(folder(isa) / f"{name}.json", values)


def recall(name: str, isa: ModuleType) -> dict[str, Any] | None:
    """What was kept under this name, None where there is nothing of the kind."""
    return kept(folder(isa) / f"{name}.json")


def keep(path: Path, values: dict[str, Any]) -> None:
    """Write a table to a file of the cache, unless it cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(values, file)
        os.replace(file.name, path)


def kept(path: Path) -> dict[str, Any] | None:
    """The table in a file of the cache, None where there is none of this user's own."""
    try:
        found = json.loads(_own(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


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
