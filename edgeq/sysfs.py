"""Small files of the system under /proc and /sys, read so that nothing in them can break a caller.

A file that is missing, unreadable, too long or garbled reads as nothing. Paths start at a folder
`root`, so that tests can show the files of another machine.
"""

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cgroups", "cpu_list", "fields", "integer", "numbered", "parsed_cpus", "strings", "text"]

MOST = 1 << 20  # bytes read of a file
MOST_CPUS = 1 << 14
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def text(path: Path) -> str:
    """Content without blanks around it; undecodable bytes and NUL are left out.

    >>> text(Path("/proc/no such file"))
    ''
    """
    return _raw(path).replace("\0", "").strip()


def strings(path: Path) -> list[str]:
    """The strings of a file that ends each with NUL, as the device tree does."""
    return [part for part in _raw(path).split("\0") if part.strip()]


def _raw(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MOST).decode("utf-8", "ignore")
    except (OSError, ValueError):
        return ""


def integer(path: Path) -> int | None:
    """The one whole number that a file holds.

    >>> integer(Path("/proc/no such file")) is None
    True
    """
    found = text(path)
    return int(found) if _INTEGER.fullmatch(found) else None


def fields(path: Path) -> dict[str, str]:
    """Lines `name : value` or `name=value`, such as those of /proc/meminfo and /etc/os-release;
    of lines with the same name the last.
    """
    parts = (re.split(r"[:=]", line, maxsplit=1) for line in text(path).splitlines())
    return {part[0].strip(): part[1].strip().strip('"') for part in parts if len(part) == 2}


def cpu_list(path: Path) -> frozenset[int]:
    """CPUs in the kernel's notation, such as 0-3,8; none where it is not that."""
    return parsed_cpus(text(path))


def parsed_cpus(words: str) -> frozenset[int]:
    """
    >>> sorted(parsed_cpus("0-2,8")), sorted(parsed_cpus("0-x"))
    ([0, 1, 2, 8], [])
    """
    found: set[int] = set()
    for part in words.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            return frozenset()
        first, last = int(match[1]), int(match[2] or match[1])
        found.update(range(first, min(last, first + MOST_CPUS) + 1))
    return frozenset(found)


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that hold this process, innermost first, and of those above:
    of version 2 all, of version 1 those of the controller (cpu, memory).
    """
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        top = root / "sys/fs/cgroup"
        if controller in controllers.split(","):
            top /= controller
        elif controllers:
            continue
        inner = top / path.lstrip("/")
        for place in (inner, *inner.parents):
            yield place
            if place == top:
                break


def numbered(folder: Path, pattern: str) -> Iterator[Path]:
    """Entries of a folder that match a pattern, `cpu10` after `cpu9`."""
    try:
        found = list(folder.glob(pattern))
    except (OSError, ValueError):
        return
    yield from sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]{1,18})", str(path))
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]
