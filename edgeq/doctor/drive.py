"""Which disk a path is on, and how fast it reads."""

import contextlib
import mmap
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from edgeq import sysfs

__all__ = ["Drive", "find", "free", "kind", "read_speed"]

CHUNK = 1 << 20
SECONDS = 0.5  # of reading at most
MOST = 256 << 20  # bytes of reading at most
LEAST = 8 << 20  # bytes of a file that is worth reading
FILES = 2000  # looked at when one is searched for
_PARTITION = re.compile(r"((?:mmcblk|nvme\d+n|nbd)\d+)p\d+|((?:s|v|xv|h)d[a-z]+)\d+")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph"}


@dataclass(frozen=True)
class Drive:
    """What a path is mounted from."""

    mount: str = ""
    filesystem: str = ""
    options: frozenset[str] = frozenset()
    kind: str = ""  # SD card, NVMe SSD, ...


def find(path: Path, root: Path = Path("/")) -> Drive:
    """The drive of a path, by the mounts of this process; an empty one where they are unknown."""
    best, words = "", []
    for line in sysfs.text(root / "proc/self/mountinfo").splitlines():
        parts = line.split()
        if len(parts) < 9 or "-" not in parts[6:-2]:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), parts[4])
        if _holds(mount, path) and len(mount) >= len(best):  # the last of equals hides the others
            best, words = mount, parts
    if not words:
        return Drive()
    filesystem, source = words[words.index("-", 6) + 1 :][:2]
    device = Path(source).name if source.startswith("/dev/") else ""
    if not (root / "sys/class/block" / device).exists() or not device:
        uevent = sysfs.fields(root / "sys/dev/block" / words[2] / "uevent")
        device = uevent.get("DEVNAME", device)
    known = "network" if filesystem in _NETWORK else kind(device, root)
    known = "memory" if filesystem in ("tmpfs", "ramfs") else known
    return Drive(best, filesystem, frozenset(words[5].split(",")), known)


def _holds(mount: str, path: Path) -> bool:
    return mount == "/" or path.is_relative_to(mount)


def kind(device: str, root: Path = Path("/")) -> str:
    """What a block device is, by its kernel name such as mmcblk0p2; nothing where unknown."""
    blocks = root / "sys/class/block"
    for _ in range(4):  # a volume on an encrypted volume on ...
        below = next(sysfs.numbered(blocks / device / "slaves", "*"), None)
        if below is None:
            break
        device = below.name
    if match := _PARTITION.fullmatch(device):
        device = match[1] or match[2]
    if device.startswith("mmcblk"):
        card = sysfs.text(blocks / device / "device/type")
        return {"SD": "SD card", "MMC": "eMMC"}.get(card, "SD card or eMMC")
    return _other(device, blocks)


def _other(device: str, blocks: Path) -> str:
    if device.startswith("nvme"):
        return "NVMe SSD"
    if device.startswith("zram"):
        return "compressed RAM"
    if device.startswith(("vd", "xvd")):
        return "virtual disk"
    turns = sysfs.integer(blocks / device / "queue/rotational")
    if turns is None:
        return ""
    with contextlib.suppress(OSError):
        if "/usb" in str((blocks / device).resolve()):
            return "USB disk"
    return "hard disk" if turns else "SSD"


def free(path: Path) -> tuple[int, int] | None:
    """Bytes (in all, that this user may still write) of the disk of a path; None where that is not
    known, or it is none, as /proc.
    """
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return (usage.total, usage.free) if usage.total else None
    return None


def read_speed(path: Path) -> float | None:
    """Bytes per second of reading a file on the disk of this path (a folder: one in it, else one of
    Python's packages, if on the same disk), not from the system's memory; None where there is no
    such file or no way around that memory.
    """
    with contextlib.suppress(OSError):
        disk = path.stat().st_dev
        for file in _files(path):
            status = file.stat()
            if status.st_dev == disk and status.st_size >= LEAST:
                return _timed(file)
    return None


def _files(path: Path) -> Iterator[Path]:
    """Models first, then large files of packages."""
    if path.is_file():
        yield path
        return
    yield from sorted(path.glob("*.gguf"))
    site = Path(sysconfig.get_path("platlib"))
    for pattern in ("llvmlite/binding/*", "numpy.libs/*", "*/*.so"):
        yield from (file for _, file in zip(range(FILES), site.glob(pattern)))


def _timed(file: Path) -> float | None:
    """The file is read past the page cache, at most SECONDS or MOST of it."""
    if not hasattr(os, "O_DIRECT"):
        return None
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, CHUNK) as buffer:  # aligned, as direct reads need it
            done, start = 0, perf_counter()
            while done < MOST and perf_counter() - start < SECONDS:
                got = os.readv(fd, [buffer])
                if got <= 0:
                    break
                done += got
            seconds = perf_counter() - start
    finally:
        os.close(fd)
    return done / seconds if done and seconds else None
