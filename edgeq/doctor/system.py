"""Operating system, Python, packages, clock and terminal."""

import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from edgeq import devices, sysfs
from edgeq.doctor import Finding, System
from edgeq.machine import look

TITLE = "System"

PACKAGES = ("numpy", "numba", "llvmlite")
_RULE = re.compile(r"(<=|>=|==|!=|<|>)\s*([0-9.]+)")
_64_BIT = {"aarch64", "arm64", "x86_64", "amd64"}
RELEASED = 1_750_000_000  # seconds since 1970 when this was not yet written


def findings(system: System) -> Iterator[Finding]:
    yield _operating_system(system)
    yield from _device(system)
    yield _width(system)
    yield _python()
    yield _packages()
    yield from _clock()
    yield from _encoding(system)


def _operating_system(system: System) -> Finding:
    if system.name != "Linux":
        text = f"{platform.platform() if system.live else system.name}: tested on Linux only"
        return Finding("system", "info", text)
    release = sysfs.fields(system.root / "etc/os-release")
    release = release or sysfs.fields(system.root / "usr/lib/os-release")
    name = release.get("PRETTY_NAME", "").strip("'") or "Linux"
    kernel = system.text("proc/sys/kernel/osrelease") or "unknown"
    return Finding("system", "ok", f"{name}, kernel {kernel}")


def _device(system: System) -> Iterator[Finding]:
    here = devices.here(system.root)
    if here.id == devices.GENERIC:
        return
    named = look(system.root).model or here.name
    yield Finding("device", "ok", f"{named} (profile {here.id})", values={"profile": here.id})


def _width(system: System) -> Finding:
    values = {"machine": system.machine, "bits": system.bits}
    if system.bits == 64:
        return Finding("64 bits", "ok", system.machine, values=values)
    remedy = "install a 64-bit system; on a board, write its 64-bit image to the card"
    if system.machine in _64_BIT:
        text = f"32-bit programs on a 64-bit kernel ({system.machine})"
        return Finding("64 bits", "fail", text, remedy, values)
    if not re.search(r"^CPU part\s*: 0xd", sysfs.text(system.root / "proc/cpuinfo"), re.MULTILINE):
        remedy = "edgeq needs a machine with a 64-bit CPU and system"
    return Finding("64 bits", "fail", f"32-bit system ({system.machine})", remedy, values)


def _python() -> Finding:
    name, number = platform.python_implementation(), platform.python_version()
    where = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    values = {"version": number, "executable": sys.executable}
    if name != "CPython":
        return Finding("Python", "fail", f"{name} {number}", "use CPython: numba needs it", values)
    return Finding("Python", "ok", f"{number}, {where}", values=values)


def _packages() -> Finding:
    found = {name: _version(name) for name in PACKAGES}
    missing = [name for name, number in found.items() if not number]
    text = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    if missing:
        remedy = f"{sys.executable} -m pip install {' '.join(missing)}"
        return Finding("packages", "fail", text, remedy, found)
    for name in ("numpy", "llvmlite"):
        rule = _wanted("numba", name)
        if not fits(found[name], rule):
            text += f": this numba needs {name}{rule}"
            remedy = f"{sys.executable} -m pip install '{name}{rule}'"
            return Finding("packages", "fail", text, remedy, found)
    return Finding("packages", "ok", text, values=found)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _wanted(package: str, other: str) -> str:
    """Which versions of the other a package needs, as `<0.48,>=0.47`."""
    try:
        rules = requires(package) or []
    except PackageNotFoundError:
        return ""
    names = (rule.partition(";")[0].strip() for rule in rules)
    found = (re.fullmatch(rf"{other}\s*\(?([<>=!~][^()]*)\)?", name) for name in names)
    return next((match[1].strip() for match in found if match), "")


def fits(number: str, rule: str) -> bool:
    """Whether a version keeps to a rule; what cannot be read as numbers is left out.

    >>> fits("2.5.0", "<2.5,>=1.22"), fits("0.46.0", ">=0.46.0dev0,<0.47")
    (False, True)
    """
    own = _numbers(number)
    for sign, bound in _RULE.findall(rule):
        limit = _numbers(bound)
        holds = {"<": own < limit, ">": own > limit, "=": own == limit, "!": own != limit}
        if not (holds[sign[0]] or (sign in ("<=", ">=") and own == limit)):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    parts = [int(part) for part in re.match(r"[0-9.]*", text)[0].split(".") if part]  # type: ignore[index]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def _clock() -> Iterator[Finding]:
    if time.time() < RELEASED:
        text = f"set to {time.strftime('%Y-%m-%d')}: downloads will fail"
        yield Finding("clock", "warn", text, "sudo timedatectl set-ntp true")


def _encoding(system: System) -> Iterator[Finding]:
    name = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    if name != "utf8":
        text = f"output is {sys.stdout.encoding}: other characters are written as escapes"
        yield Finding("terminal", "warn", text, "export LANG=C.UTF-8")
