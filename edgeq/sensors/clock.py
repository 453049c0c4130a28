"""Clocks of the CPUs (Linux: Documentation/admin-guide/pm/cpufreq.rst)."""

from pathlib import Path

from edgeq import sysfs

__all__ = ["find", "read"]


def find(root: Path) -> list[Path]:
    """A file per CPU that says how fast it runs now, in kHz."""
    cpus = sysfs.numbered(root / "sys/devices/system/cpu", "cpu[0-9]*")
    files = (cpu / "cpufreq/scaling_cur_freq" for cpu in cpus)
    return [file for file in files if sysfs.integer(file)]


def read(files: list[Path]) -> tuple[float, ...]:
    """MHz of each CPU that says so."""
    found = (sysfs.integer(file) for file in files)
    return tuple(khz / 1000 for khz in found if khz and khz > 0)
