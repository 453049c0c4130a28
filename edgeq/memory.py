"""Memory of this process and of the machine, in bytes."""

import contextlib
import sys
from pathlib import Path

import psutil

__all__ = ["available", "peak", "restart_peak"]


def available() -> int:
    """Memory that can be used without swapping.

    >>> available() > 1_000_000
    True
    """
    return int(psutil.virtual_memory().available)


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
