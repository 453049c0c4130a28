"""Perplexity of files by each method, in edgeq and in llama.cpp: the same file, the same figure.

    python tests/bench/methods.py SRC TEXT CALIBRATION --peer-python PYTHON [-t RECIPE ...]

SRC is a checkpoint folder, PYTHON an interpreter with llama-cpp-python. CALIBRATION is a text for
the importance matrix and the Hessians of the methods that want them; not the one to measure on.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgeq import calibration, load, quantizers
from edgeq.calibration import Settings
from edgeq.choosing import Target
from edgeq.evaluate import evaluate, tokens, windows
from edgeq.pipeline import run

RECIPES = ["Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "IQ4_NL"]  # of each value family one

THEIRS = """
import math, sys
import numpy
from llama_cpp import Llama
path, ids, threads = sys.argv[1], numpy.load(sys.argv[2]), int(sys.argv[3])
ctx = ids.shape[1]
settings = {"n_threads": threads, "n_threads_batch": threads, "logits_all": True}
model = Llama(path, n_ctx=ctx, n_batch=ctx, flash_attn=True, verbose=False, **settings)
total = count = 0
for window in ids:
    model.reset()
    model.eval(window.tolist())
    logits = model.scores[ctx // 2 : ctx - 1].astype(numpy.float64)
    logits -= logits.max(1, keepdims=True)
    targets = window[ctx // 2 + 1 :]
    chosen = logits[numpy.arange(len(targets)), targets]
    total += (numpy.log(numpy.exp(logits).sum(1)) - chosen).sum()
    count += len(targets)
print(math.exp(total / count))
"""


def settings(method: str, imatrix: Path, hessians: Path) -> dict[str, Path]:
    """What a method is given, as `edgeq.pipeline.run` takes it."""
    need = quantizers.needs(method)
    if need == "hessian":
        return {"hessians": hessians}
    return {"importance": imatrix} if need == "importance" else {}


def files(source: Path, folder: Path, text: Path, recipes: list[str], ctx: int) -> Iterator[Path]:
    """One file after the other, of all methods; calibrated on a text."""
    imatrix, hessians = folder / "imatrix.gguf", folder / "hessian.gguf"
    calibration.run(source, text, imatrix, Settings(ctx=ctx, hessians=True), hessian_out=hessians)
    for method in quantizers.available():
        for recipe in recipes:
            given = settings(method, imatrix, hessians)
            yield run(
                source, folder / f"{method}-{recipe}.gguf", recipe, method=method, **given
            ).path
    for name, wanted in ("3.5bpw", Target(3.5)), ("3.5bpw-outliers", Target(3.5, outliers=True)):
        yield run(source, folder / f"{name}.gguf", importance=imatrix, target=wanted).path


def main() -> None:
    """Print one row of a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("-t", "--types", nargs="+", default=RECIPES)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("-c", "--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    print("| file | llama.cpp | edgeq | |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder, ids = Path(name), Path(name) / "ids.npy"
        for path in files(args.source, folder, args.calibration, args.types, args.ctx):
            with load(path, ctx=args.ctx) as model:
                found, bos = tokens(model, text, args.ctx)
                np.save(ids, [w for w, _ in windows(found, args.ctx, bos)][: args.chunks])
                own = evaluate(model, text, args.ctx, chunks=args.chunks).perplexity.value
                threads = str(model.threads)
            command = [args.peer_python, "-c", THEIRS, str(path), str(ids), threads]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            other = float(done.stdout)
            change = 100 * (own / other - 1)
            print(f"| {path.stem} | {other:.4f} | {own:.4f} | {change:+.3f} % |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
