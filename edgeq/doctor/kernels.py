"""The folder of compiled kernels, and whether code may be compiled at all."""

import contextlib
import mmap
import stat
from collections.abc import Iterator
from pathlib import Path

from edgeq.doctor import Finding, System, drive
from edgeq.errors import KernelError
from edgeq.text import human

TITLE = "Kernels"

NEEDED = 20 << 20  # bytes of all kernels that a model uses, with room for those of another
_USUAL = "rm or chown what is there, or set EDGEQ_CACHE to a folder of your own"


def findings(system: System) -> Iterator[Finding]:
    """Of this process, whatever `root` is: another machine's kernels are not here."""
    yield _executable()
    try:
        from edgeq.kernels import store

        root = store.root()
    except ImportError:
        return  # another line says which package is missing
    except KernelError as error:
        yield Finding("cache", "fail", str(error).partition(": set")[0], "set EDGEQ_CACHE")
        return
    yield _folder(root, system)
    with contextlib.suppress(KernelError, ImportError):
        yield _compiled(root)


def _executable() -> Finding:
    """A service may forbid memory that is written first and run then (MemoryDenyWriteExecute=)."""
    if not hasattr(mmap, "PROT_EXEC"):
        return Finding("compiling", "info", "unknown on this system")
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError:
        text = "this process may not run code that it makes"
        return Finding("compiling", "fail", text, "MemoryDenyWriteExecute=no in the service's file")
    return Finding("compiling", "ok", "code made here may be run here")


def _folder(root: Path, system: System) -> Finding:
    from edgeq.kernels import store

    wished = store.places()[0]
    found, sizes = drive.find(root, system.root), drive.free(root)
    mode = stat.S_IMODE(root.stat().st_mode)
    values = {
        "path": str(root),
        "mode": f"{mode:o}",
        "free": sizes[1] if sizes else None,
        "filesystem": found.filesystem,
        "options": sorted(found.options),
    }
    if root != wished:
        text = f"{root}, since {wished} is {store.refused(wished)}: lost when the machine restarts"
        return Finding("cache", "warn", text, _USUAL, values)
    if sizes and sizes[1] < NEEDED:
        text = f"{root}: {human(sizes[1])} free"
        return Finding("cache", "fail", text, "make room, or set EDGEQ_CACHE", values)
    if found.kind == "memory":
        text = f"{root} is in memory: lost when the machine restarts"
        return Finding("cache", "warn", text, "set EDGEQ_CACHE to a folder on a disk", values)
    return Finding("cache", "ok", f"{root}, mode {mode:o}", values=values)


def _compiled(root: Path) -> Finding:
    from edgeq.kernels import cache, isa

    here = cache.folder(isa.choose())
    own = sorted(here.glob("*.o"))
    size = sum(file.stat().st_size for file in own)
    old = [path for path in root.glob("kernels-*") if path != here]
    values = {"kernels": len(own), "bytes": size, "other_folders": [str(path) for path in old]}
    more = f"; {len(old)} of other versions beside it may be deleted" if old else ""
    if not own:
        text = f"none yet: the first start takes longer{more}"
        return Finding("compiled", "info", text, values=values)
    return Finding("compiled", "ok", f"{len(own)} kernels, {human(size)}{more}", values=values)
