"""Small private files in the user's cache folder: whole or not there, and read only if nobody else
could have written them.
"""

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from edgeq.errors import KernelError

__all__ = ["keep", "kept", "own", "places", "refused", "root", "write"]


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


def write(path: Path, data: bytes) -> None:
    """Store a file; complete or not at all, and nothing is left where the disk is full.

    Raises OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def own(path: Path) -> bytes:
    """Bytes of a file, none when others could have written it or put it there. Raises OSError."""
    if not _private(path.parent.lstat()):
        return b""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with open(fd, "rb") as file:
        return file.read() if _private(os.fstat(fd)) else b""


def keep(path: Path, values: dict[str, Any]) -> None:
    """Write a table to a file of the cache, unless it cannot be written."""
    with contextlib.suppress(OSError):
        write(path, json.dumps(values).encode())


def kept(path: Path) -> dict[str, Any] | None:
    """The table in a file of the cache, None where there is none of this user's own."""
    try:
        found = json.loads(own(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
