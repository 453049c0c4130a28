"""Speed beside llama.cpp on the same files, threads and machine.

    python tests/bench/peers.py MODEL.gguf... --peer-python PYTHON [--threads 2] [--rounds 3]

PYTHON is an interpreter with llama-cpp-python, compiled for this CPU (`pip install
llama-cpp-python`). Both engines take turns in processes of their own; medians of all rounds are
compared, llama.cpp with the better of flash attention on and off.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[list[int]], None]  # evaluate ids after what is in the KV cache


def edgeq_engine(path: str, threads: int, context: int) -> tuple[Run, Callable[[], None]]:
    import edgeq

    model = edgeq.load(path, threads=threads, ctx=context)

    def feed(ids: list[int]) -> None:
        model.feed(ids, logits=True)

    return feed, model.reset


def llama_engine(
    path: str, threads: int, context: int, flash: bool
) -> tuple[Run, Callable[[], None]]:
    from llama_cpp import Llama

    model = Llama(
        path,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        n_ubatch=512,
        flash_attn=flash,
        verbose=False,
    )
    return model.eval, model.reset


def worker(engine: str, path: str, threads: int, prompt: int, gen: int) -> dict[str, Any]:
    """One engine, one warm-up, one measurement of each kind."""
    context = prompt + gen + 16
    if engine == "edgeq":
        feed, reset = edgeq_engine(path, threads, context)
    else:
        feed, reset = llama_engine(path, threads, context, engine.endswith("+fa"))
    ids = [300 + 7 * i % 30000 for i in range(prompt)]
    out = {}
    for kind, parts in (("pp", [ids]), ("tg", [[i] for i in ids[:gen]])):
        for _ in range(2):  # the first one warms up
            reset()
            if kind == "tg":
                feed([1])
            start = time.perf_counter()
            for part in parts:
                feed(part)
            out[kind] = sum(map(len, parts)) / (time.perf_counter() - start)
    out["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def measure(python: str, engine: str, path: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [python, __file__, "--worker", engine, path, f"--threads={args.threads}"]
    command += [f"--prompt={args.prompt}", f"--gen={args.gen}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if engine != "edgeq":
        env.pop("PYTHONPATH")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: str, args: argparse.Namespace) -> str:
    """A row of the table."""
    engines = {"edgeq": sys.executable, "llama": args.peer_python, "llama+fa": args.peer_python}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, python in engines.items():
            samples[name].append(measure(python, name, path, args))

    def median(name: str, key: str) -> float:
        return statistics.median(s[key] for s in samples[name])

    cells = [Path(path).stem, f"{Path(path).stat().st_size / 2**20:.0f}"]
    for kind in ("pp", "tg"):
        ours = median("edgeq", kind)
        theirs = max(median("llama", kind), median("llama+fa", kind))
        cells += [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
    cells += [f"{median('edgeq', 'rss'):.0f}", f"{median('llama+fa', 'rss'):.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--peer-python")
    parser.add_argument("--worker")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    args = parser.parse_args()
    if args.worker:
        model = args.models[0]
        print(json.dumps(worker(args.worker, model, args.threads, args.prompt, args.gen)))
        return
    tests = [f"pp{args.prompt}", f"tg{args.gen}"]
    columns = ["file", "MiB", *(c for t in tests for c in (f"{t} edgeq", "llama.cpp", "ratio"))]
    columns += ["peak MiB edgeq", "llama.cpp"]
    print("| " + " | ".join(columns) + " |\n|---" + "|---:" * (len(columns) - 1) + "|")
    for model in args.models:
        print(compare(model, args), flush=True)


if __name__ == "__main__":
    main()
