"""Tell before downloading or converting what fits a machine, how fast it will be, what to take."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli._terminal import Status, harmless, human, is_terminal, note

if TYPE_CHECKING:
    from types import ModuleType

    from edgeq.blueprint import Blueprint
    from edgeq.plan import Row, Speed
    from edgeq.rates import Rates

GIB = 1 << 30


@dataclass(frozen=True)
class _Place:
    """Where the model would run."""

    name: str
    ram: int  # bytes that it may take
    isa: "ModuleType"
    rates: "Rates | None"


@click.command()
@click.argument("model", required=False)
@click.option("--device", metavar="NAME", help="As `edgeq devices` lists them. [this machine]")
@click.option("-c", "--ctx", type=click.IntRange(1), help="Context. [4096, or of training]")
@click.option("--kv", default="f16", metavar="TYPE", help="KV cache, also K,V. [f16]")
@click.option("-d", "--n-depth", "depth", type=click.IntRange(0), default=0, help="Tokens before.")
@click.option("-t", "--threads", type=click.IntRange(1, 256), help="Threads. [what does best]")
@click.option(
    "--efficiency",
    metavar="DECODE[,PREFILL]",
    help="Of another engine: the shares of bandwidth and of dot products that it reaches.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    model: str | None,
    device: str | None,
    ctx: int | None,
    kv: str,
    depth: int,
    threads: int | None,
    efficiency: str | None,
    as_json: bool,
) -> None:
    """Tell for each recipe of MODEL: file, RAM, what fits, tokens per second, expected loss.

    MODEL is a checkpoint folder, a GGUF file or user/repo[:quant], of which only headers are
    fetched. Without MODEL: what could run, by size and recipe. Speeds are of a prompt of 512 tokens
    and of generation.
    """
    from edgeq import cache, hub
    from edgeq.blueprint import read

    options = {
        "ctx": ctx,
        "kv": cache.kv_types(kv.split(",") if "," in kv else kv),
        "depth": depth,
        "efficiency": _shares(efficiency),
    }
    if model is None:
        _sizes(device, threads, options, as_json)
        return
    with hub.headers(model) as path:
        blueprint = read(path)
    with _status() as status:
        place = _place(device, threads, [blueprint], status)
    _show_model(blueprint, place, options, as_json)


def _shares(text: str | None) -> tuple[float, float] | None:
    """
    >>> _shares("0.88"), _shares("0.88,0.5")
    ((0.88, 1.0), (0.88, 0.5))
    """
    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
        decode, prefill = (*shares, 1.0)[:2] if len(shares) == 1 else shares
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 4 for share in shares):
        raise click.BadParameter(f"--efficiency {text}: expected shares such as 0.88 or 0.88,0.5")
    return decode, prefill


@contextmanager
def _status() -> Iterator[Any]:
    """Callback that says what takes time, on a terminal."""
    status = Status()

    def report(what: str, done: int, total: int) -> None:
        if is_terminal(sys.stderr):
            status(f"measuring this machine, once: {done}/{total} {what}")

    try:
        yield report
    finally:
        status.clear()


def _place(
    device: str | None, threads: int | None, plans: "list[Blueprint]", progress: Any
) -> _Place:
    """The device by its files, or this machine as it is measured."""
    from edgeq import devices, memory, rates
    from edgeq.errors import RequestError
    from edgeq.kernels import isa

    pair = (threads, threads) if threads else None
    if device is not None:
        known = devices.get(device)
        ram = (known.ram[-1] if known.ram else 0) - (known.system_mib << 20)
        if not known.ram:
            raise RequestError(f"device {known.id}: its file has no ram_gib: add it")
        size = f", {known.ram_gib[0]:g} GB"
        found = rates.of_device(known, pair)
        return _Place(f"{known.name}{size}", ram, isa.named(known.isa, device), found)
    formats = {m.format.name for plan in plans for file in plan.files for m in file.matrices} | {
        "F16"
    }
    runs = any(plan.arch for plan in plans)
    here = rates.measured(formats, pair, progress) if runs else None
    return _Place("this machine", memory.available(), isa.choose(), here)


# -- one model -------------------------------------------------------------------------------------
def _show_model(
    blueprint: "Blueprint", place: _Place, options: dict[str, Any], as_json: bool
) -> None:
    from edgeq.plan import recommended, rows

    found = rows(blueprint, place.rates, place.isa, place.ram, **options)
    best = recommended(found)
    if as_json:
        click.echo(json.dumps(_document(blueprint, place, found, best), indent=1))
        return
    if blueprint.problem:
        note(f"the engine cannot run it: {blueprint.problem}")
    if not blueprint.exact:
        note("the size of the vocabulary is guessed: it was not fetched")
    _print(_table_of(found, best))
    click.echo(_machine_line(place))
    click.echo("ctx: the most that fits. prompt, gen: tokens per second, limited by (gen) limit.")
    click.echo("loss: KL divergence that the recipe costs the small example model.")
    click.echo(_advice(blueprint, best))


def _advice(blueprint: "Blueprint", best: "tuple[Row, str] | None") -> str:
    if best is None:
        return f"Nothing fits: {harmless(blueprint.name)} needs a machine with more memory."
    row, reason = best
    lines = [f"Take {row.file.recipe}: {reason}."] if row.file.divergence is not None else []
    if row.decode:
        lines += [f"It would generate {_rate(row.decode)} tokens/s, held up by {row.decode.limit}."]
    return "\n".join(lines or ["It fits."])


def _table_of(found: "list[Row]", best: "tuple[Row, str] | None") -> Any:
    heads = ("", "recipe", "file", "bits", "RAM", "ctx", "prompt", "gen", "limit", "loss")
    table = _table(*heads)
    for row in found:
        file = row.file
        table.add_row(
            "*" if best and row is best[0] else "",
            file.recipe,
            human(file.nbytes),
            f"{file.bits_per_weight:.2f}",
            "" if row.ram is None else human(row.ram),
            _context(row),
            _rate(row.prefill),
            _rate(row.decode),
            row.decode.limit if row.decode else "",
            "" if file.divergence is None else f"{file.divergence:.4f}",
        )
    return table


def _context(row: "Row") -> str:
    """The largest that fits."""
    return "" if row.largest is None else str(row.largest) if row.largest else "no"


def _rate(speed: "Speed | None") -> str:
    if speed is None:
        return ""
    return f"{speed.tokens:.0f}" if speed.tokens >= 100 else f"{speed.tokens:.3g}"


def _machine_line(place: _Place) -> str:
    lines = [f"{place.name}: {human(max(place.ram, 0))} of memory for it"]
    if place.rates:
        few, many = place.rates.threads
        counts = f"{few}" if few == many else f"{few} (prompts: {many})"
        lines += [f"{place.rates.read:.3g} GB/s with {counts} threads; {place.rates.source}"]
    return harmless("\n".join(lines))


def _document(
    blueprint: "Blueprint", place: _Place, found: "list[Row]", best: "tuple[Row, str] | None"
) -> dict[str, Any]:
    rates = place.rates
    return {
        "model": blueprint.name,
        "problem": blueprint.problem or None,
        "sizes_exact": blueprint.exact,
        "trained_context": blueprint.arch.context_length if blueprint.arch else None,
        "device": place.name,
        "available": place.ram,
        "threads": rates.threads[0] if rates else None,
        "threads_batch": rates.threads[1] if rates else None,
        "read_gbs": rates.read if rates else None,
        "source": rates.source if rates else None,
        "rows": [_record(row) for row in found],
        "recommended": best and {"recipe": best[0].file.recipe, "reason": best[1]},
    }


def _record(row: "Row") -> dict[str, Any]:
    return {
        "recipe": row.file.recipe,
        "bytes": row.file.nbytes,
        "bits_per_weight": round(row.file.bits_per_weight, 4),
        "ram": row.ram,
        "fits": row.fits,
        "largest_context": row.largest,
        "prefill": row.prefill and row.prefill.tokens,
        "prefill_limit": row.prefill and row.prefill.limit,
        "decode": row.decode and row.decode.tokens,
        "decode_limit": row.decode and row.decode.limit,
        "divergence": row.file.divergence,
    }


# -- all sizes -------------------------------------------------------------------------------------
def _sizes(device: str | None, threads: int | None, options: dict[str, Any], as_json: bool) -> None:
    from edgeq.plan import CONTEXT, rows
    from edgeq.sizes import MIXTURES, blueprints

    plans = blueprints()
    with _status() as status:
        place = _place(device, threads, plans, status)
    wanted = options["ctx"] or CONTEXT
    found = {}
    for plan in plans:
        options["ctx"] = min(wanted, plan.arch.context_length) if plan.arch else wanted
        found[plan.name] = rows(plan, place.rates, place.isa, place.ram, **options)
    if as_json:
        records = [{"size": name, **_record(row)} for name, some in found.items() for row in some]
        click.echo(json.dumps({"device": place.name, "available": place.ram, "rows": records}))
        return
    table = _table("size", *MIXTURES)
    for name, some in found.items():
        table.add_row(name, *(_cell(row) for row in some))
    _print(table)
    click.echo(_machine_line(place))
    click.echo(f"RAM in GiB with a context of {wanted}, tokens generated per second (-: too large)")


def _cell(row: "Row") -> str:
    assert row.ram is not None
    return f"{row.ram / GIB:.1f} {_rate(row.decode) if row.fits else '-':>5}"


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    left = ("", "recipe", "limit", "size")
    for column in columns:
        table.add_column(
            column, justify="left" if column in left else "right", overflow="fold", no_wrap=True
        )
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if is_terminal(sys.stdout) else 80).print(table)
