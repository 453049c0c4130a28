"""Speed beside llama.cpp on the same files, threads and machine.

    python tests/bench/peers.py MODEL.gguf... --peer-python PYTHON [--rounds 5]

PYTHON is an interpreter with llama-cpp-python, compiled for this CPU (`pip install
llama-cpp-python`). Each engine loads the file once, in a process of its own that sleeps while
others are measured; in each round they take turns, test by test, and the machine's limits are
measured as well. Shown: each engine's median; the median of the rounds' ratios to llama.cpp, with
flash attention on or off, whichever has the better median; our share of the machine's limits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WARM_UP, PAUSE = 8, 0.05  # generated tokens; seconds in which the last engine's threads fall asleep
ENGINES = ("edgeq", "llama", "llama+fa")


# -- a worker: one engine, measured on demand ------------------------------------------------------
class Edgeq:
    """Our engine; like Llama, it evaluates ids after the first `depth` ones of its cache."""

    def __init__(self, path: str, threads: int, context: int, kv: str) -> None:
        import edgeq

        self.model = edgeq.load(path, threads=threads, ctx=context, kv=kv)
        self.facts = {
            "macs": self.model.macs_per_token,
            "bytes": self.model.bytes_per_token,
            "isa": self.model.isa,
        }

    def rewind(self, depth: int) -> None:
        self.model.rewind(depth)

    def feed(self, ids: list[int]) -> None:
        self.model.feed(ids, logits=True)


class Llama:
    """llama.cpp with the settings that are its best: see --help of llama-bench."""

    facts: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, path: str, threads: int, context: int, flash: bool) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            n_ubatch=512,
            flash_attn=flash,
            verbose=False,
        )

    def rewind(self, depth: int) -> None:
        self.model.n_tokens = depth  # eval drops what is behind

    def feed(self, ids: list[int]) -> None:
        self.model.eval(ids)


def work(engine: str, path: str, args: argparse.Namespace) -> None:
    """Answer each line "pp" or "tg" on stdin with a line of JSON on stdout."""
    context = args.depth + max(args.prompt, args.gen) + 16
    if engine == "edgeq":
        model: Edgeq | Llama = Edgeq(path, args.threads, context, args.kv)
    else:
        model = Llama(path, args.threads, context, engine.endswith("+fa"))
    ids = [300 + 7 * i % 30000 for i in range(context)]
    behind = {"pp": args.depth, "tg": max(args.depth, 1)}  # tokens before a test: all begin as ids
    for first in range(0, behind["tg"], 512):
        model.feed(ids[first : min(first + 512, behind["tg"])])
    parts = {"pp": [ids[: args.prompt]], "tg": [[i] for i in ids[: args.gen]]}

    def measure(test: str, count: int) -> float:
        model.rewind(behind[test])
        start = time.perf_counter()
        for part in parts[test][:count]:
            model.feed(part)
        return sum(map(len, parts[test][:count])) / (time.perf_counter() - start)

    for test in ("pp", "tg"):
        measure(test, WARM_UP)
    print(json.dumps(model.facts), flush=True)
    for line in sys.stdin:
        speed = measure(line.strip(), args.gen)
        print(json.dumps({"speed": speed, "rss": peak()}), flush=True)


def peak() -> float:
    """Most MiB that this process has held (getrusage would count the one that started it)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# -- the comparison --------------------------------------------------------------------------------
class Worker:
    """A process with one engine."""

    def __init__(self, engine: str, path: str, args: argparse.Namespace) -> None:
        ours = engine == "edgeq"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if not ours:
            env.pop("PYTHONPATH")
        flags = [
            f"--{key}={getattr(args, key)}" for key in ("threads", "prompt", "gen", "depth", "kv")
        ]
        python = sys.executable if ours else args.peer_python
        self.process = subprocess.Popen(
            [python, __file__, path, "--worker", engine, *flags],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if ours else subprocess.DEVNULL,
            text=True,
        )
        self.facts = self._answer(engine)

    def _answer(self, what: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{what}: the worker ended with exit code {self.process.wait()}")
        return dict(json.loads(line))

    def measure(self, test: str) -> dict[str, float]:
        assert self.process.stdin is not None
        time.sleep(PAUSE)
        print(test, file=self.process.stdin, flush=True)
        return self._answer(test)

    def close(self) -> None:
        self.process.communicate()


def rounds(path: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Per round: speeds[test][engine], peak MiB of each engine, limits of the machine."""
    from edgeq import cpus, limits

    usable = cpus.find().usable
    with ExitStack() as stack:
        workers = {}
        for name in ENGINES:
            workers[name] = Worker(name, path, args)
            stack.callback(workers[name].close)
        for i in range(args.rounds):
            order = ENGINES[i % 3 :] + ENGINES[: i % 3]  # nobody always follows the same one
            answers = {t: {name: workers[name].measure(t) for name in order} for t in ("pp", "tg")}
            best = limits.measure(args.threads, usable)
            yield {
                "speeds": {t: {n: a["speed"] for n, a in s.items()} for t, s in answers.items()},
                "rss": {name: answer["rss"] for name, answer in answers["tg"].items()},
                "limits": {"pp": best.dot_gmacs, "tg": best.read_gbs},
                "facts": workers["edgeq"].facts,
            }


def compare(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, for JSON and the table."""
    found = []
    for i, measured in enumerate(rounds(path, args)):
        found.append(measured)
        if sys.stderr.isatty():
            print(f"\r{Path(path).name}: round {i + 1}/{args.rounds} ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)

    first = found[0]["facts"]
    out: dict[str, Any] = {"file": Path(path).stem, "MiB": Path(path).stat().st_size / 2**20}
    out |= {"isa": first["isa"], "threads": args.threads, "depth": args.depth}
    for test, cost in (("pp", first["macs"]), ("tg", first["bytes"])):
        speeds = [measured["speeds"][test] for measured in found]
        out[test] = summary(speeds, cost / 1e9, [measured["limits"][test] for measured in found])
    out["peak_MiB"] = {name: max(measured["rss"][name] for measured in found) for name in ENGINES}
    return out


def summary(speeds: list[dict[str, float]], cost: float, limits: list[float]) -> dict[str, Any]:
    """One test over the rounds; cost: what a token takes of the limit."""
    medians: dict[str, float] = {n: statistics.median(s[n] for s in speeds) for n in ENGINES}
    peer = max(ENGINES[1:], key=lambda name: medians[name])
    shares = [s["edgeq"] * cost / limit for s, limit in zip(speeds, limits)]
    return {
        **medians,
        "peer": peer,
        "ratio": statistics.median(s["edgeq"] / s[peer] for s in speeds),
        "limit": statistics.median(limits),
        "share": statistics.median(shares),
    }


def row(found: dict[str, Any]) -> str:
    cells = [found["file"], f"{found['MiB']:.0f}"]
    for test in ("pp", "tg"):
        t = found[test]
        cells += [f"{t['edgeq']:.1f}", f"{t[t['peer']]:.1f}", f"**{t['ratio']:.2f}**"]
        cells += [f"{t['share']:.0%}"]
    peaks = found["peak_MiB"]
    cells += [f"{peaks['edgeq']:.0f}", f"{min(peaks[name] for name in ENGINES[1:]):.0f}"]
    return "| " + " | ".join(cells) + " |"


def head(args: argparse.Namespace) -> str:
    behind = f" @ d{args.depth}" if args.depth else ""
    columns = ["file", "MiB"]
    for test, limit in ((f"pp{args.prompt}", "dot"), (f"tg{args.gen}", "read")):
        columns += [f"{test}{behind} edgeq", "llama.cpp", "ratio", f"of {limit} limit"]
    columns += ["peak MiB edgeq", "llama.cpp"]
    return "| " + " | ".join(columns) + " |\n|---" + "|---:" * (len(columns) - 1) + "|"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--peer-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="of all engines [one per performance core]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--depth", type=int, default=0, help="tokens in the cache before")
    parser.add_argument("--kv", default="f16", help="type of edgeq's KV cache")
    parser.add_argument("--isa", help="instruction set for edgeq, such as avx2")
    parser.add_argument("--json", action="store_true", help="all figures, one model per line")
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.models[0], args)
        return
    if not args.peer_python:
        parser.error("--peer-python: expected an interpreter with llama-cpp-python")
    if args.isa:
        os.environ["EDGEQ_ISA"] = args.isa  # also for the limits
    if not args.threads:
        from edgeq import cpus

        args.threads = cpus.find().threads
    if not args.json:
        print(head(args), flush=True)
    for model in args.models:
        found = compare(model, args)
        print(json.dumps(found) if args.json else row(found), flush=True)


if __name__ == "__main__":
    main()
