"""What `edgeq plan` predicts for this machine, and what `edgeq bench` measures right after:
python tests/bench/plan.py FILE.gguf... [--rounds N]
"""

import argparse
import json
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
    yield "| file | GB/s | prompt of 512 | predicted | | generation | predicted | |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for file in files * rounds:
        prefill, decode, read = planned(file)
        prompt, gen = measured(file)
        off = prefill / prompt - 1, decode / gen - 1
        yield (
            f"| {file.stem} | {read:.1f} | {prompt:.1f} | {prefill:.1f} | {off[0]:+.0%} |"
            f" {gen:.1f} | {decode:.1f} | {off[1]:+.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    for line in lines(args.files, args.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
