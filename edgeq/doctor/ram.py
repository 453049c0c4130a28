"""Memory: free, swap, limits of control groups and of this process, pages."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from edgeq import sysfs
from edgeq.doctor import Finding, State, System, drive
from edgeq.text import human

TITLE = "Memory"

NEEDED = 150 << 20  # bytes that edgeq takes beside a model
LITTLE = 512 << 20  # bytes in which only a small model has room
UNLIMITED = 1 << 60  # control groups of version 1 write a number near 2^63 for none


def findings(system: System) -> Iterator[Finding]:
    total, available, swap_total, swap_free = _sizes(system)
    yield _free(total, available)
    yield from _swap(system, total, swap_total, swap_free)
    yield from _groups(system, total)
    yield from _pages(system)
    yield from _limits(system)


def _sizes(system: System) -> tuple[int, int, int, int]:
    """Bytes: RAM in all, RAM available, swap in all, swap free; 0 where unknown."""
    found = sysfs.fields(system.root / "proc/meminfo")
    names = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree")
    values = [re.fullmatch(r"([0-9]{1,15}) kB", found.get(name, "")) for name in names]
    if not any(values) and system.live:
        import psutil

        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        return memory.total, memory.available, swap.total, swap.free
    total, available, swap, unused = (int(match[1]) << 10 if match else 0 for match in values)
    return total, available, swap, unused


def _free(total: int, available: int) -> Finding:
    if not total:
        return Finding("RAM", "info", "not shown by this system")
    text = f"{human(available)} of {human(total)} available"
    values = {"total": total, "available": available}
    remedy = "close other programs: `ps aux --sort=-rss | head` shows the largest"
    if available < NEEDED:
        return Finding("RAM", "fail", f"{text}: edgeq alone takes about 150 MiB", remedy, values)
    if available < min(LITTLE, total // 4):
        return Finding("RAM", "warn", text, remedy, values)
    return Finding("RAM", "ok", text, values=values)


# -- swap ------------------------------------------------------------------------------------------
def _swap(system: System, total: int, size: int, unused: int) -> Iterator[Finding]:
    areas = list(_areas(system))
    values = {"total": size, "free": unused, "areas": [name for name, _ in areas]}
    if not size:
        if total:
            yield Finding("swap", "info", "none: a program too large is ended", values=values)
        return
    names = ", ".join(f"{kind or 'swap'} ({name})" for name, kind in areas)
    text = f"{human(size - unused)} of {human(size)} used" + (f": {names}" if names else "")
    slow = [name for name, kind in areas if kind in _SLOW]
    if slow:
        remedy = f"sudo apt install zram-tools && sudo swapoff {slow[0]}"
        yield Finding("swap", "warn", f"{text}: slow, and wears it out", remedy, values)
    elif size - unused > size // 2 and not all(kind == "compressed RAM" for _, kind in areas):
        remedy = "use a smaller model or context, or close other programs"
        yield Finding("swap", "warn", text, remedy, values)
    else:
        yield Finding("swap", "ok", text, values=values)


_SLOW = {"SD card", "SD card or eMMC", "USB disk", "hard disk"}


def _areas(system: System) -> Iterator[tuple[str, str]]:
    """(file or device, kind of disk) of each swap area."""
    for line in system.text("proc/swaps").splitlines()[1:]:
        words = line.split()
        if len(words) < 5:
            continue
        device = words[0].startswith("/dev/")
        path = Path(words[0])
        yield (
            words[0],
            drive.kind(path.name, system.root) if device else drive.find(path, system.root).kind,
        )


# -- control groups --------------------------------------------------------------------------------
def _groups(system: System, total: int) -> Iterator[Finding]:
    groups = list(sysfs.cgroups(system.root, "memory"))
    limits = [limit for group in groups for limit in _limit(group)]
    if limits:
        size, used, name = min(limits)
        room = max(size - used, 0)
        text = f"{human(size)} by {name} of a control group, {human(room)} of it free"
        values = {"limit": size, "used": used}
        remedy = "raise MemoryMax= and MemoryHigh= of the service, or --memory of the container"
        state: State = "fail" if room < NEEDED else "warn" if room < LITTLE else "info"
        yield Finding("memory limit", state, text, "" if state == "info" else remedy, values)
        return
    controllers = system.text("sys/fs/cgroup/cgroup.controllers").split()
    if controllers and "memory" not in controllers:
        text = "the kernel cannot limit memory: MemoryMax= and --memory have no effect"
        remedy = "if you want limits: add cgroup_enable=memory to /boot/firmware/cmdline.txt"
        yield Finding("memory limit", "info", text, remedy)
    elif groups and total:
        yield Finding("memory limit", "ok", "none")


def _limit(group: Path) -> Iterator[tuple[int, int, str]]:
    """(bytes, bytes used, name) of each limit of a group; version 2, then 1."""
    names = {"memory.max": "memory.current", "memory.high": "memory.current"}
    for name, usage in (names | {"memory.limit_in_bytes": "memory.usage_in_bytes"}).items():
        size = sysfs.integer(group / name)
        if size is not None and 0 <= size < UNLIMITED:
            yield size, sysfs.integer(group / usage) or 0, name


# -- pages, and limits of this process -------------------------------------------------------------
def _pages(system: System) -> Iterator[Finding]:
    chosen = re.search(r"\[(\w+)\]", system.text("sys/kernel/mm/transparent_hugepage/enabled"))
    size = os.sysconf("SC_PAGESIZE") if system.live and hasattr(os, "sysconf") else 0
    parts = [f"{human(size)} each"] if size else []
    parts += [f"huge ones: {chosen[1]}"] if chosen else []
    if parts:
        values = {"bytes": size, "huge": chosen[1] if chosen else None}
        yield Finding("pages", "ok", ", ".join(parts), values=values)


_LIMITS = {
    "Max address space": ("-v", "a model is mapped into the address space"),
    "Max data size": ("-d", "the cache and the weights' scratch need it"),
    "Max file size": ("-f", "`edgeq convert` cannot write larger files"),
}


def _limits(system: System) -> Iterator[Finding]:
    text = system.text("proc/self/limits")
    tight = False
    for name, (flag, reason) in _LIMITS.items():
        if match := re.search(rf"^{name}\s+([0-9]{{1,20}})\s", text, re.MULTILINE):
            tight = True
            found = f"{name.lower()} {human(int(match[1]))}: {reason}"
            yield Finding("limits", "warn", found, f"ulimit {flag} unlimited")
    if text and not tight:
        locked = re.search(r"^Max locked memory\s+(\S+)", text, re.MULTILINE)
        bytes_ = locked[1] if locked else ""
        shown = human(int(bytes_)) if re.fullmatch("[0-9]{1,20}", bytes_) else bytes_
        more = f", locked memory {shown}" if shown else ""
        yield Finding("limits", "ok", f"address space and file size unlimited{more}")
