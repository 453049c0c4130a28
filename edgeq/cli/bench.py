"""Measure how fast a model reads prompts and generates text."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._options import kv_options
from edgeq.cli._terminal import Status, human, is_terminal, note

if TYPE_CHECKING:
    from edgeq.bench import Plan, Row

MOST = 1000  # values of one range
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")


def _counts(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> list[int]:
    """Counts and ranges as llama-bench writes them: 128,512 and 0-2048+512 and 1-8*2."""
    return list(
        dict.fromkeys(n for text in texts for part in text.split(",") for n in _range(part))
    )


def _range(text: str) -> list[int]:
    """
    >>> _range("512"), _range("1-3"), _range("0-2048+1024"), _range("1-10*2")
    ([512], [1, 2, 3], [0, 1024, 2048], [1, 2, 4, 8])
    """
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r}: expected counts such as 512, 128,512 or 0-2048+512")
    first, last, sign, step = found.groups()
    start, end, by = int(first), int(last or first), int(step or 1)
    values = []
    while start <= end:
        values.append(start)
        start = start * by if sign == "*" else start + by
        if start <= values[-1] or len(values) > MOST:
            raise click.BadParameter(f"{text!r}: expected a range that grows, up to {MOST} values")
    if not values:
        raise click.BadParameter(f"{text!r}: expected the smaller count first")
    return values


def _list_option(*flags: str, text: str) -> Callable[[Any], Any]:
    return click.option(*flags, callback=_counts, multiple=True, metavar="N,...", help=text)


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("-m", "--model", "more", multiple=True, metavar="MODEL", help="Same as MODEL.")
@_list_option("-p", "--n-prompt", text="Prompt lengths; 0 = none. [512, or the context]")
@_list_option("-n", "--n-gen", text="Tokens to generate; 0 = none. [128, or the context]")
@_list_option("-d", "--n-depth", text="Tokens before. [0]")
@_list_option("-t", "--threads", text="Threads. [what suits the machine]")
@_list_option("-tb", "--threads-batch", text="Threads for prompts. [as -t]")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, help="Repetitions. [5]")
@click.option("--no-warmup", is_flag=True, help="No uncounted run before.")
@click.option(
    "--delay", type=click.FloatRange(0, 3600), default=0, help="Seconds to rest before each test."
)
@click.option("--limits", is_flag=True, help="Show what the machine can do at most, without MODEL.")
@click.option("--tune", is_flag=True, help="Find anew what suits this machine's memory best.")
@click.option(
    "--save",
    type=click.Path(dir_okay=False),
    metavar="FILE.toml",
    help="Measure the machine as --limits does, and write its profile for devices/.",
)
@click.option("--force", is_flag=True, help="Replace FILE.toml.")
@kv_options
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "csv", "json", "jsonl"]),
    default="md",
    help="Format of the results. [md]",
)
def command(
    models: tuple[str, ...],
    more: tuple[str, ...],
    n_prompt: list[int],
    n_gen: list[int],
    n_depth: list[int],
    threads: list[int],
    threads_batch: list[int],
    repetitions: int,
    no_warmup: bool,
    delay: float,
    limits: bool,
    tune: bool,
    save: str | None,
    force: bool,
    cache_type_k: str,
    cache_type_v: str,
    output: str,
) -> None:
    """Measure how fast MODEL reads prompts (pp) and generates (tg): tokens per second, mean ± σ.

    Flags, columns and JSON fields are named as in llama-bench. A list is written 128,512, a range
    0-2048+512 or 1-8*2. pp512 @ d2048: with 2048 tokens before.
    """
    models = (*models, *more)
    if not (models or limits or tune or save):
        raise click.UsageError("Missing argument 'MODEL...'.")
    if save:
        _save(save, force, models, threads, output)
    elif limits:
        _print(_MACHINE[output](_machine(_limits, threads)), err=bool(models))
    if tune:
        _print(_MACHINE[output](_machine(_tuning, threads)), err=bool(models))
    if not models:
        return
    from edgeq.bench import Plan

    plan = Plan(
        prompts=[n for n in n_prompt if n] if n_prompt else None,
        gens=[n for n in n_gen if n] if n_gen else None,
        depths=n_depth or [0],
        threads=threads or [None],
        threads_batch=threads_batch or [None],
        reps=repetitions,
        warm_up=not no_warmup,
        delay=delay,
        kv=(cache_type_k, cache_type_v),
    )
    _print(_ROWS[output](_rows(models, plan)))


def _print(lines: Iterable[str], err: bool = False) -> None:
    for line in lines:
        click.echo(line, err=err)


def _rows(models: Iterable[str], plan: "Plan") -> "Iterator[Row]":
    """Rows as they are measured, with a status line meanwhile."""
    from edgeq import bench, hub

    status = Status()
    progress = status if is_terminal(sys.stderr) else None
    try:
        paths = [hub.model(model) for model in models]
        for row in bench.run(paths, plan, progress=progress, on_compile=status.compiling()):
            status.clear()
            given, usual = (plan.prompts, bench.PROMPT) if row.n_prompt else (plan.gens, bench.GEN)
            if given is None and max(row.n_prompt, row.n_gen) < usual:
                note(f"{_test(row)}: the model's context holds no test of {usual} tokens")
            if row.throttled:
                note(
                    f"warning: {_test(row)}: this machine was held back ({row.throttled_by}): its "
                    "figures are too low; `edgeq doctor` says what to do"
                )
            yield row
    finally:
        status.clear()


def _machine(
    measure: Callable[[int, int], dict[str, Any]], threads: list[int]
) -> Iterator[dict[str, Any]]:
    """What `measure` finds about the machine for each thread count, and keeps for later runs."""
    from edgeq import cpus
    from edgeq.checks import whole

    machine, status = cpus.find(), Status()
    counts = [whole("threads", n, 1, 256) for n in threads or range(1, machine.threads + 1)]
    try:
        for count in counts:
            if is_terminal(sys.stderr):
                status(f"measuring this machine: {count} thread{'s' * (count > 1)}")
            found = measure(count, machine.usable)
            status.clear()
            yield found
    finally:
        status.clear()


def _save(path: str, force: bool, models: tuple[str, ...], threads: list[int], output: str) -> None:
    """Measure and show the limits up to as many threads as there are cores, and keep them."""
    from edgeq import checks, cpus, profile, sensors
    from edgeq.limits import Limits

    checks.outputs([path], [("model", model) for model in models])
    profile.refuse_target(path, force=force)
    found, load = cpus.find(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    counts = threads or list(range(1, min(len(found.cores), found.usable) + 1))
    with sensors.Watch(sensors.Sensors()) as watch:
        records = list(_machine(_limits, counts))
    held = watch.summary(max(counts)).throttled_by
    if held or load > len(found.cores) / 2:
        reason = f"the machine was held back ({held})" if held else "other programs are at work"
        note(f"warning: {reason}: these figures are too low: measure again with --force")
    _print(_MACHINE[output](records), err=bool(models))
    profile.save(profile.measured([Limits(**record) for record in records]), path, force=force)
    note(f"written: {path}: `edgeq devices {path}` shows it; in devices/ it is known by its name")


def _limits(threads: int, cores: int) -> dict[str, Any]:
    from edgeq.limits import measured

    return asdict(measured(threads, cores, again=True))


def _tuning(threads: int, cores: int) -> dict[str, Any]:
    from edgeq.kernels import isa
    from edgeq.tuning import tuned

    return {"threads": threads, **asdict(tuned(isa.choose(), threads, cores, again=True))}


# -- formats ---------------------------------------------------------------------------------------
def _markdown(rows: "Iterable[Row]") -> Iterator[str]:
    kinds: list[str] = []
    felt: list[str] = []
    for i, row in enumerate(rows):
        if not i:
            # As in llama-bench, a column of types is there when it is not the usual one.
            kinds = [name for name in ("type_k", "type_v") if getattr(row, name) != "f16"]
            felt = [head for head, (name, _) in _FELT.items() if getattr(row, name) is not None]
            heads = [*_COLUMNS[:5], *kinds, *_COLUMNS[5:], *felt]
            left = ("model", "backend", *kinds)
            yield f"| {' | '.join(heads)} |"
            yield f"| {' | '.join('---' if head in left else '---:' for head in heads)} |"
        cells = (
            row.model_type,
            human(row.model_size),
            _billions(row.model_n_params),
            row.backends,
            row.n_threads,
            *(getattr(row, name) for name in kinds),
            _test(row),
            f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}{' **throttled**' * bool(row.throttled)}",
            f"{row.rate:.1f} {'GMAC/s' if row.n_prompt else 'GB/s'}, {row.rate / row.limit:.0%}",
            human(row.peak_rss),
            *(_sensed(row, *_FELT[head]) for head in felt),
        )
        yield f"| {' | '.join(str(cell) for cell in cells)} |"


def _markdown_machine(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    for i, record in enumerate(records):
        if not i:
            yield f"| {' | '.join(_NAMES.get(key, key) for key in record)} |"
            yield "|" + " ---: |" * len(record)
        shown = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in record.values())
        yield f"| {' | '.join(shown)} |"


def _billions(count: int) -> str:
    """
    >>> _billions(1_100_048_384), _billions(7_344_384)
    ('1.10 B', '7.34 M')
    """
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _test(row: "Row") -> str:
    kind = f"pp{row.n_prompt}" if row.n_prompt else f"tg{row.n_gen}"
    return f"{kind} @ d{row.n_depth}" if row.n_depth else kind


def _sensed(row: "Row", name: str, form: str) -> str:
    value = getattr(row, name)
    return "" if value is None else format(value, form)


def _dicts(rows: "Iterable[Row]") -> Iterator[dict[str, Any]]:
    return (asdict(row) for row in rows)


def _csv(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One line per record, without the lists of single samples."""
    for i, record in enumerate(records):
        plain = {k: v for k, v in record.items() if not isinstance(v, list)}
        text = io.StringIO()
        writer = csv.DictWriter(text, plain, quoting=csv.QUOTE_ALL, lineterminator="\n")
        if not i:
            writer.writeheader()
        writer.writerow(plain)
        yield text.getvalue().rstrip("\n")


def _json(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield json.dumps(list(records), indent=2)


def _jsonl(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(record) for record in records)


_COLUMNS = ["model", "size", "params", "backend", "threads", "test"]
_COLUMNS += ["t/s", "of this machine", "peak RAM"]
# What sensors say, as far as there are any: head, field, how it is written.
_FELT = {
    "max °C": ("max_celsius", ".0f"),
    "mean MHz": ("mean_mhz", ".0f"),
    "J/token": ("joules_per_token", ".3g"),
}
_NAMES = {
    "read_gbs": "read GB/s",
    "dot_gmacs": "dot GMAC/s",
    "ahead": "prefetch bytes ahead",
    "ahead_wide": "the same from 8 bits per weight on",
    "chunk": "rows at a time (0: by their number)",
}
_MACHINE = {"md": _markdown_machine, "csv": _csv, "json": _json, "jsonl": _jsonl}
_ROWS: "dict[str, Callable[[Iterable[Row]], Iterator[str]]]" = {
    "md": _markdown,
    "csv": lambda rows: _csv(_dicts(rows)),
    "json": lambda rows: _json(_dicts(rows)),
    "jsonl": lambda rows: _jsonl(_dicts(rows)),
}
