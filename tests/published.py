"""Speeds that others published, beside what `edgeq plan` predicts when it is told how efficient
their engine is. `python tests/published.py` prints the table of docs/devices.md.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeq import devices, rates
from edgeq.blueprint import Blueprint, of_arch
from edgeq.models.arch import Arch, Rope
from edgeq.plan import predict

DATA = Path(__file__).parent / "data/published.toml"


@dataclass(frozen=True)
class Published:
    """One figure; `misses`: why it is not predicted within a quarter."""

    device: str
    model: str
    recipe: str
    threads: int
    kind: str  # prompt or generation
    published: float
    predicted: float
    source: str
    misses: str

    @property
    def off(self) -> float:
        return self.predicted / self.published - 1


@cache
def blueprint(model: str, recipe: str) -> Blueprint:
    numbers = tomllib.loads(DATA.read_text())["models"][model]
    *shape, tied = numbers
    arch = Arch(model, *shape, 4096, 1e-5, Rope(shape[5], 1e4, "norm"))
    return of_arch(model, arch, tied=bool(tied), mixtures=(recipe,))


def rows() -> Iterator[Published]:
    data = tomllib.loads(DATA.read_text())
    for row in data["row"]:
        pair = (row["threads"], row["threads"])
        found = rates.of_device(devices.get(row["device"]), pair)
        [file] = blueprint(row["model"], row["recipe"]).files
        told = data["efficiency"][row["efficiency"]]
        speeds = dict(zip(("prefill", "decode"), predict(file, found, efficiency=tuple(told))))
        for kind, speed in speeds.items():
            if kind in row and speed is not None:
                yield Published(
                    row["device"],
                    row["model"],
                    row["recipe"],
                    row["threads"],
                    {"prefill": "prompt", "decode": "generation"}[kind],
                    row[kind],
                    speed.tokens,
                    row["source"],
                    row.get(f"{kind}_misses", ""),
                )


def main() -> None:
    print("| device | model | recipe | threads | | published | predicted | | source |")
    print("|---|---|---|---:|---|---:|---:|---:|---|")
    for row in rows():
        cells = (row.device, row.model, row.recipe, row.threads, row.kind)
        figures = (f"{row.published:g}", f"{row.predicted:.3g}", f"{row.off:+.0%}")
        why = f"{row.source}; **misses**: {row.misses}" if row.misses else row.source
        print(f"| {' | '.join(map(str, (*cells, *figures, why)))} |")


if __name__ == "__main__":
    main()
