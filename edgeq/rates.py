"""How fast kernels are, per format: measured on this machine, or predicted for a device.

Weights that a row kernel gets through while they are in cache, multiply-adds of a panel kernel, and
bytes that memory delivers: what `edgeq.plan` makes tokens per second of.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeq import blocks, cpus, devices, limits
from edgeq.cpus import Cpus
from edgeq.data import find, from_table, load_toml
from edgeq.devices import Device, Read
from edgeq.errors import FormatError, RequestError
from edgeq.kernels import cache, load
from edgeq.kernels import isa as isas
from edgeq.kernels.program import TEAM_KERNELS, Team
from edgeq.products import COLS, Products
from edgeq.tuning import Tuning

if TYPE_CHECKING:
    from edgeq.models.weights import Matrix

__all__ = ["Rates", "fastest", "measured", "of_device", "seconds", "slower", "threads"]

CACHED = 1 << 18  # bytes of a matrix that stays in a core's cache
AGAIN = 16  # times that it is read in a run
SECONDS, MORE_SECONDS = 0.1, 0.02  # per kernel: the first time, and later
TOKENS, PANEL_ROWS = 128, 256
# Of what memory is sold for, programs get about so much where nobody measured it.
ATTAINABLE = 0.65
# Of what a panel kernel does alone, from cache, several threads with a whole layer do so much.
TOGETHER = 0.94
# Of the dot products that a core can do, a panel kernel does about so many where nobody knows; one
# of floats does so much less, and a row of floats in cache again: as devices/cores/ has them.
PANEL_SHARE, FLOAT_SHARE, FLOAT_ROW = 0.6, 1 / 3, 1 / 16
SMOOTH = 3  # exponent of the power mean of two times; fitted to products measured from memory
GAIN = 1.05  # what another number of threads than the usual one must bring
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
    others: tuple["Rates", ...] = ()  # with other numbers of threads for generation
    chosen_by: "Rates | None" = None  # whose figures choose one of these; None: its own


@dataclass(frozen=True)
class Core:
    """A file of devices/cores/: what kernels cost on one core."""

    source: str
    row: dict[str, float]  # cycles per 256 weights
    tile: dict[str, float]  # multiply-adds per cycle


def of_device(device: Device, threads: tuple[int, int] | None = None) -> Rates:
    """Predicted rates of a device, whose files say how fast memory and cores are.

    threads: of generation, of prompts; by default those that do best, with `others` that may do
    better for some formats. Raises RequestError for a device of which too little is known, and for
    more threads than it has cores.

    >>> of_device(devices.get("rpi5")).read
    13.23
    """
    if not device.cores or not device.read:
        raise RequestError(
            f"device {device.id}: its file has no cores or no bandwidth: add them, or run "
            "`edgeq plan` there without --device"
        )
    there, fast = sum(kind.count for kind in device.cores), device.cores[0].count
    few, many = threads or (device.decode_threads or fast, device.prefill_threads or fast)
    _at_most(max(few, many), there, device.name)
    return _predicted(device, [few] if threads else _counts(device, few, fast), many)


def _predicted(device: Device, counts: Sequence[int], many: int) -> Rates:
    """With each of some numbers of threads for generation, of which the first is the usual one."""
    usual, *others = (_of(device, few, many) for few in counts)
    return replace(usual, others=tuple(others))


def _of(device: Device, few: int, many: int) -> Rates:
    limit, fast = device.limit(few), device.cores[0]
    assert limit is not None
    core = _core(fast.kind)
    decoding, reading = min(few, fast.count), min(many, fast.count)  # cores at work
    peak = max((dot.gmacs / (dot.threads or fast.count) for dot in device.dot), default=0.0)
    return Rates(
        (few, many),
        limit.gbs if limit.kind == "measured" else limit.gbs * ATTAINABLE,
        {name: decoding * fast.ghz * 256 / cycles for name, cycles in core.row.items()}
        or _guessed_rows(peak * decoding),
        {name: reading * fast.ghz * macs for name, macs in core.tile.items()}
        or _guessed_tiles(peak * reading),
        peak * reading,
        f"{_said(limit)}; kernels {_known(core, peak)}",
    )


def _counts(device: Device, few: int, most: int) -> list[int]:
    """`few` threads for generation, and others that may do better, where it is known how long
    arithmetic takes.
    """
    more = device.more_threads(few, most)
    return [few, *(more if more and _core(device.cores[0].kind).row else [])]


def threads(
    matrices: "Sequence[Matrix]", machine: Cpus, device: Device | None = None
) -> tuple[int, int]:
    """Threads that do best with a model, for generation and for prompts, of those that may run
    here; device: by default this machine. Raises FormatError for a damaged file of a core.
    """
    device = device or devices.here()
    few, many = devices.threads(machine, device)
    counts = _counts(device, few, machine.threads)
    if len(counts) > 1:
        few = fastest(matrices, _predicted(device, counts, many)).threads[0]
    return few, many


def fastest(matrices: "Sequence[Matrix]", rates: Rates) -> Rates:
    """With the number of threads that multiplies matrices with one token soonest, as `chosen_by`
    says; attention, which is the smaller part but after long texts, has no say.
    """
    judge = rates.chosen_by or rates

    def total(of: Rates) -> float:
        return seconds(matrices, of)[2]

    best = min(judge.others, key=total, default=None)
    if best is None or GAIN * total(best) >= total(judge):
        return rates
    return next(own for own in rates.others if own.threads == best.threads)


def seconds(matrices: "Sequence[Matrix]", rates: Rates) -> tuple[float, float, float]:
    """Seconds that memory takes for a token, that arithmetic takes, and that both take together."""
    reading = computing = both = 0.0
    for m in matrices:
        read = m.rows * m.row_bytes / rates.read / 1e9
        row = rates.row.get(m.format.name)
        compute = m.rows * m.cols / row / 1e9 if row else 0.0
        reading, computing = reading + read, computing + compute
        both += slower(read, compute)
    return reading, computing, both


def slower(a: float, b: float) -> float:
    """The longer of two times that pass together; where they are alike they are in each other's
    way.

    >>> round(slower(1.0, 1.0), 2), round(slower(1.0, 0.5), 2)
    (1.26, 1.04)
    """
    return float((a**SMOOTH + b**SMOOTH) ** (1 / SMOOTH))


def _at_most(threads: int, there: int, name: str) -> None:
    if threads > there:
        raise RequestError(f"threads = {threads}: {name} has {there} cores: use -t {there} or less")


def _guessed_rows(peak: float) -> dict[str, float]:
    """1e9 weights per second where only dot products are known: of floats, which attention and
    small operations are priced by; other rows then wait for memory.
    """
    return dict.fromkeys(_floats(), peak * FLOAT_ROW) if peak else {}


def _guessed_tiles(peak: float) -> dict[str, float]:
    floats = _floats()
    share = {name: FLOAT_SHARE if name in floats else 1.0 for name in blocks.formats()}
    return {name: peak * PANEL_SHARE * part for name, part in share.items()} if peak else {}


def _floats() -> list[str]:
    return [name for name in blocks.formats() if blocks.get(name).value == "x"]


def _said(read: Read) -> str:
    """How a bandwidth is known.

    >>> _said(devices.get("rpi4").read[0])
    'measured: copy, 1 thread'
    """
    threads = "" if read.threads is None else f", {read.threads} thread{'s' * (read.threads > 1)}"
    return f"{read.kind}: {read.how}{threads}" if read.kind == "measured" else read.kind


def _known(core: Core, peak: float) -> str:
    if core.row:
        return "predicted"
    return "guessed from dot products" if peak else "unknown"


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
) -> Rates:
    """Rates of this machine: of kernels the best that was ever measured, now or before, when it may
    have been less busy; of memory what it gives now, since others may share it.

    formats: those that matter. threads: of generation, of prompts; default the engine's.
    progress(what, done, total) is called while it takes time. Raises RequestError for more threads
    than can run.
    """
    isa, machine = isas.choose(), cpus.find()
    few, many = threads or devices.threads(machine)
    _at_most(max(few, many), machine.usable, "this machine")
    here = devices.here()
    counts = [few] if threads else _counts(here, few, machine.threads)
    rates: dict[str, dict[str, float]] = {}
    wanted = sorted(set(formats))
    for kind, tokens in (("row", 1), ("tile", TOKENS)):
        kept = _sane(cache.recall(f"rates-{kind}", isa))
        for name, rate in _probe({n: n in kept for n in wanted}, isa, tokens, progress).items():
            kept[name] = max(rate, kept.get(name, 0.0))
        cache.remember(f"rates-{kind}", isa, kept)
        rates[kind] = {name: kept[name] for name in wanted}
    dot = limits.products(many, machine.usable)
    tile = {fmt: rate * many * TOGETHER for fmt, rate in rates["tile"].items()}
    usual, *others = (
        Rates(
            (count, many),
            limits.sustained(count, machine.usable),
            {fmt: rate * count for fmt, rate in rates["row"].items()},
            tile,
            dot,
            "measured here, now",
        )
        for count in counts
    )
    # The engine does not measure before it starts.
    judge = _predicted(here, counts, many) if others else None
    return replace(usual, others=tuple(others), chosen_by=judge)


def _sane(kept: dict[str, Any] | None) -> dict[str, float]:
    """What is usable of a stored entry: it may be of another version, or damaged."""
    return {
        name: value
        for name, value in (kept or {}).items()
        if type(value) in (int, float) and 0 < value < math.inf
    }


def _probe(
    formats: dict[str, bool], isa: ModuleType, tokens: int, progress: Progress | None
) -> dict[str, float]:
    """1e9 multiply-adds per second of one thread, by format: two that wait for each other could not
    be told from a busy machine. formats: whether a rate is known, which is then measured shortly.
    """
    kind = "matmul" if tokens > 1 else "matvec"
    addresses = load([*(f"{kind}/{name}" for name in formats), *TEAM_KERNELS], isa, progress)
    team = Team(isa, 1, cpus.find().usable, home=cpus.find().home)
    try:
        found = {}
        for i, (name, known) in enumerate(formats.items()):
            if progress:
                progress(f"measuring {name}", i + 1, len(formats))
            fmt = blocks.get(name)
            rows = PANEL_ROWS if tokens > 1 else CACHED // blocks.row_bytes(fmt, COLS)
            again = 1 if tokens > 1 else AGAIN
            products = Products(fmt, isa, team, addresses, rows=rows, tokens=tokens, again=again)
            found[name] = _best(products, MORE_SECONDS if known else SECONDS)
        return found
    finally:
        team.close()


def _best(products: Products, seconds: float) -> float:
    ahead, best, end = Tuning().distance(products.format), math.inf, perf_counter() + seconds
    while perf_counter() < end:  # other programs may hold up a run
        best = min(best, products.run(ahead=ahead, chunk=products.rows))
    return products.macs / best / 1e9
