"""Temperature, throttling, supply and energy."""

from collections.abc import Iterator

from edgeq import sysfs
from edgeq.doctor import Finding, State, System
from edgeq.sensors import heat, power, throttle

TITLE = "Heat and power"

NEAR = 10.0  # kelvin below the limit
_ADVICE = {
    throttle.LOW_VOLTAGE: "use the board's own power supply and a short, thick cable",
    "other": "cool it better: fan, heat sink, free air",
}


def findings(system: System) -> Iterator[Finding]:
    state = throttle.Source(system.root, system.tool).read()
    yield _temperature(system, state)
    yield from _throttling(state)
    yield from _firmware(system, state)
    yield from _protection(system)
    yield from _energy(system)


def _temperature(system: System, state: throttle.State | None) -> Finding:
    places = heat.find(system.root)
    celsius = heat.hottest(places)
    if celsius is None:
        return Finding("temperature", "info", "no sensor that can be read")
    limits = [] if state is None or state.firmware is None else [throttle.FIRMWARE_LIMIT]
    known = heat.limit(places)
    limit = min([*limits, *([known] if known else [])], default=None)
    text = f"{celsius:.0f} °C" + (f", slowed down from {limit:.0f} °C on" if limit else "")
    values = {"celsius": celsius, "limit": limit}
    if limit is not None and celsius > limit - NEAR:
        return Finding("temperature", "warn", text, _ADVICE["other"], values)
    return Finding("temperature", "ok", text, values=values)


def _throttling(state: throttle.State | None) -> Iterator[Finding]:
    if state is None:
        yield Finding("throttling", "info", "not shown by this system")
        return
    word = "" if state.firmware is None else f" (0x{state.firmware:x})"
    values = {"now": state.now, "past": state.past, "firmware": state.firmware}
    if not state.now and not state.past:
        yield Finding("throttling", "ok", f"none now{word}", values=values)
    before = tuple(name for name in state.past if name not in state.now)
    for names, when in ((state.now, "now"), (before, "since the start")):
        low = throttle.LOW_VOLTAGE in names
        others = [name for name in names if name != throttle.LOW_VOLTAGE]
        if low:  # writes may be lost then: it is more than slow
            grave: State = "fail" if when == "now" else "warn"
            advice = _ADVICE[throttle.LOW_VOLTAGE]
            yield Finding("supply", grave, f"under-voltage {when}{word}", advice, values)
        if others:
            text = f"{', '.join(others)} {when}{word}"
            # A weak supply makes the firmware lower the clock too.
            advice = _ADVICE[throttle.LOW_VOLTAGE if low else "other"]
            yield Finding("throttling", "warn", text, advice, values)


def _firmware(system: System, state: throttle.State | None) -> Iterator[Finding]:
    """A board whose firmware knows more, but does not tell this user."""
    device = next(sysfs.numbered(system.root / "dev", "vc[hi]*"), None)
    if device is not None and (state is None or state.firmware is None):
        text = f"/dev/{device.name} is there, but `vcgencmd get_throttled` does not answer"
        yield Finding("firmware", "info", text, "sudo usermod -aG video $USER, then log in again")


def _protection(system: System) -> Iterator[Finding]:
    """x86: how long the CPU has protected itself from heat."""
    cpu = system.root / "sys/devices/system/cpu"
    files = sysfs.numbered(cpu, "cpu[0-9]*/thermal_throttle/package_throttle_total_time_ms")
    seconds = max((sysfs.integer(file) or 0 for file in files), default=0) / 1000
    up = (system.text("proc/uptime").split() or [""])[0]
    try:
        share = seconds / float(up)
    except (ValueError, ZeroDivisionError):
        return
    if seconds > 0:
        text = f"too hot for {seconds:.0f} s, {min(share, 1):.1%} of the time since the start"
        much = share > 0.01
        state: State = "warn" if much else "info"
        advice = _ADVICE["other"] if much else ""
        yield Finding("throttling", state, text, advice, {"seconds": seconds})


def _energy(system: System) -> Iterator[Finding]:
    meter = power.find(system.root, system.tool)
    if meter.name:
        text = f"measured by {meter.name}: `edgeq bench` shows J/token"
        yield Finding("energy", "ok", text, values={"watts": meter.watts()})
    elif hidden := power.hidden(system.root):
        remedy = f"run `edgeq bench` as root, or: sudo chmod a+r {hidden[0]}"
        yield Finding("energy", "info", "only root may read the energy counters", remedy)
