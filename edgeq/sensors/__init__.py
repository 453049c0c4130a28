"""What the machine feels while it works: temperature, clock, throttling and energy.

`Sensors` reads all of them once; `Watch` reads them in a thread of its own while something runs,
seldom enough not to be felt, and sums up. A kind of sensor is a file here. What cannot be read is
None and never an error.
"""

import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import TracebackType

from edgeq.sensors import clock, heat, power, throttle
from edgeq.sensors.tool import Tool, run

__all__ = ["Reading", "Sensors", "Summary", "Watch", "summary"]

PERIOD = 0.5  # seconds between readings of files
TOOL_PERIOD = 2.0  # and of programs, which take some milliseconds each


@dataclass(frozen=True)
class Reading:
    """One moment."""

    seconds: float  # of a clock that only goes forward
    celsius: float | None = None  # the hottest place of the CPU
    mhz: tuple[float, ...] = ()  # of each CPU
    state: throttle.State | None = None  # of what holds the CPU back
    joules: tuple[float, ...] = ()  # counters, each with a range of its own
    watts: float | None = None


@dataclass(frozen=True)
class Summary:
    """A time as a whole; None where nothing of the kind can be read."""

    max_celsius: float | None = None
    mean_mhz: float | None = None  # of the CPUs at work
    throttled: bool | None = None
    throttled_by: str = ""
    joules: float | None = None
    power_from: str = ""  # what the joules are counted of


class Sensors:
    """Those of the machine whose files lie under `root`; found once, so that a reading is cheap.

    >>> Sensors(Path("no such folder"), tool=lambda *words: "").read().celsius is None
    True
    """

    def __init__(self, root: Path = Path("/"), tool: Tool = run) -> None:
        self._heat = heat.find(root)
        self._clocks = clock.find(root)
        self._throttle = throttle.Source(root, tool)
        self.power = power.find(root, tool)
        self._last = Reading(0.0)
        self._asked = float("-inf")

    def read(self, *, fresh: bool = True) -> Reading:
        """Everything now; fresh: programs too, even if they were asked a moment ago."""
        now = monotonic()
        ask = fresh or now - self._asked >= TOOL_PERIOD
        if ask:
            self._asked = now
        watts = self.power.watts() if ask or not self.power.by_tool else self._last.watts
        self._last = Reading(
            seconds=now,
            celsius=heat.hottest(self._heat),
            mhz=clock.read(self._clocks),
            state=self._throttle.read(ask=ask),
            joules=self.power.joules(),
            watts=watts,
        )
        return self._last


class Watch:
    """Readings from entering a block to leaving it.

    >>> with Watch(Sensors()) as watch:
    ...     pass
    >>> len(watch.readings) >= 2
    True
    """

    def __init__(self, sensors: Sensors, period: float = PERIOD) -> None:
        self.readings: list[Reading] = []
        self._sensors, self._period = sensors, period
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="edgeq sensors", daemon=True)

    def __enter__(self) -> "Watch":
        self.readings.append(self._sensors.read())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.readings.append(self._sensors.read())

    def _sample(self) -> None:
        while not self._done.wait(self._period):
            self.readings.append(self._sensors.read(fresh=False))

    def summary(self, threads: int) -> Summary:
        """Of the whole block, in which so many threads worked."""
        return summary(self.readings, self._sensors.power, threads)


def summary(readings: Sequence[Reading], meter: power.Meter, threads: int) -> Summary:
    """Readings in the order of time, the first and the last at the borders of the work.

    threads: CPUs at work; idle ones would lower the mean clock.
    """
    # At the borders the machine does not work yet, or no more.
    inside = readings[1:-1] or readings
    clocks = [statistics.mean(sorted(r.mhz)[-threads:]) for r in inside if r.mhz]
    reasons = throttle.during([r.state for r in readings if r.state])
    joules = meter.total([r.joules for r in readings])
    watts = [r.watts for r in readings[1:-1] if r.watts is not None]
    if joules is None and watts:
        joules = statistics.mean(watts) * (readings[-1].seconds - readings[0].seconds)
    return Summary(
        max_celsius=max((r.celsius for r in readings if r.celsius is not None), default=None),
        mean_mhz=statistics.mean(clocks) if clocks else None,
        throttled=None if reasons is None else bool(reasons),
        throttled_by=", ".join(reasons or ()),
        joules=joules,
        power_from=meter.name if joules is not None else "",
    )
