"""What the inner loops cost by their assembly: instructions, and cycles by llvm-mca.

    python tests/bench/assembly.py [--isa avx2] [--cpu znver4] [--mca llvm-mca-19] [FORMAT...]

row: one row times one column; panel: R rows times TILE_COLS columns. A loop may do several steps:
figures are per 256 weights (and row and column). --show prints the loops. llvm-mca is part of LLVM;
without it only instructions are counted.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernelkit as kit

from edgeq import blocks
from edgeq.kernels import isa as isas
from edgeq.kernels.dot import Column, Reader, row_dots
from edgeq.kernels.llvm import Emit, Value
from edgeq.kernels.tile import quant_tile

LOOP = re.compile(r"^(\.LBB\w+):(?:(?!^\.LBB).)*?\tj\w+\t\1$", re.DOTALL | re.MULTILINE)


def loops(fmt: blocks.BlockFormat, isa: ModuleType, kind: str) -> list[str]:
    """Assembly of the innermost loops."""

    def row(e: Emit, w: Value, x: Value, xd: Value, xs: Value, cols: Value) -> Value:
        column = Column(*(e.pointer(p) for p in (x, xd, xs)))
        return row_dots(e, fmt, Reader(e.pointer(w), e.i64(8192)), [column], cols)[0]

    def panel(e: Emit, *args: Value) -> None:
        *places, cols, out = args
        quant_tile(e, fmt, *(e.pointer(p) for p in places), cols, e.pointer(out))

    emit, arguments = (row, "iiiii") if kind == "row" else (panel, "i" * 8)
    machine = kit.host_machine(isa)
    module = kit.optimized(kit.build(emit, arguments, isa, kind == "row"), machine)
    return [m.group(0) for m in LOOP.finditer(str(machine.emit_assembly(module)))]


def weights(loop: str, isa: ModuleType) -> float:
    """Weights (times rows and columns) that one pass of a loop multiplies."""
    dots = len(re.findall(r"\tvpdpbusd|\tvpmaddubsw|\tsdot", loop))
    return dots * isa.WIDTH


def cycles(loop: str, tool: str, cpu: str) -> float:
    """Cycles of a pass in the long run."""
    lines = [line for line in loop.splitlines()[1:] if not line.lstrip().startswith((".", "#"))]
    done = subprocess.run(
        [tool, f"-mcpu={cpu}", "-iterations=200"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert total
    return int(total[1]) / 200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("formats", nargs="*", default=kit.FORMATS)
    parser.add_argument("--isa", default=isas.choose().NAME)
    parser.add_argument("--cpu", default="native")
    parser.add_argument("--mca", default="llvm-mca")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    isa, tool = isas.modules()[args.isa], shutil.which(args.mca)
    print("| format | loop | instructions per 256 | cycles per 256 |\n|---|---|---:|---:|")
    for name in args.formats:
        fmt = blocks.get(name)
        for kind in ("row", "panel") if fmt.block > 1 else ():
            found = [(weights(loop, isa), loop) for loop in loops(fmt, isa, kind)]
            done, loop = max(found)
            if args.show:
                print(loop)
            count = len(re.findall(r"^\t[a-z]", loop, re.MULTILINE)) * 256 / done
            cost = f"{cycles(loop, tool, args.cpu) * 256 / done:.2f}" if tool else "-"
            print(f"| {name} | {kind} | {count:.1f} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
