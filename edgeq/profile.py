"""What was measured on this machine, as a profile that edgeq.devices reads: a file for devices/."""

import dataclasses
import glob
import itertools
import re
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeq import cpus, data, devices, machine, sysfs
from edgeq.devices import Cores, Device, Dot, Match, Read
from edgeq.errors import RequestError
from edgeq.kernels import host, isa
from edgeq.limits import Limits

__all__ = ["measured", "refuse_target", "save", "to_toml"]

ENOUGH = 0.95  # of the best: more threads for the rest would only take power


def measured(limits: Sequence[Limits], root: Path = Path("/")) -> Device:
    """The profile of this machine with what was measured here; where it is one of devices/ by its
    name, what that file says of it and cannot be measured.

    limits: of each thread count one.
    """
    here = devices.here(root)
    online = sysfs.cpu_list(root / "sys/devices/system/cpu/online")  # this process may have fewer
    found = cpus.find(root, online or None)
    known = here if here.match.exact else Device(name="", isa="", memory="not known")
    source = f"edgeq bench --save, {datetime.now(UTC):%Y-%m-%d}"
    gib = here.ram_gib or (0.0,)
    return dataclasses.replace(
        known,
        name=known.name or machine.look(root).processor,
        isa=isa.choose().NAME,
        match=known.match if known.name else _match(root),
        cores=_cores(found, known, root) or known.cores,
        ram_gib=tuple(round(size, 1) for size in gib if size >= 0.05),
        decode_threads=_fewest(limits, "read_gbs"),
        prefill_threads=_fewest(limits, "dot_gmacs"),
        read=tuple(Read(round(x.read_gbs, 2), "measured", source, x.threads) for x in limits),
        dot=tuple(Dot(round(x.dot_gmacs, 1), "measured", source, x.threads) for x in limits),
        id="",
    )


def _fewest(limits: Sequence[Limits], what: str) -> int:
    """Threads that are enough for about the best of all."""
    best = max(getattr(one, what) for one in limits)
    return min(one.threads for one in limits if getattr(one, what) >= ENOUGH * best)


def _match(root: Path) -> Match:
    """A rule that fits just such machines."""
    seen = machine.look(root)
    if seen.model:
        return Match(model=(glob.escape(seen.model),))
    return Match(cpu=(glob.escape(seen.cpu),)) if seen.cpu else Match()


def _cores(found: cpus.Cpus, known: Device, root: Path) -> tuple[Cores, ...]:
    """Cores that are there, by kind, fastest first; none where their clock is not known."""
    kinds = [list(cores) for _, cores in itertools.groupby(found.cores, lambda core: core.speed)]
    told = known.cores if len(known.cores) == len(kinds) else (None,) * len(kinds)
    rows = []
    for cores, core in zip(kinds, told):
        ghz = _ghz([cpu for one in cores for cpu in one.cpus], root) or (core.ghz if core else 0)
        if not ghz:
            return ()
        rows.append(
            dataclasses.replace(core, count=len(cores), ghz=ghz)
            if core
            else Cores(host.name(), len(cores), ghz)
        )
    return tuple(rows)


def _ghz(numbers: list[int], root: Path) -> float:
    """The highest clock of these CPUs, else what /proc/cpuinfo says; 0 where nothing is known."""
    files = (root / f"sys/devices/system/cpu/cpu{n}/cpufreq/cpuinfo_max_freq" for n in numbers)
    khz = max((sysfs.integer(file) or 0 for file in files), default=0)
    info = re.findall(r"^cpu MHz\s*: (\d{2,5})", sysfs.text(root / "proc/cpuinfo"), re.MULTILINE)
    mhz = khz / 1000 or max(map(int, info), default=0)
    return round(mhz / 1000, 2)


def to_toml(device: Device) -> str:
    """A profile as its file.

    >>> print(to_toml(Device("A board", "neon", "LPDDR4", read=(Read(4.5, "measured", "me", 2),))))
    name = "A board"
    isa = "neon"
    memory = "LPDDR4"
    read = [
        { gbs = 4.5, kind = "measured", source = "me", threads = 2 },
    ]
    <BLANKLINE>
    """
    lines, given = [], _given(device)
    given.pop("id", None)
    match = given.pop("match", {})
    for key, value in given.items():
        if isinstance(value, tuple) and isinstance(value[0], dict):
            lines += [f"{key} = [", *(f"    {data.toml(row)}," for row in value), "]"]
        else:
            lines.append(f"{key} = {data.toml(value)}")
    if match:
        lines += ["", "[match]", *(f"{key} = {data.toml(value)}" for key, value in match.items())]
    return "\n".join(lines) + "\n"


def _given(value: Any) -> Any:
    """A dataclass as a table, without the keys that have their default."""
    if isinstance(value, tuple):
        return tuple(map(_given, value))
    if not dataclasses.is_dataclass(value):
        return value
    pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {field.name: _given(item) for field, item in pairs if item != field.default}


def refuse_target(path: Path | str, *, force: bool = False) -> None:
    """Say before the work that `save` could not write there. Raises RequestError, ResourceError."""
    data.refuse_target(path, force=force)
    if not re.fullmatch(r"[a-z0-9-]+", Path(path).stem):
        raise RequestError(f"{path}: expected a name of a-z, 0-9 and - before .toml")


def save(device: Device, path: Path | str, *, force: bool = False) -> None:
    """Write a profile that edgeq.devices can read, all or nothing. Raises RequestError,
    ResourceError.
    """
    refuse_target(path, force=force)
    text = to_toml(device)
    read = data.from_table(Device, {"id": device.id, **tomllib.loads(text)}, str(path))
    assert read == device, "a profile must be read as it was written"
    head = "# Measured by `edgeq bench --save`. What a key means: docs/devices.md.\n"
    data.save_toml(head + text, path, force=force)
