"""Speed of a model on this machine, in llama-bench's terms: pp512 reads, tg128 generates."""

import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from edgeq import memory
from edgeq.engine import Model, cores, load
from edgeq.errors import RequestError
from edgeq.limits import measured

__all__ = ["GEN", "PROMPT", "Row", "run"]

PROMPT, GEN = 512, 128  # tokens; llama-bench's defaults
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One test; names and units as in llama-bench's JSON (nanoseconds, tokens per second).

    The last three are edgeq's own: memory, and the distance to the machine's limit.
    """

    cpu_info: str
    backends: str  # instruction set
    model_filename: str
    model_type: str
    model_size: int  # bytes of all tensors
    model_n_params: int
    n_threads: int
    type_k: str
    type_v: str
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    samples_ts: list[float]
    peak_rss: int  # bytes of memory this process has used at most
    rate: float  # generation: GB/s of weights read; prompts: GMAC/s
    limit: float  # the same for this machine at its best, see edgeq.limits


def run(
    path: str | Path,
    *,
    prompts: Iterable[int] | None = None,
    gens: Iterable[int] | None = None,
    threads: int | None = None,
    reps: int = 5,
    depth: int = 0,
    kv: str | tuple[str, str] = "f16",
    progress: Progress | None = None,
    on_compile: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Measure each prompt length and each generation length; one warm-up each, not counted.

    prompts, gens: lengths in tokens; by default PROMPT and GEN, or what the model's context holds.
    depth: tokens in the KV cache before. kv: as `edgeq.load` takes it. Sampling and tokenizing are
    not timed.

    Raises RequestError when a test does not fit the model's context, or for kv.
    """
    context = _context(path)
    room = max(context - depth, 1)
    prompts = [min(PROMPT, room)] if prompts is None else prompts
    gens = [min(GEN, room)] if gens is None else gens
    tests = [(n, 0) for n in prompts] + [(0, n) for n in gens]
    if not tests:
        raise RequestError("bench: no tests: expected a prompt or a generation length")
    need = depth + max(max(test) for test in tests)
    if need > context:
        raise RequestError(
            f"{path}: context length {context}: a test of {need} tokens does not fit: "
            "use smaller -p, -n or -d"
        )
    with load(path, threads=threads, ctx=need, kv=kv, on_compile=on_compile) as model:
        rows = [_measure(model, *test, depth, reps, progress) for test in tests]
    # Last, since measuring the limits takes memory of its own.
    limits = measured(rows[0].n_threads, cores())
    return [
        replace(row, limit=limits.dot_gmacs if row.n_prompt else limits.read_gbs) for row in rows
    ]


def _context(path: str | Path) -> int:
    """The longest context of the model, in tokens."""
    from edgeq import models
    from edgeq.gguf import open_gguf

    with open_gguf(path) as gguf:
        return models.find(gguf.get("general.architecture", str)).arch(gguf).context_length


def _measure(
    model: Model, prompt: int, gen: int, depth: int, reps: int, progress: Progress | None
) -> Row:
    ids = np.random.default_rng(0).integers(0, model.arch.vocab_size, depth + prompt + gen).tolist()
    name, samples = f"pp{prompt}" if prompt else f"tg{gen}", []
    for i in range(reps + 1):
        if progress:
            progress(f"{name}: {'warm-up' if not i else f'run {i} of {reps}'}")
        model.reset()
        model.feed(ids[:depth])
        start = perf_counter_ns()
        for part in _parts(ids[depth:], 1 if gen else max(prompt, 1)):
            model.feed(part, logits=True)
        samples.append(perf_counter_ns() - start)
    return _row(model, prompt, gen, depth, samples[1:])


def _parts(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for i in range(0, len(ids), size):
        yield ids[i : i + size]


def _row(model: Model, prompt: int, gen: int, depth: int, samples: list[int]) -> Row:
    rates = [(prompt + gen) * 1e9 / ns for ns in samples]

    def spread(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    cost = model.macs_per_token if prompt else model.bytes_per_token
    return Row(
        **_facts(model),
        n_prompt=prompt,
        n_gen=gen,
        n_depth=depth,
        test_time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        avg_ns=int(statistics.mean(samples)),
        stddev_ns=int(spread(samples)),
        avg_ts=statistics.mean(rates),
        stddev_ts=spread(rates),
        samples_ns=samples,
        samples_ts=rates,
        peak_rss=memory.peak(),
        rate=statistics.mean(rates) * cost / 1e9,
        limit=0.0,
    )


def _facts(model: Model) -> dict[str, Any]:
    """What is the same for all tests of a model."""
    gguf = model.gguf
    name = gguf.metadata.get("general.name") or gguf.path.stem
    return {
        "cpu_info": _cpu(),
        "backends": model.isa,
        "model_filename": str(gguf.path),
        "model_type": str(name),
        "model_size": sum(t.nbytes for t in gguf.tensors.values()),
        "model_n_params": sum(int(np.prod(t.shape)) for t in gguf.tensors.values()),
        "n_threads": model.threads,
        "type_k": model.kv_types[0],
        "type_v": model.kv_types[1],
    }


def _cpu() -> str:
    """Name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
