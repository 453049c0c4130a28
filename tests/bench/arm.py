"""What the kernels cost on cores of Arm boards, by their assembly and llvm-mca (Debian: llvm-22).

    python tests/bench/arm.py [--core cortex-a76] [--format Q4_K] [--show row] [--json]
    python tests/bench/arm.py --write          # devices/cores/CORE.toml

Decoding: cycles per 256 weights of a row, against those in which the board's memory delivers them.
Prefill: multiply-adds per cycle of a tile, of 32 that two pipes with sdot do. Not modelled: caches,
memory latency, prefetching, mispredicted branches. --show prints a loop, and what llvm-mca has to
say about it with --timeline. Without llvm-mca only instructions are counted.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import armcode
from armboards import BOARDS, Board
from boards import PUBLISHED
from rich.console import Console
from rich.table import Table

from edgeq import blocks

CORES = Path(__file__).resolve().parents[2] / "devices" / "cores"
PEAK = 32  # multiply-adds per cycle: two sdot


@dataclass(frozen=True)
class Cost:
    """Of a format's kernels on a core: a row's per 256 weights, a tile's per 256 of its columns."""

    core: str
    format: str
    bytes: float
    row_instructions: float
    row_spills: int
    row_cycles: float
    tile_instructions: float
    tile_spills: int
    tile_macs: float  # per cycle


def cost(core: str, name: str) -> Cost:
    fmt, wanted = blocks.get(name), armcode.tile_products(core)
    row, tile = armcode.row_kernel(name, core), armcode.tile_kernel(name, core)
    nan = float("nan")
    return Cost(
        core,
        name,
        256 / fmt.block * fmt.bytes,
        armcode.counted(row, 256),
        armcode.stack_accesses(row.inner),
        armcode.cycles_of(row, 256, core) if armcode.tool() else nan,
        armcode.counted(tile, wanted),
        armcode.stack_accesses(tile.inner),
        wanted / armcode.cycles_of(tile, wanted, core) if armcode.tool() else nan,
    )


# -- tables ----------------------------------------------------------------------------------------
def kernels_table(board: Board, costs: list[Cost]) -> Table:
    title = f"{board.core}, {board.name}: {board.ghz} GHz, {board.bandwidth} GB/s by "
    table = Table(title=f"{title}{board.threads} threads; {board.source}")
    for head in ("format", "row: instructions", "spills", "cycles", "memory's", "share", "GB/s"):
        table.add_column(head, justify="left" if head == "format" else "right")
    for head in ("tile: instructions", "spills", "MAC/cycle", "of sdot peak"):
        table.add_column(head, justify="right")
    for c in costs:
        allowed = c.bytes / board.bytes_per_cycle
        table.add_row(
            c.format,
            f"{c.row_instructions:.0f}",
            str(c.row_spills),
            f"{c.row_cycles:.1f}",
            f"{allowed:.1f}",
            f"{c.row_cycles / allowed:.0%}",
            f"{c.bytes / c.row_cycles * board.ghz:.1f}",
            f"{c.tile_instructions:.0f}",
            str(c.tile_spills),
            f"{c.tile_macs:.2f}",
            f"{c.tile_macs / PEAK:.0%}" if armcode.ISA[board.core] != "neon" else "-",
        )
    return table


def models(board: Board, costs: list[Cost]) -> list[dict[str, float | str]]:
    """Published rates and the ones that the kernels would allow."""
    rows, tiles = ({c.format: v(c) for c in costs} for v in (_cycles, _macs))
    out: list[dict[str, float | str]] = []
    for known in PUBLISHED:
        if known.board == board.name and set(known.weights) <= set(rows):
            memory, decode = known.decoded(board, rows)
            out.append(
                {
                    "model": f"{known.model} {known.recipe}",
                    "memory": memory,
                    "decode": decode,
                    "published": known.decode,
                    "prefill": known.prefilled(board, tiles),
                    "published prefill": known.prefill,
                    "source": known.source,
                }
            )
    return out


def _cycles(c: Cost) -> float:
    return c.row_cycles


def _macs(c: Cost) -> float:
    return c.tile_macs


def models_table(board: Board, found: list[dict[str, float | str]]) -> Table:
    table = Table(title=f"{board.name}: tokens per second, at most")
    for key in found[0]:
        table.add_column(key, justify="left" if key in ("model", "source") else "right")
    for row in found:
        table.add_row(
            *(v if isinstance(v, str) else f"{v:.1f}" if v else "-" for v in row.values())
        )
    return table


# -- other outputs ---------------------------------------------------------------------------------
def to_toml(core: str, costs: list[Cost]) -> str:
    command = f"python tests/bench/arm.py --core {core} --write"
    schedule = " ".join(armcode.SCHEDULE[core])
    lines = [
        "# Predicted, not measured: caches and memory are not in it",
        f'source = "{command}; llvm-mca {schedule}"',
        "",
        "[row]  # cycles per 256 weights of a row, one token",
        *(f"{c.format} = {c.row_cycles:.1f}" for c in costs),
        "",
        "[tile]  # multiply-adds per cycle, many tokens",
        *(f"{c.format} = {c.tile_macs:.2f}" for c in costs),
    ]
    return "\n".join([*lines, ""])


def show(core: str, name: str, kind: str, timeline: bool) -> None:
    """A loop, and its use of the core's units."""
    find = {"row": armcode.row_kernel, "tile": armcode.tile_kernel}[kind]
    loop = find(name, core).inner
    print(loop)
    if armcode.tool():
        options = ["-timeline", "-timeline-max-iterations=2"] if timeline else []
        command = [*armcode.command(core, 200), "-resource-pressure", *options]
        subprocess.run(command, input=armcode.code_of(loop), text=True, check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", choices=list(armcode.SCHEDULE), action="append")
    parser.add_argument("--format", choices=list(blocks.formats()), action="append")
    parser.add_argument("--show", choices=["row", "tile"])
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write and (args.format or not armcode.tool()):
        parser.error("--write needs all formats, and llvm-mca")
    report, console = [], Console(width=None if sys.stdout.isatty() else 160)
    for board in BOARDS:
        if args.core and board.core not in args.core:
            continue
        names = args.format or list(blocks.formats())
        if args.show:
            for name in names:
                show(board.core, name, args.show, args.timeline)
            continue
        costs = [cost(board.core, name) for name in names]
        found = models(board, costs)
        report.append({**asdict(board), "kernels": [asdict(c) for c in costs], "models": found})
        if args.write:
            CORES.mkdir(exist_ok=True)
            (CORES / f"{board.core}.toml").write_text(to_toml(board.core, costs))
        if not args.json:
            console.print(kernels_table(board, costs))
            if found:
                console.print(models_table(board, found))
    if args.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
