"""What this machine can do at most: bytes read from memory and integer products per second.

Measured once per machine, instruction set and thread count by kernels of our own, and kept beside
the compiled kernels. `edgeq bench` shows speeds as a share of them.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

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
    dot_gmacs: float  # 1e9 8-bit multiply-adds per second, operands in registers


def measure(threads: int, cores: int) -> Limits:
    """Measure now; takes about a second."""
    isa = isas.choose()
    names = ("probe_read", "probe_dot", *TEAM_KERNELS)
    addresses = load(names, isa)
    team = Team(isa, threads, cores)
    sums, memory = aligned(64 * threads), aligned(READ_BYTES)
    memory[:] = 1
    where = [int(memory.ctypes.data), READ_BYTES, int(sums.ctypes.data)]
    read = Program([Op("probe_read", np.array(where, np.int64))], addresses, team, threads)
    steps = np.array([DOT_STEPS, 0, where[2]], np.int64)
    dot = Program([Op("probe_dot", steps)], addresses, team, threads)
    try:
        seconds = _best(read)
        products = threads * DOT_STEPS * DOT_CHAINS * isa.WIDTH
        return Limits(threads, READ_BYTES / seconds / 1e9, products / _best(dot) / 1e9)
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


def measured(threads: int, cores: int) -> Limits:
    """The stored limits for this machine and thread count, measured first where there are none."""
    path = _file(threads)
    try:
        return Limits(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        found = measure(threads, cores)
    _keep(path, json.dumps(asdict(found)))
    return found


def _file(threads: int) -> Path:
    return cache.folder(isas.choose()) / f"limits-{threads}.json"


def _keep(path: Path, text: str) -> None:
    """Write a file that later runs read; a cache that cannot be written is no error."""
    try:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        os.replace(part, path)
    except OSError:
        return
