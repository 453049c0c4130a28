"""Parameters of decoding that depend on the machine, found by a short measurement and kept beside
the compiled kernels.

How far ahead a core asks for weights, and how many rows threads take at a time, are
decided by its prefetchers and memory channels: nothing that a table could tell.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

from edgeq import blocks, cpus, memory
from edgeq.blocks import BlockFormat
from edgeq.kernels import cache, layout, load
from edgeq.kernels.program import TEAM_KERNELS, Team
from edgeq.products import ROWS, Products

__all__ = ["AHEAD", "CHUNK", "Tuning", "measure", "tuned"]

AHEAD = (0, 2048, 4096, 8192, 12288)  # bytes
CHUNK = (0, 16, 64, 256)  # rows
TURNS = 8  # so many that nobody waits long for the last, so few that taking them costs nothing
FORMAT, WIDE = "Q4_K", "Q8_0"  # of which the distances hold for all with fewer, or no fewer bits
READ_BYTES = 1 << 27  # all products together: more than the caches of a core
MOST = 1 << 20  # bytes or rows
ROUNDS, SECONDS = 15, 0.5  # per parameter: at most so many, at most so long
GAIN, OFTEN = 1.02, 0.8  # what a value must win by, and in how many of the rounds it must win
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tuning:
    """ahead: bytes of a row that are asked for in advance, 0 = none. chunk: rows that a thread
    takes at a time, 0 = so many that each has TURNS turns. ahead_wide: ahead for formats of a byte
    or more per weight, where so little is left to compute that a CPU's own prefetchers keep up.
    """

    ahead: int = layout.PREFETCH
    chunk: int = 0
    ahead_wide: int = 0

    def distance(self, fmt: BlockFormat) -> int:
        """Bytes that are asked for in advance of rows of a format.

        >>> Tuning(4096, 0, 1024).distance(blocks.get("Q8_0"))
        1024
        """
        return self.ahead_wide if fmt.bytes >= fmt.block else self.ahead

    def turn(
        self, rows: int, threads: int, step: int = layout.ROWS_AT_ONCE, matrices: int = 1
    ) -> int:
        """Rows of a matrix of `rows` that each of `threads` threads takes at a time: a multiple of
        `step`; fewer where it takes them of several matrices, so that nobody waits longer.

        >>> Tuning().turn(2048, 2), Tuning(chunk=64).turn(2048, 2), Tuning(chunk=16).turn(9, 2, 32)
        (128, 64, 32)
        """
        wanted = (self.chunk or rows // (TURNS * threads)) // matrices
        return max(wanted // step, 1) * step


def tuned(
    isa: ModuleType,
    threads: int,
    cores: int,
    progress: Progress | None = None,
    *,
    again: bool = False,
) -> Tuning:
    """The stored parameters for this machine, instruction set and thread count, measured first
    where there are none, or again. It never fails for lack of memory: then it is the default.

    cores: threads that can run at the same time. progress(what, done, total) as for `load`.
    """
    name = f"tuning-{threads}"
    kept = None if again else cache.recall(name, isa)
    if kept is not None and _sane(kept):
        return Tuning(**kept)
    try:
        found = measure(isa, threads, cores, progress)
    except MemoryError:
        return Tuning()
    memory.restart_peak()  # what this took, once per machine, is no part of what a model needs
    cache.remember(name, isa, asdict(found))
    return found


def _sane(kept: dict[str, Any]) -> bool:
    """Whether a stored entry can be used: it may be of another version, or damaged."""
    return set(kept) == set(asdict(Tuning())) and all(
        type(value) is int and 0 <= value <= MOST for value in kept.values()
    )


def measure(isa: ModuleType, threads: int, cores: int, progress: Progress | None = None) -> Tuning:
    """Measure now, a second or two: first the prefetch distances, then the rows at a time."""
    names = [f"matvec/{name}" for name in (FORMAT, WIDE)]
    addresses = load([*names, *TEAM_KERNELS], isa, progress)
    if progress:
        progress("measuring this machine", 1, 1)
    team = Team(isa, threads, cores, home=cpus.find().home)
    best = Tuning()
    try:
        for fmt, parameters in (
            (FORMAT, {"ahead": AHEAD, "chunk": CHUNK}),
            (WIDE, {"ahead_wide": AHEAD}),
        ):
            layer = _Layer(
                blocks.get(fmt), isa, team, addresses, threads=threads, nbytes=READ_BYTES
            )
            for name, values in parameters.items():
                options = [best, *(replace(best, **{name: v}) for v in values)]
                best = _fastest(layer, list(dict.fromkeys(options)))
    finally:
        team.close()
    return best


def _fastest(layer: "_Layer", options: list[Tuning]) -> Tuning:
    """The first option, unless another is clearly faster: each round compares them anew, so that
    what else the machine does weighs little.
    """
    ratios: dict[Tuning, list[float]] = {option: [] for option in options}
    end = perf_counter() + SECONDS
    for i in range(ROUNDS):
        if i > 2 and perf_counter() > end:
            break
        seconds = {option: layer.seconds(option) for option in options}
        for option in options:
            ratios[option].append(seconds[options[0]] / seconds[option])
    best = max(options, key=lambda option: median(ratios[option]))
    wins = sum(ratio > 1 for ratio in ratios[best]) / len(ratios[best])
    return best if median(ratios[best]) > GAIN and wins >= OFTEN else options[0]


class _Layer(Products):
    """Products that read a large piece of memory once, as decoding one token does."""

    def seconds(self, tuning: Tuning) -> float:
        """Time of one pass with these parameters."""
        return self.run(ahead=tuning.distance(self.format), chunk=tuning.turn(ROWS, self.threads))
