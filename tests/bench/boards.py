"""Boards without a measured run of ours: what others measured on them, and what decoding and
prefill would reach there by the cycles of arm.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from armboards import Board
from randomllama import Llama

from edgeq import blocks
from edgeq.recipe import Recipe

Cost = Mapping[str, float]  # by format

SHAPES = {
    shape.name: shape
    for shape in (
        Llama("SmolLM-135M", 30, 576, 1536, 9, 3, 49152, tied=True),
        Llama("SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, tied=True),
        Llama("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151936, tied=True),
        Llama("TinyLlama-1.1B", 22, 2048, 5632, 32, 4, 32000),
        Llama("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128256, tied=True),
        Llama("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256),
    )
}


@dataclass(frozen=True)
class Published:
    """Tokens per second that others reported for llama.cpp or what is built on it (0: unknown)."""

    board: str
    model: str
    recipe: str
    prefill: float
    decode: float
    source: str

    @cached_property
    def weights(self) -> dict[str, int]:
        shape = SHAPES[self.model]
        formats = shape.formats(Recipe.load(self.recipe))
        out: dict[str, int] = {}
        for name, (rows, cols) in shape.matrices():
            out[formats[name]] = out.get(formats[name], 0) + rows * cols
        return out

    def decoded(self, board: Board, cycles: Cost) -> tuple[float, float]:
        """Tokens per second by memory alone, and with the cycles of row kernels beside it: a matrix
        takes the longer of the two times. Nothing but matrices is counted.
        """
        memory = total = 0.0
        for name, count in self.weights.items():
            fmt = blocks.get(name)
            read = count / fmt.block * fmt.bytes / board.bandwidth / 1e9
            computed = count / 256 * cycles[name] / board.threads / board.ghz / 1e9
            memory, total = memory + read, total + max(read, computed)
        return 1 / memory, 1 / total

    def prefilled(self, board: Board, macs: Cost) -> float:
        """Tokens per second of the tiles alone, all cores at work; the head is not needed."""
        head = "token_embd.weight" if SHAPES[self.model].tied else "output.weight"
        shapes = [pair for pair in SHAPES[self.model].matrices() if pair[0] != head]
        share = sum(rows * cols for _, (rows, cols) in shapes) / sum(self.weights.values())
        cycles = sum(count * share / macs[name] for name, count in self.weights.items())
        return board.cores * board.ghz * 1e9 / cycles


_QWEN = "llama.cpp #26484, #13079"
PUBLISHED = [
    Published("Pi Zero 2 W", "SmolLM2-135M", "Q4_K_M", 14, 10, "ravijo/pi-llm"),
    Published("Pi 4", "SmolLM-135M", "Q2_K", 0, 33, "yzma BENCHMARKS.md"),
    Published("Pi 4", "TinyLlama-1.1B", "Q8_0", 10, 3, "justine.lol/matmul"),
    Published("Pi 5", "Qwen2.5-0.5B", "Q4_0", 290, 33.8, "learn.arm.com llm-decode-roofline"),
    Published("Pi 5", "Qwen2.5-0.5B", "Q2_K", 0, 30.4, _QWEN),
    Published("Pi 5", "Qwen2.5-0.5B", "Q3_K_M", 0, 28.4, _QWEN),
    Published("Pi 5", "Qwen2.5-0.5B", "Q4_K_M", 0, 26.5, _QWEN),
    Published("Pi 5", "Qwen2.5-0.5B", "Q5_K_M", 0, 23.2, _QWEN),
    Published("Pi 5", "Qwen2.5-0.5B", "Q8_0", 0, 20.5, _QWEN),
    Published("Pi 5", "TinyLlama-1.1B", "Q8_0", 45, 9, "justine.lol/matmul"),
    Published("Pi 5", "Llama-3.2-3B", "Q4_K_M", 0, 4.88, "geerlingguy/ai-benchmarks"),
    Published("Pi 5", "Llama-3.1-8B", "Q4_K_M", 0, 2.17, "geerlingguy/ai-benchmarks #7"),
]
