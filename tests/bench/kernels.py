"""Matrix products alone, every format, beside the machine's limits measured in the same run.

    python tests/bench/kernels.py [--threads 2] [FORMAT...]

matvec reads a matrix larger than any cache once per step (GB/s, share of the read limit); matmul
multiplies a layer's worth of rows with 512 columns (GMAC/s, share of the dot-product limit).
"""

import argparse
from statistics import median
from time import perf_counter

import numpy as np
from tinyllama import random_tensor

from edgeq import blocks, kernels, limits
from edgeq.engine import cores
from edgeq.kernels import isa as isas
from edgeq.kernels import layout
from edgeq.kernels.program import TEAM_KERNELS, Op, Program, Team, aligned, arguments

COLS, TOKENS, REPEATS = 2048, 512, 7
READ = 1 << 28  # bytes of the matrix that matvec reads
TAKEN: list[np.ndarray] = []  # counters of the work that is taken
KEPT: list[np.ndarray] = []  # what the ops of one format point to


def op(name: str, fmt: blocks.BlockFormat, w: np.ndarray, tokens: int, threads: int) -> Op:
    """One product; its buffers are KEPT."""
    isa, rows = isas.choose(), len(w)
    columns = -(-tokens // isa.TILE_COLS) * isa.TILE_COLS
    plain, lanes = fmt.value == "x", isa.WIDTH // 4
    panels = layout.panel_bytes(COLS, fmt.group, lanes, plain)
    size = max(layout.matmul_scratch(panels, lanes, isa.TILE_COLS), layout.MATVEC_SCRATCH)
    size = -(-size // 64) * 64
    buffers = {
        "state": aligned(16),
        "x": aligned(4 * columns * COLS),
        "xd": aligned(columns * COLS // 8),
        "xs": aligned(columns * COLS // 4),
        "out": aligned(4 * columns * rows),
        "scratch": aligned(threads * size),
        "taken": aligned(64),
    }
    buffers["state"].view(np.int64)[0] = tokens
    places = {key: int(value.ctypes.data) for key, value in buffers.items()}
    numbers = {"rows": rows, "cols": COLS, "row_bytes": w.shape[1], "stride": rows}
    numbers |= {
        "bias": 0,
        "add": 0,
        "scratch_bytes": size,
        "group": 1,
        "ahead": layout.PREFETCH,
        "chunk": 64,
        "private": 0,
        "w": int(w.ctypes.data),
    }
    made = Op(f"{name}/{fmt.name}", arguments(layout.MATMUL, **places, **numbers))
    KEPT.extend([w, *buffers.values()])
    TAKEN.append(buffers["taken"])
    return made


def seconds(program: Program) -> float:
    times = []
    for _ in range(REPEATS):
        for counter in TAKEN:
            counter.fill(0)
        start = perf_counter()
        program.run()
        times.append(perf_counter() - start)
    return median(times)


def matrix(fmt: blocks.BlockFormat, rows: int) -> np.ndarray:
    w = random_tensor(np.random.default_rng(0), fmt, (rows, COLS))
    return np.ascontiguousarray(w).view(np.uint8).reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("formats", nargs="*", default=list(blocks.formats()))
    parser.add_argument("--threads", type=int, default=cores())
    args = parser.parse_args()
    best = limits.measure(args.threads, cores())
    print(f"limits, {args.threads} threads: {best.read_gbs:.1f} GB/s, {best.dot_gmacs:.0f} GMAC/s")
    team = Team(isas.choose(), args.threads, cores())
    for name in args.formats:
        fmt = blocks.get(name)
        rows = READ // blocks.row_bytes(fmt, COLS)
        vector = op("matvec", fmt, matrix(fmt, rows), 1, args.threads)
        panel = op("matmul", fmt, matrix(fmt, COLS), TOKENS, args.threads)
        found = kernels.load([vector.kernel, panel.kernel, *TEAM_KERNELS], isas.choose())
        times = [seconds(Program([o], found, team, args.threads)) for o in (vector, panel)]
        read, macs = READ / times[0] / 1e9, TOKENS * COLS * COLS / times[1] / 1e9
        print(
            f"{fmt.name:7s} matvec {read:6.1f} GB/s {read / best.read_gbs:5.0%}"
            f"   matmul {macs:6.1f} GMAC/s {macs / best.dot_gmacs:5.0%}",
            flush=True,
        )
        KEPT.clear()
    team.close()


if __name__ == "__main__":
    main()
