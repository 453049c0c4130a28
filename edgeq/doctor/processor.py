"""SIMD, threads, load, clock and governor."""

from collections.abc import Iterator
from pathlib import Path

from edgeq import cpus, devices, sysfs
from edgeq.doctor import Finding, System
from edgeq.machine import look

TITLE = "Processor"

_CPU = "sys/devices/system/cpu"
_DYNAMIC = {
    "intel_pstate",
    "amd-pstate-epp",
    "intel_cpufreq",
}  # there, powersave is not the minimum


def findings(system: System) -> Iterator[Finding]:
    yield Finding("processor", "ok", look(system.root).processor)
    yield from _simd(system)
    yield _threads(system)
    yield from _load(system)
    yield _clock(system)
    yield from _turbo(system)
    yield from _supply(system)


# -- instruction set -------------------------------------------------------------------------------
def _simd(system: System) -> Iterator[Finding]:
    off = system.env.get("NUMBA_DISABLE_JIT", "0")
    if off not in ("", "0"):
        text = f"NUMBA_DISABLE_JIT={off}: kernels cannot be compiled"
        yield Finding("compiler", "fail", text, "unset NUMBA_DISABLE_JIT")
    try:
        from edgeq.kernels import isa

        found = [module.NAME for module in isa.available()]
    except (ImportError, OSError) as error:
        text = f"llvmlite cannot be loaded: {error}"
        yield Finding("SIMD", "fail", text, "python -m pip install --force-reinstall llvmlite")
        return
    yield _used(system, found)
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        if system.env.get(name):
            text = f"{name} is set: kernels are compiled for that CPU, not for this one"
            yield Finding("compiler", "info", text, f"unset {name}")


def _used(system: System, found: list[str]) -> Finding:
    """found: instruction sets that run here, best first."""
    forced = system.env.get("EDGEQ_ISA", "")
    used = forced or found[0]
    values = {"available": found, "used": used}
    unset = "unset EDGEQ_ISA"
    if used not in found:
        text = f"EDGEQ_ISA={forced}: does not run on this CPU ({', '.join(found)} do)"
        return Finding("SIMD", "fail", text, unset, values)
    if used != found[0]:
        text = f"{used}, forced by EDGEQ_ISA, though {found[0]} runs here"
        return Finding("SIMD", "warn", text, unset, values)
    known = devices.here(system.root).isa
    if _weaker(used, known, system.machine):
        text = f"{used}: the system hides the {known} that this CPU has"
        remedy = "use the newest kernel; in a virtual machine, pass the host's CPU on"
        return Finding("SIMD", "warn", text, remedy, values)
    if len(found) == 1:
        text = f"{used}: no faster instructions found"
        remedy = "in a virtual machine, pass the host's CPU on (-cpu host)"
        return Finding("SIMD", "warn", text, remedy, values)
    return Finding("SIMD", "ok", f"{used}, the best that this CPU has", values=values)


def _weaker(used: str, known: str, machine: str) -> bool:
    """Whether a machine of this kind uses less than its board is known to have."""
    from edgeq.kernels import isa

    ranks = {m.NAME: m.RANK for m in isa.modules().values() if machine in m.CPU}
    return bool(ranks.get(used, 0) < ranks.get(known, 0))


# -- threads ---------------------------------------------------------------------------------------
def _threads(system: System) -> Finding:
    allowed = _allowed(system)
    found = cpus.find(system.root, allowed or None)
    online = sysfs.cpu_list(system.root / _CPU / "online")
    device = devices.here(system.root)
    decode, prefill = devices.threads(found, device)
    more = device.more_threads(decode, found.threads)
    values = {"cores": len(found.cores), "decode": decode, "prefill": prefill, "quota": found.quota}
    some = f" ({more[-1]} with formats that take long)" if more else ""
    text = f"{decode} for answers{some}, {prefill} for prompts; {_cores(found)}"
    if found.quota is not None and found.quota < len(found.cores):
        text += f"; a control group allows {found.quota:g} CPUs' worth of time"
        remedy = "raise CPUQuota= of the service, or --cpus of the container"
        return Finding("threads", "warn", text, remedy, values)
    if allowed and len(allowed) < len(online):
        text += f"; this process may use {len(allowed)} of {len(online)} CPUs"
        return Finding("threads", "warn", text, "start it without taskset or CPUAffinity=", values)
    return Finding("threads", "ok", text, values=values)


def _cores(found: cpus.Cpus) -> str:
    """
    >>> _cores(cpus.Cpus((cpus.Core((0, 1)), cpus.Core((2,), 0.4))))
    '2 cores, 1 of them fast'
    """
    count = len(found.cores)
    kinds = f", {len(found.fast)} of them fast" if len(found.fast) < count else ""
    return f"{count} core{'s' * (count != 1)}{kinds}"


def _allowed(system: System) -> frozenset[int]:
    """CPUs that this process may use, as the system says."""
    status = sysfs.fields(system.root / "proc/self/status")
    return sysfs.parsed_cpus(status.get("Cpus_allowed_list", ""))


def _load(system: System) -> Iterator[Finding]:
    first = (system.text("proc/loadavg").split() or [""])[0]
    try:
        load = float(first)
    except ValueError:
        return
    count = len(sysfs.cpu_list(system.root / _CPU / "online")) or 1
    text = f"{load:.2f} threads at work in the last minute"
    values = {"load": load}
    if load < count / 2:
        yield Finding("load", "ok", text, values=values)
    else:
        remedy = "stop other programs before you measure: `top` shows them"
        yield Finding("load", "warn", f"{text}, on {count} CPUs", remedy, values)


# -- clock -----------------------------------------------------------------------------------------
def _clock(system: System) -> Finding:
    places = [*sysfs.numbered(system.root / _CPU, "cpu[0-9]*/cpufreq")]
    governors = sorted({sysfs.text(place / "scaling_governor") for place in places} - {""})
    if not governors:
        return _counted(system)
    now, most, top = (_mhz(places, f"{name}_freq") for name in _FREQUENCIES)
    values = {"governor": governors, "mhz": now, "max_mhz": most, "hardware_mhz": top}
    text = f"{', '.join(governors)}: now {now:.0f} MHz of {most or top:.0f}"
    if 0 < most < 0.95 * top:
        text = f"limited to {most:.0f} of {top:.0f} MHz"
        return Finding("clock", "warn", text, _tee("scaling_max_freq", f"{top * 1000:.0f}"), values)
    driver = sysfs.text(places[0] / "scaling_driver")
    slow = "powersave" in governors and driver not in _DYNAMIC
    if slow or ("userspace" in governors and now < 0.95 * most):
        return Finding("clock", "warn", text, _tee("scaling_governor", "performance"), values)
    return Finding("clock", "ok", text, values=values)


def _counted(system: System) -> Finding:
    """What psutil knows on systems without such files."""
    if system.live and system.name != "Linux":
        import psutil

        known = psutil.cpu_freq()
        if known is not None:
            text = f"now {known.current:.0f} MHz of {known.max:.0f}"
            return Finding("clock", "info", text, values={"mhz": known.current})
    return Finding("clock", "info", "not shown by this system (a virtual machine?)")


_FREQUENCIES = ("scaling_cur", "scaling_max", "cpuinfo_max")


def _mhz(places: list[Path], name: str) -> float:
    """Of the fastest CPU; 0 where nothing is known."""
    return max((sysfs.integer(place / name) or 0 for place in places), default=0) / 1000


def _tee(file: str, value: str) -> str:
    return f"echo {value} | sudo tee /{_CPU}/cpu*/cpufreq/{file}"


def _turbo(system: System) -> Iterator[Finding]:
    for file, off in (("intel_pstate/no_turbo", 1), ("cpufreq/boost", 0)):
        if system.integer(f"{_CPU}/{file}") == off:
            remedy = f"echo {1 - off} | sudo tee /{_CPU}/{file}"
            yield Finding("turbo", "warn", "higher clocks are switched off", remedy)


def _supply(system: System) -> Iterator[Finding]:
    supplies = sysfs.numbered(system.root / "sys/class/power_supply", "*")
    mains = [path for path in supplies if sysfs.text(path / "type") == "Mains"]
    online = [sysfs.integer(path / "online") for path in mains]
    if online and not any(online):
        yield Finding("supply", "info", "on battery: the CPU may be slower", "connect the charger")
    if system.text("sys/firmware/acpi/platform_profile") in ("low-power", "quiet"):
        profile = system.text("sys/firmware/acpi/platform_profile")
        remedy = "echo balanced | sudo tee /sys/firmware/acpi/platform_profile"
        yield Finding("profile", "warn", f"power profile {profile}", remedy)
