"""Which processors this process may use: physical cores, how fast each kind is, CPU quotas.

Known from sysfs (Linux: Documentation/ABI/testing/sysfs-devices-system-cpu) and cgroups; elsewhere
only counted.
"""

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgeq import sysfs

__all__ = ["Core", "Cpus", "find", "stay_on"]

FAST = 2 / 3  # of the fastest core's speed; the little cores of all known kinds are below


@dataclass(frozen=True)
class Core:
    """A physical core: its logical CPUs (SMT siblings) and its speed, 1 = the fastest here."""

    cpus: tuple[int, ...]
    speed: float = 1.0


@dataclass(frozen=True)
class Cpus:
    """Cores that this process may use, fastest first; quota: CPUs' worth of time per second that
    its cgroups allow.
    """

    cores: tuple[Core, ...]
    quota: float | None = None

    @cached_property
    def fast(self) -> tuple[Core, ...]:
        """The performance cores: all, where there is only one kind."""
        return tuple(core for core in self.cores if core.speed >= FAST)

    @property
    def threads(self) -> int:
        """Threads that do best by default: one per performance core, fewer under a quota."""
        return self._within_quota(len(self.fast))

    @property
    def usable(self) -> int:
        """Threads that can run at the same time."""
        return self._within_quota(sum(len(core.cpus) for core in self.cores))

    def home(self, thread: int) -> frozenset[int]:
        """CPUs that a thread (counted from 0) should stay on; empty = anywhere.

        Work is split evenly, so one thread on a slow core holds up all: where there are such, as
        many threads as there are performance cores stay on these. On no single one: a second
        process that pinned its threads so would share cores with the first while others idle.
        """
        if len(self.fast) == len(self.cores) or thread >= len(self.fast):
            return frozenset()
        return frozenset(cpu for core in self.fast for cpu in core.cpus)

    def _within_quota(self, count: int) -> int:
        return count if self.quota is None else max(min(count, int(self.quota)), 1)


def find(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Cpus:
    """The processors of this machine, as files under `root` describe them.

    allowed: logical CPUs to count; default those this process may run on.
    """
    mine = frozenset(_allowed() if allowed is None else allowed)
    places = {cpu: root / f"sys/devices/system/cpu/cpu{cpu}" for cpu in mine}
    siblings = {
        cpu: sysfs.cpu_list(place / "topology/thread_siblings_list")
        for cpu, place in places.items()
    }
    if not any(siblings.values()):
        return Cpus(_counted(sorted(mine)), _quota(root))
    speeds = _speeds(root, places)
    groups = {tuple(sorted((siblings[cpu] & mine) | {cpu})) for cpu in mine}
    top = max(speeds.values())
    cores = [Core(group, max(speeds[cpu] for cpu in group) / top) for group in groups]
    return Cpus(tuple(sorted(cores, key=lambda core: (-core.speed, core.cpus))), _quota(root))


def stay_on(cpus: Collection[int]) -> frozenset[int]:
    """Keep the calling thread on these CPUs; returns where it could run before, empty where
    nothing was changed (no such wish, not possible on this system).
    """
    if not cpus or not hasattr(os, "sched_setaffinity"):
        return frozenset()
    with contextlib.suppress(OSError):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        return frozenset(before)
    return frozenset()


def _allowed() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _counted(mine: list[int]) -> tuple[Core, ...]:
    """As many equal cores as the system says it has."""
    import psutil

    count = min(psutil.cpu_count(logical=False) or len(mine), len(mine))
    return tuple(Core(tuple(mine[i::count])) for i in range(count))


def _speeds(root: Path, places: dict[int, Path]) -> dict[int, float]:
    """Relative speed per CPU, by the first source that knows all of them."""
    fast = sysfs.cpu_list(root / "sys/devices/cpu_core/cpus")  # x86 with two kinds of cores
    if fast:
        return {cpu: 1.0 if cpu in fast else FAST / 2 for cpu in places}
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        found = {cpu: float(sysfs.integer(place / name) or 0) for cpu, place in places.items()}
        if all(found.values()):
            return found
    return dict.fromkeys(places, 1.0)


def _quota(root: Path) -> float | None:
    """CPUs' worth of time allowed by the cgroups that this process is in, and those above."""
    places = sysfs.cgroups(root, "cpu")
    return min((quota for place in places for quota in _quota_of(place)), default=None)


def _quota_of(place: Path) -> Iterator[float]:
    """cpu.max says "quota period" (version 2); version 1 has a file for each; none: max or -1."""
    words = sysfs.text(place / "cpu.max").split() or [
        sysfs.text(place / f"cpu.cfs_{name}_us") for name in ("quota", "period")
    ]
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
        yield int(words[0]) / int(words[1])
