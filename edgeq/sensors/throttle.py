"""Whether the CPU is held back: by the firmware, the kernel's cooling or its own protection.

The firmware's word is that of `vcgencmd get_throttled`
(https://www.raspberrypi.com/documentation/computers/os.html#vcgencmd): bits 0 to 3 say what is so
now, the same bits from 16 on what was so since the start. Counters: Documentation/ABI/testing/
sysfs-devices-system-cpu, thermal_throttle. Cooling: Documentation/driver-api/thermal/sysfs-api.rst.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq import sysfs
from edgeq.sensors.tool import Tool

__all__ = ["BITS", "FIRMWARE_LIMIT", "HEAT", "HISTORY", "LOW_VOLTAGE", "Source", "State", "during"]

LOW_VOLTAGE = "under-voltage"
HEAT = "too hot"
BITS = {0: LOW_VOLTAGE, 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
HISTORY = 16  # bits further on: the same, since the start
FIRMWARE_LIMIT = 80.0  # °C from which such a firmware slows the cores down
_WORD = re.compile(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})")
_COOLING = re.compile(r"processor|cpufreq|cpu", re.IGNORECASE)


@dataclass(frozen=True)
class State:
    """One moment: what holds the CPU back now, what did since the start of the machine, and how
    often it protected itself from heat.
    """

    now: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    events: int = 0
    firmware: int | None = None  # its word

    @staticmethod
    def of_firmware(word: int) -> "State":
        """
        >>> State.of_firmware(0x50005).now
        ('under-voltage', 'throttled')
        """
        now = tuple(name for bit, name in BITS.items() if word >> bit & 1)
        past = tuple(name for bit, name in BITS.items() if word >> bit + HISTORY & 1)
        return State(now, past, firmware=word)


class Source:
    """All that one machine says about this."""

    def __init__(self, root: Path, tool: Tool) -> None:
        self._tool = tool
        self._files = [
            path
            for pattern in ("*/*firmware/get_throttled", "*firmware/get_throttled")
            for path in sysfs.numbered(root / "sys/devices/platform", pattern)
        ]
        chips = sysfs.numbered(root / "sys/class/hwmon", "hwmon*")
        self._alarms = [
            alarm for chip in chips for alarm in sysfs.numbered(chip, "in*_lcrit_alarm")
        ]
        cooling = sysfs.numbered(root / "sys/class/thermal", "cooling_device*")
        self._cooling = [
            path / "cur_state" for path in cooling if _COOLING.search(sysfs.text(path / "type"))
        ]
        cpu = root / "sys/devices/system/cpu"
        self._counters = [*sysfs.numbered(cpu, "cpu[0-9]*/thermal_throttle/*_throttle_count")]
        self._word: int | None = None
        self._ask = not self._files

    def read(self, *, ask: bool = True) -> State | None:
        """The state now, None where the machine says nothing; ask: programs too."""
        word = self._firmware(ask)
        alarms = [value for file in self._alarms if (value := sysfs.integer(file)) is not None]
        cooling = [value for file in self._cooling if (value := sysfs.integer(file)) is not None]
        counts = [value for file in self._counters if (value := sysfs.integer(file)) is not None]
        if word is None and not (alarms or cooling or counts):
            return None
        state = State.of_firmware(word or 0)
        low = (LOW_VOLTAGE,) * (any(alarms) and LOW_VOLTAGE not in state.now)
        hot = (HEAT,) * any(value > 0 for value in cooling)
        return State(state.now + low + hot, state.past, sum(counts), word)

    def _firmware(self, ask: bool) -> int | None:
        """Its word, from a file or else from its program; that keeps its last answer."""
        for file in self._files:
            if (word := _parsed(sysfs.text(file))) is not None:
                return word
        if self._ask and ask:
            self._word = _parsed(self._tool("vcgencmd", "get_throttled"))
            self._ask = self._word is not None
        return self._word


def during(states: Sequence[State]) -> tuple[str, ...] | None:
    """What held the CPU back between the first state and the last, also between two readings; None
    where nothing is known.
    """
    if not states:
        return None
    first, last = states[0], states[-1]
    found = [name for state in states for name in state.now]
    found += [name for name in last.past if name not in first.past]
    found += [HEAT] * (last.events > first.events)
    return tuple(dict.fromkeys(found))


def _parsed(text: str) -> int | None:
    match = _WORD.fullmatch(text)
    return int(match[1], 16) if match else None
