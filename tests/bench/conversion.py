"""Time and memory of whole conversions, beside llama-quantize where it is at hand.

    python tests/bench/tinyllama.py /tmp/tiny-F16.gguf F16
    python tests/bench/conversion.py /tmp/tiny-F16.gguf [--peer-python PYTHON] [RECIPE ...]

PYTHON is an interpreter with llama-cpp-python. Every conversion runs in a process of its own, ours
and theirs by turns. "CPU" adds the seconds of all threads, which other programs disturb less;
"peak" is the largest resident memory of the process, mapped files included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = ["Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K"]

OURS = """
import json, sys, time
from edgeq import convert, quantize
import numpy as np
src, out, recipe, threads = sys.argv[1:]
for fmt in ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0"):  # loads the compiled code
    quantize(np.ones((1, 256), np.float32), fmt)
start, busy = time.perf_counter(), time.process_time()
convert(src, out, recipe, threads=int(threads))
print(json.dumps([time.perf_counter() - start, time.process_time() - busy]))
"""

THEIRS = """
import ctypes, json, sys, time
import llama_cpp
src, out, recipe, threads = sys.argv[1:]
names = {name.removeprefix("LLAMA_FTYPE_MOSTLY_"): name for name in dir(llama_cpp)}
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = getattr(llama_cpp, names[recipe]), int(threads)
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
start, busy = time.perf_counter(), time.process_time()
assert not llama_cpp.llama_model_quantize(src.encode(), out.encode(), ctypes.byref(settings))
print(json.dumps([time.perf_counter() - start, time.process_time() - busy]))
"""


def measure(python: str, code: str, *args: str) -> tuple[float, float, float]:
    """Seconds and CPU seconds of the work itself, and the peak memory of its process in MB."""
    process = subprocess.Popen([python, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{python}: failed")
    unit = 1 if sys.platform == "darwin" else 1024
    seconds, busy = json.loads(said.splitlines()[-1])
    return seconds, busy, usage.ru_maxrss * unit / 1e6


def main() -> None:
    """Print one line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", help="GGUF file of floats, or a checkpoint folder without peer")
    parser.add_argument("recipes", nargs="*", default=RECIPES, help=f"default: {RECIPES}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer-python", help="interpreter with llama-cpp-python")
    args = parser.parse_args()
    columns = "  seconds    CPU  peak MB"
    print(f"{'recipe':9}{columns}" + f"   llama-quantize{columns}  ratio" * bool(args.peer_python))
    with tempfile.TemporaryDirectory(dir=Path(args.source).parent) as folder:
        for recipe in args.recipes:
            settings = args.source, f"{folder}/out.gguf", recipe, str(args.threads)
            ours = measure(sys.executable, OURS, *settings)
            Path(settings[1]).unlink()
            line = f"{recipe:9}" + "{:9.2f}{:7.1f}{:9.0f}".format(*ours)
            if args.peer_python:
                theirs = measure(args.peer_python, THEIRS, *settings)
                Path(settings[1]).unlink()
                line += " " * 17 + "{:9.2f}{:7.1f}{:9.0f}".format(*theirs)
                line += f"{theirs[0] / ours[0]:7.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
