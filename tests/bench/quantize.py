"""Speed and error of the quantizers: `python tests/bench/quantize.py [METHOD] [FORMAT ...]`.

Quantizes a matrix of 4 M random weights to each format, on one thread and on all. Mparam/s is
millions of weights per second, MB/s the float32 bytes read; error is the relative RMSE. Whole
conversions, beside llama-quantize: conversion.py; their memory: memory.py.
"""

import sys
import time

import numpy as np

from edgeq import blocks
from edgeq.quantizers import quantize

ROWS, COLS = 2048, 2048
REPEATS = 3


def best_seconds(w: np.ndarray, fmt: str, method: str, threads: int | None) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        quantize(w, fmt, method=method, threads=threads)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def relative_error(w: np.ndarray, fmt: str, method: str) -> float:
    miss = blocks.decode(quantize(w, fmt, method=method), fmt) - w
    return float(np.sqrt(np.square(miss, dtype=np.float64).mean() / np.square(w).mean()))


def main() -> None:
    method, *names = sys.argv[1:] or ["search"]
    formats = names or [n for n, f in blocks.formats().items() if f.value != "x"]
    w = np.random.default_rng(0).standard_normal((ROWS, COLS), np.float32) * np.float32(0.02)
    print(f"{method}: format  compile s  Mparam/s 1 thread  all threads  MB/s all threads  error")
    for fmt in formats:
        start = time.perf_counter()
        quantize(w[:1], fmt, method=method)
        first = time.perf_counter() - start
        alone, together = (w.size / best_seconds(w, fmt, method, n) / 1e6 for n in (1, None))
        error = relative_error(w[:256], fmt, method)
        print(f"{fmt:8}{first:9.2f}{alone:19.0f}{together:13.0f}{together * 4:18.0f}{error:10.5f}")


if __name__ == "__main__":
    main()
