"""The disk that models are on: room, kind, speed."""

import os
from collections.abc import Iterator
from pathlib import Path

from edgeq.doctor import Finding, System, drive
from edgeq.text import human

TITLE = "Disk"

LITTLE, NEEDED = 2 << 30, 200 << 20  # free bytes
SLOW = 60e6  # bytes per second


def findings(system: System) -> Iterator[Finding]:
    path = Path(os.path.abspath(system.place))
    found = drive.find(path, system.root)
    yield _room(path, found)
    yield from _writable(path, found)
    yield from _speed(path, found)


def _room(path: Path, found: drive.Drive) -> Finding:
    sizes = drive.free(path)
    what = ", ".join(part for part in (found.kind, found.filesystem) if part)
    where = f"{path}" + (f" ({what})" if what else "")
    if sizes is None:
        return Finding("room", "info", f"{where}: unknown")
    total, free = sizes
    values = {
        "path": str(path),
        "kind": found.kind,
        "filesystem": found.filesystem,
        "total": total,
        "free": free,
    }
    text = f"{human(free)} of {human(total)} free: {where}"
    if free >= LITTLE or "ro" in found.options:  # nothing is written there anyway
        return Finding("room", "ok", text, values=values)
    remedy = "delete what you do not need: `du -xh --max-depth=2 ~ | sort -h | tail`"
    return Finding("room", "fail" if free < NEEDED else "warn", text, remedy, values)


def _writable(path: Path, found: drive.Drive) -> Iterator[Finding]:
    if "ro" in found.options:
        text = f"{found.mount} is mounted read-only: nothing can be converted to there"
        remedy = f"sudo mount -o remount,rw {found.mount}; if it fails, the disk may be failing"
        yield Finding("writing", "warn", text, remedy)
    if found.filesystem in ("vfat", "msdos"):
        text = f"{found.filesystem} holds no file above 4 GiB"
        yield Finding("writing", "warn", text, "use a disk with ext4 or exfat for large models")


def _speed(path: Path, found: drive.Drive) -> Iterator[Finding]:
    if found.kind == "memory":
        return
    rate = drive.read_speed(path)
    if rate is None:
        yield Finding("reading", "info", "not measured: no large file there to read past the cache")
        return
    text = f"{rate / 1e6:.0f} MB/s: the first start of a 1 GB model takes {1e9 / rate:.1f} s"
    values = {"bytes_per_second": rate}
    if rate < SLOW:
        remedy = "keep models on an SSD, or a faster card (A2)"
        yield Finding("reading", "warn", text, remedy, values)
    else:
        yield Finding("reading", "ok", text, values=values)
