"""What this machine can do at most: bytes read from memory and integer products per second.

Measured by kernels of our own; the best per machine, instruction set and thread count is kept
beside the compiled kernels. `edgeq bench` shows speeds as a share of them.
"""

import math
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from edgeq import cpus, memory
from edgeq.kernels import cache, load
from edgeq.kernels import isa as isas
from edgeq.kernels.layout import DOT_CHAINS
from edgeq.kernels.program import TEAM_KERNELS, Op, Program, Team, aligned

__all__ = ["Limits", "measure", "measured"]

READ_BYTES = 1 << 28  # more than any cache
DOT_STEPS = 1 << 21
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """Best of several runs with all `threads` at work."""

    threads: int
    read_gbs: float  # 1e9 bytes per second, read once, in order
    dot_gmacs: float  # 1e9 8-bit multiply-adds per second, operands at hand


def measure(threads: int, cores: int) -> Limits:
    """Measure now; takes about a second.

    cores: threads that can run at the same time.
    """
    isa = isas.choose()
    names = ("probe_read", "probe_dot", *TEAM_KERNELS)
    addresses = load(names, isa)
    team = Team(isa, threads, cores, home=cpus.find().home)
    size = min(READ_BYTES, memory.available() // 8) // 4096 * 4096
    sums, source = aligned(64 * threads), aligned(size)
    source[:] = 1  # pages that were never written are all the same one
    where = [int(source.ctypes.data), size, int(sums.ctypes.data)]
    read = Program([Op("probe_read", np.array(where, np.int64))], addresses, team, threads)
    steps = np.array([DOT_STEPS, where[0], where[2]], np.int64)
    dot = Program([Op("probe_dot", steps)], addresses, team, threads)
    try:
        seconds = _best(read)
        products = threads * DOT_STEPS * DOT_CHAINS * isa.WIDTH
        return Limits(threads, size / seconds / 1e9, products / _best(dot) / 1e9)
    finally:
        team.close()


def _best(program: Program) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        program.run()
        times.append(perf_counter() - start)
    return min(times)


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
