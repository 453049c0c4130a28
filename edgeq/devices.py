"""Boards and laptops that are known: what each is, how fast its memory is, which threads do best.

A device is a file in devices/; nothing else has to be edited to add one. docs/devices.md explains
the keys.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from edgeq.cpus import Cpus
from edgeq.data import find, from_table, load_toml
from edgeq.errors import FormatError, RequestError
from edgeq.machine import Machine, look

__all__ = [
    "Cores",
    "Device",
    "Dot",
    "Match",
    "Power",
    "Read",
    "every",
    "get",
    "here",
    "known",
    "threads",
]

GIB = 1 << 30
MOST = 256  # threads, and cores of a kind
GENERIC = "generic"  # the device that no rule names
Kind = Literal["measured", "theoretical"]  # theoretical: of a data sheet, or computed from one


@dataclass(frozen=True, slots=True)
class Match:
    """Which machines a file is about. model, compatible, cpu: shell patterns, of which one must fit
    if there are any; the others must all hold. Without any rule, no machine fits.
    """

    model: tuple[str, ...] = ()  # of the device tree
    compatible: tuple[str, ...] = ()  # of an entry of the device tree
    cpu: tuple[str, ...] = ()  # of the processor's name
    parts: tuple[str, ...] = ()  # Arm CPU parts, all of which must be there
    features: tuple[str, ...] = ()  # of the CPU, all of which must be there
    without: tuple[str, ...] = ()  # features that must not be there

    def fits(self, machine: Machine) -> bool:
        """Whether a machine is meant."""
        named = (
            _any(self.model, {machine.model}),
            _any(self.compatible, machine.compatible),
            _any(self.cpu, {machine.cpu}),
        )
        return (
            self != Match()
            and (any(named) or not self.exact)
            and machine.parts >= set(self.parts)
            and machine.features >= set(self.features)
            and not machine.features & set(self.without)
        )

    @property
    def exact(self) -> bool:
        """Whether the rule names a product, not what many have in common."""
        return bool(self.model or self.compatible or self.cpu)


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores of one kind; caches in KiB, of one core."""

    kind: str  # LLVM's name of the CPU, as `cortex-a76`
    count: int
    ghz: float
    l1_kib: int = 0  # of data
    l2_kib: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes per second from memory. A copy reads and writes, and both count: where reading alone
    was not measured, it tells about what reading reaches.
    """

    gbs: float  # 1e9 bytes per second
    kind: Kind
    source: str
    threads: int | None = None  # None: of the memory, whatever reads it
    how: Literal["read", "copy"] = "read"


@dataclass(frozen=True, slots=True)
class Dot:
    """8-bit multiply-adds per second, operands at hand."""

    gmacs: float  # 1e9 per second
    kind: Kind
    source: str
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Power:
    """What the whole board takes, in watts."""

    idle: float
    load: float
    kind: Kind
    source: str


@dataclass(frozen=True)
class Device:
    """A board, or a class of laptops; fields are the keys of its file."""

    name: str
    isa: str  # file name in edgeq/kernels/isa/; the best that it runs
    memory: str  # kind and width
    match: Match = Match()
    cores: tuple[Cores, ...] = ()  # fastest kind first; () = whatever is found
    shared_kib: int = 0  # last cache, shared by all cores
    ram_gib: tuple[float, ...] = ()  # what it is sold with; after `get` and `here` one of them
    system_mib: int = 300  # RAM that a system without a desktop and other programs need
    decode_threads: int | None = None  # that do best; None: one per performance core
    prefill_threads: int | None = None
    read: tuple[Read, ...] = ()
    dot: tuple[Dot, ...] = ()
    power: Power | None = None
    id: str = ""  # name of its file

    @property
    def ram(self) -> tuple[int, ...]:
        """Bytes of RAM that it is sold with, smallest first."""
        return tuple(sorted(int(size * GIB) for size in self.ram_gib))

    @property
    def names(self) -> list[str]:
        """What `get` knows it by: alone, and with each of several sizes of RAM.

        >>> [name for device in every() for name in device.names if name.startswith("rpi4")][:3]
        ['rpi4', 'rpi4-1gb', 'rpi4-2gb']
        """
        sizes = sorted(self.ram_gib) if len(self.ram_gib) > 1 else []
        return [self.id, *(f"{self.id}-{size:g}gb" for size in sizes)]

    def more_threads(self, few: int, most: int) -> list[int]:
        """Numbers of threads above `few`, up to `most`, that may generate better where arithmetic
        takes longer than memory: those whose reading was measured.

        >>> [get("rpi5").more_threads(2, most) for most in (3, 4)], get("rpi4").more_threads(1, 4)
        ([[], [4]], [])
        """
        fast = self.cores[0].count if self.cores else 0
        known = {r.threads for r in self.read if (r.kind, r.how) == ("measured", "read")}
        return sorted(n for n in known if n and few < n <= min(most, fast))

    def limit(self, threads: int) -> Read | None:
        """Read bandwidth with so many threads: measured with just as many if possible, else with
        the most below, else with any, else the data sheet's; None where nothing is known.

        >>> get("rpi5").limit(2).gbs, get("rpi5").limit(3).gbs
        (13.23, 13.23)
        """

        def distance(read: Read) -> tuple[bool, bool, bool, int]:
            known = read.threads or threads
            return (
                read.kind != "measured",
                read.how != "read",
                known > threads,
                abs(known - threads),
            )

        return min(self.read, key=distance, default=None)

    def _with_ram(self, gib: float) -> "Device":
        return dataclasses.replace(self, ram_gib=(gib,))


def every() -> list[Device]:
    """All known devices, by file name.

    Raises FormatError for a malformed file.

    >>> [device.id for device in every()][:2]
    ['apple-m1', 'apple-m2']
    """
    return list(_shipped())


@functools.cache
def _shipped() -> tuple[Device, ...]:
    return tuple(_read(path) for path in sorted(find("devices").glob("*.toml")))


def get(name: str | Path) -> Device:
    """A device by name, with its size of RAM or without (then the largest), or the file of one.

    Raises as `known`.

    >>> get("rpi5-8gb").ram == (8 << 30,), get("rpi5").ram == (16 << 30,)
    (True, True)
    >>> get("toaster")
    Traceback (most recent call last):
        ...
    edgeq.errors.RequestError: device 'toaster' is unknown: `edgeq devices` lists them
    """
    return _largest(known(name))


def known(name: str | Path) -> Device:
    """As `get`, but a device that is named without its size of RAM has all that it is sold with.

    Raises RequestError for an unknown name, with those that are close; FormatError for the file.

    >>> known("rpi5").ram_gib, known("rpi5-8gb").ram_gib
    ((2.0, 4.0, 8.0, 16.0), (8.0,))
    """
    if str(name).endswith(".toml"):
        return _read(Path(name))
    wanted, names = str(name).lower(), {n: device for device in every() for n in device.names}
    if wanted not in names:
        close = difflib.get_close_matches(wanted, names)
        advice = f"did you mean {', '.join(close)}?" if close else "`edgeq devices` lists them"
        raise RequestError(f"device {str(name)!r} is unknown: {advice}")
    device = names[wanted]
    if wanted == device.id:
        return device
    return device._with_ram(float(wanted.removeprefix(f"{device.id}-").removesuffix("gb")))


def here(root: Path = Path("/")) -> Device:
    """The device that this machine is, as files under `root` describe it, with its own RAM; else
    the generic one.
    """
    return _here(root) if root != Path("/") else _this()


@functools.cache
def _this() -> Device:
    return _here(Path("/"))


def _here(root: Path) -> Device:
    machine = look(root)
    fitting = [device for device in every() if device.match.fits(machine)]
    fitting.sort(key=lambda device: not device.match.exact)
    device = fitting[0] if fitting else get(GENERIC)
    gib = machine.ram / GIB
    # A system sees a little less than there is.
    sold = (size for size in device.ram_gib if gib <= size <= 1.25 * gib)
    return device._with_ram(min(sold, default=gib)) if gib else device


def threads(cpus: Cpus, device: Device | None = None) -> tuple[int, int]:
    """Threads that do best for generation and for prompts, of those that may run here; device: by
    default this machine.
    """
    found = device or here()
    return _at_most(found.decode_threads, cpus), _at_most(found.prefill_threads, cpus)


def _at_most(wanted: int | None, cpus: Cpus) -> int:
    return cpus.threads if wanted is None else min(wanted, cpus.threads)


def _largest(device: Device) -> Device:
    return device._with_ram(max(device.ram_gib)) if device.ram_gib else device


def _any(patterns: tuple[str, ...], found: frozenset[str] | set[str]) -> bool:
    return any(fnmatchcase(text, pattern) for text in found for pattern in patterns)


def _read(path: Path) -> Device:
    device = from_table(Device, {"id": path.stem, **load_toml(path)}, str(path))
    words = [("id", device.id)]
    # A kind is also the name of a file in devices/cores/.
    words += [(f"cores[{i}]: kind", cores.kind) for i, cores in enumerate(device.cores)]
    for what, word in words:
        if not re.fullmatch(r"[a-z0-9-]+", word):
            raise FormatError(f"{path}: {what} = {word!r}: expected a-z, 0-9 and - only")
    for what, value in _amounts(device):
        if not 0 < value < 1e6:
            raise FormatError(f"{path}: {what} = {value}: expected a number above 0, below 1e6")
    for what, count in _counts(device):
        if count is not None and not 1 <= count <= MOST:
            raise FormatError(f"{path}: {what} = {count}: expected 1 to {MOST}")
    return device


def _amounts(device: Device) -> Iterator[tuple[str, float]]:
    """What must be above zero; sizes of caches may be left out."""
    yield "system_mib", device.system_mib
    yield from (("ram_gib", size) for size in device.ram_gib)
    if device.shared_kib:
        yield "shared_kib", device.shared_kib
    for i, cores in enumerate(device.cores):
        yield f"cores[{i}]: ghz", cores.ghz
        caches = {"l1_kib": cores.l1_kib, "l2_kib": cores.l2_kib}
        yield from ((f"cores[{i}]: {name}", size) for name, size in caches.items() if size)
    yield from ((f"read[{i}]: gbs", read.gbs) for i, read in enumerate(device.read))
    yield from ((f"dot[{i}]: gmacs", dot.gmacs) for i, dot in enumerate(device.dot))
    if device.power:
        yield "power: idle", device.power.idle
        yield "power: load", device.power.load


def _counts(device: Device) -> Iterator[tuple[str, int | None]]:
    """Threads and cores; None: not given."""
    yield "decode_threads", device.decode_threads
    yield "prefill_threads", device.prefill_threads
    yield from ((f"cores[{i}]: count", cores.count) for i, cores in enumerate(device.cores))
    yield from ((f"read[{i}]: threads", read.threads) for i, read in enumerate(device.read))
    yield from ((f"dot[{i}]: threads", dot.threads) for i, dot in enumerate(device.dot))
