"""Matrix products alone, every format, beside the machine's limits measured in the same run.

    python tests/bench/kernels.py [--threads 2] [--json] [--plot FILE.svg] [FORMAT...]

row: a matrix times one column, as in generation. From L2 by one thread in cycles per 256 weights,
which is what the instructions cost; and from memory by all threads, as a share of the read limit.
panel: a layer times 512 columns, as in a prompt; GMAC/s and cycles of a thread per 256 weights and
column; as a share of the dot-product limit. With a plot (it needs matplotlib): the roofline
(Williams, Waterman and Patterson 2009) of the machine with every format in it.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numba import njit
from randomllama import random_tensor

from edgeq import blocks, cpus, kernels, limits
from edgeq.kernels import isa as isas
from edgeq.kernels import layout
from edgeq.kernels.program import TEAM_KERNELS, Op, Program, Team, aligned, arguments
from edgeq.tuning import Tuning

COLS, TOKENS, REPEATS = 2048, 512, 7
MEMORY, CACHE, AGAIN = 1 << 28, 1 << 18, 64  # bytes of a matrix; how often the small one is read

HEADS = (
    "format",
    "bytes per 256",
    "row: cycles per 256",
    "from L2, GB/s",
    "from memory, GB/s",
    "of limit",
    "panel: GMAC/s",
    "cycles per 256",
    "of limit",
)


class Bench:
    """A team of threads, and what its programs point to."""

    def __init__(self, threads: int) -> None:
        self.isa, self.threads = isas.choose(), threads
        self.team = Team(self.isa, threads, cpus.find().usable)
        self.kept: list[np.ndarray] = []
        self.counters: list[np.ndarray] = []  # of the work that is taken

    def seconds(self, name: str, fmt: blocks.BlockFormat, nbytes: int, again: int = 1) -> float:
        """Median time of one product of a matrix of so many bytes; the best, if it is repeated to
        see what its instructions cost.
        """
        columns = TOKENS if name == "matmul" else 1
        w = _matrix(fmt, nbytes // blocks.row_bytes(fmt, COLS))
        ops = [self._op(name, fmt, w, columns) for _ in range(again)]
        found = kernels.load([ops[0].kernel, *TEAM_KERNELS], self.isa)
        program = Program(ops, found, self.team, self.threads)
        times = []
        for _ in range(REPEATS):
            for counter in self.counters:
                counter.fill(0)
            start = perf_counter()
            program.run()
            times.append((perf_counter() - start) / again)
        self.kept.clear()
        self.counters.clear()
        return median(times) if again == 1 else min(times)

    def _op(self, name: str, fmt: blocks.BlockFormat, w: np.ndarray, tokens: int) -> Op:
        isa, rows, plain = self.isa, len(w), fmt.value == "x"
        columns = -(-tokens // isa.TILE_COLS) * isa.TILE_COLS
        lanes = isa.WIDTH // 4
        panel = layout.panel_bytes(COLS, fmt.group, lanes, plain)
        size = layout.matmul_scratch(panel, lanes, isa.TILE_COLS) + layout.MATVEC_SCRATCH
        sizes = {"state": 16, "x": 4 * columns * COLS, "xd": columns * COLS // 8}
        sizes |= {"xs": columns * COLS // 4, "out": 4 * columns * rows, "taken": layout.COUNTER}
        sizes |= {"scratch": self.threads * (-(-size // 64) * 64)}
        buffers = {key: aligned(max(nbytes, 1)) for key, nbytes in sizes.items()}
        buffers["state"].view(np.int64)[0] = tokens
        numbers = {key: int(value.ctypes.data) for key, value in buffers.items()}
        numbers |= {"rows": rows, "cols": COLS, "row_bytes": w.shape[1], "stride": rows}
        numbers |= {"bias": 0, "add": 0, "group": 1, "private": 0, "w": int(w.ctypes.data)}
        numbers |= {
            "scratch_bytes": sizes["scratch"] // self.threads,
            "ahead": Tuning().distance(fmt),
        }
        numbers |= {"chunk": Tuning().turn(rows, self.threads)}
        self.kept.extend([w, *buffers.values()])
        self.counters.append(buffers["taken"])
        return Op(f"{name}/{fmt.name}", arguments(layout.MATMUL, **numbers))


def _matrix(fmt: blocks.BlockFormat, rows: int) -> np.ndarray:
    w = random_tensor(np.random.default_rng(0), fmt, (rows, COLS))
    return np.ascontiguousarray(w).view(np.uint8).reshape(rows, -1)


def clock() -> float:
    """Cycles per second, from a chain of additions that wait for each other."""

    @njit
    def chain(n: int) -> int:
        x = 1
        for i in range(n):
            x = (x ^ i) + 3
        return x

    chain(10)
    best, n = float("inf"), 1 << 24
    for _ in range(5):
        start = perf_counter()
        chain(n)
        best = min(best, perf_counter() - start)
    return 2 * n / best


def measure(names: list[str], threads: int, best: limits.Limits) -> Iterator[dict[str, Any]]:
    """A row of the table per format."""
    hz, alone, together = clock(), Bench(1), Bench(threads)
    for name in names:
        fmt = blocks.get(name)
        size = blocks.row_bytes(fmt, COLS)
        cached, read = (n // size * size for n in (CACHE, MEMORY))
        t = alone.seconds("matvec", fmt, cached, AGAIN)
        gbs = read / together.seconds("matvec", fmt, read) / 1e9
        macs = TOKENS * COLS**2
        gmacs = macs / together.seconds("matmul", fmt, COLS * size) / 1e9
        yield {
            "format": name,
            "bytes_per_256": size * 256 // COLS,
            "row_cycles": t * hz * 256 / (cached / size * COLS),
            "row_cached_gbs": cached / t / 1e9,
            "row_gbs": gbs,
            "row_share": gbs / best.read_gbs,
            "panel_gmacs": gmacs,
            "panel_cycles": 256 * threads * hz / gmacs / 1e9,
            "panel_share": gmacs / best.dot_gmacs,
            "threads": threads,
        }
    for bench in (alone, together):
        bench.team.close()


def plot(rows: list[dict[str, Any]], best: limits.Limits, path: str) -> None:
    """Multiply-adds per second over multiply-adds per byte of weights: two roofs, and the formats
    below them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
    x = np.geomspace(0.3, 4000, 300)
    axes.plot(x, np.minimum(x * best.read_gbs, best.dot_gmacs), color="black", linewidth=1.2)
    for row, color in zip(rows, plt.get_cmap("tab20").colors, strict=False):
        per_byte, edge = 256 / row["bytes_per_256"], {"color": color, "markersize": 7}
        axes.plot(per_byte, row["row_gbs"] * per_byte, "o", label=row["format"], **edge)
        axes.plot(per_byte * TOKENS, row["panel_gmacs"], "s", **edge)
    place = {"fontsize": 9, "color": "0.25"}
    axes.set(xscale="log", yscale="log", xlim=(0.3, 4000), ylim=(5, 2 * best.dot_gmacs))
    axes.text(2, 2.4 * best.read_gbs, f"read {best.read_gbs:.0f} GB/s", ha="right", **place)
    axes.text(60, 1.06 * best.dot_gmacs, f"byte dot products {best.dot_gmacs:.0f} GMAC/s", **place)
    axes.text(2.2, 14, "circles: one column (generation)", **place)
    axes.text(70, 55, f"squares: {TOKENS} columns (prompt)", **place)
    axes.set_xlabel("multiply-adds per byte of weights read")
    axes.set_ylabel("multiply-adds per second, 1e9")
    axes.set_title(f"{isas.choose().NAME}, {best.threads} threads", fontsize=10)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def show(row: dict[str, Any]) -> str:
    return (
        f"| {row['format']} | {row['bytes_per_256']} | {row['row_cycles']:.1f} |"
        f" {row['row_cached_gbs']:.1f} | {row['row_gbs']:.1f} | {row['row_share']:.0%} |"
        f" {row['panel_gmacs']:.0f} | {row['panel_cycles']:.2f} | {row['panel_share']:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("formats", nargs="*", default=list(blocks.formats()))
    parser.add_argument("--threads", type=int, default=cpus.find().threads)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="roofline as SVG or PNG; needs matplotlib")
    args = parser.parse_args()
    # Memory as it is now; what the CPU can multiply stays the same: the best that was ever seen.
    usable = cpus.find().usable
    known = limits.measured(args.threads, usable)
    best = replace(limits.measure(args.threads, usable), dot_gmacs=known.dot_gmacs)
    if not args.json:
        print(f"limits, {args.threads} threads: read {best.read_gbs:.1f} GB/s, ", end="")
        print(f"dot products {best.dot_gmacs:.0f} GMAC/s\n")
        print(f"| {' | '.join(HEADS)} |\n|---|{'---:|' * (len(HEADS) - 1)}")
    rows = []
    for row in measure(args.formats, args.threads, best):
        rows.append(row)
        print(json.dumps(row) if args.json else show(row), flush=True)
    if args.plot:
        plot(rows, best, args.plot)


if __name__ == "__main__":
    main()
