"""Speed of a model on this machine, in llama-bench's terms: pp512 reads, tg128 generates."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeq import cpus, machine, memory, sensors
from edgeq.checks import whole
from edgeq.engine import Model, load
from edgeq.errors import RequestError
from edgeq.limits import measured

__all__ = ["GEN", "PROMPT", "Plan", "Row", "run"]

PROMPT, GEN = 512, 128  # tokens; llama-bench's defaults
WARM_UP = 4  # generated tokens before those that count
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure: for each model, thread count and depth, all prompts, then all generations.

    prompts, gens: lengths in tokens; by default PROMPT and GEN, or what the model's context holds.
    depths: tokens in the KV cache before. threads: None = the model's default. threads_batch: those
    of prompts, None = as threads. delay: seconds to rest before each test. kv: types
    of the KV cache, as `edgeq.load` takes them.
    """

    prompts: Sequence[int] | None = None
    gens: Sequence[int] | None = None
    depths: Sequence[int] = (0,)
    threads: Sequence[int | None] = (None,)
    threads_batch: Sequence[int | None] = (None,)
    reps: int = 5
    warm_up: bool = True
    delay: float = 0
    kv: tuple[str, str] = ("f16", "f16")

    def tests(self, context: int) -> list["Test"]:
        """Tests for a model with this context, at each depth."""
        found = []
        for depth in self.depths:
            room = max(context - depth, 1)
            prompts = [min(PROMPT, room)] if self.prompts is None else self.prompts
            gens = [min(GEN, room)] if self.gens is None else self.gens
            found += [Test(depth, n, 0) for n in prompts] + [Test(depth, 0, n) for n in gens]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Test:
    """One length, read or generated after `depth` tokens."""

    depth: int
    prompt: int
    gen: int

    @property
    def size(self) -> int:
        """Tokens in the cache in the end."""
        return self.depth + self.prompt + self.gen

    def __str__(self) -> str:
        kind = f"pp{self.prompt}" if self.prompt else f"tg{self.gen}"
        return f"{kind} @ d{self.depth}" if self.depth else kind


@dataclass(frozen=True)
class Row:
    """One test; names and units as in llama-bench's JSON (nanoseconds, tokens per second).

    From peak_rss on they are edgeq's own: memory, the distance to the machine's limit, and what its
    sensors said, None where there are none (edgeq.sensors).
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
    # Bytes of memory this process has used at most since the model was opened, off Linux since it
    # started, and so while limits were measured.
    peak_rss: int
    rate: float  # generation: GB/s of weights read; prompts: GMAC/s
    limit: float  # the same for this machine at its best, see edgeq.limits
    max_celsius: float | None = None
    mean_mhz: float | None = None  # of as many CPUs as there are threads
    throttled: bool | None = None  # whether the machine held its CPU back
    throttled_by: str = ""  # and why
    joules_per_token: float | None = None
    power_from: str = ""  # what these joules are counted of


def run(
    paths: Iterable[str | Path],
    plan: Plan,
    *,
    progress: Progress | None = None,
    on_compile: Callable[[str, int, int], None] | None = None,
) -> Iterator[Row]:
    """Measure each model; rows come as they are done. Sampling and tokenizing are not timed.

    What is in the KV cache before a test is read once for all tests and repetitions that share it.

    Raises RequestError when there is nothing to measure or a test does not fit a model's context,
    or for kv.
    """
    for count in (*plan.threads, *plan.threads_batch):
        whole("threads", 1 if count is None else count, 1, 256)
    tests = {path: _fitting(path, plan) for path in paths}
    for path in tests:
        few, many = _usual(path) if None in plan.threads else (1, 1)
        done: set[tuple[Test, int]] = set()
        for t, tb in itertools.product(plan.threads, plan.threads_batch):
            threads = t or few
            batch = tb or t or many
            # With lists of both, each test depends on one of them only.
            todo = {test: batch if test.prompt else threads for test in tests[path]}
            todo = {test: count for test, count in todo.items() if (test, count) not in done}
            if todo:
                done.update(todo.items())
                options = {"threads": threads, "threads_batch": batch, "on_compile": on_compile}
                yield from _series(path, todo, plan, progress, options)


def _usual(path: str | Path) -> tuple[int, int]:
    """Threads that a model generates and reads prompts with, where nobody says how many."""
    from edgeq import models, rates
    from edgeq.gguf import open_gguf
    from edgeq.models import weights

    with open_gguf(path) as gguf:
        return rates.threads(weights.bind(gguf, models.arch_of(gguf)).matrices, cpus.find())


def _fitting(path: str | Path, plan: Plan) -> list[Test]:
    """The tests for a model; all fit its context."""
    from edgeq import models
    from edgeq.gguf import open_gguf

    with open_gguf(path) as gguf:
        context = models.arch_of(gguf).context_length
    tests = plan.tests(context)
    if not tests:
        raise RequestError("bench: no tests: expected a prompt or a generation length")
    need = max(test.size for test in tests)
    if need > context:
        raise RequestError(
            f"{path}: context length {context}: a test of {need} tokens does not fit: "
            "use smaller -p, -n or -d"
        )
    return tests


def _series(
    path: str | Path,
    tests: dict[Test, int],
    plan: Plan,
    progress: Progress | None,
    options: dict[str, Any],
) -> Iterator[Row]:
    """All tests of a model with certain thread counts."""
    usable = cpus.find().usable
    # First, since measuring the limits takes memory of its own.
    limits = {count: measured(count, usable) for count in dict.fromkeys(tests.values())}
    memory.restart_peak()
    need = max(test.size for test in tests)
    with load(path, ctx=need, kv=plan.kv, **options) as model:
        ids = np.random.default_rng(0).integers(0, model.arch.vocab_size, need).tolist()
        felt = sensors.Sensors()
        for test, threads in tests.items():
            time.sleep(plan.delay)
            report = partial(_report, progress, f"{model.gguf.path.name}: {test}")
            if plan.warm_up:
                report("warm-up")
                _once(model, test, ids, WARM_UP)
            _fill(model, test, ids)
            with sensors.Watch(felt) as watch:
                samples = []
                for i in range(plan.reps):
                    report(f"run {i + 1} of {plan.reps}")
                    samples.append(_once(model, test, ids))
            best = limits[threads]
            limit = best.dot_gmacs if test.prompt else best.read_gbs
            speeds = _speeds(model, test, samples) | {"limit": limit}
            tokens = len(samples) * (test.prompt + test.gen)
            yield Row(**_facts(model, threads), **speeds, **_felt(watch.summary(threads), tokens))


def _report(progress: Progress | None, what: str, doing: str) -> None:
    if progress:
        progress(f"{what}: {doing}")


def _fill(model: Model, test: Test, ids: list[int]) -> None:
    """Tokens before the test, as far as they are not in the cache."""
    model.rewind(test.depth)
    model.feed(ids[len(model.seen) : test.depth])


def _once(model: Model, test: Test, ids: list[int], most: int | None = None) -> int:
    """Nanoseconds of one repetition; most: tokens of a generation."""
    _fill(model, test, ids)
    new = ids[test.depth : test.size][: None if test.prompt else most]
    start = time.perf_counter_ns()
    for part in _parts(new, test.prompt or 1):
        model.feed(part, logits=True)
    return time.perf_counter_ns() - start


def _parts(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for i in range(0, len(ids), size):
        yield ids[i : i + size]


def _speeds(model: Model, test: Test, samples: list[int]) -> dict[str, Any]:
    rates = [(test.prompt + test.gen) * 1e9 / ns for ns in samples]

    def spread(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    cost = model.macs_per_token if test.prompt else model.bytes_per_token
    return {
        "n_prompt": test.prompt,
        "n_gen": test.gen,
        "n_depth": test.depth,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": int(statistics.mean(samples)),
        "stddev_ns": int(spread(samples)),
        "avg_ts": statistics.mean(rates),
        "stddev_ts": spread(rates),
        "samples_ns": samples,
        "samples_ts": rates,
        "peak_rss": memory.peak(),
        "rate": statistics.mean(rates) * cost / 1e9,
    }


def _felt(found: sensors.Summary, tokens: int) -> dict[str, Any]:
    """What the sensors said while so many tokens were read or generated."""
    facts = asdict(found)
    joules = facts.pop("joules")
    return facts | {"joules_per_token": None if joules is None else joules / tokens}


def _facts(model: Model, threads: int) -> dict[str, Any]:
    """What is the same for all tests of a model with so many threads."""
    gguf = model.gguf
    name = gguf.metadata.get("general.name") or gguf.path.stem
    return {
        "cpu_info": machine.look().processor,
        "backends": model.isa,
        "model_filename": str(gguf.path),
        "model_type": str(name),
        "model_size": sum(t.nbytes for t in gguf.tensors.values()),
        "model_n_params": sum(int(np.prod(t.shape)) for t in gguf.tensors.values()),
        "n_threads": threads,
        "type_k": model.kv_types[0],
        "type_v": model.kv_types[1],
    }
