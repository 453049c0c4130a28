"""Speeds that were measured or published, beside what `edgeq plan` predicts: for ours with the
rates of kernels and memory at that time, for those of others told how efficient their engine is.
`python tests/published.py` prints the tables of docs/devices.md.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeq import blocks, devices, rates
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


@dataclass(frozen=True)
class Measured:
    """A row of `edgeq bench`, and what was predicted for it."""

    recipe: str
    depth: int
    prefill: float
    decode: float
    predicted: tuple[float, float]
    misses: str

    @property
    def off(self) -> tuple[float, float]:
        return self.predicted[0] / self.prefill - 1, self.predicted[1] / self.decode - 1


def measured() -> Iterator[Measured]:
    """With the kernels' own rates, and the read limit of each round."""
    data = tomllib.loads((DATA.parent / "measured.toml").read_text())
    each = {name: blocks.get(name).bytes / blocks.get(name).block for name in data["row"]}
    row = {name: 2 * gbs / each[name] for name, gbs in data["row"].items()}
    for bench in data["bench"]:
        [file] = blueprint(data["model"], bench["recipe"]).files
        nbytes = sum(m.rows * m.row_bytes for m in file.matrices)
        read = bench["decode"] * nbytes / bench["share"] / 1e9
        found, depth = rates.Rates((2, 2), read, row, data["tile"]), bench.get("depth", 0)
        prefill = predict(file, found, depth=depth)[0]
        decode = predict(file, found, depth=depth + 32)[1]  # in the middle of 64 tokens
        assert prefill is not None
        yield Measured(
            bench["recipe"],
            depth,
            bench["prefill"],
            bench["decode"],
            (prefill.tokens, decode.tokens),
            bench.get("misses", ""),
        )


def main() -> None:
    print("| recipe | after | prompt of 512 | predicted | | generation | predicted | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for seen in measured():
        (prompt, answer), (p, d) = seen.predicted, seen.off
        print(
            f"| {seen.recipe} | {seen.depth} | {seen.prefill} | {prompt:.1f} | {p:+.0%} |"
            f" {seen.decode} | {answer:.1f} | {d:+.0%}{' (1)' * bool(seen.misses)} |"
        )
    print()
    print("| device | model | recipe | threads | | published | predicted | | source |")
    print("|---|---|---|---:|---|---:|---:|---:|---|")
    for row in rows():
        cells = (row.device, row.model, row.recipe, row.threads, row.kind)
        figures = (f"{row.published:g}", f"{row.predicted:.3g}", f"{row.off:+.0%}")
        why = f"{row.source}; **misses**: {row.misses}" if row.misses else row.source
        print(f"| {' | '.join(map(str, (*cells, *figures, why)))} |")


if __name__ == "__main__":
    main()
