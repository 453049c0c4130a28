"""Measure how fast a model reads prompts and generates text."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgeq.cli._terminal import Status, human, note

if TYPE_CHECKING:
    from edgeq.bench import Row

_KV = "f16, bf16, f32, q8_0 or q4_0: type of cached"


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Comma-separated counts, such as 128,512; without 0, which leaves a kind of test out."""
    if value is None:
        return None
    try:
        numbers = [int(word) for word in value.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise click.BadParameter(f"{value!r}: expected counts such as 512 or 128,512")
    return [n for n in numbers if n]


@click.command()
@click.argument("model")
@click.option(
    "-p",
    "--n-prompt",
    callback=_counts,
    metavar="N,...",
    help="Prompt lengths. [512, or the context]",
)
@click.option(
    "-n",
    "--n-gen",
    callback=_counts,
    metavar="N,...",
    help="Tokens to generate. [128, or the context]",
)
@click.option("-d", "--n-depth", type=click.IntRange(0), default=0, help="Tokens before. [0]")
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads. [one per core]")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, help="Repetitions. [5]")
@click.option("-ctk", "--cache-type-k", default="f16", metavar="TYPE", help=f"{_KV} keys. [f16]")
@click.option("-ctv", "--cache-type-v", default="f16", metavar="TYPE", help=f"{_KV} values. [f16]")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "csv", "json", "jsonl"]),
    default="md",
    help="Format of the results. [md]",
)
def command(
    model: str,
    n_prompt: list[int] | None,
    n_gen: list[int] | None,
    n_depth: int,
    threads: int | None,
    repetitions: int,
    cache_type_k: str,
    cache_type_v: str,
    output: str,
) -> None:
    """Measure how fast MODEL reads prompts (pp) and generates (tg): tokens per second, mean ± σ.

    Columns and JSON fields are named as in llama-bench. 0 leaves a kind of test out.
    """
    from edgeq import bench, hub

    status = Status()
    try:
        rows = bench.run(
            hub.model(model),
            prompts=n_prompt,
            gens=n_gen,
            threads=threads,
            reps=repetitions,
            depth=n_depth,
            kv=(cache_type_k, cache_type_v),
            progress=status,
            on_compile=status.compiling(),
        )
    finally:
        status.clear()
    for row in rows:
        usual = bench.PROMPT if row.n_prompt else bench.GEN
        given = n_prompt if row.n_prompt else n_gen
        if given is None and max(row.n_prompt, row.n_gen) < usual:
            note(f"{_test(row)}: the model's context holds no test of {usual} tokens")
    click.echo(_FORMATS[output](rows))


def _markdown(rows: "Sequence[Row]") -> str:
    # As in llama-bench, a column of types is there when one of them is not the usual.
    kinds = [name for name in ("type_k", "type_v") if any(getattr(r, name) != "f16" for r in rows)]
    heads = ["model", "size", "params", "backend", "threads", *kinds, "test", "t/s"]
    heads += ["of this machine", "peak RAM"]
    left = ["model", "backend", *kinds]
    lines = [
        f"| {' | '.join(heads)} |",
        f"| {' | '.join('---' if head in left else '---:' for head in heads)} |",
    ]
    for row in rows:
        cells = (
            row.model_type,
            human(row.model_size),
            _billions(row.model_n_params),
            row.backends,
            row.n_threads,
            *(getattr(row, name) for name in kinds),
            _test(row),
            f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
            f"{row.rate:.1f} {'GMAC/s' if row.n_prompt else 'GB/s'}, {row.rate / row.limit:.0%}",
            human(row.peak_rss),
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def _billions(count: int) -> str:
    """
    >>> _billions(1_100_048_384), _billions(7_344_384)
    ('1.10 B', '7.34 M')
    """
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _test(row: "Row") -> str:
    kind = f"pp{row.n_prompt}" if row.n_prompt else f"tg{row.n_gen}"
    return f"{kind} @ d{row.n_depth}" if row.n_depth else kind


def _csv(rows: "Sequence[Row]") -> str:
    """One line per test, without the lists of single samples."""
    plain = [{k: v for k, v in asdict(row).items() if not isinstance(v, list)} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, plain[0] if plain else [], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue().rstrip()


def _json(rows: "Sequence[Row]") -> str:
    return json.dumps([asdict(row) for row in rows], indent=2)


def _jsonl(rows: "Sequence[Row]") -> str:
    return "\n".join(json.dumps(asdict(row)) for row in rows)


_FORMATS = {"md": _markdown, "csv": _csv, "json": _json, "jsonl": _jsonl}
