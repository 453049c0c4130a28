"""What `edgeq plan` predicts for this machine, and what `edgeq bench` measures right after:
python tests/bench/plan.py FILE.gguf... [--rounds N]
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GEN = 64  # tokens


def edgeq(*args: str) -> Any:
    command = [sys.executable, "-m", "edgeq", *args]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def planned(file: Path) -> tuple[float, float, float]:
    """Tokens per second of a prompt and of generation, and GB/s, as they are predicted."""
    found = edgeq("plan", str(file), "--json")
    names = ("as it is", file.stem.rpartition("-")[2])  # files of floats are listed by recipe
    [row] = [row for row in found["rows"] if row["recipe"] in names]
    return row["prefill"], row["decode"], found["read_gbs"]


def measured(file: Path) -> tuple[float, float]:
    """Tokens per second of a prompt and of generation."""
    prompt, gen = edgeq("bench", str(file), "-n", str(GEN), "-r", "3", "-o", "json")
    return prompt["avg_ts"], gen["avg_ts"]


def lines(files: list[Path], rounds: int) -> Iterator[str]:
    """Each round, then the medians of a file: memory that others use as well is not the same when
    it is measured and when it is used.
    """
    yield "| file | GB/s | prompt of 512 | predicted | | generation | predicted | |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    found: dict[Path, list[tuple[float, ...]]] = {file: [] for file in files}
    for file in files * rounds:
        found[file].append((*planned(file), *measured(file)))
        yield line(file.stem, found[file][-1])
    for file, rows in found.items() if rounds > 1 else ():
        medians = tuple(statistics.median(column) for column in zip(*rows, strict=True))
        yield line(f"{file.stem}, median of {rounds}", medians)


def line(name: str, values: tuple[float, ...]) -> str:
    prefill, decode, read, prompt, gen = values
    off = prefill / prompt - 1, decode / gen - 1
    return (
        f"| {name} | {read:.1f} | {prompt:.1f} | {prefill:.1f} | {off[0]:+.0%} |"
        f" {gen:.1f} | {decode:.1f} | {off[1]:+.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    for text in lines(args.files, args.rounds):
        print(text, flush=True)


if __name__ == "__main__":
    main()
