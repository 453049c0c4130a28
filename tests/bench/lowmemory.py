"""Peak memory of answering with a small model: `python tests/bench/lowmemory.py MODEL.gguf
[--limit 400] [--peer-python PYTHON]`.

cold: the first start on a machine, kernels are compiled. warm: the next one. llama.cpp: the same
prompt through llama-cpp-python, of interpreter PYTHON. Each is run as a user would, and the
processes it starts count: `peak` is the largest sum of their memory at one time, pages that they
share counted once (PSS); `processes` the largest peaks of single ones (RSS).

Where this process may make memory cgroups (as root; version 1 or 2), each runs in one of LIMIT MB,
no swap, in which pages of files count as well: passing it proves that a board with little more is
enough.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROMPT, PREDICT = "once upon a time there was a model that fitted into a small board ", 32
CGROUPS = Path("/sys/fs/cgroup")
MB = 1_000_000
LLAMA = """
import sys, llama_cpp
path, context, threads, prompt, n = sys.argv[1:]
model = llama_cpp.Llama(path, n_ctx=int(context), n_threads=int(threads), verbose=False)
print(model(prompt, max_tokens=int(n), temperature=0)["choices"][0]["text"])
"""


@contextlib.contextmanager
def cage(limit: int) -> Iterator[Path | None]:
    """A memory cgroup of `limit` bytes, where one can be made."""
    if (CGROUPS / "cgroup.controllers").exists():  # version 2, where swap is counted apart
        place, most, swap = CGROUPS, "memory.max", ("memory.swap.max", 0)
    else:
        place, most, swap = (
            CGROUPS / "memory",
            "memory.limit_in_bytes",
            ("memory.memsw.limit_in_bytes", limit),
        )
    place /= f"edgeq-{os.getpid()}"
    try:
        place.mkdir()
    except OSError:
        yield None
        return
    try:
        limited = (place / most).exists()  # else this controller is not on in this tree
        if limited:
            (place / most).write_text(str(limit))
            with contextlib.suppress(OSError):  # a kernel without accounting of swap
                (place / swap[0]).write_text(str(swap[1]))
        yield place if limited else None
    finally:
        place.rmdir()


def measure(command: list[str], env: dict[str, str], limit: int) -> dict[str, object]:
    """Run a command and watch it and what it starts."""
    with cage(limit) as place, tempfile.TemporaryFile("w+") as said:

        def enter() -> None:
            if place:
                (place / "cgroup.procs").write_text(str(os.getpid()))

        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=enter
        )
        peak, each = watch(process)
        seconds = time.perf_counter() - start
        said.seek(0)
        return {
            "code": process.returncode,
            "seconds": seconds,
            "peak": peak,
            "each": sorted(each.values(), reverse=True)[:4],
            "limited": place is not None,
            "said": said.read().strip().rpartition("\n")[2],
        }


def watch(process: subprocess.Popen[bytes]) -> tuple[int, dict[int, int]]:
    """(largest sum of proportional bytes at one time, peak by process) until it ends."""
    peak, each, main = 0, {}, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error):
            for one in [main, *main.children(recursive=True)]:
                with contextlib.suppress(psutil.Error, OSError, IndexError):
                    total += kilobytes(one.pid, "smaps_rollup", "Pss:")
                    each[one.pid] = kilobytes(one.pid, "status", "VmHWM:")
        peak = max(peak, total)
        time.sleep(0.005)
    return peak, each


def kilobytes(process: int, file: str, key: str) -> int:
    """A value of a file in /proc, in bytes."""
    return int(Path(f"/proc/{process}/{file}").read_text().split(key)[1].split()[0]) * 1024


def main() -> None:
    """Run everything, print a line each; exit code 1 when something of ours exceeds the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=int, default=400, help="MB")
    parser.add_argument("-c", "--ctx", type=int, default=2048)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--peer-python")
    args = parser.parse_args()
    numbers = ["-n", str(PREDICT), "-c", str(args.ctx), "-t", str(args.threads)]
    run = [sys.executable, "-m", "edgeq", "run", str(args.model), PROMPT, *numbers, "--temp", "0"]
    cache = tempfile.mkdtemp()
    env = {**os.environ, "EDGEQ_CACHE": cache}
    cases = [("edgeq cold", run), ("edgeq warm", run)]
    if args.peer_python:
        facts = [str(args.model), str(args.ctx), str(args.threads), PROMPT, str(PREDICT)]
        cases.append(("llama.cpp", [args.peer_python, "-c", LLAMA, *facts]))
    failed = False
    print(f"{args.model.name}: {args.model.stat().st_size / MB:.0f} MB, context {args.ctx}")
    try:
        for name, command in cases:
            found = measure(command, env, args.limit * MB)
            fits = found["code"] == 0 and found["peak"] <= args.limit * MB
            failed |= not fits and name != "llama.cpp"
            sizes = " + ".join(f"{size / MB:.0f}" for size in found["each"])
            cage_said = f"in a cgroup of {args.limit} MB" if found["limited"] else "no cgroup"
            print(
                f"{name:10}  peak {found['peak'] / MB:4.0f} MB  processes {sizes}  "
                f"{found['seconds']:5.1f} s  {'fits' if fits else 'FAILS'} ({cage_said}, "
                f"exit {found['code']})\n            {found['said']}"
            )
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
