"""Matrix products by themselves, to be timed: what kernels do at most, without a model."""

from time import perf_counter
from types import ModuleType

import numpy as np

from edgeq import blocks, memory
from edgeq.blocks import BlockFormat
from edgeq.kernels import layout
from edgeq.kernels.program import Op, Program, Team, aligned, arguments

__all__ = ["COLS", "ROWS", "Products"]

COLS, ROWS = 2048, 5632  # one product: a small model's feed-forward matrix


class Products:
    """Products of matrices [rows, COLS] with `tokens` columns: so many that `nbytes` of weights are
    read, or `again` and again the same one.
    """

    def __init__(
        self,
        fmt: BlockFormat,
        isa: ModuleType,
        team: Team,
        addresses: dict[str, int],
        *,
        threads: int = 1,
        nbytes: int = 1,
        rows: int = ROWS,
        tokens: int = 1,
        again: int = 0,
    ) -> None:
        self.format, self.rows, self.threads = fmt, rows, threads
        self._tokens = tokens
        row, lanes = blocks.row_bytes(fmt, COLS), isa.WIDTH // 4
        count = max(min(nbytes, memory.available() // 8) // (rows * row), 1)
        columns = -(-tokens // isa.TILE_COLS) * isa.TILE_COLS
        panel = layout.panel_bytes(COLS, fmt.group, lanes, fmt.value == "x")
        scratch = layout.matmul_scratch(panel, lanes, isa.TILE_COLS) + layout.MATVEC_SCRATCH
        scratch = -(-scratch // 64) * 64
        sizes = {"x": 4 * columns * COLS, "xd": columns * COLS // 8, "xs": columns * COLS // 4}
        sizes |= {"out": 4 * columns * rows, "state": 16, "scratch": threads * scratch}
        sizes |= {"w": count * rows * row, "taken": (again or count) * layout.COUNTER}
        self._memory = {name: aligned(size) for name, size in sizes.items()}
        self._memory["w"][:] = 1  # pages that were never written are all the same one
        self._memory["state"].view(np.int64)[0] = tokens
        places = {name: int(part.ctypes.data) for name, part in self._memory.items()}
        numbers = {"rows": rows, "cols": COLS, "row_bytes": row, "stride": rows, "bias": 0}
        numbers |= {"add": 0, "group": 1, "scratch_bytes": scratch, "private": 0}
        numbers |= {"ahead": 0, "chunk": rows}
        first, taken = places.pop("w"), places.pop("taken")
        self._args = [
            arguments(
                layout.MATMUL,
                **places,
                **numbers,
                w=first + i % count * rows * row,
                taken=taken + i * layout.COUNTER,
            )
            for i in range(again or count)
        ]
        kernel = f"{'matmul' if tokens > 1 else 'matvec'}/{fmt.name}"
        ops = [Op(kernel, args) for args in self._args]
        self._program = Program(ops, addresses, team, threads)

    @property
    def macs(self) -> int:
        """Multiply-adds of one run."""
        return len(self._args) * self.rows * COLS * self._tokens

    def run(self, *, ahead: int, chunk: int) -> float:
        """Time of one run, with so many bytes asked for in advance and rows taken at a time."""
        for args in self._args:
            for name, value in (("ahead", ahead), ("chunk", chunk)):
                args[layout.MATMUL.index(name)] = value
        self._memory["taken"].fill(0)
        start = perf_counter()
        self._program.run()
        return perf_counter() - start
