"""Temperatures of the CPU, and those at which it is slowed down.

Linux: Documentation/driver-api/thermal/sysfs-api.rst, Documentation/hwmon/sysfs-interface.rst.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from edgeq import sysfs

__all__ = ["Place", "find", "hottest", "limit"]

_CPU = re.compile(r"cpu|core|package|pkg|soc|^tj|k10temp|zenpower", re.IGNORECASE)
_OTHER = re.compile(r"gpu", re.IGNORECASE)
MARGIN = 10.0  # kelvin below the temperature at which the system would be switched off


@dataclass(frozen=True)
class Place:
    """Something whose temperature can be read, in thousandths of a degree Celsius."""

    name: str
    file: Path
    limit: float | None = None  # °C at which it is cooled by working more slowly


def find(root: Path) -> list[Place]:
    """The places of the CPU; where none is called so, all there are."""
    zones = [_zone(path) for path in sysfs.numbered(root / "sys/class/thermal", "thermal_zone*")]
    chips = [
        Place(name, file, _degrees(file.with_name(file.name.replace("_input", "_crit"))))
        for chip in sysfs.numbered(root / "sys/class/hwmon", "hwmon*")
        if (name := sysfs.text(chip / "name"))
        for file in sysfs.numbered(chip, "temp*_input")
    ]
    cpu = [p for p in (*zones, *chips) if _CPU.search(p.name) and not _OTHER.search(p.name)]
    return [place for place in cpu or zones if _degrees(place.file) is not None]


def hottest(places: list[Place]) -> float | None:
    """°C of the hottest place."""
    found = (_degrees(place.file) for place in places)
    return max((celsius for celsius in found if celsius is not None), default=None)


def limit(places: list[Place]) -> float | None:
    """The lowest temperature, in °C, from which one of the places is cooled by working less."""
    return min((place.limit for place in places if place.limit is not None), default=None)


def _zone(path: Path) -> Place:
    return Place(sysfs.text(path / "type"), path / "temp", _trip(path))


def _trip(zone: Path) -> float | None:
    """Passive and hot trip points slow the CPU down, critical ones switch the machine off; active
    ones only start a fan.
    """
    found: dict[str, list[float]] = {}
    for kind in sysfs.numbered(zone, "trip_point_*_type"):
        celsius = _degrees(kind.with_name(kind.name.replace("_type", "_temp")))
        if celsius is not None and celsius > 30:  # 0 stands for one that is not set
            found.setdefault(sysfs.text(kind), []).append(celsius)
    slow = found.get("passive", []) + found.get("hot", [])
    return min(slow or [celsius - MARGIN for celsius in found.get("critical", [])], default=None)


def _degrees(file: Path) -> float | None:
    """A value that can be a temperature of silicon that works."""
    value = sysfs.integer(file)
    return value / 1000 if value is not None and -40_000 <= value <= 150_000 else None
