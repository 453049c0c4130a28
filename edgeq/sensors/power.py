"""Energy that the machine takes: counters of the CPU, else sensors of the board.

The first kind that can be read is used: energy counters of CPU and memory (RAPL: Documentation/
power/powercap/powercap.rst), power sensors (Documentation/hwmon/sysfs-interface.rst), the rails of
a power management chip (`vcgencmd pmic_read_adc`). They do not measure the same: the first is the
chip, the others more or less of the board.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq import sysfs
from edgeq.sensors.tool import Tool

__all__ = ["Meter", "find", "hidden", "rails"]

_POWERCAP = "sys/class/powercap"
_COUNTED = re.compile(r"package-\d+|dram")  # the parts of one package are in it already
_TOTAL = re.compile(r"_IN$|total", re.IGNORECASE)  # a sensor of all that others measure in parts
_RAIL = re.compile(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.MULTILINE)
MOST_WATTS = 10_000.0


@dataclass(frozen=True)
class Meter:
    """A source of energy or power; by default none."""

    name: str = ""
    counters: tuple[tuple[Path, float], ...] = ()  # file in microjoules, joules until it is 0 again
    files: tuple[tuple[Path, ...], ...] = ()  # microwatts, or millivolts and milliamperes
    tool: Tool | None = None

    @property
    def by_tool(self) -> bool:
        """Whether a program has to be asked."""
        return self.tool is not None

    def joules(self) -> tuple[float, ...]:
        """What each counter shows; nothing when one cannot be read."""
        found = [sysfs.integer(file) for file, _ in self.counters]
        known = tuple(value / 1e6 for value in found if value is not None and value >= 0)
        return known if len(known) == len(found) else ()

    def watts(self) -> float | None:
        """Power now, all sensors together; None when one of them cannot be read."""
        if self.tool is not None:
            return rails(self.tool("vcgencmd", "pmic_read_adc"))
        found = [_watts(files) for files in self.files]
        known = [value for value in found if value is not None]
        return sum(known) if known and len(known) == len(found) else None

    def total(self, readings: Sequence[tuple[float, ...]]) -> float | None:
        """Joules between the first and the last reading of the counters, which start again at 0
        after their range; None where fewer than two can be read.
        """
        sound = [values for values in readings if values]
        if len(sound) < 2:
            return None
        steps = [
            _step(before, after, most)
            for row, following in itertools.pairwise(sound)
            for before, after, (_, most) in zip(row, following, self.counters)
        ]
        return None if any(math.isnan(step) for step in steps) else sum(steps)


def find(root: Path, tool: Tool) -> Meter:
    """The best meter of a machine; an empty one where there is none."""
    counters = [
        (file, most / 1e6)
        for file in _counters(root)
        if sysfs.integer(file) is not None
        and (most := sysfs.integer(file.with_name("max_energy_range_uj"))) is not None
    ]
    if counters:
        return Meter("CPU energy counters", tuple(counters))
    for chip in sysfs.numbered(root / "sys/class/hwmon", "hwmon*"):
        files = _sensors(chip)
        if files:
            return Meter(f"{sysfs.text(chip / 'name') or 'power'} sensor", files=tuple(files))
    if rails(tool("vcgencmd", "pmic_read_adc")) is not None:
        return Meter("rails of the power management chip", tool=tool)
    return Meter()


def hidden(root: Path) -> list[Path]:
    """Energy counters that are there, but not for this user."""
    return [file for file in _counters(root) if file.exists() and not sysfs.text(file)]


def rails(text: str) -> float | None:
    """Watts of all rails of which voltage and current are listed.

    >>> rails("VDD_CORE_A current(7)=2.0A\\nVDD_CORE_V volt(15)=0.75V\\nEXT5V_V volt(24)=5.0V")
    1.5
    """
    found: dict[str, dict[str, float]] = {}
    for name, unit, number in _RAIL.findall(text):
        try:
            found.setdefault(name, {})[unit] = float(number)
        except ValueError:
            continue
    watts = [rail["A"] * rail["V"] for rail in found.values() if len(rail) == 2]
    return sum(watts) if watts and sum(watts) < MOST_WATTS else None


def _counters(root: Path) -> list[Path]:
    zones = sysfs.numbered(root / _POWERCAP, "intel-rapl:*")
    return [zone / "energy_uj" for zone in zones if _COUNTED.fullmatch(sysfs.text(zone / "name"))]


def _sensors(chip: Path) -> list[tuple[Path, ...]]:
    """The power sensors of a chip that together are all it measures; none of a graphics card's or a
    battery's."""
    if (chip / "device/drm").exists() or (chip / "device/type").exists():
        return []
    files = [*sysfs.numbered(chip, "power*_input")] or [*sysfs.numbered(chip, "power*_average")]
    found: dict[tuple[Path, ...], str] = {(file,): _label(file) for file in files}
    if not found:  # only channels with names: further ones are sums, or drops across a resistor
        for volts in sysfs.numbered(chip, "in*_input"):
            amperes = volts.with_name("curr" + volts.name.removeprefix("in"))
            if _label(volts) and amperes.exists():
                found[volts, amperes] = _label(volts)
    readable = {files: label for files, label in found.items() if _watts(files) is not None}
    whole = [files for files, label in readable.items() if _TOTAL.search(label)]
    return whole[:1] or list(readable)


def _label(file: Path) -> str:
    return sysfs.text(file.with_name(file.name.partition("_")[0] + "_label"))


def _watts(files: tuple[Path, ...]) -> float | None:
    """Microwatts, or millivolts times milliamperes: both are millionths."""
    values = [sysfs.integer(file) for file in files]
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(files):
        return None
    watts = math.prod(numbers) / 1e6
    return watts if 0 <= watts < MOST_WATTS else None


def _step(before: float, after: float, most: float) -> float:
    """Joules from one reading of a counter to the next; NaN beyond its range."""
    if max(before, after) > most:
        return math.nan
    return after - before if after >= before else after - before + most
