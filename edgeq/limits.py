"""What this machine can do at most: bytes read from memory and integer products per second.

Measured by kernels of our own; the best per machine, instruction set and thread count is kept
beside the compiled kernels. `edgeq bench` shows speeds as a share of them.
"""

import contextlib
import math
import mmap
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import cpus, memory
from edgeq.kernels import cache, load
from edgeq.kernels import isa as isas
from edgeq.kernels.layout import DOT_CHAINS
from edgeq.kernels.program import TEAM_KERNELS, Op, Program, Team, aligned

__all__ = ["Limits", "measure", "measured", "products", "sustained"]

READ_BYTES = 1 << 30  # so many that also the caches of a server hold little of them
DOT_STEPS = 1 << 21
REPEATS, LONG_REPEATS = 5, 11


@dataclass(frozen=True)
class Limits:
    """Best of several runs with all `threads` at work."""

    threads: int
    read_gbs: float  # 1e9 bytes per second, read once, in order
    dot_gmacs: float  # 1e9 8-bit multiply-adds per second, operands at hand


def measure(threads: int, cores: int) -> Limits:
    """Measure now; takes a second or two, on a slow board five.

    cores: threads that can run at the same time.
    """
    with _programs(threads, cores, READ_BYTES) as (size, read, _):
        gbs = size / min(_times(read, REPEATS)) / 1e9
    return Limits(threads, gbs, products(threads, cores))


def products(threads: int, cores: int) -> float:
    """1e9 8-bit multiply-adds per second: the best of several runs."""
    count = threads * DOT_STEPS * DOT_CHAINS * int(isas.choose().WIDTH)
    with _programs(threads, cores, 4096) as (_, _, dot):
        return count / min(_times(dot, REPEATS)) / 1e9


def sustained(threads: int, cores: int) -> float:
    """1e9 bytes per second that go on coming from memory: the median of runs. Takes a second or
    two, on a slow board five.
    """
    with _programs(threads, cores, READ_BYTES) as (size, read, _):
        return size / statistics.median(_times(read, LONG_REPEATS)) / 1e9


@contextlib.contextmanager
def _programs(threads: int, cores: int, most: int) -> Iterator[tuple[int, Program, Program]]:
    """How many bytes are read (`most`, if memory allows), the program that reads them, and the one
    of products.
    """
    addresses = load(("probe_read", "probe_dot", *TEAM_KERNELS), isas.choose())
    sums, source = aligned(64 * threads), _like_a_file(min(most, memory.available() // 4))
    size = source.nbytes
    start, out = int(source.ctypes.data), int(sums.ctypes.data)
    ops = (
        Op("probe_read", _words(start, size, out)),
        Op("probe_dot", _words(DOT_STEPS, start, out)),
    )
    team = Team(isas.choose(), threads, cores, home=cpus.find().home)
    try:
        read, dot = (Program([op], addresses, team, threads) for op in ops)
        yield size, read, dot
    finally:
        team.close()


def _like_a_file(nbytes: int) -> NDArray[np.uint8]:
    """u8[nbytes, rounded] of memory in pages as small as those of a mapped model."""
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    options = {"flags": private} if private else {}  # Windows has other ones
    place = mmap.mmap(-1, max(nbytes // 4096, 1) * 4096, **options)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            place.madvise(mmap.MADV_NOHUGEPAGE)
    found = np.frombuffer(place, np.uint8)
    found[:] = 1  # pages that were never written are all the same one
    return found


def _words(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _times(program: Program, repeats: int) -> list[float]:
    """Seconds of each run."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        program.run()
        times.append(perf_counter() - start)
    return times


def measured(threads: int, cores: int, *, again: bool = False) -> Limits:
    """The best that was ever measured on this machine with so many threads: now, and what is stored
    of earlier times, when it may have been less busy. again: forget these.
    """
    found = asdict(measure(threads, cores))
    kept = None if again else cache.recall(_name(threads), isas.choose())
    if kept is not None and _sane(kept, threads):
        found = {name: max(value, kept[name]) for name, value in found.items()}
    cache.remember(_name(threads), isas.choose(), found)
    return Limits(**found)


def _sane(kept: dict[str, Any], threads: int) -> bool:
    """Whether stored limits can be used: they may be of another version, or damaged."""
    return (
        set(kept) == {"threads", "read_gbs", "dot_gmacs"}
        and kept["threads"] == threads
        and all(type(v) in (int, float) and 0 < v < math.inf for v in kept.values())
    )


def _name(threads: int) -> str:
    return f"limits-{threads}"
