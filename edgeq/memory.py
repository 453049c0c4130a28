"""Memory of this process and of the machine, in bytes."""

import contextlib
import sys
from pathlib import Path

import psutil

from edgeq import sysfs

__all__ = ["available", "peak", "restart_peak"]


def available(root: Path = Path("/")) -> int:
    """Memory that can be used without swapping: what the machine has left, or less where a control
    group of this process allows less.

    >>> available() > 1_000_000
    True
    """
    allowed = (_allowed(place) for place in sysfs.cgroups(root, "memory"))
    found = [size for size in allowed if size is not None]
    return max(min([int(psutil.virtual_memory().available), *found]), 0)


def _allowed(place: Path) -> int | None:
    """Bytes that a control group has left; pages of files make room when they must."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = sysfs.integer(place / limit_name), sysfs.integer(place / used_name)
        if limit is not None and used is not None:
            return limit - used + _of_files(sysfs.text(place / "memory.stat"))
    return None


def _of_files(stat: str) -> int:
    """Bytes of files in memory; `total_` are version 1's sums with the groups below."""
    pairs = (line.partition(" ") for line in stat.splitlines())
    table = {name: int(value) for name, _, value in pairs if value.isdecimal()}
    kinds = ("inactive_file", "active_file")
    return sum(table.get(f"total_{kind}", table.get(kind, 0)) for kind in kinds)


def restart_peak() -> None:
    """Let `peak` count from now on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most memory that this process has held at once, mapped file pages included.

    >>> peak() > 1_000_000
    True
    """
    try:
        # getrusage's value also counts the program that started this one: VmHWM does not.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
