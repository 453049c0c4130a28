"""How fast kernels are, per format: measured on this machine, or predicted for a device.

Weights that a row kernel gets through while they are in cache, multiply-adds of a panel kernel, and
bytes that memory delivers: what `edgeq.plan` makes tokens per second of.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from types import ModuleType
from typing import Any

from edgeq import blocks, cpus, devices, limits
from edgeq.data import find, from_table, load_toml
from edgeq.devices import Device
from edgeq.errors import FormatError, RequestError
from edgeq.kernels import cache, load
from edgeq.kernels import isa as isas
from edgeq.kernels.program import TEAM_KERNELS, Team
from edgeq.products import COLS, Products
from edgeq.tuning import Tuning

__all__ = ["Rates", "measured", "of_device"]

CACHED = 1 << 18  # bytes of a matrix that stays in a core's cache
AGAIN = 16  # times that it is read in a run
SECONDS = 0.1  # per kernel
TOKENS, PANEL_ROWS = 128, 256
# Of what memory is sold for, programs get about so much where nobody measured it.
ATTAINABLE = 0.65
# Of what a panel kernel does alone, from cache, several threads with a whole layer do so much.
TOGETHER = 0.94
# Of the dot products that a core can do, a panel kernel does about so many where nobody knows.
PANEL_SHARE = 0.6
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rates:
    """All threads together; rows and tiles by format name.

    Where a format is not listed, nothing is known: then only memory limits it (rows), or there is
    no prediction (tiles).
    """

    threads: tuple[int, int]  # of generation, of prompts
    read: float  # 1e9 bytes per second with the threads of generation
    row: dict[str, float] = field(default_factory=dict)  # 1e9 weights per second, in cache
    tile: dict[str, float] = field(default_factory=dict)  # 1e9 multiply-adds per second
    dot: float = 0.0  # 1e9 8-bit multiply-adds per second at most; 0: not known
    source: str = ""  # where the figures come from, for people


@dataclass(frozen=True)
class Core:
    """A file of devices/cores/: what kernels cost on one core."""

    source: str
    row: dict[str, float]  # cycles per 256 weights
    tile: dict[str, float]  # multiply-adds per cycle


def of_device(device: Device, threads: tuple[int, int] | None = None) -> Rates:
    """Predicted rates of a device, whose files say how fast memory and cores are.

    threads: of generation, of prompts; by default those that do best. Raises RequestError for a
    device of which too little is known.

    >>> of_device(devices.get("rpi5")).read
    13.23
    """
    if not device.cores or not device.read:
        raise RequestError(
            f"device {device.id}: its file has no cores or no bandwidth: add them, or run "
            "`edgeq plan` there without --device"
        )
    fast = device.cores[0]
    few, many = threads or (
        device.decode_threads or fast.count,
        device.prefill_threads or fast.count,
    )
    limit = device.limit(few)
    assert limit is not None
    core = _core(fast.kind)
    decoding, reading = min(few, fast.count) * fast.ghz, min(many, fast.count) * fast.ghz  # GHz
    peak = max((dot.gmacs for dot in device.dot), default=0.0)
    return Rates(
        (few, many),
        limit.gbs if limit.kind == "measured" else limit.gbs * ATTAINABLE,
        {name: decoding * 256 / cycles for name, cycles in core.row.items()},
        {name: reading * macs for name, macs in core.tile.items()}
        or (dict.fromkeys(blocks.formats(), peak * PANEL_SHARE) if peak else {}),
        peak,
        f"memory {limit.kind}, kernels " + ("predicted" if core.row else "unknown"),
    )


def _core(kind: str) -> Core:
    path = find("devices") / "cores" / f"{kind}.toml"
    if not path.is_file():
        return Core("", {}, {})
    core = from_table(Core, load_toml(path), str(path))
    for name, value in (*core.row.items(), *core.tile.items()):
        if name not in blocks.formats() or not 0 < value < 1e6:
            raise FormatError(f"{path}: {name} = {value}: expected a format, and a number above 0")
    return core


def measured(
    formats: Iterable[str],
    threads: tuple[int, int] | None = None,
    progress: Progress | None = None,
    *,
    again: bool = False,
) -> Rates:
    """Rates of this machine: kernels are measured once and remembered, memory anew, since others
    may share it.

    formats: those that matter. threads: of generation, of prompts; default the engine's. again:
    forget what is remembered. progress(what, done, total) is called while it takes time.
    """
    isa, machine = isas.choose(), cpus.find()
    few, many = threads or devices.threads(machine)
    rates: dict[str, dict[str, float]] = {}
    wanted = sorted(set(formats))
    for kind, count, tokens in (("row", few, 1), ("tile", many, TOKENS)):
        kept = {} if again else _sane(cache.recall(f"rates-{kind}", isa))
        missing = [fmt for fmt in wanted if fmt not in kept]
        if missing:
            kept |= _probe(missing, isa, tokens, progress)
            cache.remember(f"rates-{kind}", isa, kept)
        share = min(count, machine.usable) * (1 if tokens == 1 else TOGETHER)
        rates[kind] = {fmt: kept[fmt] * share for fmt in wanted}
    limit = limits.measure(few, machine.usable)
    dot = limits.measure(many, machine.usable).dot_gmacs if many != few else limit.dot_gmacs
    return Rates((few, many), limit.read_gbs, rates["row"], rates["tile"], dot, "measured here")


def _sane(kept: dict[str, Any] | None) -> dict[str, float]:
    """What is usable of a stored entry: it may be of another version, or damaged."""
    return {
        name: value
        for name, value in (kept or {}).items()
        if type(value) in (int, float) and 0 < value < math.inf
    }


def _probe(
    formats: list[str], isa: ModuleType, tokens: int, progress: Progress | None
) -> dict[str, float]:
    """1e9 multiply-adds per second of one thread, by format: two that wait for each other could not
    be told from a busy machine.
    """
    kind = "matmul" if tokens > 1 else "matvec"
    addresses = load([*(f"{kind}/{name}" for name in formats), *TEAM_KERNELS], isa, progress)
    team = Team(isa, 1, cpus.find().usable, home=cpus.find().home)
    try:
        found = {}
        for i, name in enumerate(formats):
            if progress:
                progress(f"measuring {name}", i + 1, len(formats))
            fmt = blocks.get(name)
            rows = PANEL_ROWS if tokens > 1 else CACHED // blocks.row_bytes(fmt, COLS)
            again = 1 if tokens > 1 else AGAIN
            found[name] = _best(
                Products(fmt, isa, team, addresses, rows=rows, tokens=tokens, again=again)
            )
        return found
    finally:
        team.close()


def _best(products: Products) -> float:
    ahead, best, end = Tuning().distance(products.format), math.inf, perf_counter() + SECONDS
    while perf_counter() < end:  # other programs may hold up a run
        best = min(best, products.run(ahead=ahead, chunk=products.rows))
    return products.macs / best / 1e9
