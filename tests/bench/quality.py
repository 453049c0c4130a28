"""KL divergence of files by recipe, beside llama-quantize's: both measured by the same engine.

    python tests/bench/quality.py SRC TEXT --peer-python PYTHON [--imatrix FILE] [--fit]
        [-t RECIPE ...]

SRC is a checkpoint folder, PYTHON an interpreter with llama-cpp-python. Files of both programs are
read by edgeq together with the F32 model, window by window of TEXT, so the figures differ by what
the files hold and nothing else. With --fit edgeq makes a recipe of its own, for the size of
llama-quantize's file.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edgeq import convert, imatrix, load
from edgeq.choosing import Target
from edgeq.evaluate import evaluate_all
from edgeq.pipeline import run

RECIPES = [
    "Q8_0",
    "Q6_K",
    "Q5_1",
    "Q5_K_M",
    "Q5_0",
    "Q5_K_S",
    "Q4_1",
    "Q4_K_M",
    "Q4_K_S",
    "IQ4_NL",
    "Q4_0",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
]

THEIRS = """
import ctypes, sys
import llama_cpp, numpy
src, out, recipe, weights = sys.argv[1:]
names = {name.removeprefix("LLAMA_FTYPE_MOSTLY_"): name for name in dir(llama_cpp)}
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, names[recipe])
class Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]
if weights:
    arrays = {k: numpy.ascontiguousarray(v, "f4") for k, v in numpy.load(weights).items()}
    table = (Entry * (len(arrays) + 1))(
        *(Entry(k.encode(), v.ctypes.data, v.size) for k, v in arrays.items())
    )
    kind = dict(settings._fields_)["imatrix"]
    settings.imatrix = ctypes.cast(table, kind)
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
assert not llama_cpp.llama_model_quantize(src.encode(), out.encode(), ctypes.byref(settings))
"""


def divergences(reference: Path, files: list[Path], text: str, ctx: int) -> list[float]:
    """Mean KL divergence of some files from the reference."""
    with ExitStack() as stack:
        base, *models = (stack.enter_context(load(file, ctx=ctx)) for file in (reference, *files))
        found = evaluate_all(models, text, ctx, reference=base)
        return [one.divergence.kld.value for one in found if one.divergence]


def main() -> None:
    """Print one row of a table for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-t", "--types", nargs="+", default=RECIPES)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("-c", "--ctx", type=int, default=256)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    print("| recipe | MiB | llama-quantize | edgeq | |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = convert(args.source, folder / "F32.gguf", "F32")
        weights = ""
        if args.imatrix:
            weights = str(folder / "weights.npz")
            np.savez(weights, **imatrix.read(args.imatrix).importance())
        for recipe in args.types:
            ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
            command = [args.peer_python, "-c", THEIRS, str(reference), str(theirs), recipe, weights]
            subprocess.run(command, check=True, stdout=sys.stderr)
            how: dict[str, Any] = {"recipe": recipe}
            if args.fit:
                how = {"target": Target(size=theirs.stat().st_size)}
            run(args.source, ours, importance=args.imatrix, force=True, **how)
            other, own = divergences(reference, [theirs, ours], text, args.ctx)
            size = ours.stat().st_size / 2**20
            change = 100 * (own / other - 1)
            print(
                f"| {recipe} | {size:.2f} | {other:.6f} | {own:.6f} | {change:+.1f} % |", flush=True
            )


if __name__ == "__main__":
    main()
